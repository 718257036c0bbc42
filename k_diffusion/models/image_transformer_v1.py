"""The established module of the transformer of one level: `ImageTransformerV1` as it was made."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from k_diffusion.models.established_transformers import ImageTransformerV1

__all__ = ["ImageTransformerDenoiserModelV1"]

_DECAYS = re.compile(
    r"(qkv_proj|self_attn\.out_proj|up_proj|down_proj|norm\.linear"
    r"|(patch_in|patch_out|merges\.\d+|splits\.\d+)\.proj)\.weight$"
)
_MAPS = re.compile(r"^mapping\.|\.norm\.linear\.weight$")


def transformer_groups(
    network: nn.Module, base_lr: float, mapping_lr_scale: float
) -> list[dict[str, Any]]:
    """Groups for an optimizer: matrices decay, and what maps the condition learns more slowly.

    Args:
        network: one of the established transformers.
        base_lr: of all but the mapping and the norms' scales.
        mapping_lr_scale: of base_lr, for these.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {
        (maps, decays): [] for maps in (False, True) for decays in (True, False)
    }
    for name, parameter in network.named_parameters():
        groups[bool(_MAPS.search(name)), bool(_DECAYS.search(name))].append(parameter)
    return [
        {
            "params": parameters,
            "lr": base_lr * (mapping_lr_scale if maps else 1),
            **({} if decays else {"weight_decay": 0.0}),
        }
        for (maps, decays), parameters in groups.items()
    ]


def check_ends(before: int, after: int, num_classes: int, names: tuple[str, str]) -> None:
    """Refuse other channels after than before, and a table of classes without a choice."""
    if before != after:
        raise ValueError(
            f"{names[1]} = {after} differs from {names[0]} = {before}: give the same, the channels "
            "of the image"
        )
    if num_classes == 1 or num_classes < 0:
        raise ValueError(
            f"num_classes = {num_classes} leaves no choice: give 0, or the classes and one more "
            "for no class"
        )


class ImageTransformerDenoiserModelV1(ImageTransformerV1):
    """`ImageTransformerV1`, made and grouped as it always was.

    Args:
        n_layers: blocks.
        d_model: width of the tokens, a multiple of 64.
        d_ff: width between the layers of the feed-forwards.
        in_features, out_features: channels of the image, before and after.
        patch_size: height and width of a patch, in pixels.
        num_classes: classes, and one more, the last: no class; 0: none.
        dropout: share of activations dropped, in training.
        sigma_data: standard deviation of the clean data; only kept.
    """

    def __init__(
        self,
        n_layers: int,
        d_model: int,
        d_ff: int,
        in_features: int,
        out_features: int,
        patch_size: Sequence[int],
        num_classes: int = 0,
        dropout: float = 0.0,
        sigma_data: float = 1.0,
    ) -> None:
        check_ends(in_features, out_features, num_classes, ("in_features", "out_features"))
        super().__init__(
            input_channels=in_features,
            patch_size=patch_size,
            width=d_model,
            depth=n_layers,
            d_ff=d_ff,
            dropout_rate=dropout,
            num_classes=max(0, num_classes - 1),
        )
        self.sigma_data = sigma_data

    @torch.no_grad()
    def proj_(self) -> None:
        """Bring the factors of the cosines back to 100 at most, which is where they act."""
        for block in self.blocks:
            block.self_attn.qk_norm.scale.clamp_(max=math.log(100))  # type: ignore[union-attr, operator]

    def param_groups(
        self, base_lr: float = 5e-4, mapping_lr_scale: float = 1 / 3
    ) -> list[dict[str, Any]]:
        """See `transformer_groups`."""
        return transformer_groups(self, base_lr, mapping_lr_scale)
