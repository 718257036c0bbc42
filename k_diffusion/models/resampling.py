"""Half and twice the size, in one to three dimensions.

Letters in shapes: B samples, C channels; `...` are one to three dimensions.

Plain sampling at every second position folds what is finer than the coarse grid onto it, so that a
network's output trembles when its input moves by one position. With a blur before it
(Zhang 2019, arXiv:1904.11486) much less of that is left; see `Blur` for which.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from k_diffusion.models.layers import convolution
from k_diffusion.models.recompute import recomputed

INTERPOLATIONS = {1: "linear", 2: "bilinear", 3: "trilinear"}
APPLY = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class Downsample(nn.Module):
    """Half the size, by a convolution of stride 2."""

    def __init__(self, dims: int, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = convolution(dims, in_channels, out_channels, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """From (B, in_channels, ...) to (B, out_channels, ...), each size halved."""
        return self.conv(x)


class Upsample(nn.Module):
    """Twice the size: every value repeated, then a convolution."""

    def __init__(self, dims: int, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = convolution(dims, in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """From (B, in_channels, ...) to (B, out_channels, ...), each size doubled."""
        return recomputed(self._enlarge, x)

    def _enlarge(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Blur(nn.Module):
    """Every second value of x after a blur with the weights 1, 3, 3, 1 along each dimension.

    They are centred between two positions, as the coarse grid's positions lie on the fine one, and
    are the transpose of linear interpolation. At the border the outermost value goes on. One
    channel does not see another: it runs as a convolution in as many groups as channels, which
    costs a C-th of the dense one.

    Args:
        dims: dimensions, 1 to 3.
    """

    def __init__(self, dims: int) -> None:
        super().__init__()
        line = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        weight = line
        for _ in range(dims - 1):
            weight = weight[..., None] * line
        # Kept with the weights, so that it is there in a model that was built without memory.
        self.weight: Tensor
        self.register_buffer("weight", weight[None, None])

    def forward(self, x: Tensor) -> Tensor:
        """From (B, C, ...) to (B, C, ...), each size halved."""
        dims, channels = x.ndim - 2, x.shape[1]
        weight = self.weight.to(x.dtype).expand(channels, *self.weight.shape[1:])
        x = F.pad(x, (1, 1) * dims, mode="replicate")
        return APPLY[dims](x, weight, stride=2, groups=channels)


class SmoothDownsample(nn.Module):
    """Half the size: a blur, every second value, then a convolution."""

    def __init__(self, dims: int, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.blur = Blur(dims)
        self.conv = convolution(dims, in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """From (B, in_channels, ...) to (B, out_channels, ...), each size halved."""
        return recomputed(self._shrink, x)

    def _shrink(self, x: Tensor) -> Tensor:
        return self.conv(self.blur(x))


class SmoothUpsample(nn.Module):
    """Twice the size: linear interpolation, then a convolution."""

    def __init__(self, dims: int, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.mode = INTERPOLATIONS[dims]
        self.conv = convolution(dims, in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """From (B, in_channels, ...) to (B, out_channels, ...), each size doubled."""
        return recomputed(self._enlarge, x)

    def _enlarge(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode=self.mode))


RESAMPLING: dict[str, tuple[type[nn.Module], type[nn.Module]]] = {
    "strided": (Downsample, Upsample),
    "antialiased": (SmoothDownsample, SmoothUpsample),
}
"""Name -> what halves, and what doubles."""


def pad_to_multiple(x: Tensor, factor: int) -> Tensor:
    """x, shape (B, C, ...), whose sizes are enlarged to multiples by repeating its last values.

    Repeated, since that works from a size of 1 (a reflection needs as many values as it adds) and
    makes no edge where the data ends (zeros would); at the end alone, so that a crop of the data
    keeps its place on the coarse grids.
    """
    lacking = [-size % factor for size in x.shape[2:]]
    if not any(lacking):
        return x
    return F.pad(x, [n for lack in reversed(lacking) for n in (0, lack)], mode="replicate")


def crop(x: Tensor, size: torch.Size) -> Tensor:
    """The first values of x, shape (B, C, *size)."""
    for dim, length in enumerate(size, 2):
        x = x.narrow(dim, 0, length)
    return x
