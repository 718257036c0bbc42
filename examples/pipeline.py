"""A diffusers pipeline drawn by our sampler, and our sampler inside the pipeline: the same images.

    python examples/pipeline.py                                  a tiny Stable Diffusion, made here
    python examples/pipeline.py --model FOLDER_OR_ID --prompt "a red fox" --steps 20

The tiny one has random weights, so that nothing is downloaded; its pictures show nothing.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from k_diffusion import PlanScheduler, external
from k_diffusion.utils.images import image_grid, save_png

WORDS = ["<pad>", "<start>", "<end>", "<unknown>", "a", "red", "fox", "on", "the", "moon"]


def make_pipeline(folder: Path) -> Path:
    """A Stable Diffusion of some thousand weights, in the files that diffusers keeps it in."""
    import diffusers
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

    torch.manual_seed(0)
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    tokens = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    text = CLIPTextConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=12, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    sizes = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
    diffusers.StableDiffusionPipeline(
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=tokens, pad_token="<pad>", eos_token="<end>", model_max_length=12
        ),
        text_encoder=CLIPTextModel(text),
        unet=diffusers.UNet2DConditionModel(
            sample_size=16, cross_attention_dim=16, attention_head_dim=4, **sizes,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        ),
        vae=diffusers.AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
            latent_channels=4, **sizes,
        ),
        scheduler=diffusers.DDIMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1,
            clip_sample=False, set_alpha_to_one=False,
        ),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def main(model: str, prompt: str, steps: int, out: str) -> float:
    """Draws two images in both ways into `out`; returns how far apart they are, of 0 to 1."""
    sampler = external.load(model or make_pipeline(Path(out) / "model"), "karras", "dpmpp_2m")
    ours = sampler.sample(prompt, steps=steps, seeds=[1, 2], to="tensor") / 2 + 0.5

    pipe = sampler.pipeline  # the same modules, with a solver of this library as its scheduler
    own = pipe.scheduler.config
    pipe.scheduler = PlanScheduler.from_config(own, solver="dpmpp_2m", schedule="karras")
    noise = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    theirs = pipe([prompt] * 2, num_inference_steps=steps, generator=noise, output_type="pt").images
    for name, images in (("sampler", ours), ("pipeline", theirs)):
        save_png(Path(out) / f"{name}.png", image_grid(2 * images.cpu().float() - 1, columns=2))
    return (ours.clamp(0, 1) - theirs).abs().max().item()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="", help="folder or hub id of a diffusers pipeline")
    parser.add_argument("--prompt", default="a red fox on the moon")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--out", default="runs/pipeline", help="folder to write to")
    asked = parser.parse_args()
    print(f"{main(**vars(asked)):.1e} apart at most; the images are in {asked.out}")
