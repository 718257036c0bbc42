"""A part of an image as the condition: digits completed where a mask hides them.

    python examples/inpainting.py      trains on random masks, then fills in strokes and halves

Any denoiser fills in holes without training for it (`guidance`); one that has learned it sees the
known part in every evaluation, and needs few of them.
"""

from __future__ import annotations

import argparse

import torch

from k_diffusion.models import KnownPart
from k_diffusion.sampling import KSampler, unit_noise
from k_diffusion.training import Digits, load_denoiser, make_config, run_training
from k_diffusion.utils.augmentation import random_mask
from k_diffusion.utils.images import image_grid, save_png


def main(images: int, out: str) -> None:
    # Boxes, halves, strokes and no mask at all: drawn anew for each image each time it is seen.
    conditioner = KnownPart(channels=1, mask="mixed")
    config = {
        "model": {
            "type": "unet", "channels": 32, "channel_mults": [1, 2], "blocks": 1,
            "attention": [False, True], "prediction": "edm", "sigma_data": "auto",
            "image_channels": conditioner.image_channels,  # the picture's, and the mask
        },
        "data": {"source": "digits"},
        "augmentation": {"warp": 0.12},  # 1,438 digits are few; the network is told what is done
        "optimizer": {"lr": 2e-3},
        "total_images": images,
        "out": out,
    }  # fmt: skip
    result = run_training(make_config(config), conditioner=conditioner, overwrite=True)
    denoiser, _ = load_denoiser(result.checkpoint)

    real = Digits("test").images[:64]
    noise = unit_noise(real.shape[1:], seeds=range(len(real)))
    rows, names = [real[:10]], ["real"]
    for kind in ("stroke", "half"):
        hidden = random_mask(kind, len(real), (8, 8), seeds_of(real))
        condition = conditioner((real, ~hidden))
        drawn = KSampler(denoiser, "karras", "dpmpp_2m").sample(noise, 12, condition)
        for name, made in (("another digit", real.roll(1, 0)), ("diffusion", drawn)):
            error = (made - real)[hidden].square().mean().sqrt()
            print(f"{kind:<7} {name:<15} error where hidden {error:.3f}")
        kept = (drawn - real)[~hidden].abs().mean()
        print(f"{kind:<7} {'diffusion':<15} error where known {kept:.3f}")
        shown = torch.where(hidden, torch.zeros_like(real), real)
        rows += [shown[:10], drawn[:10]]
        names += [kind, "drawn"]
    grid = image_grid(torch.cat(rows), rows_named=names, columns=10, scale=6)
    save_png(f"{out}/pictures.png", grid)


def seeds_of(images: torch.Tensor) -> range:
    """One a picture, so that its mask is the same each time."""
    return range(1000, 1000 + len(images))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=50_000, help="to train on")
    parser.add_argument("--out", default="runs/inpainting", help="folder to write to")
    main(**vars(parser.parse_args()))
