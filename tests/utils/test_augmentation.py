"""Augmentation: exact moves, the right frequencies, and one seed a sample."""

import math

import pytest
import torch

from k_diffusion.utils import augmentation as aug
from k_diffusion.utils.levels import VP
from k_diffusion.utils.maths import fold_seed

SEEDS = [fold_seed(7, i) for i in range(2000)]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(batch: int = 6) -> torch.Tensor:
    return torch.arange(batch * 2 * 5 * 7.0).reshape(batch, 2, 5, 7)


RANDOM = {
    "uniforms": lambda r, n: aug.uniforms(r, n, 3),
    "normals": lambda r, n: aug.normals(r, (n, 2, 3)),
    "random_flip": lambda r, n: aug.random_flip(images(n), r),
    "random_crop": lambda r, n: aug.random_crop(images(n), (2, 3), r),
    "random_shift": lambda r, n: aug.random_shift(images(n), 2, r),
    "add_noise": lambda r, n: aug.add_noise(images(n), VP.at(0.3), r)[0],
    "box": lambda r, n: aug.random_mask("box", n, (9, 11), r),
    "half": lambda r, n: aug.random_mask("half", n, (9, 11), r),
    "stroke": lambda r, n: aug.random_mask("stroke", n, (9, 11), r),
    "mixed": lambda r, n: aug.random_mask("mixed", n, (9, 11), r),
}


@pytest.mark.parametrize("name", RANDOM)
def test_same_randomness_same_result_and_other_randomness_another(name: str) -> None:
    draw = RANDOM[name]
    assert torch.equal(draw(generator(3), 40), draw(generator(3), 40))
    assert not torch.equal(draw(generator(3), 40), draw(generator(4), 40))
    assert torch.equal(draw(SEEDS[:40], 40), draw(SEEDS[:40], 40))
    assert not torch.equal(draw(SEEDS[:40], 40), draw(SEEDS[40:80], 40))


@pytest.mark.parametrize(
    "name", sorted(set(RANDOM) - {"random_flip", "random_crop", "random_shift", "add_noise"})
)
def test_with_seeds_a_sample_does_not_know_its_neighbours(name: str) -> None:
    together = RANDOM[name](SEEDS[:8], 8)
    for i in range(8):
        assert torch.equal(RANDOM[name](SEEDS[i : i + 1], 1)[0], together[i])


def test_wrong_number_of_seeds_is_refused() -> None:
    with pytest.raises(ValueError, match="3 seeds for 4 samples"):
        aug.uniforms([1, 2, 3], 4)
    with pytest.raises(ValueError, match="3 seeds for 4 samples"):
        aug.normals([1, 2, 3], (4, 1))


def test_uniforms_of_seeds_are_uniform() -> None:
    drawn = aug.uniforms(SEEDS, 2000, 2)
    assert drawn.dtype == torch.float64
    assert ((drawn >= 0) & (drawn < 1)).all()
    even = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    # Kolmogorov-Smirnov distance; 1.95 / sqrt(n) is exceeded once in a thousand.
    for column in drawn.T:
        assert (column.sort().values - even).abs().max() < 1.95 / 2000**0.5
    assert abs(torch.corrcoef(drawn.T)[0, 1]) < 3.3 / 2000**0.5


def test_flip_moves_only_the_chosen() -> None:
    x = images(3)
    flipped = aug.flip(x, torch.tensor([True, False, True]))
    assert torch.equal(flipped[1], x[1])
    for i in (0, 2):
        for column in range(7):
            assert torch.equal(flipped[i, :, :, column], x[i, :, :, 6 - column])
    whole = x.to(torch.uint8)
    assert aug.flip(whole, torch.ones(3, dtype=torch.bool)).dtype == torch.uint8


@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_random_flip_has_the_asked_share(share: float) -> None:
    x = torch.tensor([0.0, 1.0]).reshape(1, 1, 1, 2).expand(2000, 1, 1, 2)
    got = aug.random_flip(x, SEEDS, share)[:, 0, 0, 0].mean().item()
    assert abs(got - share) <= 3.3 * (share * (1 - share) / 2000) ** 0.5


def test_random_crop_is_a_window_and_reaches_every_place_equally() -> None:
    x = torch.arange(20.0).reshape(1, 1, 4, 5).expand(2000, 1, 4, 5)
    windows = aug.random_crop(x, (2, 4), SEEDS)
    corner = windows[:, 0, 0, 0].long()
    offsets = torch.tensor([[0, 1, 2, 3], [5, 6, 7, 8]])
    assert torch.equal(windows[:, 0].long(), corner[:, None, None] + offsets)
    counts = torch.bincount(corner, minlength=20)
    places = [row * 5 + column for row in range(3) for column in range(2)]
    assert counts[places].sum() == 2000
    assert (counts[places] / 2000 - 1 / 6).abs().max() < 0.035


def test_shift_is_a_window_of_the_image_continued_by_reflection() -> None:
    x = images(49)
    moves = torch.cartesian_prod(torch.arange(-3, 4), torch.arange(-3, 4))
    moved = aug.shift(x, moves[:, 0], moves[:, 1])
    wide = torch.nn.functional.pad(x, (3, 3, 3, 3), mode="reflect")
    for i, (down, right) in enumerate(moves.tolist()):
        assert torch.equal(moved[i], wide[i, :, 3 - down : 8 - down, 3 - right : 10 - right])
    one = x[:1, :, :1, :1]  # of a single pixel there is nothing else to show
    assert torch.equal(aug.shift(one, torch.tensor([5]), torch.tensor([-9])), one)


def test_random_shift_reaches_every_place_equally() -> None:
    x = torch.arange(49.0).reshape(1, 1, 7, 7).expand(2000, 1, 7, 7)
    middle = aug.random_shift(x, 1, SEEDS)[:, 0, 3, 3].long()
    counts = torch.bincount(middle, minlength=49)
    places = [7 * row + column for row in (2, 3, 4) for column in (2, 3, 4)]
    assert counts[places].sum() == 2000
    assert (counts[places] / 2000 - 1 / 9).abs().max() < 0.025
    assert torch.equal(aug.random_shift(x[:8], 0, SEEDS[:8]), x[:8])


def test_apart_gives_others_numbers_of_the_same_seed() -> None:
    first, second = aug.apart([1, 2], 0), aug.apart([1, 2], 1)
    assert first == [fold_seed(1, 0), fold_seed(2, 0)]
    assert not set(first) & set(second)
    one = generator()
    assert aug.apart(one, 3) is one


def test_crop_outside_is_refused() -> None:
    with pytest.raises(ValueError, match=r"window 1 of 2 x 3 at \(4, 0\)"):
        aug.crop(images(2), (2, 3), [0, 4], [0, 0])


def test_crop_start_stays_inside() -> None:
    assert [aug.crop_start(2, u) for u in (0.0, 0.34, 0.999)] == [0, 1, 2]
    assert aug.crop_start(2, 1.0) == 2


def test_add_noise_is_the_level() -> None:
    x0 = torch.full((2000, 3), 1.5, dtype=torch.float64)
    level = VP.at(-0.4)
    x, noise = aug.add_noise(x0, level, SEEDS)
    assert x.dtype == torch.float64
    assert (x - (level.alpha * x0 + level.sigma * noise)).abs().max() < 1e-15
    assert abs(noise.mean()) < 3.3 / 6000**0.5
    assert abs(noise.var() - 1) < 3.3 * (2 / 6000) ** 0.5


def test_masks_hide_what_they_say() -> None:
    assert not aug.random_mask("none", 4, (6, 8), SEEDS[:4]).any()
    half = aug.random_mask("half", 2000, (6, 8), SEEDS)
    assert half.shape == (2000, 1, 6, 8)
    assert (half.sum((1, 2, 3)) == 24).all()
    kinds, counts = half.unique(dim=0, return_counts=True)
    assert len(kinds) == 4
    assert (counts / 2000 - 0.25).abs().max() < 0.035
    box = aug.random_mask("box", 2000, (8, 12), SEEDS)[:, 0]
    heights, widths = box.any(2).sum(1), box.any(1).sum(1)
    assert torch.equal(heights * widths, box.sum((1, 2)))  # a filled rectangle
    assert (heights.min(), heights.max(), widths.min(), widths.max()) == (2, 6, 3, 9)
    assert box.any(0).all()  # every pixel is hidden at times


def _stroke(size: tuple[int, int], seed: int) -> list[list[bool]]:
    """A mask of strokes, pixel by pixel from the words of its description."""
    height, width = size
    drawn = iter(aug.uniforms([seed], 1, 1 + 4 * 11)[0].tolist())
    pieces = []
    for _ in range(int(next(drawn) * 4) + 1):
        radius = max(min(size) * (1 / 16 + (1 / 6 - 1 / 16) * next(drawn)) / 2, 0.5**0.5)
        x, y = next(drawn) * (width - 1), next(drawn) * (height - 1)
        for _ in range(4):
            angle, step = 2 * math.pi * next(drawn), min(size) * (0.1 + 0.3 * next(drawn))
            there = (
                min(max(x + step * math.cos(angle), 0), width - 1),
                min(max(y + step * math.sin(angle), 0), height - 1),
            )
            pieces.append((radius, x, y, *there))
            x, y = there

    def near(px: int, py: int, radius: float, x: float, y: float, x2: float, y2: float) -> bool:
        # The nearest of many points on the piece, rather than a formula for it.
        return any(
            math.hypot(px - x - (x2 - x) * k / 400, py - y - (y2 - y) * k / 400) <= radius
            for k in range(401)
        )

    return [[any(near(px, py, *piece) for piece in pieces) for px in range(width)]
            for py in range(height)]  # fmt: skip


def test_strokes_are_what_they_are_said_to_be() -> None:
    size = (12, 17)
    masks = aug.random_mask("stroke", 6, size, SEEDS[:6])[:, 0]
    for mask, seed in zip(masks, SEEDS, strict=False):
        # 401 points of a piece are a little less near than all of it.
        assert (mask != torch.tensor(_stroke(size, seed))).sum() <= 1
    many = aug.random_mask("stroke", 2000, (16, 16), SEEDS)
    shares = many.float().mean((1, 2, 3))
    assert shares.min() > 0
    assert 0.1 < shares.mean() < 0.4
    assert many.any(0).all()  # every pixel is hidden at times
    assert aug.random_mask("stroke", 50, (1, 3), SEEDS[:50]).any(3).all()  # tiny images, too


def test_mixed_masks_are_of_every_kind_equally() -> None:
    mixed = aug.random_mask("mixed", 2000, (8, 8), SEEDS)
    kinds = ["none", "box", "half", "stroke"]
    made = torch.stack([
        aug.random_mask(kind, 2000, (8, 8), aug.apart(SEEDS, k + 1)) for k, kind in enumerate(kinds)
    ])  # fmt: skip
    same = (made == mixed).flatten(2).all(2)
    assert same.any(0).all()
    chosen = (aug.uniforms(aug.apart(SEEDS, 0), 2000)[:, 0] * 4).long()
    assert same[chosen, torch.arange(2000)].all()
    assert (torch.bincount(chosen) / 2000 - 0.25).abs().max() < 0.035


def test_unknown_mask_offers_the_nearest() -> None:
    with pytest.raises(ValueError, match="unknown mask 'boks'; did you mean 'box'"):
        aug.random_mask("boks", 1, (4, 4), [0])
