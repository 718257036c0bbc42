"""Colour changes against one pixel at a time, in float64, by the definition."""

from __future__ import annotations

import colorsys
import math

import numpy as np
import pytest
import torch

from k_diffusion.utils.colours import ColourChange, apply

ALL = ColourChange(hue=0.3, saturation=0.8, greyscale=0.3, contrast=0.5, brightness=0.4)
SEEDS = list(range(40))


def _slowly(pixel, drawn):
    """Turn about the grey axis (by cross products), pull towards grey, stretch, add, cut."""
    turns, saturation, grey, contrast, added = drawn
    axis = np.array([1.0, 1.0, 1.0]) / math.sqrt(3)
    angle = 2 * math.pi * turns
    value = np.array(pixel, np.float64)
    value = (
        value * math.cos(angle)
        + np.cross(axis, value) * math.sin(angle)
        + axis * (axis @ value) * (1 - math.cos(angle))
    )
    luma = 0.299 * value[0] + 0.587 * value[1] + 0.114 * value[2]
    value = luma + saturation * (value - luma)
    if grey:
        value[:] = luma
    return np.clip(contrast * value + added, -1, 1)


def images(channels: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.rand(len(SEEDS), channels, 3, 4, generator=generator) - 1


@pytest.mark.parametrize("channels", [3, 4])
def test_the_batch_is_the_pixels_one_by_one(channels: int) -> None:
    x = images(channels)
    got, drawn = ALL(x, SEEDS), ALL.draw(SEEDS, len(SEEDS))
    assert 0 < drawn[:, 2].sum() < len(SEEDS)
    cut = 0
    for i in range(len(SEEDS)):
        for row in range(3):
            for column in range(4):
                slow = _slowly(x[i, :3, row, column].tolist(), drawn[i].tolist())
                cut += int((np.abs(slow) == 1).any())
                assert np.abs(got[i, :3, row, column].numpy() - slow).max() < 1e-6
    assert 10 < cut < 400, "values must be cut at times here"
    assert torch.equal(got[:, 3:], x[:, 3:])


@pytest.mark.parametrize("channels", [1, 2])
def test_grey_images_are_stretched_and_brightened_alone(channels: int) -> None:
    x = images(channels)
    got, drawn = ALL(x, SEEDS), ALL.draw(SEEDS, len(SEEDS))
    contrast, added = (drawn[:, i].reshape(-1, 1, 1) for i in (3, 4))
    assert (got[:, 0] - (contrast * x[:, 0] + added).clamp(-1, 1)).abs().max() < 1e-6
    assert torch.equal(got[:, 1:], x[:, 1:])
    rgb = ALL(x[:, :1].expand(-1, 3, -1, -1), SEEDS)  # grey, in three channels
    assert (rgb - got[:, :1]).abs().max() < 1e-6


def test_a_third_of_a_turn_makes_red_green() -> None:
    red = torch.tensor([1.0, 0.0, 0.0]).reshape(1, 3, 1, 1)
    third = torch.tensor([[1 / 3, 1, 0, 1, 0]], dtype=torch.float64)
    assert (apply(red, third).flatten() - torch.tensor([0.0, 1.0, 0.0])).abs().max() < 1e-6
    assert abs(colorsys.rgb_to_hsv(0, 1, 0)[0] - 1 / 3) < 1e-12  # the usual sense of a hue


def test_ranges_and_shares() -> None:
    n = 20_000
    drawn = ALL.draw(torch.Generator().manual_seed(0), n)
    for column, (low, high) in {
        0: (-0.3, 0.3),
        1: (0.2, 1.8),
        3: (0.5, 1.5),
        4: (-0.4, 0.4),
    }.items():
        even = low + (high - low) * (torch.arange(n, dtype=torch.float64) + 0.5) / n
        # Kolmogorov-Smirnov distance; 1.95 / sqrt(n) is exceeded once in a thousand.
        assert (drawn[:, column].sort().values - even).abs().max() < (high - low) * 1.95 / n**0.5
    assert abs(drawn[:, 2].mean() - 0.3) < 0.011
    assert torch.corrcoef(drawn.T).fill_diagonal_(0).abs().max() < 0.03


def test_nothing_asked_nothing_done_and_a_seed_decides_alone() -> None:
    x = images(3)
    assert (ColourChange()(x, SEEDS) - x).abs().max() < 1e-6
    assert not ColourChange(contrast=0.1).of_colours
    assert ColourChange(greyscale=0.1).of_colours
    whole = ALL(x, SEEDS)
    assert torch.equal(whole[7:8], ALL(x[7:8], [7]))
    assert ALL(x.bfloat16(), SEEDS).dtype is torch.bfloat16


def test_what_is_refused() -> None:
    with pytest.raises(TypeError, match=r"floating-point, got torch\.uint8"):
        ALL(torch.zeros(1, 3, 2, 2, dtype=torch.uint8), [0])
    with pytest.raises(ValueError, match=r"1 to 4 channels, got \(1, 5, 2, 2\)"):
        ALL(torch.zeros(1, 5, 2, 2), [0])
    for name, value in (
        ("hue", 0.6), ("saturation", -0.1), ("contrast", 1.1), ("greyscale", 2), ("hue", True),
        ("brightness", math.inf), ("brightness", math.nan),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"{name} must lie in"):
            ColourChange(**{name: value})
