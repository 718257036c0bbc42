"""Layers that the models share: norms, the time and condition embedding, attention, blocks.

Letters in shapes: B samples, C channels, H height, W width, E the width of the embedding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from k_diffusion.utils.maths import unknown

TIME_SCALES = {
    "timestep": 1.0,
    # A unit time seen a thousandfold has the angles of a network that counts a thousand timesteps.
    "unit": 1000.0,
    # ln(sigma / alpha) / 4 lies in about [-2, 2]: sigma / alpha from e^-8 to e^8 holds every
    # schedule in use. The sinusoids are laid for times that span a thousand; on a span of four all
    # but the fastest few would be constants, and near levels would look alike. So it is stretched.
    "log_sigma": 250.0,
}
"""Time convention -> the factor that makes a network's time span about a thousand."""


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


def sinusoids(t: Tensor, count: int) -> Tensor:
    """Cosines and sines of t at `count` frequencies from 1 down to about 1/10,000.

    Args:
        t: times, shape (B,).
        count: frequencies.

    Returns:
        Features of unit mean square, shape (B, 2 count), float32 or better.

    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.5; Ho et al. 2020, arXiv:2006.11239.
    """
    # Angles reach a thousand: below float32 they would be noise, whatever the network computes in.
    t = t.to(torch.promote_types(t.dtype, torch.float32))
    powers = torch.arange(count, device=t.device, dtype=t.dtype)
    angles = t[:, None] * torch.exp(powers * (-math.log(10_000) / count))
    return torch.cat([angles.cos(), angles.sin()], 1) * math.sqrt(2)


class Conditioning(nn.Module):
    """From time and condition to one embedding: a mapping network of two layers.

    What is known of a sample meets in the hidden layer, so that the second layer can mix it.

    Args:
        features: frequencies of the time features, twice over (cosine and sine).
        width: E.
        time_scale: what times are multiplied by, see TIME_SCALES.
        num_classes: classes; row `num_classes` of the table is the learned "no label".
        embedding_dim: width of embedding vectors; `null_embedding` is the learned "none".
    """

    def __init__(
        self,
        features: int,
        width: int,
        time_scale: float = 1.0,
        num_classes: int = 0,
        embedding_dim: int = 0,
    ) -> None:
        super().__init__()
        self.time_scale = time_scale
        self.features = features
        self.num_classes = num_classes
        self.embedding_dim = embedding_dim
        self.time = nn.Linear(2 * features, width)
        self.mapping = nn.Linear(width, width)
        if num_classes:
            self.classes = nn.Embedding(num_classes + 1, width)
            # About the size that the time features have here, so that neither drowns the other.
            nn.init.normal_(self.classes.weight, std=0.5)
        if embedding_dim:
            self.vector = nn.Linear(embedding_dim, width, bias=False)
            self.null_embedding = nn.Parameter(torch.zeros(embedding_dim))

    def forward(
        self, t: Tensor, class_label: Tensor | None = None, embedding: Tensor | None = None
    ) -> Tensor:
        """The embedding, shape (B, E).

        Args:
            t: times in the network's convention, shape (B,).
            class_label: shape (B,), integers from 0 to num_classes (that one: no label); None: no
                labels.
            embedding: shape (B, embedding_dim); None: the learned null for every sample.
        """
        hidden = self.time(sinusoids(t * self.time_scale, self.features).to(self.time.weight.dtype))
        if self.num_classes:
            if class_label is None:
                hidden = hidden + self.classes.weight[self.num_classes]
            else:
                hidden = hidden + self.classes(class_label.long())
        if self.embedding_dim:
            vector = self.null_embedding[None] if embedding is None else embedding
            hidden = hidden + self.vector(vector.to(self.vector.weight.dtype))
        # The blocks' modulations begin with this non-linearity: once here instead of in each.
        return F.silu(self.mapping(F.silu(hidden)))

    def check_shapes(
        self, batch: int, class_label: Tensor | None = None, embedding: Tensor | None = None
    ) -> None:
        """Refuse what the shapes and dtypes alone show to be wrong; reads no value.

        Raises:
            ValueError: names the condition, what it is, and the way out.
        """
        if class_label is not None:
            if not self.num_classes:
                raise ValueError(
                    "class_label was given, but this model has no classes: leave it out, or build "
                    "the model with num_classes"
                )
            _check_tensor("class_label", class_label)
            if class_label.dtype not in _INTEGERS:
                raise ValueError(
                    f"class_label is of {class_label.dtype}; class indices are integers: "
                    "convert it with .long()"
                )
            if class_label.shape != (batch,):
                raise ValueError(
                    f"class_label has shape {tuple(class_label.shape)}, but the batch has {batch} "
                    f"samples: give one label a sample, shape ({batch},){_repeat(class_label)}"
                )
        if embedding is not None:
            if not self.embedding_dim:
                raise ValueError(
                    "embedding was given, but this model takes none: leave it out, or build the "
                    "model with embedding_dim"
                )
            _check_tensor("embedding", embedding)
            if not embedding.is_floating_point():
                raise ValueError(
                    f"embedding is of {embedding.dtype}; its values are real numbers: "
                    "convert it with .float()"
                )
            if embedding.shape != (batch, self.embedding_dim):
                raise ValueError(
                    f"embedding has shape {tuple(embedding.shape)}; this model and a batch of "
                    f"{batch} take ({batch}, {self.embedding_dim})"
                )

    def check(self, batch: int, condition: Mapping[str, Any]) -> None:
        """Refuse a condition that `forward` cannot take; reads values, so it may wait for a device.

        Args:
            batch: samples, B.
            condition: keyword arguments of `forward`, without the time.

        Raises:
            ValueError: an unknown name, a wrong shape, or a value out of range.
        """
        accepted = ("class_label", "embedding")
        for name in condition:
            if name not in accepted:
                raise ValueError(unknown("condition", name, accepted))
        self.check_shapes(batch, **condition)
        label, embedding = condition.get("class_label"), condition.get("embedding")
        if label is not None and label.device.type != "meta":
            label = label.long()
            wrong = label[(label < 0) | (label > self.num_classes)]
            if wrong.numel():
                raise ValueError(
                    f"class_label holds {wrong[0].item()}; this model knows classes 0 to "
                    f"{self.num_classes - 1} ({self.num_classes} stands for no label)"
                )
        if (
            embedding is not None
            and embedding.device.type != "meta"
            and not bool(torch.isfinite(embedding).all())
        ):
            raise ValueError("embedding holds values that are not finite: check what made it")


_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(
            f"{name} must be a tensor, got {type(value).__name__}: wrap it in torch.tensor()"
        )


def _repeat(label: Tensor) -> str:
    return "; to use one for all, .expand(batch) it" if label.numel() == 1 else ""


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
