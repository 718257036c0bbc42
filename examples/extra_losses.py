"""Losses beside the denoising loss: one by the features of a network, one by a mask.

    python examples/extra_losses.py      trains with both, and draws digits

Features are those of a classifier of the same data, so nothing is downloaded. The mask comes with
the data: here it is the ink of each digit, elsewhere it may be what a person has marked.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from k_diffusion import training
from k_diffusion.evaluation.classifier import train_classifier
from k_diffusion.sampling import KSampler, unit_noise
from k_diffusion.utils.images import image_grid, save_png


@training.register_loss("features")
class FeatureDistance(nn.Module):
    """How far apart two images are in the eyes of a network, at several scales (after Zhang et al.
    2018, arXiv:1801.03924): its weights are frozen, as it does not say `trained = True`."""

    def __init__(self, *, epochs: int = 10, seed: int = 0) -> None:
        super().__init__()
        digits = training.Digits("train")
        self.layers = train_classifier(digits.images, digits.labels, epochs=epochs, seed=seed).body

    def forward(self, outcome: training.Outcome) -> Tensor:
        one, other, distance = outcome.denoised, outcome.x0, torch.zeros_like(outcome.weight)
        for layer in self.layers[:9]:  # those with a height and a width
            one, other = layer(one), layer(other)
            if isinstance(layer, nn.SiLU):
                apart = F.normalize(one, dim=1) - F.normalize(other, dim=1)
                distance = distance + apart.square().sum(1).mean((1, 2))
        return distance  # of each sample, shape (B,)


@training.register_loss("masked", raws=["mask"])
def masked(outcome: training.Outcome, *, outside: float = 0.0) -> Tensor:
    """The denoising loss of what a mask shows, and `outside` of the rest."""
    mask = outcome.raws["mask"]
    square = (outcome.denoised - outcome.x0).square() * (mask + outside * (1 - mask))
    return outcome.weight * square.flatten(1).sum(1) / mask.flatten(1).sum(1).clamp(min=1)


def main(images: int, out: str) -> None:
    digits = training.Digits("train")
    ink = (digits.images > 0).float()
    source = training.ArraySource(
        digits.images, digits.labels, digits.class_names, raws={"mask": ink}
    )
    config = {
        "model": {
            "type": "unet", "channels": 32, "channel_mults": [1, 2], "blocks": 1,
            "attention": [False, True], "num_classes": 10,
            "prediction": "edm", "sigma_data": "auto",
        },
        "data": {"source": "digits"},
        "loss": {"extra": {"features": {"weight": 0.05}, "masked": {"weight": 0.2}}},
        "total_images": images,
        "out": out,
    }  # fmt: skip
    result = training.run_training(training.make_config(config), source=source, overwrite=True)
    denoiser, _ = training.load_denoiser(result.checkpoint)
    noise = unit_noise((1, 8, 8), seeds=range(40))
    drawn = KSampler(denoiser, "karras", "dpmpp_2m").sample(noise, 20, torch.arange(40) % 10)
    save_png(f"{out}/digits.png", image_grid(drawn, scale=6))
    print(f"the digits 0 to 9, four of each, are in {out}/digits.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=50_000, help="to train on")
    parser.add_argument("--out", default="runs/extra_losses", help="folder to write to")
    main(**vars(parser.parse_args()))
