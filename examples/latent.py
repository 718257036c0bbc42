"""Diffusion in latents: an autoencoder halves the digits, a network works on what it gives.

    python examples/latent.py                trains both, and draws digits

An autoencoder of diffusers takes the same place:
`PretrainedAutoencoder.from_pretrained("folder or id", subfolder="vae")` of k_diffusion.external.
"""

from __future__ import annotations

import argparse

import torch

from k_diffusion.models import SmallAutoencoder
from k_diffusion.sampling import KSampler, unit_noise
from k_diffusion.training import (
    Digits,
    LatentSource,
    check_autoencoder,
    load_autoencoder,
    load_denoiser,
    make_config,
    run_training,
    save_autoencoder,
    train_autoencoder,
)
from k_diffusion.utils.images import image_grid, save_png


def main(images: int, out: str) -> None:
    digits, held_out = Digits("train"), Digits("test").images
    fresh = SmallAutoencoder(in_channels=1, latent_channels=4, channels=32, halvings=1)
    save_autoencoder(
        f"{out}/vae.safetensors", train_autoencoder(fresh, digits, total_images=images)
    )
    autoencoder = load_autoencoder(f"{out}/vae.safetensors")
    with torch.no_grad():
        latents = autoencoder.encode(held_out)
        error = (autoencoder.decode(latents) - held_out).square().mean().sqrt()
    print(f"latents {tuple(latents.shape[1:])}: mean {latents.mean():.2f}, deviation "
          f"{latents.std():.2f}; what comes back differs by {error:.3f}")  # fmt: skip

    config = {
        "model": {
            "type": "unet", "channels": 32, "channel_mults": [1, 2], "blocks": 1,
            "attention": [False, True], "num_classes": 10, "prediction": "flow",
        },
        "data": {"source": "digits"},  # of which `source` makes the latents
        "optimizer": {"lr": 2e-3},
        "total_images": images,
        "out": out,
    }  # fmt: skip
    source = LatentSource(digits, autoencoder).encoded()
    checkpoint = run_training(make_config(config), source=source, overwrite=True).checkpoint
    denoiser, info = load_denoiser(checkpoint)
    check_autoencoder(info, autoencoder)  # the one whose latents the network knows
    noise = unit_noise(info.data["shape"], seeds=range(40))
    drawn = KSampler(denoiser, solver="dpmpp_2m").sample(noise, 20, torch.arange(40) % 10)
    with torch.no_grad():
        save_png(f"{out}/digits.png", image_grid(autoencoder.decode(drawn), scale=6))
    print(f"the digits 0 to 9, four of each, are in {out}/digits.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=100_000, help="to train each on")
    parser.add_argument("--out", default="runs/latent", help="folder to write to")
    main(**vars(parser.parse_args()))
