"""Several conditions at once: a word, a sound, a small picture, any of which may be left out.

    python examples/multimodal.py            trains, then draws digits told in several ways

Words and sounds are sequences of one width, which the network attends to together.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from text_to_image import WORDS, make_encoder
from torch import Tensor

from k_diffusion.external import TextEncoder
from k_diffusion.models import AudioTokens, CompositeConditioner, LowResolution
from k_diffusion.sampling import KSampler, unit_noise
from k_diffusion.training import (
    ArraySource,
    Digits,
    load_conditioner,
    load_denoiser,
    make_config,
    run_training,
)
from k_diffusion.utils.images import image_grid, save_png


def tone(digits: Tensor) -> Tensor:
    """The sound of a digit, which stands for someone's voice: 0 is low, 9 is high; (B, 512)."""
    pitch = 200 * 1.3 ** digits[:, None].float()
    return 0.8 * torch.sin(2 * math.pi * pitch * torch.arange(512) / 8000)


def main(images: int, out: str) -> None:
    conditioner = CompositeConditioner(
        word=TextEncoder.from_pretrained(make_encoder(Path(out) / "encoder"), max_length=4),
        sound=AudioTokens(sample_rate=8000, window=256, hop=128, bands=16),
        picture=LowResolution(channels=1, factor=4, size=(8, 8)),
        part_dropout=0.3,  # so that each can be told alone
    )
    digits = Digits()
    words = [WORDS[label] for label in digits.labels]
    source = ArraySource(digits.images, raws={"text": words, "audio": tone(digits.labels)})
    config = {
        "model": {
            "type": "unet", "channels": 32, "channel_mults": [1, 2], "blocks": 1,
            "attention": [False, True], "context_dim": 16, "image_channels": 1,
            "prediction": "edm", "sigma_data": "auto",
        },
        "data": {"source": "digits"},  # of which `source` takes the place
        "optimizer": {"lr": 2e-3},
        "total_images": images,
        "out": out,
    }  # fmt: skip
    run = {"source": source, "conditioner": conditioner, "overwrite": True}
    denoiser, info = load_denoiser(run_training(make_config(config), **run).checkpoint)
    conditioner = load_conditioner(info)  # saved by its config, encoder and all
    sampler, ten = KSampler(denoiser, "karras", "dpmpp_2m"), torch.arange(10)
    first = [int((digits.labels == digit).nonzero()[0]) for digit in ten]
    small = conditioner.parts["picture"].lower(digits.images[first])
    raw = {"word": WORDS, "sound": tone(ten), "picture": small}
    rows = []
    for told in (("word",), ("sound",), ("picture",), ("word", "sound", "picture")):
        condition = conditioner({part: raw[part] for part in told})  # the others: absent
        rows.append(sampler.sample(unit_noise((1, 8, 8), seeds=range(10)), 12, condition))
    names = ["word", "sound", "picture", "all three"]
    grid = image_grid(torch.cat(rows), rows_named=names, columns=10, scale=6)
    save_png(f"{out}/digits.png", grid)
    print(f"the digits 0 to 9, told in four ways, are in {out}/digits.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=150_000, help="to train on")
    parser.add_argument("--out", default="runs/multimodal", help="folder to write to")
    main(**vars(parser.parse_args()))
