"""denoising-diffusion-pytorch's Unet, without the packages that its trainer needs."""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path

from torch import nn

from model_bench.library import CHANNELS, Library, Network, stub

NAME = "denoising_diffusion_pytorch"


def library(folder: Path) -> Library:
    sys.path.insert(0, str(folder))
    stub("torchvision", "torchvision.transforms", "torchvision.utils", "ema_pytorch", "accelerate")
    # In place of the package, which imports all its trainers: of its modules just the one is run.
    package = types.ModuleType(NAME)
    package.__path__ = [str(folder / NAME)]
    sys.modules[NAME] = package
    module = importlib.import_module(f"{NAME}.{NAME}")

    def unet(dim: int, mults: tuple[int, ...]) -> Network:
        def make() -> nn.Module:
            network: nn.Module = module.Unet(
                dim, dim_mults=mults, channels=CHANNELS, flash_attn=True
            )
            return network

        return Network("Unet", make, f"dim={dim}, dim_mults={mults}, flash_attn=True")

    networks = [unet(64, (1, 2, 2, 2)), unet(80, (1, 2, 2))]
    return Library("denoising-diffusion-pytorch", module.__version__, networks)
