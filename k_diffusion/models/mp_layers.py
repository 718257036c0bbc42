"""Layers that keep magnitudes: inputs of unit mean square give outputs of unit mean square.

So no norm has to repair activations or weights that grow in training. The price is that weights
have no length: forward uses their directions alone, and training puts them back on the sphere.

Source of all: Karras et al. 2024 (EDM2), arXiv:2312.02696; the equations named below are its own.

Letters in shapes: B samples, C channels, H height, W width, E the width of the embedding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from k_diffusion.models.attention import MixesPositions, weighted
from k_diffusion.models.recompute import recomputed

LEAST = 1e-4
"""Magnitudes below it count as it: nothing is divided by zero."""

BALANCE = 0.3
"""Share of a residual or attention branch in its sum with the main path (config G)."""

LIMIT = 256.0
"""Activations are clipped to it, which leaves float16 room (config G)."""


def unit_magnitude(x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """x over its root mean square along dim: pixel norm where that is the channels' (eq. 30)."""
    # Squares are summed in float32 or better, whatever the network computes in.
    dtype = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=dtype)
    count = x.numel() // norm.numel()
    return x * (1 / (norm * count**-0.5).clamp(min=LEAST)).to(x.dtype)


def mp_silu(x: Tensor) -> Tensor:
    """SiLU over its root mean square on unit Gaussian input, 0.596 (eq. 81)."""
    return F.silu(x) / 0.596


def mp_sum(a: Tensor, b: Tensor, balance: float = 0.5) -> Tensor:
    """A sum of two that are independent and of unit magnitude (eq. 88).

    Args:
        balance: share of b, from 0 (a alone) to 1 (b alone).
    """
    return torch.lerp(a, b, balance) / math.hypot(1 - balance, balance)


def mp_cat(a: Tensor, b: Tensor, balance: float = 0.5) -> Tensor:
    """a and b joined along the channels, both with the say that `balance` gives them (eq. 103).

    The more channels one has, the smaller each, lest it drown the other in what reads both.

    Args:
        balance: share of b.
    """
    channels_a, channels_b = a.shape[1], b.shape[1]
    whole = math.sqrt(channels_a + channels_b) / math.hypot(1 - balance, balance)
    scale_a = whole * (1 - balance) / math.sqrt(channels_a)
    scale_b = whole * balance / math.sqrt(channels_b)
    return torch.cat([a * scale_a, b * scale_b], 1)


class MPFourier(nn.Module):
    """Features of a number: cosines of random frequencies and phases, fixed once drawn (eq. 75).

    Args:
        count: features.
    """

    def __init__(self, count: int) -> None:
        super().__init__()
        self.frequencies: Tensor
        self.phases: Tensor
        self.register_buffer("frequencies", torch.randn(count))
        self.register_buffer("phases", torch.rand(count))

    def forward(self, x: Tensor) -> Tensor:
        """Shape (B, count), float32 or better, of unit mean square over the draw, of x (B,)."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        turns = torch.outer(x.to(dtype), self.frequencies.to(dtype)) + self.phases.to(dtype)
        return torch.cos(2 * math.pi * turns) * math.sqrt(2)


class UnitRows(nn.Module):
    """Weights of which only each output's direction counts; abstract.

    The gradient is orthogonal to them, so every step of an optimiser makes them longer, and the
    next step smaller against them (eq. 47). Hence `force`, after each step (eq. 66): a learning
    rate then is a rate of rotation.

    Args:
        shape: outputs, then all over which one output is a sum.
    """

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))
        self.force()

    @torch.no_grad()
    def force(self) -> None:
        """Give each output's weights unit mean square, in place (eq. 66)."""
        self.weight.copy_(self._unit())

    def directions(self, dtype: torch.dtype) -> Tensor:
        """The weights, each output's of norm 1, which is what keeps magnitudes (eq. 47)."""
        return (self._unit() * self.weight[0].numel() ** -0.5).to(dtype)

    def _unit(self) -> Tensor:
        weight = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        return unit_magnitude(weight, tuple(range(1, weight.ndim)))


class MPLinear(UnitRows):
    """A linear map of the last dimension, without bias."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(outputs, inputs)

    def forward(self, x: Tensor) -> Tensor:
        """Shape (..., inputs) to (..., outputs)."""
        return F.linear(x, self.directions(x.dtype))


class MPConv(UnitRows):
    """A convolution of odd kernel that keeps height and width, without bias."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__(outputs, inputs, kernel, kernel)

    def forward(self, x: Tensor) -> Tensor:
        """Shape (B, inputs, H, W) to (B, outputs, H, W)."""
        return F.conv2d(x, self.directions(x.dtype), padding=self.weight.shape[-1] // 2)


class MPEmbedding(UnitRows):
    """A vector for each of `count` indices: a linear map of one-hot vectors of unit magnitude."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__(width, count)

    def forward(self, index: Tensor) -> Tensor:
        """Shape (B, width) of integers (B,)."""
        table = self.directions(self.weight.dtype).T * math.sqrt(self.weight.shape[1])
        return F.embedding(index, table)


class MPMapping(nn.Module):
    """From time and condition to one embedding (figure 21, top).

    Any number of sources is summed as eq. 88 sums two: over the root of the sum of their mean
    squares. A vector's mean square is its own, so that zeros add nothing and take nothing, either.

    Args:
        count: features of the time.
        scale: what the time is multiplied by, see `mapping.TimeFeatures`.
        width: E.
        num_classes: classes; index `num_classes` is the learned "no label".
        vectors: name -> width of the vectors that it can be told.
    """

    def __init__(
        self, count: int, scale: float, width: int, num_classes: int, vectors: Mapping[str, int]
    ) -> None:
        super().__init__()
        self.scale, self.num_classes = scale, num_classes
        self.features = MPFourier(count)
        self.time = MPLinear(count, width)
        self.classes = MPEmbedding(num_classes + 1, width) if num_classes else None
        self.vectors = nn.ModuleDict({name: MPLinear(n, width) for name, n in vectors.items()})

    def forward(
        self, t: Tensor, class_label: Tensor | None = None, **vectors: Tensor | None
    ) -> Tensor:
        """The embedding, shape (B, E).

        Args:
            t: times in the network's convention, shape (B,).
            class_label: shape (B,), integers from 0 to num_classes (that one: no label); None: no
                labels.
            vectors: each of shape (B, its width); None: zeros.
        """
        dtype = self.time.weight.dtype
        hidden = self.time(self.features(t * self.scale).to(dtype))
        squares = torch.ones_like(hidden[:, :1])
        if self.classes is not None:
            if class_label is None:
                class_label = torch.full_like(t, self.num_classes, dtype=torch.int64)
            hidden = hidden + self.classes(class_label.long())
            squares = squares + 1
        for name, layer in self.vectors.items():
            if (vector := vectors.get(name)) is not None:
                vector = vector.to(dtype)
                hidden = hidden + layer(vector)
                squares = squares + vector.square().mean(1, keepdim=True)
        return mp_silu(hidden * squares.rsqrt())


class CosineAttention(MixesPositions):
    """Attention of every position to every other, by the cosines of queries and keys, added to its
    input (section 2.2; figure 21).

    Args:
        channels: C.
        head_channels: channels of one head; divides C.
    """

    def __init__(self, channels: int, head_channels: int) -> None:
        super().__init__()
        self.head_channels = head_channels
        self.qkv = MPLinear(channels, 3 * channels)
        self.out = MPLinear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Shape (B, C, H, W) in and out."""
        batch, channels, height, width = x.shape
        tokens = x.flatten(2).transpose(1, 2)  # a view where x is channels_last
        heads = unit_magnitude(self.qkv(tokens).unflatten(2, (3, -1, self.head_channels)), -1)
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = v if self.identity else weighted(q, k, v)
        mixed = mixed.transpose(1, 2).flatten(2)
        mixed = self.out(mixed).transpose(1, 2).reshape(batch, channels, height, width)
        return mp_sum(x, mixed, BALANCE)


class MPBlock(nn.Module):
    """What the blocks of encoder and decoder share (figure 21); abstract.

    Args:
        in_channels: C of the input.
        out_channels: C of the output.
        width: E.
        dropout: share of activations dropped before the second convolution, in training.
        head_channels: channels of an attention head; None: no attention.
        resamples: whether height and width change by a factor of 2 first, each value of the
            coarser grid standing for 2x2 of the finer.
    """

    skip_first: ClassVar[bool]
    """Whether the branch reads the main path after the skip's convolution, or before."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        width: int,
        dropout: float = 0.0,
        head_channels: int | None = None,
        resamples: bool = False,
    ) -> None:
        super().__init__()
        self.resamples = resamples
        self.skip = MPConv(in_channels, out_channels, 1) if in_channels != out_channels else None
        self.conv1 = MPConv(out_channels if self.skip_first else in_channels, out_channels, 3)
        self.modulation = MPLinear(width, out_channels)
        self.gain = nn.Parameter(torch.zeros(()))
        self.dropout = nn.Dropout(dropout)
        self.conv2 = MPConv(out_channels, out_channels, 3)
        self.attention = CosineAttention(out_channels, head_channels) if head_channels else None

    def branch(self, x: Tensor, embedding: Tensor) -> Tensor:
        """The residual branch; its gain lets the embedding speak, at first not at all."""
        h = recomputed(self._first, x)
        scale = self.modulation(embedding) * self.gain + 1
        drops = self.training and self.dropout.p > 0
        return recomputed(self._second, h, scale[:, :, None, None], random=drops)

    def _first(self, x: Tensor) -> Tensor:
        return self.conv1(mp_silu(x))

    def _second(self, h: Tensor, scale: Tensor) -> Tensor:
        return self.conv2(self.dropout(mp_silu(h * scale)))

    def join(self, x: Tensor, branch: Tensor) -> Tensor:
        """Main path and branch in one, attended to and clipped."""
        x = mp_sum(x, branch, BALANCE)
        if self.attention is not None:
            x = self.attention(x)
        return x.clamp(-LIMIT, LIMIT)


class EncoderBlock(MPBlock):
    """A block on the way down: pixel norm on the main path, and the branch reads the normed."""

    skip_first = True

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """From (B, in_channels, H, W), or twice that size, to (B, out_channels, H, W)."""
        if self.resamples:
            x = F.avg_pool2d(x, 2)
        if self.skip is not None:
            x = self.skip(x)
        x = unit_magnitude(x, 1)
        return self.join(x, self.branch(x, embedding))


class DecoderBlock(MPBlock):
    """A block on the way up, which reads what its mirror image put out, too."""

    skip_first = False

    def forward(self, x: Tensor, embedding: Tensor, mirrored: Tensor | None = None) -> Tensor:
        """From (B, in_channels, H, W), or half that size, to (B, out_channels, H, W).

        `mirrored`, of the same height and width, is joined to x; both together have in_channels.
        """
        if self.resamples:
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        if mirrored is not None:
            x = mp_cat(x, mirrored)
        branch = self.branch(x, embedding)
        return self.join(x if self.skip is None else self.skip(x), branch)


class Uncertainty(nn.Module):
    """The log variance of the error at each time: one layer on Fourier features (eqs. 14 to 16).

    Args:
        count: features of the time.
        scale: what the time is multiplied by, see `mapping.TimeFeatures`.
    """

    def __init__(self, count: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.features = MPFourier(count)
        self.layer = MPLinear(count, 1)

    def forward(self, t: Tensor) -> Tensor:
        """Shape (B,), of times t, shape (B,)."""
        return self.layer(self.features(t * self.scale).to(self.layer.weight.dtype)).squeeze(1)
