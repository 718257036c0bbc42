"""Whole diffusers pipelines of a few thousand weights, made here: nothing is downloaded.

Each function gives a pipeline with random weights, the same every time. An autoencoder halves the
size: an image of 16 x 16 has latents of 8 x 8.
"""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

from tests.external.tiny import save_tokenizer

WORDS = "a red green blue fox cat on the moon"
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def with_scheduler(pipeline: Any, scheduler: Any) -> Any:
    """The pipeline with another scheduler, or with its own where that is None; without its bar."""
    if scheduler is not None:
        pipeline.scheduler = scheduler
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tokenizer(length: int = 12) -> tuple[Any, int]:
    """A tokenizer of whole words, and how many it knows."""
    from transformers import PreTrainedTokenizerFast

    with tempfile.TemporaryDirectory() as folder:
        count = save_tokenizer(Path(folder), WORDS)
        made = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    made.model_max_length = length
    return made, count


def clip(count: int, width: int = 16, projection: int | None = None) -> Any:
    """A CLIP text encoder of two layers; with a projection where its width is given."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=count,
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=12,
        projection_dim=projection or width,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    kind = CLIPTextModel if projection is None else CLIPTextModelWithProjection
    return kind(config).eval()


def t5(count: int, width: int = 16, kind: str = "T5") -> Any:
    """A T5 or UMT5 encoder of one layer."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        vocab_size=count, d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2, pad_token_id=0
    )
    return getattr(transformers, f"{kind}EncoderModel")(config).eval()


def autoencoder(channels: int = 4, **options: Any) -> Any:
    """A KL autoencoder that halves the size."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        sample_size=16,
        **options,
    ).eval()


def tiny_sd(
    prediction_type: str = "epsilon", scheduler: Any = None, kind: str = "", **options: Any
) -> Any:
    """Stable Diffusion 1.x (epsilon) or 2.x (v_prediction); latents (4, 8, 8).

    Args:
        prediction_type: what its own scheduler, a DDIMScheduler, says.
        scheduler: another one.
        kind: of pipeline: "", "Img2Img" or "Inpaint".
        options: of its own scheduler.
    """
    import diffusers

    torch.manual_seed(0)
    tokens, count = tokenizer()
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=8,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
    ).eval()
    own = {**BETAS, "steps_offset": 1, "clip_sample": False, "set_alpha_to_one": False, **options}
    pipeline = getattr(diffusers, f"StableDiffusion{kind}Pipeline")(
        vae=autoencoder(),
        text_encoder=clip(count),
        tokenizer=tokens,
        unet=unet,
        scheduler=diffusers.DDIMScheduler(prediction_type=prediction_type, **own),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return with_scheduler(pipeline, scheduler)


def tiny_sdxl(scheduler: Any = None, **options: Any) -> Any:
    """Stable Diffusion XL: two text encoders, sizes as conditions; its own is EulerDiscrete."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    torch.manual_seed(1)
    tokens, count = tokenizer()
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=8,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
    ).eval()
    own = {**BETAS, "steps_offset": 1, "timestep_spacing": "leading", **options}
    pipeline = StableDiffusionXLPipeline(
        vae=autoencoder(force_upcast=False),
        text_encoder=clip(count),
        text_encoder_2=clip(count, projection=16),
        tokenizer=tokens,
        tokenizer_2=tokens,
        unet=unet,
        scheduler=EulerDiscreteScheduler(**own),
        add_watermarker=False,
    )
    return with_scheduler(pipeline, scheduler)


def tiny_sd3(scheduler: Any = None, **options: Any) -> Any:
    """Stable Diffusion 3: three text encoders, a flow transformer; latents (4, 8, 8)."""
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    torch.manual_seed(2)
    tokens, count = tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        out_channels=4,
        pos_embed_max_size=16,
    ).eval()
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **options}),
        vae=autoencoder(shift_factor=0.06, scaling_factor=1.5, use_quant_conv=False),
        text_encoder=clip(count, projection=16),
        tokenizer=tokens,
        text_encoder_2=clip(count, projection=16),
        tokenizer_2=tokens,
        text_encoder_3=t5(count, 32),
        tokenizer_3=tokens,
    )
    return with_scheduler(pipeline, scheduler)


def tiny_flux(scheduler: Any = None, guidance: bool = True, **options: Any) -> Any:
    """Flux: packed latents, an embedding of the guidance, a shift by the image's size."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    torch.manual_seed(3)
    tokens, count = tokenizer()
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=guidance,
    ).eval()
    own = {"shift": 3.0, "use_dynamic_shifting": True, **options}
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**own),
        vae=autoencoder(shift_factor=0.1, scaling_factor=0.36, use_quant_conv=False),
        text_encoder=clip(count),
        tokenizer=tokens,
        text_encoder_2=t5(count),
        tokenizer_2=tokens,
        transformer=transformer,
    )
    return with_scheduler(pipeline, scheduler)


def tiny_dit(scheduler: Any = None, **options: Any) -> Any:
    """DiT with classes 0 to 999 and learned variances; its own is DDIM on linear betas."""
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    torch.manual_seed(4)
    transformer = DiTTransformer2DModel(
        sample_size=8,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
    ).eval()
    own = {"clip_sample": False, **options}
    pipeline = DiTPipeline(
        transformer=transformer, vae=autoencoder(), scheduler=DDIMScheduler(**own)
    )
    return with_scheduler(pipeline, scheduler)


def tiny_pixart(scheduler: Any = None, size: int = 8, **options: Any) -> Any:
    """PixArt-alpha: T5 with a mask, learned variances; its own is DPM-Solver++."""
    from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel

    torch.manual_seed(7)
    tokens, count = tokenizer()
    transformer = PixArtTransformer2DModel(
        sample_size=size,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,  # sizes take a third of the width each
        caption_channels=16,
        cross_attention_dim=24,
        in_channels=4,
        out_channels=8,
        attention_bias=True,
        norm_elementwise_affine=False,
    ).eval()
    with torch.no_grad():  # zeros when it is made, so that it would say nothing
        torch.nn.init.normal_(transformer.proj_out.weight, std=0.1)
    pipeline = PixArtAlphaPipeline(
        tokenizer=tokens,
        text_encoder=t5(count),
        vae=autoencoder(),
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(**options),
    )
    return with_scheduler(pipeline, scheduler)


def tiny_stable_audio(scheduler: Any = None, **options: Any) -> Any:
    """Stable Audio: a 1-D transformer with v prediction on EDM's levels; latents (4, 32)."""
    from diffusers import (
        AutoencoderOobleck,
        CosineDPMSolverMultistepScheduler,
        StableAudioDiTModel,
        StableAudioPipeline,
        StableAudioProjectionModel,
    )

    torch.manual_seed(5)
    tokens, count = tokenizer()
    transformer = StableAudioDiTModel(
        sample_size=32,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_key_value_attention_heads=2,
        num_attention_heads=2,
        out_channels=4,
        cross_attention_dim=16,
        time_proj_dim=8,
        global_states_input_dim=32,
        cross_attention_input_dim=16,
    ).eval()
    with warnings.catch_warnings():  # torch's, of the weight_norm that diffusers uses
        warnings.simplefilter("ignore", FutureWarning)
        vae = AutoencoderOobleck(
            encoder_hidden_size=4,
            downsampling_ratios=[1, 2],
            channel_multiples=[1, 2],
            decoder_channels=4,
            decoder_input_channels=4,
            audio_channels=2,
            sampling_rate=16,
        ).eval()
    pipeline = StableAudioPipeline(
        vae=vae,
        text_encoder=t5(count),
        projection_model=StableAudioProjectionModel(
            text_encoder_dim=16, conditioning_dim=16, min_value=0, max_value=32
        ).eval(),
        tokenizer=tokens,
        transformer=transformer,
        scheduler=CosineDPMSolverMultistepScheduler(solver_order=2, **options),
    )
    return with_scheduler(pipeline, scheduler)


def tiny_video(scheduler: Any = None, **options: Any) -> Any:
    """Wan: text to video by a flow transformer; latents (16, frames, 2, 2) of 16 x 16."""
    from diffusers import (
        AutoencoderKLWan,
        UniPCMultistepScheduler,
        WanPipeline,
        WanTransformer3DModel,
    )

    torch.manual_seed(6)
    tokens, count = tokenizer()
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=16,
        freq_dim=16,
        ffn_dim=16,
        num_layers=1,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=16,
    ).eval()
    own = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    pipeline = WanPipeline(
        tokenizer=tokens,
        text_encoder=t5(count, kind="UMT5"),
        vae=AutoencoderKLWan(
            base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
            temperal_downsample=[False, True, True],
        ).eval(),
        scheduler=UniPCMultistepScheduler(**{**own, **options}),
        transformer=transformer,
    )  # fmt: skip
    return with_scheduler(pipeline, scheduler)
