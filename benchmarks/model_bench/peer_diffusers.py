"""diffusers' UNet2DModel; its attention is `scaled_dot_product_attention` by default."""

from __future__ import annotations

import sys
from pathlib import Path

from torch import Tensor, nn

from model_bench.library import CHANNELS, SIZE, Library, Network


def library(folder: Path) -> Library:
    sys.path.insert(0, str(folder))
    import diffusers

    def call(network: nn.Module, x: Tensor, t: Tensor) -> Tensor:
        answer: Tensor = network(x, t, return_dict=False)[0]
        return answer

    def unet(channels: tuple[int, ...], layers: int) -> Network:
        def make() -> nn.Module:
            network: nn.Module = diffusers.UNet2DModel(
                sample_size=SIZE,
                in_channels=CHANNELS,
                out_channels=CHANNELS,
                block_out_channels=channels,
                layers_per_block=layers,
                down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
                up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
                attention_head_dim=32,
            )
            return network

        options = f"block_out_channels={channels}, layers_per_block={layers}"
        return Network("UNet2DModel", make, f"{options}, attention in the last level", call)

    networks = [unet((64, 128, 128), 2), unet((96, 160, 160), 1)]
    return Library("diffusers", diffusers.__version__, networks)
