"""azula's UNet, which is given an embedding of the time: by the library's own layer."""

from __future__ import annotations

import sys
from pathlib import Path

from torch import Tensor, nn

from model_bench.library import CHANNELS, Library, Network

WIDTH = 256  # of the embedding


def library(folder: Path) -> Library:
    sys.path.insert(0, str(folder))
    import azula
    from azula.nn.layers import SineEncoding
    from azula.nn.unet import UNet

    class Timed(nn.Module):
        def __init__(self, norm: str) -> None:
            super().__init__()
            self.encode = nn.Sequential(SineEncoding(WIDTH), nn.Linear(WIDTH, WIDTH), nn.SiLU())
            self.unet = UNet(
                CHANNELS,
                CHANNELS,
                mod_features=WIDTH,
                hid_channels=(96, 192, 192),
                hid_blocks=(1, 1, 2),
                norm=norm,
            )

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.unet(x, self.encode(t))

    def unet(norm: str) -> Network:
        options = f"hid_channels=(96, 192, 192), hid_blocks=(1, 1, 2), norm={norm}"
        return Network("UNet", lambda: Timed(norm), options)

    networks = [unet(norm) for norm in ("layer", "group")]
    return Library("azula", azula.__version__, networks)
