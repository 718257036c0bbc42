"""The batched augmentation against one image at a time, in float64, by the definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from k_diffusion.utils.augmentation import uniforms
from k_diffusion.utils.maths import fold_seed
from k_diffusion.utils.warp import Warp, _normals, apply, condition, random_zoom


def _cubic(t):
    """Keys' kernel with a = -0.75."""
    t, a = abs(t), -0.75
    if t <= 1:
        return (a + 2) * t**3 - (a + 3) * t**2 + 1
    return a * (t**3 - 5 * t**2 + 8 * t - 4) if t < 2 else 0.0


def _mirrored(i, n):
    i = i % (2 * n)
    return i if i < n else 2 * n - 1 - i


def _matrix(warp, a, height, width):
    def scale(x, y):
        return np.diag([x, y, 1.0])

    def rotate(t):
        return np.array([[math.cos(t), -math.sin(t), 0], [math.sin(t), math.cos(t), 0], [0, 0, 1]])

    def move(x, y):
        return np.array([[1, 0, x], [0, 1, y], [0, 0, 1.0]])

    grown, stretched = warp.scale ** a[2], warp.anisotropy ** a[5]
    return (
        move(width / 2 - 0.5, height / 2 - 0.5)
        @ scale(1 - 2 * a[0], 1)
        @ scale(1, 1 - 2 * a[1])
        @ scale(grown, grown)
        @ rotate(-a[3])
        @ rotate(a[4])
        @ scale(stretched, 1 / stretched)
        @ rotate(-a[4])
        @ move(warp.translation * width * a[6], warp.translation * height * a[7])
        @ move(-width / 2 + 0.5, -height / 2 + 0.5)
    )


def _slowly(warp, image, a):
    """One image, pixel by pixel; the order of the matrices is the established pipeline's."""
    _, height, width = image.shape
    back = np.linalg.inv(_matrix(warp, a, height, width))
    out = np.empty_like(image)
    for row in range(height):
        for column in range(width):
            x, y, _ = back @ [column, row, 1.0]
            out[:, row, column] = _sampled(image, x, y)
    return out


@pytest.mark.parametrize("size", [(8, 8), (6, 10)])
def test_the_batch_is_the_images_one_by_one(size):
    warp = Warp(probability=0.8)
    torch.manual_seed(0)
    x = torch.rand(12, 2, *size) * 2 - 1
    seeds = list(range(12))
    got, told = warp(x, seeds)
    drawn = warp.draw(seeds, 12)
    assert (drawn != 0).any(dim=0).all(), "every change must occur here"
    for i in range(12):
        slow = _slowly(warp, x[i].double().numpy(), drawn[i].tolist())
        assert np.abs(got[i].numpy() - slow).max() < 1e-4
    assert (told - condition(drawn).float()).abs().max() == 0


def _sampled(image, x, y):
    """By the same kernel, at a place that is between pixels."""
    channels, height, width = image.shape
    total = np.zeros(channels)
    for j in range(math.floor(y) - 1, math.floor(y) + 3):
        for i in range(math.floor(x) - 1, math.floor(x) + 3):
            weight = _cubic(y - j) * _cubic(x - i)
            total += weight * image[:, _mirrored(j, height), _mirrored(i, width)]
    return total


def test_a_zoom_is_a_window_enlarged():
    torch.manual_seed(0)
    x, seeds = torch.rand(20, 2, 6, 10) * 2 - 1, list(range(20))
    got = random_zoom(x, 0.4, seeds)
    sides = []
    for i, seed in enumerate(seeds):
        share, right, down = uniforms([seed], 1, 3)[0].tolist()
        share = 0.4 + 0.6 * share
        sides.append(share)
        left, top = right * (10 - share * 10), down * (6 - share * 6)  # the window's corner
        for row in range(6):
            for column in range(10):
                here = left + share * (column + 0.5) - 0.5, top + share * (row + 0.5) - 0.5
                slow = _sampled(x[i].double().numpy(), *here)
                assert np.abs(got[i, :, row, column].numpy() - slow).max() < 1e-4
    assert min(sides) < 0.5
    assert max(sides) > 0.9
    assert (random_zoom(x, 1.0, seeds) - x).abs().max() < 1e-5
    for wrong in (0.0, 1.1):
        with pytest.raises(ValueError, match="smallest window's share must lie above 0, to 1"):
            random_zoom(x, wrong, seeds)


def test_what_belongs_together_happens_together():
    """Angle and amount of the stretching; both directions of the translation."""
    drawn = Warp(probability=0.5).draw(list(range(200)), 200)
    happens = drawn != 0
    assert torch.equal(happens[:, 4], happens[:, 5])
    assert torch.equal(happens[:, 6], happens[:, 7])
    shares = happens.double().mean(0)
    wanted = torch.tensor([0.5, 0.25, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5])  # top to bottom: and of a coin
    assert (shares - wanted).abs().max() < 0.15
    pairs = happens[:, 2:].double()
    for i, j in ((0, 1), (1, 2), (2, 4)):  # the others have nothing to do with one another
        assert abs(float((pairs[:, i] * pairs[:, j]).mean()) - 0.25) < 0.12


def test_an_even_number_of_0_makes_a_finite_normal_one():
    assert bool(_normals(torch.zeros(3, 4, dtype=torch.float64)).isfinite().all())


def test_the_condition_is_the_established_one():
    a = torch.tensor([[1.0, 0.0, 0.5, 0.3, -2.0, 0.7, 0.1, -0.2]], dtype=torch.float64)
    known = [1, 0, 0.5, math.cos(0.3) - 1, math.sin(0.3), 0.7 * math.cos(-2), 0.7 * math.sin(-2)]
    assert (condition(a)[0] - torch.tensor([*known, 0.1, -0.2])).abs().max() < 1e-7


def test_left_alone_an_image_is_itself_and_told_as_0():
    x = torch.rand(64, 3, 8, 8)
    warp = Warp(probability=0.0)
    got, told = warp(x, list(range(64)))
    mirrored = told[:, 0] == 1
    assert 0 < mirrored.sum() < 64
    assert torch.equal(got[~mirrored], x[~mirrored])
    assert torch.equal(got[mirrored], x[mirrored].flip(-1))
    assert (told[:, 1:] == 0).all()


def test_a_warp_of_nothing_is_nothing_by_interpolation_too():
    warp, x = Warp(), torch.rand(2, 1, 7, 9)
    drawn = torch.zeros(2, 8, dtype=torch.float64)
    told_otherwise = drawn.clone()
    told_otherwise[:, 4] = 1.0  # an angle of no stretching
    got = apply(x, warp.matrices(told_otherwise, 7, 9), told_otherwise)
    assert (got - x).abs().max() < 1e-5


def test_shares_and_spreads_of_what_is_drawn():
    warp, n = Warp(), 40_000
    drawn = warp.draw(torch.Generator().manual_seed(0), n)
    happens = (drawn != 0).double().mean(dim=0)
    shares = [0.5, 0.06, *[0.12] * 6]
    assert (happens - torch.tensor(shares)).abs().max() < 0.01
    for column in (2, 5, 6, 7):
        chosen = drawn[:, column][drawn[:, column] != 0]
        assert abs(chosen.std().item() - 1) < 0.04
        assert abs(chosen.mean().item()) < 0.06
    for column in (3, 4):
        chosen = drawn[:, column][drawn[:, column] != 0]
        assert abs(chosen.std().item() - math.pi / 3**0.5) < 0.06
    together = torch.corrcoef(drawn[(drawn[:, 6:8] != 0).all(1)][:, 6:8].T)[0, 1]
    assert abs(together.item()) < 0.05


def test_a_seed_decides_alone():
    warp, x = Warp(0.5), torch.rand(5, 3, 8, 8)
    whole, told = warp(x, [3, 1, 4, 1, 5])
    alone, alone_told = warp(x[2:3], [4])
    assert torch.equal(whole[2:3], alone)
    assert torch.equal(told[2:3], alone_told)
    assert torch.equal(uniforms([7, 8], 2, 3)[1], uniforms([8], 1, 3)[0])


def test_many_seeds_at_once_are_the_seeds_one_by_one():
    seeds = [0, 1, -5, 2**62 + 3, 12345678901234567890]
    known = [[(fold_seed(s, i) >> 10) * 2.0**-53 for i in range(4)] for s in seeds]
    assert torch.equal(uniforms(seeds, 5, 4), torch.tensor(known, dtype=torch.float64))


def test_dtype_and_what_is_refused():
    got, _ = Warp(1.0)(torch.rand(2, 3, 8, 8).bfloat16(), [1, 2])
    assert got.dtype is torch.bfloat16
    with pytest.raises(TypeError, match=r"floating-point, got torch\.uint8"):
        Warp()(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), [1])
    with pytest.raises(ValueError, match=r"shape \(B, C, H, W\), got \(3, 8, 8\)"):
        Warp()(torch.zeros(3, 8, 8), [1, 2, 3])
    for options, word in (
        ({"probability": 1.5}, "probability must lie in"),
        ({"scale": 0}, "scale must be above 0"),
        ({"anisotropy": -1}, "anisotropy must be above 0"),
        ({"translation": -0.1}, "translation must be at least 0"),
    ):
        with pytest.raises(ValueError, match=word):
            Warp(**options)
