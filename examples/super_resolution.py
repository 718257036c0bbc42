"""An image as the condition: digits from pictures of half their size.

    python examples/super_resolution.py      trains, then compares with linear enlargement

Inpainting is alike: see inpainting.py.
"""

from __future__ import annotations

import argparse

import torch

from k_diffusion.models import LowResolution
from k_diffusion.sampling import KSampler, unit_noise
from k_diffusion.training import Digits, load_denoiser, make_config, run_training
from k_diffusion.utils.images import image_grid, save_png


def main(images: int, out: str) -> None:
    conditioner = LowResolution(channels=1, factor=2)  # makes its own small pictures in training
    config = {
        "model": {
            "type": "unet", "channels": 32, "channel_mults": [1, 2], "blocks": 1,
            "attention": [False, True], "image_channels": 1,
            "prediction": "edm", "sigma_data": "auto",
        },
        "data": {"source": "digits"},
        "optimizer": {"lr": 2e-3},
        "total_images": images,
        "out": out,
    }  # fmt: skip
    result = run_training(make_config(config), conditioner=conditioner, overwrite=True)
    denoiser, _ = load_denoiser(result.checkpoint)

    real = Digits("test").images[:64]
    small = conditioner.lower(real)
    condition = conditioner(small)  # what any network with image_channels = 1 can be told
    noise = unit_noise(real.shape[1:], seeds=range(len(real)))
    drawn = KSampler(denoiser, "karras", "dpmpp_2m").sample(noise, 12, condition)
    for name, made in (("linear", condition["image"]), ("diffusion", drawn)):
        lost = (conditioner.lower(made) - small).square().mean().sqrt()
        error = (made - real).square().mean().sqrt()
        print(f"{name:<10} error {error:.3f}, against the small picture {lost:.3f}")
    rows = torch.cat([condition["image"][:10], drawn[:10], real[:10]])
    grid = image_grid(rows, rows_named=["linear", "diffusion", "real"], columns=10, scale=6)
    save_png(f"{out}/pictures.png", grid)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=50_000, help="to train on")
    parser.add_argument("--out", default="runs/super_resolution", help="folder to write to")
    main(**vars(parser.parse_args()))
