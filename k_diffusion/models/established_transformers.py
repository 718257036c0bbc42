"""The established transformers of images, under the names that their checkpoints have.

Version 2 is the hourglass of this library, called in another way. Version 1, of one level, shares
its norms, feed-forwards and mapping, and has an attention of its own.

They are called as `network(x, sigma, **condition)`, x of about unit variance, sigma the noise
standard deviation in data units.
"""

from __future__ import annotations

import math
from collections.abc import Mapping as Dictionary
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from k_diffusion.models.attention import MixesPositions
from k_diffusion.models.checks import check_axes
from k_diffusion.models.conditions import ClassLabel, Condition, Vector
from k_diffusion.models.established_conditions import check_established
from k_diffusion.models.hourglass import HourglassConfig, HourglassLayers
from k_diffusion.models.layers import zeroed
from k_diffusion.models.mapping import FourierFeatures
from k_diffusion.models.recompute import Checkpointing, Policy, check_policy, recomputed
from k_diffusion.models.transformer import (
    EPSILON,
    AdaRMSNorm,
    FeedForward,
    Mapping,
    RMSNorm,
    axial_positions,
    global_attention,
)
from k_diffusion.utils.maths import unknown

AUGMENTATIONS = 9
"""Numbers that say how a sample was augmented (Karras et al. 2022, arXiv:2206.00364, app. F)."""


class _Told(nn.Module):
    """What both versions check before they compute; abstract."""

    num_classes: int
    mapping_cond_dim: int = 0

    def check_condition(self, batch: int, **condition: Any) -> None:
        """See `Network.check_condition`; under the established names."""
        check_established(self._conditions(), batch, None, condition, values=True)

    def _conditions(self) -> dict[Condition, int]:
        return {
            ClassLabel("class_cond", self.num_classes): self.num_classes,
            Vector("mapping_cond", self.mapping_cond_dim): self.mapping_cond_dim,
            Vector("aug_cond", AUGMENTATIONS): AUGMENTATIONS,
        }

    def _check(self, x: Tensor, sigma: Tensor, **condition: Tensor | None) -> None:
        """Refuse shapes that broadcasting would take for others; reads no value."""
        if sigma.shape != x.shape[:1]:
            raise ValueError(
                f"sigma has shape {tuple(sigma.shape)}; give one a sample, shape ({x.shape[0]},)"
            )
        check_established(self._conditions(), x.shape[0], x.shape[2:], condition, values=False)


class ImageTransformerV2(_Told, HourglassLayers):
    """The network of "image_transformer_v2": the hourglass of Crowson et al. 2024.

    Args:
        input_channels: channels of x.
        patch_size: height and width of a patch, in pixels.
        widths: width of each level, the finest first.
        depths: blocks of each level.
        d_ffs: width between the layers of the feed-forwards of each level; None: 3 widths.
        self_attns: of each level: {"type": "global", "d_head": 64}, or "neighborhood" with d_head
            and kernel_size, or "shifted-window" with d_head and window_size, or "none"; None:
            neighbourhoods of 7, but global at the coarsest, and d_head 64.
        dropout_rate: of each level, or one for all; None: 0.
        mapping_width: width of the vector that conditions every layer.
        mapping_depth: blocks of the mapping.
        mapping_d_ff: width between the layers of a block; None: 3 mapping_width.
        mapping_cond_dim: width of mapping_cond; 0: none.
        mapping_dropout_rate: share of activations dropped there, in training.
        num_classes: classes; the table has a row more, the last: no class. 0: none.
        checkpointing: see `NetworkConfig`.

    Raises:
        ValueError: what cannot work, with its value and the way out.
    """

    def __init__(
        self,
        *,
        input_channels: int,
        patch_size: Sequence[int],
        widths: Sequence[int],
        depths: Sequence[int],
        d_ffs: Sequence[int | None] | None = None,
        self_attns: Sequence[Dictionary[str, Any]] | None = None,
        dropout_rate: float | Sequence[float] | None = None,
        mapping_width: int = 256,
        mapping_depth: int = 2,
        mapping_d_ff: int | None = None,
        mapping_cond_dim: int = 0,
        mapping_dropout_rate: float = 0.0,
        num_classes: int = 0,
        checkpointing: Policy = False,
    ) -> None:
        super().__init__()
        if d_ffs is not None:
            if len(d_ffs) != len(widths):
                raise ValueError(
                    f"d_ffs = {d_ffs} has {len(d_ffs)} entries for the {len(widths)} levels of "
                    f"widths = {widths}; give one for each, or null for 3 times its width"
                )
            d_ffs = [d or 3 * width for d, width in zip(d_ffs, widths, strict=True)]
        dropout = dropout_rate or 0.0
        config = HourglassConfig(
            in_channels=input_channels,
            patch_size=tuple(patch_size),
            widths=tuple(widths),
            depths=tuple(depths),
            ff_widths=None if d_ffs is None else tuple(d_ffs),  # type: ignore[arg-type]
            **_attention(self_attns),
            dropout=dropout if isinstance(dropout, (int, float)) else tuple(dropout),
            mapping_width=mapping_width,
            mapping_depth=mapping_depth,
            mapping_ff_width=mapping_d_ff,
            mapping_dropout=mapping_dropout_rate,
            embedding_dim=mapping_cond_dim,
            augmentation_dim=AUGMENTATIONS,
            num_classes=num_classes,
            prediction="edm",
            checkpointing=checkpointing,
        )
        self.num_classes = num_classes
        self.mapping_cond_dim = mapping_cond_dim
        self.checkpointing = Checkpointing(config.checkpointing)
        self.add_layers(config)

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        aug_cond: Tensor | None = None,
        class_cond: Tensor | None = None,
        mapping_cond: Tensor | None = None,
    ) -> Tensor:
        """The network's output, shape of x.

        Args:
            x: scaled noisy data, shape (B, input_channels, height, width).
            sigma: noise standard deviations in data units, shape (B,).
            aug_cond: how the samples were augmented, shape (B, 9); None: not at all.
            class_cond: classes, shape (B,), num_classes for none; None: none.
            mapping_cond: shape (B, mapping_cond_dim); None: zeros.

        Raises:
            ValueError: a condition that it was not built for, or a shape or dtype that does not
                fit.
        """
        self._check(x, sigma, class_cond=class_cond, mapping_cond=mapping_cond, aug_cond=aug_cond)
        mapping = self.embed(sigma.log() / 4, class_cond, mapping_cond, aug_cond)
        return self.run(x, mapping, self.checkpointing)


_TYPES = {
    "global": "global",
    "neighborhood": "neighborhood",
    "shifted-window": "shifted_window",
    "none": "none",
}


def _attention(self_attns: Sequence[Dictionary[str, Any]] | None) -> dict[str, Any]:
    """The levels' attention as the fields of a HourglassConfig."""
    if self_attns is None:
        return {}
    for attn in self_attns:
        if attn.get("type") not in _TYPES:
            raise ValueError(unknown("self_attns type", attn.get("type"), _TYPES))
        takes = {"global": ["d_head"], "neighborhood": ["d_head", "kernel_size"], "none": []}
        takes["shifted-window"] = ["d_head", "window_size"]
        for key in attn:
            if key != "type" and key not in takes[attn["type"]]:
                raise ValueError(
                    unknown(f"key of {attn['type']} attention", key, takes[attn["type"]])
                )
        if attn["type"] == "shifted-window" and "window_size" not in attn:
            raise ValueError(
                f"self_attns {dict(attn)} has no window_size; give the side of a window, in tokens"
            )

    def each(key: str, default: int) -> tuple[int, ...]:
        return tuple(attn.get(key, default) for attn in self_attns)

    return {
        "attention": tuple(_TYPES[attn["type"]] for attn in self_attns),
        "head_channels": each("d_head", 64),
        "kernel_size": each("kernel_size", 7),
        "window_size": each("window_size", 8),
    }


# ---------------------------------------------------------------- version 1


class ImageTransformerV1(_Told):
    """The network of "image_transformer_v1": one level, global attention, heads of 64 channels.

    Args:
        input_channels: channels of x.
        patch_size: height and width of a patch, in pixels.
        width: width of the tokens, and of the mapping; a multiple of 64.
        depth: blocks.
        d_ff: width between the layers of the feed-forwards; None or 0: about 8/3 width, rounded to
            a multiple of the largest power of two that changes it by no more than 5%.
        dropout_rate: share of activations dropped, in training.
        num_classes: classes; the table has a row more, the last: no class. 0: none.
        checkpointing: see `NetworkConfig`.

    Raises:
        ValueError: what cannot work, with its value and the way out.
    """

    HEAD_CHANNELS = 64
    MAPPING_DEPTH = 2

    def __init__(
        self,
        *,
        input_channels: int,
        patch_size: Sequence[int],
        width: int,
        depth: int,
        d_ff: int | None = None,
        dropout_rate: float = 0.0,
        num_classes: int = 0,
        checkpointing: Policy = False,
    ) -> None:
        super().__init__()
        if width < 1 or width % self.HEAD_CHANNELS:
            near = max(1, round(width / self.HEAD_CHANNELS)) * self.HEAD_CHANNELS
            raise ValueError(
                f"width = {width} is no multiple of {self.HEAD_CHANNELS}, the channels of a head; "
                f"{near} works"
            )
        for name, value in (("depth", depth), ("num_classes", num_classes)):
            if value < 0:
                raise ValueError(f"{name} = {value} is negative; give 0 for none")
        if len(patch_size) != 2 or min(patch_size) < 1:
            raise ValueError(f"patch_size = {patch_size} must be a height and a width, from 1 on")
        check_policy(checkpointing, 1, depth)
        hidden = d_ff or rounded(width * 8 / 3)
        self.num_classes = num_classes
        self.input_channels = input_channels
        self.patch = (patch_size[0], patch_size[1])
        self.checkpointing = Checkpointing(checkpointing)
        pixels = input_channels * math.prod(self.patch)
        self.time_emb = FourierFeatures(1, width // 2)
        self.time_in_proj = nn.Linear(width, width, bias=False)
        self.aug_emb = FourierFeatures(AUGMENTATIONS, width // 2)
        self.aug_in_proj = nn.Linear(width, width, bias=False)
        self.class_emb = nn.Embedding(num_classes + 1, width) if num_classes else None
        self.mapping = Mapping(self.MAPPING_DEPTH, width, hidden, dropout_rate)
        self.in_proj = nn.Linear(pixels, width, bias=False)
        self.blocks = nn.ModuleList(
            _BlockV1(width, hidden, self.HEAD_CHANNELS, dropout_rate) for _ in range(depth)
        )
        self.out_norm = RMSNorm(width)
        self.out_proj = zeroed(nn.Linear(width, pixels, bias=False))

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        aug_cond: Tensor | None = None,
        class_cond: Tensor | None = None,
    ) -> Tensor:
        """The network's output, shape of x; arguments as of `ImageTransformerV2.forward`."""
        high, wide = self.patch
        check_axes(x, self.input_channels, ("height", "width"))
        self._check(x, sigma, class_cond=class_cond, aug_cond=aug_cond)
        if x.shape[2] % high or x.shape[3] % wide:
            raise ValueError(
                f"x is {x.shape[2]} x {x.shape[3]} pixels, which patches of {high} x {wide} cannot "
                "share out; give multiples of the patch"
            )
        h = x.unflatten(3, (-1, wide)).unflatten(2, (-1, high))
        h = self.in_proj(h.permute(0, 2, 4, 1, 3, 5).flatten(3))  # a channel's pixels side by side
        mapping = self._embed(sigma.log() / 4, aug_cond, class_cond)
        positions = axial_positions(h, aspect=high / wide)
        for index, block in enumerate(self.blocks):
            h = self.checkpointing.run(block, h, mapping, positions, index=index)
        h = self.out_proj(self.out_norm(h)).unflatten(3, (-1, high, wide))
        return h.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)

    def _embed(self, time: Tensor, augmentation: Tensor | None, label: Tensor | None) -> Tensor:
        dtype, half = self.in_proj.weight.dtype, math.sqrt(0.5)
        if augmentation is None:
            augmentation = time.new_zeros(len(time), AUGMENTATIONS)
        hidden = self.time_in_proj((half * self.time_emb(time[:, None])).to(dtype))
        hidden = hidden + self.aug_in_proj((half * self.aug_emb(augmentation)).to(dtype))
        if self.class_emb is not None:
            if label is None:
                hidden = hidden + self.class_emb.weight[self.num_classes]
            else:
                hidden = hidden + self.class_emb(label.long())
        return self.mapping(hidden)


def rounded(value: float, tolerance: float = 0.05) -> int:
    """The nearest multiple of the largest power of two for which it is within the tolerance."""
    power = 2 ** max(0, math.ceil(math.log2(value)) - 1)
    while power > 1 and abs(round(value / power) * power - value) > tolerance * value:
        power //= 2
    return round(value / power) * power


class _BlockV1(nn.Module):
    def __init__(self, width: int, hidden: int, head_channels: int, dropout: float) -> None:
        super().__init__()
        self.self_attn = _SelfAttentionV1(width, head_channels, dropout)
        self.ff = FeedForward(width, hidden, width, dropout)

    def forward(self, x: Tensor, mapping: Tensor, positions: Tensor) -> Tensor:
        return self.ff(self.self_attn(x, mapping, positions), mapping)


class _SelfAttentionV1(MixesPositions):
    """Cosine attention whose whole heads turn, by neighbouring pairs of channels."""

    def __init__(self, width: int, head_channels: int, dropout: float) -> None:
        super().__init__()
        heads = width // head_channels
        self.head_channels = head_channels
        self.norm = AdaRMSNorm(width, width)
        self.qkv_proj = nn.Linear(width, 3 * width, bias=False)
        self.qk_norm = _LogScale(heads)
        self.pos_emb = _AxialRoPEV1(heads, head_channels)
        self.dropout = nn.Dropout(dropout)
        self.out_proj = zeroed(nn.Linear(width, width, bias=False))

    def forward(self, x: Tensor, mapping: Tensor, positions: Tensor) -> Tensor:
        qkv = recomputed(lambda x, mapping: self.qkv_proj(self.norm(x, mapping)), x, mapping)
        qk, v = qkv.unflatten(-1, (3, -1, self.head_channels)).split([2, 1], 3)
        q, k = recomputed(self._cosine, qk, self.qk_norm(), self.pos_emb(positions)).unbind(3)
        v = v.squeeze(3)
        mixed = v if self.identity else global_attention(q, k, v)
        return x + self.out_proj(self.dropout(mixed.flatten(3)))

    def _cosine(self, qk: Tensor, scale: Tensor, angles: Tensor) -> Tensor:
        unit = F.rms_norm(qk, (self.head_channels,), eps=EPSILON)
        unit = unit * (scale / self.head_channels).sqrt().to(qk.dtype)[:, None]
        a, b = unit.unflatten(-1, (-1, 2)).unbind(-1)
        angles = angles[:, :, None]
        cos, sin = angles.cos().to(qk.dtype), angles.sin().to(qk.dtype)
        return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)


class _LogScale(nn.Module):
    """The factor of each head's cosines, kept as its logarithm and at most 100."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((heads,), math.log(10)))

    def forward(self) -> Tensor:
        # Above the bound the value stays and the gradient passes, so that it can come back.
        above = (self.scale - math.log(100)).clamp(min=0).detach()
        return (self.scale - above).exp()


class _AxialRoPEV1(nn.Module):
    """Learned frequencies, kept as logarithms, those of rows and columns apart."""

    def __init__(self, heads: int, head_channels: int) -> None:
        super().__init__()
        exponents = torch.linspace(math.log(math.pi), math.log(5 * math.pi), head_channels // 4)
        self.freqs_h = nn.Parameter(exponents.repeat(heads, 1))
        self.freqs_w = nn.Parameter(exponents.repeat(heads, 1))

    def forward(self, positions: Tensor) -> Tensor:
        """Angles, shape (H, W, N, D / 2), of positions (H, W, 2)."""
        row, column = positions[:, :, None, None].unbind(-1)
        return torch.cat([row * self.freqs_h.exp(), column * self.freqs_w.exp()], -1)
