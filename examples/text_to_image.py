"""A text as the condition: its tokens, as a frozen encoder sees them, by cross-attention.

    python examples/text_to_image.py         trains on "a small three" and the like, and draws

The encoder is made here, tiny and untrained, so that nothing is downloaded; give
`--encoder openai/clip-vit-base-patch32`, or a folder, for a real one.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from k_diffusion.external import TextEncoder
from k_diffusion.sampling import KSampler, unit_noise
from k_diffusion.training import ArraySource, Digits, load_denoiser, make_config, run_training
from k_diffusion.utils.images import image_grid, save_png

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def make_encoder(folder: Path) -> Path:
    """A text encoder and its tokenizer, in the files that transformers keeps them in."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

    words = ["<pad>", "<end>", "<unknown>", "digit", *WORDS]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", unk_token="<unknown>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    encoder = CLIPTextConfig(vocab_size=len(words), num_attention_heads=2, **sizes, **ids)
    CLIPTextModel(encoder).save_pretrained(folder)
    return folder


def main(images: int, out: str, encoder: str = "") -> None:
    path = encoder or make_encoder(Path(out) / "encoder")
    conditioner = TextEncoder.from_pretrained(path, max_length=4)
    digits = Digits()
    texts = [f"digit {WORDS[label]}" for label in digits.labels]
    source = ArraySource(digits.images, raws={"text": texts})
    config = {
        "model": {
            "type": "unet", "channels": 32, "channel_mults": [1, 2], "blocks": 1,
            "attention": [False, True], "context_dim": conditioner.context_dim,
            "prediction": "edm", "sigma_data": "auto",
        },
        "data": {"source": "digits"},  # of which `source` takes the place
        "optimizer": {"lr": 2e-3},
        "total_images": images,
        "out": out,
    }  # fmt: skip
    result = run_training(
        make_config(config), source=source, conditioner=conditioner, overwrite=True
    )
    denoiser, _ = load_denoiser(result.checkpoint)
    noise = unit_noise((1, 8, 8), seeds=range(40))
    told = conditioner([f"digit {word}" for word in WORDS * 4])
    drawn = KSampler(denoiser, "karras", "dpmpp_2m").sample(noise, 12, told)
    save_png(f"{out}/digits.png", image_grid(drawn, columns=10, scale=6))
    print(f'"digit zero" to "digit nine", four of each, are in {out}/digits.png')


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=100_000, help="to train on")
    parser.add_argument("--out", default="runs/text_to_image", help="folder to write to")
    parser.add_argument("--encoder", default="", help="folder or id of a text encoder")
    main(**vars(parser.parse_args()))
