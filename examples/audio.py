"""A sound's spectrogram as the condition: waveforms from what a listener hears of them.

    python examples/audio.py                 trains on gliding tones, then makes some anew

The network is the UNet in one dimension. For a sound as a sequence, by cross-attention, the
conditioner is "audio_tokens".
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor

from k_diffusion.models import AudioChannels
from k_diffusion.sampling import KSampler, unit_noise
from k_diffusion.training import ArraySource, load_denoiser, make_config, run_training

RATE, LENGTH = 4000, 256


def tones(count: int, seed: int) -> Tensor:
    """Tones of random pitch that glide to another, shape (count, 1, LENGTH), in [-1, 1]."""
    draw = torch.rand(3, count, 1, generator=torch.Generator().manual_seed(seed))
    first, last = 150 + 1200 * draw[0], 150 + 1200 * draw[1]
    time = torch.arange(LENGTH) / RATE
    cycles = first * time + (last - first) * time**2 / (2 * LENGTH / RATE)
    return (0.8 * torch.sin(2 * math.pi * (cycles + draw[2])))[:, None]


def main(images: int, out: str) -> None:
    conditioner = AudioChannels(sample_rate=RATE, window=128, hop=32, bands=16, reads="clean")
    config = {
        "model": {
            "type": "unet", "dims": 1, "channels": 32, "channel_mults": [1, 2, 2, 2], "blocks": 1,
            "attention": [False, False, False, True], "image_channels": 16,
            "prediction": "edm", "sigma_data": "auto",
        },
        "data": {"source": "digits"},  # of which `source` takes the place
        "optimizer": {"lr": 2e-3},
        "total_images": images,
        "out": out,
    }  # fmt: skip
    result = run_training(
        make_config(config),
        source=ArraySource(tones(2000, seed=0)),
        conditioner=conditioner,
        overwrite=True,
    )
    denoiser, _ = load_denoiser(result.checkpoint)

    asked = conditioner(tones(32, seed=1))  # of tones that it was not trained on
    noise = unit_noise((1, LENGTH), seeds=range(32))
    drawn = KSampler(denoiser, "karras", "dpmpp_2m").sample(noise, 16, asked)
    heard = conditioner(drawn)["image"]
    # 0.02 of a spectrogram is one decibel.
    for name, other in (("asked", asked["image"]), ("others'", asked["image"].roll(1, 0))):
        print(f"from the {name} spectrogram: {(heard - other).abs().mean() / 0.02:.1f} dB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=50_000, help="sounds to train on")
    parser.add_argument("--out", default="runs/audio", help="folder to write to")
    main(**vars(parser.parse_args()))
