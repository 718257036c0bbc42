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

    def unet(flash: bool) -> Network:
        def make() -> nn.Module:
            return module.Unet(64, dim_mults=(1, 2, 3), channels=CHANNELS, flash_attn=flash)

        return Network("Unet", make, f"dim=64, dim_mults=(1, 2, 3), flash_attn={flash}")

    return Library(
        "denoising-diffusion-pytorch", module.__version__, [unet(False), unet(True)]
    )
