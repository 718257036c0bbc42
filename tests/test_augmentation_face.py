"""K.augmentation: the established names, with the numbers that the established pipeline gave."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

import k_diffusion as K
from k_diffusion.augmentation import rotate2d, scale2d, translate2d
from k_diffusion.models.augment_wrapper import KarrasAugmentWrapper

Pipeline = K.augmentation.KarrasAugmentationPipeline

RECORDED = {
    1: (
        [
            -0.507241, -0.635030, -0.546074, -0.583492, -0.055297, 0.102601, -0.093140, -0.867042,
            -0.378262, 0.551966, -0.461529, -0.536280, 0.398635, 0.484766, -0.141599, 0.425077,
            -0.694619, 0.379697, 0.018206, 0.026074,
        ],
        [
            1.000000, 0.000000, 0.061677, -0.073078, -0.375253, 0.613871, 0.095907, -1.332780,
            0.516132,
        ],
        0.4980026,
    ),
    2: (
        [
            -0.155749, 0.076595, -0.755571, -0.051508, 0.463809, -0.544345, -0.296809, -0.414084,
            -0.555526, -0.152527, -0.760266, -0.202587, -0.893890, 0.206415, -0.724689, 0.014509,
            0.816430, 0.304503, 0.478008, 0.817625,
        ],
        [
            0.000000, 1.000000, -0.319500, -1.935826, -0.352462, -1.178868, -0.249768, -0.190978,
            1.453821,
        ],
        0.2050342,
    ),
    8: (
        [
            0.565249, -0.139031, -0.363895, -0.071247, 0.534160, 0.182957, 0.682798, 0.308628,
            0.116912, 0.366831, -0.766694, -0.140158, -0.522003, 0.842898, 0.291857, -0.218332,
            -0.404249, -0.752867, -0.420399, -0.919728,
        ],
        [
            1.000000, 0.000000, 0.502697, -1.721149, -0.692779, 0.000000, 0.000000, 0.442345,
            -0.334828,
        ],
        0.2546784,
    ),
    11: (
        [
            0.714253, 0.388119, 0.268268, 0.289640, -0.636472, -0.359049, -0.244583, 0.578414,
            0.040760, -0.307327, -0.364329, 0.395840, -0.774673, -0.469577, -0.004530, 0.519325,
            0.116739, -0.562187, -0.963869, -0.256817,
        ],
        [
            1.000000, 0.000000, -0.699542, -1.890548, 0.454889, 0.263744, -1.275311, -0.054214,
            -0.190417,
        ],
        0.7599972,
    ),
}  # fmt: skip
"""Seed -> k-diffusion 0.1.1's changed image, its condition, and the next number of the generator:
of the grey image below, 4 x 5, at a_prob = 0.8."""


def grey() -> Image.Image:
    return Image.fromarray((np.arange(20) * 37 % 256).astype(np.uint8).reshape(4, 5))


@pytest.mark.parametrize("seed", RECORDED)
def test_the_same_seed_gives_what_it_gave(seed: int) -> None:
    torch.manual_seed(seed)
    image, original, told = Pipeline(a_prob=0.8)(grey())
    following = torch.rand(1).item()
    recorded, condition, next_one = RECORDED[seed]
    assert image.shape == original.shape == (1, 4, 5)
    assert told.dtype is image.dtype is torch.float32
    assert (image.flatten() - torch.tensor(recorded)).abs().max() < 2e-5
    assert (told - torch.tensor(condition)).abs().max() < 1e-6
    assert abs(following - next_one) < 1e-6


def _kernel(t: float) -> float:
    t = abs(t)
    if t < 1:
        return 1.5 * t**3 - 2.5 * t**2 + 1
    return -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2 if t < 2 else 0.0


def _slowly(image: np.ndarray, back: np.ndarray) -> np.ndarray:
    """Pixel by pixel in float64; beyond the edges: the image, mirrored about its last pixels."""
    _, height, width = image.shape
    wide = np.pad(image, ((0, 0), (200, 200), (200, 200)), mode="reflect")
    out = np.zeros_like(image)
    for row in range(height):
        for column in range(width):
            x, y, _ = back @ [column, row, 1.0]
            for j in range(math.floor(y) - 1, math.floor(y) + 3):
                for i in range(math.floor(x) - 1, math.floor(x) + 3):
                    weight = _kernel(y - j) * _kernel(x - i)
                    out[:, row, column] += weight * wide[:, j + 200, i + 200]
    return out


@pytest.mark.parametrize("size", [(7, 7), (6, 9)])
def test_the_product_of_the_established_matrices_by_a_slow_reference(size: tuple[int, int]) -> None:
    """From the drawn numbers, by the nine matrices one after the other."""
    height, width = size
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    pipeline = Pipeline(a_prob=0.7)
    warped = 0
    for seed in range(12):
        torch.manual_seed(seed)
        a = pipeline._draw()[0].float()
        torch.manual_seed(seed)
        image, original, _ = pipeline(Image.fromarray(pixels))
        warped += bool(a[2:].any())
        grown, stretched = 2 ** (0.2 * a[2]), 2 ** (0.2 * a[5])
        forward = (
            translate2d(width / 2 - 0.5, height / 2 - 0.5)
            @ scale2d(1 - 2 * a[0], 1)
            @ scale2d(1, 1 - 2 * a[1])
            @ scale2d(grown, grown)
            @ rotate2d(-a[3])
            @ rotate2d(a[4])
            @ scale2d(stretched, 1 / stretched)
            @ rotate2d(-a[4])
            @ translate2d(height * a[6] / 8, width * a[7] / 8)
            @ translate2d(-width / 2 + 0.5, -height / 2 + 0.5)
        )
        slow = _slowly(original.double().numpy(), np.linalg.inv(forward.double().numpy()))
        assert np.abs(image.numpy() - slow).max() < 1e-4
    assert warped > 6


def test_switched_off_it_draws_the_same_and_does_nothing() -> None:
    torch.manual_seed(3)
    Pipeline()(grey())
    after = torch.rand(1)
    torch.manual_seed(3)
    image, original, told = Pipeline(disable_all=True)(grey())
    assert torch.equal(image, original)
    assert image is not original
    assert (told == 0).all()
    assert torch.equal(torch.rand(1), after)
    assert (original[0] - torch.from_numpy(np.array(grey())) / 127.5 + 1).abs().max() < 1e-6


def test_what_is_only_mirrored_is_not_interpolated() -> None:
    seen = set()
    for seed in range(20):
        torch.manual_seed(seed)
        image, original, told = Pipeline(a_prob=0.0)(grey())
        seen.add(bool(told[0]))
        assert torch.equal(image, original.flip(2) if told[0] else original)
        assert (told[1:] == 0).all()
    assert seen == {False, True}


def test_matrices_and_names() -> None:
    x = torch.tensor([2.0, 3.0, 1.0])
    assert (translate2d(1, torch.tensor(-2.0)) @ x).tolist() == [3, 1, 1]
    assert (scale2d(2, torch.tensor(-1.0)) @ x).tolist() == [4, -3, 1]
    quarter = rotate2d(torch.tensor(math.pi / 2)) @ x
    assert (quarter - torch.tensor([-3.0, 2.0, 1.0])).abs().max() < 1e-6
    assert K.augmentation.KarrasAugmentWrapper is KarrasAugmentWrapper
    assert "augmentation" in dir(K)
    with pytest.raises(ValueError, match=r"probability must lie in \[0, 1\], got 2"):
        Pipeline(a_prob=2)
