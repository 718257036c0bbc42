"""Layers that the models share: norms and convolutions over one to three dimensions.

Letters in shapes: B samples, C channels, E the width of the embedding; `...` are one to three
dimensions of space (and time).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

CONVOLUTIONS: dict[int, type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]] = {
    1: nn.Conv1d,
    2: nn.Conv2d,
    3: nn.Conv3d,
}
"""Dimensions -> class."""


def convolution(dims: int, inputs: int, outputs: int, size: int = 3, stride: int = 1) -> Any:
    """A convolution that keeps the size of its input (or divides it by the stride).

    Args:
        dims: dimensions, 1 to 3.
        inputs, outputs: channels.
        size: of the kernel, odd.
        stride: of the output's positions on the input.
    """
    return CONVOLUTIONS[dims](inputs, outputs, size, stride=stride, padding=size // 2)


class Pointwise(nn.Linear):
    """A linear layer over the channels of (B, C, ...), as a convolution of size 1 is.

    As a matrix product it needs no copy of channels_last data, and torch's convolution of this
    size is slow on a single thread.
    """

    def forward(self, x: Tensor) -> Tensor:
        """From (B, inputs, ...) to (B, outputs, ...), in channels_last."""
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
"""Dimensions, B and C among them -> the memory format."""


def channels_last(x: Tensor) -> Tensor:
    """x, shape (B, C, ...), in the memory format in which convolutions and norms are fastest."""
    # torch.func.vmap knows no memory format.
    if transforming() or x.ndim not in CHANNELS_LAST:
        return x
    return x.contiguous(memory_format=CHANNELS_LAST[x.ndim])


def norm_groups(channels: int) -> int:
    """Groups for a group norm: the largest divisor up to 32 that leaves 4 channels in a group.

    With one channel in a group the norm would wipe out each channel's mean, and what a network
    knows of the overall brightness with it; fewer than 8 channels are one group.
    """
    most = max(1, min(32, channels // 4))
    return next(groups for groups in range(most, 0, -1) if channels % groups == 0)


def transforming() -> bool:
    """Whether a transform of torch.func is at work, under which torch can do less."""
    return torch._C._are_functorch_transforms_active()


class GroupNorm(nn.GroupNorm):
    """A group norm in `norm_groups`, which torch.func.jvp can pass, too."""

    def __init__(self, channels: int, affine: bool = True) -> None:
        super().__init__(norm_groups(channels), channels, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        """Shape (B, C, ...) in and out."""
        # torch's forward derivative of it knows no channels_last.
        return super().forward(x.contiguous() if transforming() else x)

    def factors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The scale and shift of x's samples, shapes (B, C)."""
        return self.weight.expand(len(x), -1), self.bias.expand(len(x), -1)


def zeroed(layer: Any) -> Any:
    """The layer with all its parameters zero, so that what it ends begins as nothing."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class AdaptiveGroupNorm(nn.Module):
    """Group norm whose scale and shift come from the embedding.

    Source: Dhariwal and Nichol 2021, arXiv:2105.05233, section 3.1.

    Args:
        channels: C.
        width: E.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.norm = GroupNorm(channels, affine=False)
        self.modulation = nn.Linear(width, 2 * channels)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x normalised, scaled and shifted, shape (B, C, ...), for an embedding (B, E)."""
        factors = self.factors(x, embedding)
        scale, shift = (n.reshape(*n.shape, *[1] * (x.ndim - 2)) for n in factors)
        return torch.addcmul(shift, self.norm(x), scale)

    def factors(self, x: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """The scale and shift of x's samples, shapes (B, C), for an embedding (B, E)."""
        scale, shift = self.modulation(embedding).chunk(2, 1)
        return 1 + scale, shift
