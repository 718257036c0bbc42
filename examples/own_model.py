"""A model of your own: once registered, it is trained, saved, resumed and sampled by its name.

python examples/own_model.py             trains it and draws digits, in about a minute
k-diffusion train --plugin examples/own_model.py --config your.toml     with type = "mixer"
k-diffusion sample --plugin examples/own_model.py runs/own_model
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from k_diffusion.models import register_model
from k_diffusion.sampling import KSampler, unit_noise
from k_diffusion.training import load_denoiser, make_config, run_training
from k_diffusion.utils.images import image_grid, save_png


@dataclass(frozen=True)
class MixerConfig:
    """Each field is an option of the config; one that is unknown or of another type is refused."""

    in_channels: int = 1
    pixels: int = 64
    width: int = 128
    layers: int = 4
    num_classes: int = 10
    sigma_data: float = 0.5


@register_model("mixer")
class Mixer(nn.Module):
    """Layers that mix all pixels of a small image; any module with a forward like this will do."""

    Config = MixerConfig
    prediction = "edm"  # what its output means; the library does the rest

    def __init__(self, config: MixerConfig) -> None:
        super().__init__()
        self.config, self.sigma_data = config, config.sigma_data
        values, width = config.in_channels * config.pixels, config.width
        self.enter = nn.Linear(values, width)
        self.time = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))
        self.classes = nn.Embedding(config.num_classes + 1, width)  # the last: not told
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(config.layers))
        self.leave = nn.Linear(width, values)

    def forward(self, x: Tensor, t: Tensor, class_label: Tensor | None = None) -> Tensor:
        if class_label is None:
            class_label = torch.full((len(x),), self.config.num_classes, device=x.device)
        told = self.time(t[:, None].to(x.dtype)) + self.classes(class_label)
        h = self.enter(x.flatten(1))
        for layer in self.layers:
            h = h + layer(F.silu(F.layer_norm(h, h.shape[1:]) + told))
        return self.leave(h).view_as(x)


def main(images: int, out: str) -> None:
    model = {"type": "mixer", "width": 256, "sigma_data": "auto"}
    config = {"model": model, "data": {"source": "digits"}, "total_images": images, "out": out}
    checkpoint = run_training(make_config(config), overwrite=True).checkpoint
    denoiser, _ = load_denoiser(checkpoint)
    noise = unit_noise((1, 8, 8), seeds=range(40))
    drawn = KSampler(denoiser, "karras", "dpmpp_2m").sample(noise, 20, torch.arange(40) % 10)
    save_png(f"{out}/digits.png", image_grid(drawn, scale=6))
    print(f"the digits 0 to 9, four of each, are in {out}/digits.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=200_000, help="to train on")
    parser.add_argument("--out", default="runs/own_model", help="folder to write to")
    main(**vars(parser.parse_args()))
