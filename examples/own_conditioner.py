"""A conditioner of your own: how much ink a digit has, told to the network as a vector.

python examples/own_conditioner.py       trains, then asks for little ink and for much
k-diffusion sample --plugin examples/own_conditioner.py runs/own_conditioner --condition 0.3
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from k_diffusion.models import Conditioner, register_conditioner
from k_diffusion.sampling import KSampler, unit_noise
from k_diffusion.training import load_conditioner, load_denoiser, make_config, run_training


@dataclass(frozen=True, kw_only=True)
class InkConfig:
    reads: str = "clean"  # of a training batch: the clean images themselves


@register_conditioner("ink")
class Ink(Conditioner):
    """The share of ink in a picture, from 0 to 1."""

    Config = InkConfig
    keywords = ("embedding",)  # of the network

    def forward(self, raw: Any) -> dict[str, Tensor]:
        ink = torch.as_tensor(raw, dtype=torch.float32, device=self.device)
        # The 1 says that it is told at all: without it, no ink would look like not being told.
        return {"embedding": torch.stack([4 * ink, torch.ones_like(ink)], 1)}

    def null(self, batch: int, like: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        return {"embedding": torch.zeros(batch, 2, device=self.device)}

    def from_batch(self, raws: Mapping[str, Any], seeds: Any) -> dict[str, Tensor]:
        return self(ink_of(self.find(raws)))

    def read(self, word: str) -> list[float]:
        return [float(word)]  # from the command line: --condition 0.3


def ink_of(images: Tensor) -> Tensor:
    return (images.flatten(1).mean(1) + 1) / 2


def main(images: int, out: str) -> None:
    config = {
        "model": {
            "type": "unet", "channels": 32, "channel_mults": [1, 2], "blocks": 1,
            "attention": [False, True], "embedding_dim": 2,
            "prediction": "edm", "sigma_data": "auto",
        },
        "conditioner": {"type": "ink"},
        "data": {"source": "digits"},
        "optimizer": {"lr": 2e-3},
        "total_images": images,
        "out": out,
    }  # fmt: skip
    checkpoint = run_training(make_config(config), overwrite=True).checkpoint
    denoiser, info = load_denoiser(checkpoint)
    conditioner = load_conditioner(info)
    sampler = KSampler(denoiser, "karras", "dpmpp_2m")
    for asked in (0.2, 0.3, 0.4):
        noise = unit_noise((1, 8, 8), seeds=range(16))
        drawn = ink_of(sampler.sample(noise, 12, conditioner([asked] * 16)))
        print(f"asked for {asked:.2f} of ink, drawn with {drawn.mean():.2f} ± {drawn.std():.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=30_000, help="to train on")
    parser.add_argument("--out", default="runs/own_conditioner", help="folder to write to")
    main(**vars(parser.parse_args()))
