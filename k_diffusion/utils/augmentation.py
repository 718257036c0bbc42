"""Transformations, noise and masks for training data, each of them reproducible.

Randomness comes from a `torch.Generator` (drawn for the batch as a whole) or from one integer seed
a sample; with seeds, what happens to a sample does not depend on its neighbours in the batch.
Images are tensors of shape (B, C, H, W); transformations only move values, they compute none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from k_diffusion.utils.hashing import fold_seeds
from k_diffusion.utils.levels import Level
from k_diffusion.utils.maths import unknown

Randomness = torch.Generator | Sequence[int]
"""A generator, or one seed a sample."""


def uniforms(randomness: Randomness, batch: int, count: int = 1) -> Tensor:
    """Numbers in [0, 1), float64 on the CPU, shape (batch, count).

    Args:
        randomness: a CPU generator, or `batch` seeds; a seed's numbers are a function of it alone.
        batch: number of samples.
        count: numbers a sample.
    """
    if isinstance(randomness, torch.Generator):
        return torch.rand(batch, count, generator=randomness, dtype=torch.float64)
    _check_seeds(randomness, batch)
    # fold_seed gives 63 bits; the upper 53 are all that a float64 in [0, 1) can hold.
    return torch.from_numpy((fold_seeds(randomness, range(count)) >> 10) * 2.0**-53)


def normals(randomness: Randomness, shape: Sequence[int]) -> Tensor:
    """Unit Gaussian noise, float32 on the CPU.

    Args:
        randomness: a CPU generator, or `shape[0]` seeds.
        shape: (B, ...).
    """
    if isinstance(randomness, torch.Generator):
        return torch.randn(tuple(shape), generator=randomness)
    _check_seeds(randomness, shape[0])
    generator = torch.Generator()
    noise = torch.empty(tuple(shape))
    for row, seed in zip(noise, randomness, strict=True):
        row.normal_(generator=generator.manual_seed(seed))
    return noise


def flip(x: Tensor, chosen: Tensor) -> Tensor:
    """Mirror the chosen samples left to right.

    Args:
        x: shape (B, C, H, W).
        chosen: boolean, shape (B,).
    """
    return torch.where(chosen.to(x.device).reshape(-1, *[1] * (x.ndim - 1)), x.flip(-1), x)


def random_flip(x: Tensor, randomness: Randomness, share: float = 0.5) -> Tensor:
    """Mirror a random share of the samples left to right.

    Args:
        x: shape (B, C, H, W).
        randomness: a CPU generator, or B seeds.
        share: the probability with which a sample is mirrored, in [0, 1].
    """
    return flip(x, uniforms(randomness, x.shape[0])[:, 0] < share)


def crop(x: Tensor, size: tuple[int, int], top: Sequence[int], left: Sequence[int]) -> Tensor:
    """Cut a window out of each sample.

    Args:
        x: shape (B, C, H, W).
        size: height and width of the window, in pixels.
        top: B rows at which the windows begin.
        left: B columns at which they begin.

    Raises:
        ValueError: a window does not lie inside its image.
    """
    (height, width), (rows, columns) = size, x.shape[-2:]
    for i, (y, z) in enumerate(zip(top, left, strict=True)):
        if not (0 <= y <= rows - height and 0 <= z <= columns - width):
            raise ValueError(
                f"window {i} of {height} x {width} at ({y}, {z}) leaves the image of "
                f"{rows} x {columns}"
            )
    windows = [
        image[..., y : y + height, z : z + width] for image, y, z in zip(x, top, left, strict=True)
    ]
    return torch.stack(windows)


def random_crop(x: Tensor, size: tuple[int, int], randomness: Randomness) -> Tensor:
    """Cut a window out of each sample; every place where it fits is as likely as any other.

    Args:
        x: shape (B, C, H, W).
        size: height and width of the window, in pixels.
        randomness: a CPU generator, or B seeds.
    """
    drawn = uniforms(randomness, x.shape[0], 2)
    top = [crop_start(x.shape[-2] - size[0], u) for u in drawn[:, 0].tolist()]
    left = [crop_start(x.shape[-1] - size[1], u) for u in drawn[:, 1].tolist()]
    return crop(x, size, top, left)


def crop_start(slack: int, uniform: float) -> int:
    """One of the `slack + 1` places of a window, chosen by a number in [0, 1)."""
    return min(int(uniform * (slack + 1)), slack)


def add_noise(x0: Tensor, level: Level, randomness: Randomness) -> tuple[Tensor, Tensor]:
    """Noisy data x = alpha · x0 + sigma · noise, and the noise.

    Args:
        x0: clean data, shape (B, ...).
        level: signal scale and noise standard deviation, in data units.
        randomness: a CPU generator, or B seeds.

    Returns:
        x and the unit Gaussian noise, both of x0's shape, dtype and device.
    """
    noise = normals(randomness, x0.shape).to(x0)
    return level.alpha * x0 + level.sigma * noise, noise


def no_mask(batch: int, size: tuple[int, int], randomness: Randomness) -> Tensor:
    """Hides nothing."""
    return torch.zeros(batch, 1, *size, dtype=torch.bool)


def box_mask(batch: int, size: tuple[int, int], randomness: Randomness) -> Tensor:
    """Hides one box a sample; its sides are between a quarter and three quarters of the image's."""
    drawn = uniforms(randomness, batch, 4).tolist()
    mask = torch.zeros(batch, 1, *size, dtype=torch.bool)
    for hidden, (u, v, y, z) in zip(mask, drawn, strict=True):
        height = max(1, round(size[0] * (0.25 + 0.5 * u)))
        width = max(1, round(size[1] * (0.25 + 0.5 * v)))
        top, left = crop_start(size[0] - height, y), crop_start(size[1] - width, z)
        hidden[:, top : top + height, left : left + width] = True
    return mask


def half_mask(batch: int, size: tuple[int, int], randomness: Randomness) -> Tensor:
    """Hides the left, right, upper or lower half, each with probability 1/4."""
    mask = torch.zeros(batch, 1, *size, dtype=torch.bool)
    height, width = size[0] // 2, size[1] // 2
    sides = (uniforms(randomness, batch)[:, 0] * 4).long().tolist()
    for hidden, side in zip(mask, sides, strict=True):
        if side == 0:
            hidden[:, :, :width] = True
        elif side == 1:
            hidden[:, :, size[1] - width :] = True
        elif side == 2:
            hidden[:, :height] = True
        else:
            hidden[:, size[0] - height :] = True
    return mask


MASKS: dict[str, Callable[[int, tuple[int, int], Randomness], Tensor]] = {
    "none": no_mask,
    "box": box_mask,
    "half": half_mask,
}


def random_mask(kind: str, batch: int, size: tuple[int, int], randomness: Randomness) -> Tensor:
    """Random masks, true where the image is hidden.

    Args:
        kind: a name in `MASKS`.
        batch: number of samples B.
        size: height and width in pixels.
        randomness: a CPU generator, or B seeds.

    Returns:
        Boolean, shape (B, 1, H, W).

    Raises:
        ValueError: the kind is unknown.
    """
    if kind not in MASKS:
        raise ValueError(unknown("mask", kind, MASKS))
    return MASKS[kind](batch, size, randomness)


def _check_seeds(seeds: Sequence[int], batch: int) -> None:
    if len(seeds) != batch:
        raise ValueError(f"{len(seeds)} seeds for {batch} samples: give one a sample")
