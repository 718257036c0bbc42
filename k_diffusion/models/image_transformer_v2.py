"""The established module of the hourglass transformer: `ImageTransformerV2` as it was made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from k_diffusion.models.established_transformers import ImageTransformerV2
from k_diffusion.models.image_transformer_v1 import check_ends, transformer_groups

__all__ = [
    "GlobalAttentionSpec",
    "ImageTransformerDenoiserModelV2",
    "LevelSpec",
    "MappingSpec",
    "NeighborhoodAttentionSpec",
    "NoAttentionSpec",
    "ShiftedWindowAttentionSpec",
]


@dataclass
class GlobalAttentionSpec:
    """Attention to every token, with heads of d_head channels."""

    d_head: int


@dataclass
class NeighborhoodAttentionSpec:
    """Attention to the kernel_size by kernel_size tokens around."""

    d_head: int
    kernel_size: int


@dataclass
class ShiftedWindowAttentionSpec:
    """Attention within windows of window_size by window_size tokens, shifted by half every time."""

    d_head: int
    window_size: int


@dataclass
class NoAttentionSpec:
    """No attention: feed-forwards alone."""


@dataclass
class LevelSpec:
    """Blocks of a level, the width of its tokens and its feed-forwards, its attention, and the
    share of activations that it drops in training."""

    depth: int
    width: int
    d_ff: int
    self_attn: (
        GlobalAttentionSpec
        | NeighborhoodAttentionSpec
        | ShiftedWindowAttentionSpec
        | NoAttentionSpec
    )
    dropout: float


@dataclass
class MappingSpec:
    """Blocks of the mapping, its width and that of its feed-forwards, and the share dropped."""

    depth: int
    width: int
    d_ff: int
    dropout: float


_TYPES: dict[type, str] = {
    GlobalAttentionSpec: "global",
    NeighborhoodAttentionSpec: "neighborhood",
    ShiftedWindowAttentionSpec: "shifted-window",
    NoAttentionSpec: "none",
}


def _attention(spec: Any) -> dict[str, Any]:
    if type(spec) not in _TYPES:
        raise ValueError(
            f"self_attn = {spec!r} is no attention: give one of "
            f"{', '.join(kind.__name__ for kind in _TYPES)}"
        )
    return {"type": _TYPES[type(spec)], **asdict(spec)}


class ImageTransformerDenoiserModelV2(ImageTransformerV2):
    """`ImageTransformerV2`, made and grouped as it always was.

    Args:
        levels: the finest first.
        mapping: what makes one vector of all that is known of a sample.
        in_channels, out_channels: channels of the image, before and after.
        patch_size: height and width of a patch, in pixels.
        num_classes: classes, and one more, the last: no class; 0: none.
        mapping_cond_dim: width of `mapping_cond`; 0: none.
    """

    def __init__(
        self,
        levels: Sequence[LevelSpec],
        mapping: MappingSpec,
        in_channels: int,
        out_channels: int,
        patch_size: Sequence[int],
        num_classes: int = 0,
        mapping_cond_dim: int = 0,
    ) -> None:
        check_ends(in_channels, out_channels, num_classes, ("in_channels", "out_channels"))
        super().__init__(
            input_channels=in_channels,
            patch_size=patch_size,
            widths=[level.width for level in levels],
            depths=[level.depth for level in levels],
            d_ffs=[level.d_ff for level in levels],
            self_attns=[_attention(level.self_attn) for level in levels],
            dropout_rate=[level.dropout for level in levels],
            mapping_width=mapping.width,
            mapping_depth=mapping.depth,
            mapping_d_ff=mapping.d_ff,
            mapping_cond_dim=mapping_cond_dim,
            mapping_dropout_rate=mapping.dropout,
            num_classes=max(0, num_classes - 1),
        )

    def param_groups(
        self, base_lr: float = 5e-4, mapping_lr_scale: float = 1 / 3
    ) -> list[dict[str, Any]]:
        """See `transformer_groups`."""
        return transformer_groups(self, base_lr, mapping_lr_scale)
