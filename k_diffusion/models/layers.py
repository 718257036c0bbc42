"""Layers that the models share: norms, attention, blocks.

Letters in shapes: B samples, C channels, H height, W width, E the width of the embedding.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def norm_groups(channels: int) -> int:
    """Groups for a group norm: the largest divisor up to 32 that leaves 4 channels in a group.

    With one channel in a group the norm would wipe out each channel's mean, and what a network
    knows of the overall brightness with it; fewer than 8 channels are one group.
    """
    most = max(1, min(32, channels // 4))
    return next(groups for groups in range(most, 0, -1) if channels % groups == 0)


def zeroed(layer: nn.Conv2d | nn.Linear) -> Any:
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
        self.groups = norm_groups(channels)
        self.modulation = nn.Linear(width, 2 * channels)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x normalised, scaled and shifted, shape (B, C, H, W), for an embedding (B, E)."""
        scale, shift = self.modulation(embedding)[:, :, None, None].chunk(2, 1)
        return F.group_norm(x, self.groups) * (1 + scale) + shift


class SelfAttention(nn.Module):
    """Attention of every position to every other, added to its input; at first it adds nothing.

    Args:
        channels: C.
        head_channels: channels of one head; divides C.
    """

    def __init__(self, channels: int, head_channels: int) -> None:
        super().__init__()
        self.head_channels = head_channels
        self.norm = nn.GroupNorm(norm_groups(channels), channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = zeroed(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """Shape (B, C, H, W) in and out."""
        batch, channels, height, width = x.shape
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # a view where x is channels_last
        heads = self.qkv(tokens).unflatten(2, (3, -1, self.head_channels))
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.out(mixed).transpose(1, 2).reshape(batch, channels, height, width)


class ResidualBlock(nn.Module):
    """Two convolutions beside a skip, then attention where it is asked for.

    At first it passes its input (through the 1x1 convolution where the channels change).

    Args:
        in_channels: C of the input.
        out_channels: C of the output.
        width: E.
        dropout: share of activations dropped before the second convolution, in training.
        head_channels: channels of an attention head; None: no attention.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        width: int,
        dropout: float = 0.0,
        head_channels: int | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(norm_groups(in_channels), in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = AdaptiveGroupNorm(out_channels, width)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None
        self.attention = SelfAttention(out_channels, head_channels) if head_channels else None

    def forward(self, x: Tensor, embedding: Tensor, mirrored: Tensor | None = None) -> Tensor:
        """From (B, in_channels, H, W) and an embedding (B, E) to (B, out_channels, H, W).

        `mirrored`, of the same height and width, is joined to x; both together have in_channels.
        (Joined here, so that under checkpointing the copy of both does not outlive the block.)
        """
        if mirrored is not None:
            x = torch.cat([x, mirrored], 1)
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h, embedding))))
        h = h + (x if self.skip is None else self.skip(x))
        return h if self.attention is None else self.attention(h)


class Downsample(nn.Conv2d):
    """Half the height and width, by a convolution of stride 2."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, stride=2, padding=1)


class Upsample(nn.Module):
    """Twice the height and width: every value four times, then a convolution."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """From (B, in_channels, H, W) to (B, out_channels, 2H, 2W)."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
