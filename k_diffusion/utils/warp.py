"""The augmentation of Karras et al.: geometric changes that the network is told of.

Told, it learns them apart from the data, and asked for none of them it draws images without: the
pipeline does not leak (Karras et al. 2022, arXiv:2206.00364, appendix F.2 and table 6).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from k_diffusion.utils.augmentation import Randomness, uniforms
from k_diffusion.utils.maths import is_number

CONDITION = 9
"""Numbers of a condition: 0 throughout is an image left as it is."""


@dataclass(frozen=True)
class Warp:
    """Flips, scaling, rotation, anisotropic scaling and translation of a batch, and its condition.

    Each image is mirrored with probability 1/2, and given each of the other changes with
    `probability`. An image that is only mirrored is not interpolated.

    Args:
        probability: of each change but the mirroring, in [0, 1].
        scale: images are enlarged by scale^n, n a unit Gaussian number; above 0.
        anisotropy: images are stretched by anisotropy^n along an even angle; above 0.
        translation: images are moved by n times this share of their sides.

    Raises:
        ValueError: an argument out of its range.
    """

    probability: float = 0.12
    scale: float = 2**0.2
    anisotropy: float = 2**0.2
    translation: float = 1 / 8

    def __post_init__(self) -> None:
        if not (is_number(self.probability) and 0 <= self.probability <= 1):
            raise ValueError(f"probability must lie in [0, 1], got {self.probability!r}")
        for name in ("scale", "anisotropy"):
            value = getattr(self, name)
            if not (is_number(value) and 0 < value < math.inf):
                raise ValueError(f"{name} must be above 0, got {value!r}")
        if not (is_number(self.translation) and 0 <= self.translation < math.inf):
            raise ValueError(f"translation must be at least 0, got {self.translation!r}")

    def __call__(self, x: Tensor, randomness: Randomness) -> tuple[Tensor, Tensor]:
        """Changed images, and what to tell the network.

        Args:
            x: shape (B, C, H, W), floating-point.
            randomness: a CPU generator, or B seeds.

        Returns:
            Images of x's shape, dtype and device, and conditions, shape (B, 9), float32, there.

        Raises:
            TypeError, ValueError: x is no batch of floating-point images.
        """
        if not x.is_floating_point():
            raise TypeError(f"images to warp must be floating-point, got {x.dtype}")
        if x.ndim != 4:
            raise ValueError(f"images to warp must have shape (B, C, H, W), got {tuple(x.shape)}")
        drawn = self.draw(randomness, x.shape[0])
        told = condition(drawn).to(x.device, torch.float32)
        return apply(x, self.matrices(drawn, x.shape[-2], x.shape[-1]), drawn), told

    def draw(self, randomness: Randomness, batch: int) -> Tensor:
        """What happens to each image, float64 on the CPU, shape (B, 8).

        In the order of the established code's a0 to a7: mirrored left to right (0 or 1), top to
        bottom (0 or 1), logarithm of the enlargement to the base `scale`, angle of the rotation
        (radians), angle of the stretching, logarithm of the stretching to the base `anisotropy`,
        and the translations to the right and downwards, in units of `translation` of the sides.
        """
        u = uniforms(randomness, batch, 13)
        happens = (u[:, :5] < self.probability).double()
        n = _normals(u[:, 9:13])
        angles = (2 * u[:, 7:9] - 1) * math.pi
        return torch.stack(
            [
                (u[:, 5] < 0.5).double(),
                (u[:, 6] < 0.5).double() * happens[:, 0],
                n[:, 0] * happens[:, 1],
                angles[:, 0] * happens[:, 2],
                angles[:, 1] * happens[:, 3],
                n[:, 1] * happens[:, 3],
                n[:, 2] * happens[:, 4],
                n[:, 3] * happens[:, 4],
            ],
            dim=1,
        )

    def matrices(self, drawn: Tensor, height: int, width: int) -> Tensor:
        """Where each pixel of the result comes from: (x, y, 1) there to (x, y) here, (B, 2, 3).

        x and y are in pixels from the image's centre, x to the right and y downwards.
        """
        a = drawn
        forward = _scaling(1 - 2 * a[:, 0], 1 - 2 * a[:, 1])
        grown = self.scale ** a[:, 2]
        forward = forward @ _scaling(grown, grown) @ _rotation(-a[:, 3])
        stretched = self.anisotropy ** a[:, 5]
        turn = _rotation(a[:, 4])
        forward = forward @ turn @ _scaling(stretched, 1 / stretched) @ turn.mT
        moved = self.translation * torch.stack([width * a[:, 6], height * a[:, 7]], dim=1)
        # result = forward (here + moved), so here = forward^-1 result - moved.
        back = torch.linalg.inv(forward)
        return torch.cat([back, -moved.unsqueeze(2)], dim=2)


def condition(drawn: Tensor) -> Tensor:
    """The established nine numbers of what was drawn, shape (B, 9), from (B, 8)."""
    a = drawn
    return torch.stack(
        [
            a[:, 0], a[:, 1], a[:, 2], a[:, 3].cos() - 1, a[:, 3].sin(),
            a[:, 5] * a[:, 4].cos(), a[:, 5] * a[:, 4].sin(), a[:, 6], a[:, 7],
        ],
        dim=1,
    )  # fmt: skip


def apply(x: Tensor, matrices: Tensor, drawn: Tensor) -> Tensor:
    """Images resampled by cubic interpolation, continued beyond their edges by reflection.

    Args:
        x: shape (B, C, H, W).
        matrices: from `Warp.matrices`, (B, 2, 3), on the CPU.
        drawn: from `Warp.draw`; tells which images are only mirrored.
    """
    out = x.clone()
    # Known on the host: nothing waits for a device.
    rest = (drawn[:, 2:] != 0).any(dim=1)
    for axis, mirrored in ((-1, drawn[:, 0]), (-2, drawn[:, 1])):
        rows = ((mirrored == 1) & ~rest).nonzero().flatten().to(x.device)
        if len(rows):
            out[rows] = out[rows].flip(axis)
    rows = rest.nonzero().flatten()
    if len(rows):
        there = rows.to(x.device)
        out[there] = resample(x[there], matrices[rows])
    return out


PADDING = 2
"""Pixels beyond an image that cubic interpolation within it asks for."""


def resample(x: Tensor, matrices: Tensor) -> Tensor:
    """Images by cubic interpolation, continued beyond their edges by reflection.

    Args:
        x: shape (B, C, H, W).
        matrices: (x, y, 1) of the result to (x, y) of x, in pixels from the centre, (B, 2, 3),
            float64 on the CPU.
    """
    # An image and its mirrored continuation are even about each edge, and so is what interpolates
    # them. So places are brought into the image first, where at most two pixels beyond it are
    # asked for: half the time of grid_sample's own reflection, pixel by pixel.
    batch, _, height, width = x.shape
    padded = _continued(_continued(x.float(), -2), -1)
    theta = matrices.to(x.device, torch.float32)[..., None, None]
    across, down = (_centred(side, x.device) for side in (width, height))
    grid = torch.empty(2, batch, height, width, device=x.device)
    for axis, side in ((0, width), (1, height)):
        place = grid[axis]
        torch.add(theta[:, axis, 0] * across, theta[:, axis, 1] * down[:, None], out=place)
        place.add_(theta[:, axis, 2]).div_(side)
        # How many images away from the middle one; every other one is mirrored.
        away = place.round()
        place.sub_(away).mul_(away.remainder_(2).mul_(-2).add_(1))
        place.mul_(2 * side / (side + 2 * PADDING))  # to grid_sample's -1 to 1 over all
    warped = F.grid_sample(padded, grid.permute(1, 2, 3, 0), mode="bicubic", align_corners=False)
    return warped.to(x.dtype)


def _centred(side: int, device: torch.device) -> Tensor:
    """The places of a side's pixels, from its middle."""
    return torch.arange(side, dtype=torch.float32, device=device) - (side - 1) / 2


def _continued(x: Tensor, dim: int) -> Tensor:
    """Images with `PADDING` mirrored pixels beyond each end of a dimension."""
    side = x.shape[dim]
    if side < PADDING:  # one pixel: its mirror image is itself
        return torch.cat([x] * (side + 2 * PADDING), dim)
    ends = [x.narrow(dim, first, PADDING).flip(dim) for first in (0, side - PADDING)]
    return torch.cat([ends[0], x, ends[1]], dim)


def random_zoom(x: Tensor, smallest: float, randomness: Randomness) -> Tensor:
    """A window of each image, enlarged to the image's size by cubic interpolation.

    Its side is an even share, from `smallest` to 1, of the image's; every place where it fits is as
    likely as any other.

    Args:
        x: shape (B, C, H, W), floating-point.
        smallest: above 0, to 1.
        randomness: a CPU generator, or B seeds.

    Raises:
        ValueError: smallest is out of its range.
    """
    if not 0 < smallest <= 1:
        raise ValueError(f"the smallest window's share must lie above 0, to 1, got {smallest!r}")
    u = uniforms(randomness, x.shape[0], 3)
    share = smallest + (1 - smallest) * u[:, 0]
    room = (1 - share)[:, None] * torch.tensor([x.shape[-1], x.shape[-2]], dtype=torch.float64)
    return resample(x, torch.cat([_scaling(share, share), ((u[:, 1:] - 0.5) * room)[..., None]], 2))


def _normals(u: Tensor) -> Tensor:
    """Unit Gaussian numbers from pairs of even ones (Box and Muller 1958), as many."""
    half = u.shape[1] // 2
    radius = (-2 * (1 - u[:, :half]).log()).sqrt()
    angle = 2 * math.pi * u[:, half:]
    return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)


def _scaling(x: Tensor, y: Tensor) -> Tensor:
    return torch.diag_embed(torch.stack([x, y], dim=1))


def _rotation(angle: Tensor) -> Tensor:
    """Turns by an angle, (B,), as (B, 2, 2)."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)
