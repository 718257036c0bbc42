"""diffusers' UNet2DModel; its attention is `scaled_dot_product_attention` by default."""

from __future__ import annotations

import sys
from pathlib import Path

from torch import Tensor, nn

from model_bench.library import CHANNELS, SIZE, Library, Network


def library(folder: Path) -> Library:
    sys.path.insert(0, str(folder))
    import diffusers

    def make() -> nn.Module:
        return diffusers.UNet2DModel(
            sample_size=SIZE,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            block_out_channels=(64, 128, 128),
            layers_per_block=2,
            down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
            attention_head_dim=32,
        )

    def call(network: nn.Module, x: Tensor, t: Tensor) -> Tensor:
        return network(x, t, return_dict=False)[0]

    unet = Network(
        "UNet2DModel",
        make,
        "block_out_channels=(64, 128, 128), layers_per_block=2, attention in the last level, "
        "attention_head_dim=32",
        call,
    )
    return Library("diffusers", diffusers.__version__, [unet])
