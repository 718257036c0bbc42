"""From one digit to another through the noises that they are made of.

    python examples/interpolate.py           trains, then draws what lies between digits

The probability-flow ODE takes every image to a noise and back. Between two noises lie noises as
likely as they are on the great circle, not on the line, whose middle is too small.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from k_diffusion.sampling import KSampler
from k_diffusion.sampling.likelihood import invert
from k_diffusion.training import Digits, load_denoiser, make_config, run_training
from k_diffusion.utils.images import image_grid, save_png

STEPS = 7


def great_circle(a: Tensor, b: Tensor, share: float) -> Tensor:
    """The point of that share of the way from each a to its b, shape (B, ...), on an arc."""
    flat = [v.flatten(1) for v in (a, b)]
    lengths = [v.norm(dim=1) for v in flat]
    cosine = (flat[0] * flat[1]).sum(1) / (lengths[0] * lengths[1])
    angle = cosine.clamp(-1, 1).arccos().clamp_min(1e-6)
    parts = [((1 - share) * angle).sin() / angle.sin(), (share * angle).sin() / angle.sin()]
    first, second = (part.reshape(-1, *[1] * (a.ndim - 1)) for part in parts)
    return first * a + second * b


def main(images: int, out: str) -> None:
    config = {
        "model": {
            "type": "unet", "channels": 32, "channel_mults": [1, 2], "blocks": 1,
            "attention": [False, True], "prediction": "edm", "sigma_data": "auto",
        },
        "data": {"source": "digits"},
        "optimizer": {"lr": 2e-3},
        "total_images": images,
        "out": out,
    }  # fmt: skip
    result = run_training(make_config(config), overwrite=True)
    denoiser, _ = load_denoiser(result.checkpoint)

    sampler = KSampler(denoiser, "karras", "heun")
    levels = sampler.levels(100)
    real = Digits("test")
    first, second = real.images[:8], real.images[8:16]
    noises = [invert(denoiser, x, levels[-2], levels[0])[0] for x in (first, second)]
    back = sampler.sample(noises[0], 100)
    error = (back - first).norm() / first.norm()
    print(f"image -> noise -> image: relative error {error:.1e}")

    shares = [i / (STEPS + 1) for i in range(1, STEPS + 1)]
    rows = [sampler.sample(great_circle(*noises, share), 30) for share in shares]
    between = torch.stack([first, *rows, second], 1).flatten(0, 1)
    save_png(f"{out}/between.png", image_grid(between, columns=STEPS + 2, scale=6))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=50_000, help="to train on")
    parser.add_argument("--out", default="runs/interpolate", help="folder to write to")
    main(**vars(parser.parse_args()))
