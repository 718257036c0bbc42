"""Transformations, noise and masks for training data, each of them reproducible.

Randomness comes from a `torch.Generator` (drawn for the batch as a whole) or from one integer seed
a sample; with seeds, what happens to a sample does not depend on its neighbours in the batch.
Images are tensors of shape (B, C, H, W). Here transformations only move values, they compute none;
`warp` and `colours` have those that do.
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


def apart(randomness: Randomness, key: int) -> Randomness:
    """Randomness for one of several purposes: of seeds others, of a generator what comes next."""
    if isinstance(randomness, torch.Generator):
        return randomness
    return fold_seeds(randomness, [key])[:, 0].tolist()


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


def shift(x: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Move each sample by whole pixels; what comes in is the sample itself, mirrored at its edges.

    The same as a window out of an image that was continued beyond its edges, which are not
    repeated.

    Args:
        x: shape (B, C, H, W).
        down, right: pixels, int64, shape (B,); negative: upwards, to the left.
    """
    rows = mirrored(torch.arange(x.shape[-2]) - down[:, None], x.shape[-2]).to(x.device)
    columns = mirrored(torch.arange(x.shape[-1]) - right[:, None], x.shape[-1]).to(x.device)
    moved = x.gather(2, rows[:, None, :, None].expand(x.shape))
    return moved.gather(3, columns[:, None, None, :].expand(x.shape))


def random_shift(x: Tensor, most: int, randomness: Randomness) -> Tensor:
    """Move each sample by -most to most pixels down and to the right; all are equally likely.

    Args:
        x: shape (B, C, H, W).
        most: pixels.
        randomness: a CPU generator, or B seeds.
    """
    places = (uniforms(randomness, x.shape[0], 2) * (2 * most + 1)).long().clamp(max=2 * most)
    return shift(x, places[:, 0] - most, places[:, 1] - most)


def mirrored(places: Tensor, length: int) -> Tensor:
    """Places on an endless line to places in [0, length): there and back again, int64."""
    period = max(1, 2 * (length - 1))
    folded = places.remainder(period)
    return torch.minimum(folded, period - folded) if length > 1 else torch.zeros_like(places)


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


STROKES, TURNS = 4, 4
"""The most strokes of a mask, and the straight pieces of each."""


def stroke_mask(batch: int, size: tuple[int, int], randomness: Randomness) -> Tensor:
    """Hides one to four strokes of a brush a sample, with round ends.

    Each goes from an even place along four straight pieces, of an even direction and a tenth to
    four tenths of the image's shorter side, back towards the image where it would leave it. Its
    thickness is 1/16 to 1/6 of that side. At least the pixel in which it begins is hidden.
    """
    length = min(size)
    drawn = uniforms(randomness, batch, 1 + STROKES * (3 + 2 * TURNS)).float()
    count = (drawn[:, 0] * STROKES).long() + 1
    strokes = drawn[:, 1:].reshape(batch, STROKES, 3 + 2 * TURNS)
    far = torch.tensor([size[1] - 1.0, size[0] - 1.0])
    # Half a diagonal reaches a pixel's centre from anywhere in it.
    radius = (length * (1 / 16 + strokes[..., 0] * (1 / 6 - 1 / 16)) / 2).clamp(min=0.5**0.5)
    mask = torch.zeros(batch, 1, *size, dtype=torch.bool)
    for k in range(STROKES):
        drawing = (count > k).nonzero()[:, 0]
        stroke, start = strokes[drawing, k], strokes[drawing, k, 1:3] * far
        for turn in stroke[:, 3:].split(2, dim=1):
            angle, step = 2 * torch.pi * turn[:, 0], length * (0.1 + 0.3 * turn[:, 1])
            end = start + step[:, None] * torch.stack([angle.cos(), angle.sin()], dim=1)
            end = torch.minimum(end.clamp(min=0), far)
            reached = _squared_distance(size, start, end)
            mask[drawing, 0] |= reached <= radius[drawing, k, None, None].square()
            start = end
    return mask


def _squared_distance(size: tuple[int, int], start: Tensor, end: Tensor) -> Tensor:
    """From every pixel's centre to straight pieces between points (x, y), (B, 2): (B, H, W)."""
    x = torch.arange(size[1]) - start[:, 0, None, None]
    y = torch.arange(size[0])[:, None] - start[:, 1, None, None]
    ahead, below = ((end - start)[:, i, None, None] for i in (0, 1))
    square = (ahead.square() + below.square()).clamp(min=1e-6)
    share = ((x * (ahead / square)) + (y * (below / square))).clamp(0, 1)
    return (x - share * ahead).square() + (y - share * below).square()


def mixed_mask(batch: int, size: tuple[int, int], randomness: Randomness) -> Tensor:
    """A mask of any other kind a sample, each kind as likely as any other: so that one network
    learns to fill in a box, a half, strokes, and to draw nothing where nothing is hidden."""
    kinds = [no_mask, box_mask, half_mask, stroke_mask]
    chosen = (uniforms(apart(randomness, 0), batch)[:, 0] * len(kinds)).long()
    mask = torch.zeros(batch, 1, *size, dtype=torch.bool)
    for k, kind in enumerate(kinds):
        made = kind(batch, size, apart(randomness, k + 1))
        mask = torch.where((chosen == k).reshape(-1, 1, 1, 1), made, mask)
    return mask


MASKS: dict[str, Callable[[int, tuple[int, int], Randomness], Tensor]] = {
    "none": no_mask,
    "box": box_mask,
    "half": half_mask,
    "stroke": stroke_mask,
    "mixed": mixed_mask,
}
"""Kinds of masks."""


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
