"""What each kind of pipeline is told, and the shape of what it draws.

Texts are encoded by the pipeline's own `encode_prompt`, so that whatever is loaded in it (adapters,
textual inversions) counts. What differs between the kinds stands here, one function for each:

    told = tell(pipeline, Asked(prompts=["a red fox"], guidance=5.0, height=512, width=512))
    told.condition, told.negative      # keywords of the network
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from k_diffusion.external.asked import (
    FAMILIES,
    Asked,
    Family,
    Keywords,
    Told,
    encode,
    encode_options,
    family,
)
from k_diffusion.utils import maths


def find_family(pipeline: Any) -> Family:
    """The family of a pipeline, with all that it needs in it.

    Raises:
        TypeError: a pipeline of a class that is not known.
        ValueError: a component is missing.
    """
    name = type(pipeline).__name__
    if name not in FAMILIES:
        raise TypeError(
            maths.unknown("diffusers pipeline", name, FAMILIES)
            + "; or put a PlanScheduler into it, or wrap its network by foreign_denoiser"
        )
    found = FAMILIES[name]
    for component in (found.network, "scheduler", *found.needs):
        if getattr(pipeline, component, None) is None:
            raise ValueError(
                f"{name} has no {component}: load it, and pass {component}=... to "
                f"{name}.from_pretrained"
            )
    return found


def tell(pipeline: Any, asked: Asked) -> Told:
    """What the network of a pipeline is told.

    Raises:
        TypeError: an unknown pipeline.
        ValueError: an unknown option, a missing component, or what the pipeline itself refuses.
    """
    found = find_family(pipeline)
    known = {*found.options, *encode_options(pipeline)}
    for name in asked.options:
        if name not in known:
            raise ValueError(maths.unknown(f"option of {type(pipeline).__name__},", name, known))
    if hasattr(pipeline, "encode_prompt"):
        if asked.prompts is None and asked.options.get("prompt_embeds") is None:
            raise ValueError(f"{type(pipeline).__name__} needs a prompt, or prompt_embeds")
        if asked.prompts is not None:
            encoders = [n for n in pipeline.components if n.startswith("text_encoder")]
            if all(getattr(pipeline, n) is None for n in encoders):
                raise ValueError(
                    f"{type(pipeline).__name__} has no text_encoder for its prompts: load it, or "
                    "give prompt_embeds"
                )
    elif asked.prompts is not None or asked.negatives is not None:
        raise ValueError(f"{type(pipeline).__name__} takes no prompts")
    if asked.labels is not None and "labels" not in found.options:
        raise ValueError(f"{type(pipeline).__name__} takes no labels: give it a prompt")
    told = found.tell(pipeline, asked)
    if told.scale <= 1 and not asked.pair:
        told = Told(told.condition, {}, 1.0)
    for name, value in (*told.condition.items(), *told.negative.items()):
        if isinstance(value, Tensor) and len(value) != asked.count:
            raise ValueError(
                f"{name} has {len(value)} rows for {asked.count} prompts: give as many of each"
            )
    return told


_ATTENTION = "cross_attention_kwargs"


def _attention(asked: Asked) -> Keywords:
    """What the network's attention is told: the scale of its adapters, say."""
    given = asked.options.get(_ATTENTION)
    return {} if given is None else {_ATTENTION: dict(given)}


def _guidance_embedding(pipeline: Any, asked: Asked) -> Keywords:
    """`timestep_cond` of networks distilled under guidance, which are told its scale."""
    width = pipeline.unet.config.time_cond_proj_dim
    if width is None:
        return {}
    scales = torch.full((asked.count,), asked.guidance - 1.0)
    made = pipeline.get_guidance_scale_embedding(scales, embedding_dim=width)
    return {"timestep_cond": made.to(pipeline._execution_device)}


def _without_guidance(pipeline: Any, asked: Asked) -> Asked:
    """A distilled network is told its scale, and called once."""
    if pipeline.unet.config.time_cond_proj_dim is None:
        return asked
    return Asked(**{**vars(asked), "guidance": 1.0, "negatives": None, "pair": False})


@family(
    "StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline",
    "LatentConsistencyModelPipeline", "LatentConsistencyModelImg2ImgPipeline",
    network="unet", options=(_ATTENTION,),
)  # fmt: skip
def _stable_diffusion(pipeline: Any, asked: Asked) -> Told:
    plain = _without_guidance(pipeline, asked)
    text, negative = encode(pipeline, plain)
    condition = {
        "encoder_hidden_states": text,
        **_guidance_embedding(pipeline, asked),
        **_attention(asked),
    }
    against = {} if negative is None else {"encoder_hidden_states": negative}
    return Told(condition, against, plain.guidance)


@family(
    "StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionXLInpaintPipeline",
    network="unet", guidance=5.0,
    options=(
        _ATTENTION, "aesthetic_score", "crops_coords_top_left", "negative_aesthetic_score",
        "negative_crops_coords_top_left", "negative_original_size", "negative_target_size",
        "original_size", "target_size",
    ),
)  # fmt: skip
def _stable_diffusion_xl(pipeline: Any, asked: Asked) -> Told:
    plain = _without_guidance(pipeline, asked)
    text, negative, pooled, negative_pooled = encode(pipeline, plain)
    size = (asked.height, asked.width)
    own = asked.options

    def sizes(prefix: str) -> Tensor:
        def said(name: str, usual: Any) -> tuple[int, ...]:
            return tuple(own.get(prefix + name) or own.get(name) or usual)

        numbers = [*said("original_size", size), *said("crops_coords_top_left", (0, 0))]
        if getattr(pipeline.config, "requires_aesthetics_score", False):
            usual = 2.5 if prefix else 6.0
            numbers.append(own.get(prefix + "aesthetic_score", usual))
        else:
            numbers += said("target_size", size)
        row = torch.tensor([numbers], dtype=text.dtype, device=text.device)
        return row.expand(asked.count, -1)

    condition = {
        "encoder_hidden_states": text,
        "text_embeds": pooled,
        "time_ids": sizes(""),
        **_guidance_embedding(pipeline, asked),
        **_attention(asked),
    }
    _check_time_ids(pipeline, condition)
    against = {}
    if negative is not None and plain.guided:
        against = {
            "encoder_hidden_states": negative,
            "text_embeds": negative_pooled,
            "time_ids": sizes("negative_"),
        }
    return Told(condition, against, plain.guidance)


def _check_time_ids(pipeline: Any, condition: Keywords) -> None:
    width = pipeline.unet.config.addition_time_embed_dim
    given = width * condition["time_ids"].shape[1] + condition["text_embeds"].shape[1]
    wanted = pipeline.unet.add_embedding.linear_1.in_features
    if given != wanted:
        raise ValueError(
            f"this UNet takes {wanted} numbers of sizes and pooled text, but is told {given}: "
            "requires_aesthetics_score must be set for a refiner alone"
        )


@family(
    "StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline",
    "StableDiffusion3InpaintPipeline",
    network="transformer", guidance=7.0,
)  # fmt: skip
def _stable_diffusion_3(pipeline: Any, asked: Asked) -> Told:
    text, negative, pooled, negative_pooled = encode(pipeline, asked)
    condition = {"encoder_hidden_states": text, "pooled_projections": pooled}
    if not asked.guided:
        return Told(condition, {}, 1.0)
    against = {"encoder_hidden_states": negative, "pooled_projections": negative_pooled}
    return Told(condition, against, asked.guidance)


@family(
    "FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline",
    network="transformer", guidance=3.5,
    options=(
        "negative_pooled_prompt_embeds", "negative_prompt_2", "negative_prompt_embeds",
        "true_cfg_scale",
    ),
)  # fmt: skip
def _flux(pipeline: Any, asked: Asked) -> Told:
    """The scale is told the network; a second estimate is made under `true_cfg_scale`."""
    own = asked.options
    scale = float(own.get("true_cfg_scale", 1.0))
    text, pooled, _ = encode(pipeline, asked)
    condition = {"encoder_hidden_states": text, "pooled_projections": pooled}
    if pipeline.transformer.config.guidance_embeds:
        condition["guidance"] = torch.full((asked.count,), asked.guidance, device=text.device)
    against: Keywords = {}
    given = own.get("negative_prompt_embeds")
    if scale > 1 and (asked.negatives is not None or given is not None):
        text, pooled, _ = encode(
            pipeline,
            asked,
            prompt=asked.negatives,
            prompt_2=own.get("negative_prompt_2"),
            prompt_embeds=given,
            pooled_prompt_embeds=own.get("negative_pooled_prompt_embeds"),
        )
        against = {"encoder_hidden_states": text, "pooled_projections": pooled}
    elif scale > 1:
        raise ValueError(f"true_cfg_scale {scale} needs a negative prompt")
    elif asked.negatives is not None:
        raise ValueError("Flux hears a negative prompt under true_cfg_scale alone: give one, 4 say")
    return Told(condition, against, scale)


@family("PixArtAlphaPipeline", "PixArtSigmaPipeline", network="transformer", guidance=4.5)
def _pixart(pipeline: Any, asked: Asked) -> Told:
    negative = [""] * asked.count if asked.negatives is None else asked.negatives
    clean = asked.options.get("clean_caption", True)
    text, mask, against, against_mask = encode(
        pipeline, asked, negative_prompt=negative, clean_caption=clean
    )
    condition: Keywords = {"encoder_hidden_states": text, "encoder_attention_mask": mask}
    if pipeline.transformer.config.sample_size == 128 and not type(pipeline).__name__.count(
        "Sigma"
    ):
        size = text.new_tensor([[asked.height, asked.width]])
        condition["resolution"] = size.expand(asked.count, -1)
        condition["aspect_ratio"] = (size[:, :1] / size[:, 1:]).expand(asked.count, -1)
    if not asked.guided:
        return Told(condition, {}, 1.0)
    negatives = {"encoder_hidden_states": against, "encoder_attention_mask": against_mask}
    return Told(condition, negatives, asked.guidance)


@family("DiTPipeline", network="transformer", guidance=4.0, options=("labels",))
def _dit(pipeline: Any, asked: Asked) -> Told:
    if asked.labels is None:
        raise ValueError("DiTPipeline needs labels: classes, one for each image")
    classes = int(pipeline.transformer.config.num_embeds_ada_norm)
    for label in asked.labels:
        if not 0 <= label < classes:
            raise ValueError(f"label {label} is none of the classes 0 to {classes - 1}")
    labels = torch.tensor(asked.labels, device=pipeline._execution_device)
    null = torch.full_like(labels, classes)
    return Told({"class_labels": labels}, {"class_labels": null}, asked.guidance)


@family("DDIMPipeline", "DDPMPipeline", network="unet", guidance=1.0, needs=())
def _unconditional(pipeline: Any, asked: Asked) -> Told:
    if asked.guidance != 1:
        raise ValueError(f"{type(pipeline).__name__} has no condition: leave guidance away")
    return Told({}, {}, 1.0)


@family(
    "StableAudioPipeline", network="transformer", guidance=7.0, kind="sound",
    needs=("vae", "projection_model"),
)  # fmt: skip
def _stable_audio(pipeline: Any, asked: Asked) -> Told:
    """Without a negative text its place is taken by zeros."""
    device = pipeline._execution_device
    two = asked.guided and (
        asked.negatives is not None or asked.options.get("negative_prompt_embeds") is not None
    )
    text = encode(pipeline, asked, do_classifier_free_guidance=two)
    with torch.no_grad():
        start, end = pipeline.encode_duration(0.0, asked.seconds, device, False, asked.count)
    parts = text.chunk(2) if two else (text,)
    told = [torch.cat([part, start, end], dim=1) for part in parts]
    condition = {
        "encoder_hidden_states": told[-1],
        "global_hidden_states": torch.cat([start, end], dim=2),
    }
    if not asked.guided:
        return Told(condition, {}, 1.0)
    negative = told[0] if two else torch.zeros_like(told[-1])
    return Told(condition, {"encoder_hidden_states": negative}, asked.guidance)


@family("WanPipeline", network="transformer", guidance=5.0, kind="video")
def _wan(pipeline: Any, asked: Asked) -> Told:
    if getattr(pipeline.config, "boundary_ratio", None) is not None:
        raise ValueError(
            "this WanPipeline has two transformers (boundary_ratio): give it a PlanScheduler, or "
            "join them by guidance.SwitchAt"
        )
    if getattr(pipeline.config, "expand_timesteps", False):
        raise ValueError("this WanPipeline has a time for each token: give it a PlanScheduler")
    options = {"max_sequence_length": 512, **asked.options}
    text, negative = encode(pipeline, Asked(**{**vars(asked), "options": options}))
    against = {"encoder_hidden_states": negative} if asked.guided else {}
    return Told({"encoder_hidden_states": text}, against, asked.guidance)


def shift(pipeline: Any, scheduler: Any, shape: tuple[int, ...]) -> tuple[float | None, bool]:
    """How the levels of a pipeline depend on the size: mu, and whether even sigmas are handed over.

    Args:
        pipeline: of diffusers.
        scheduler: of diffusers, that lays them.
        shape: of one sample's latents.

    mu, the logarithm of the flow's shift, is linear in the number of tokens (Esser et al. 2024,
    arXiv:2403.03206, section 5.3.2), by the numbers in the scheduler's config.
    """
    config: Mapping[str, Any] = scheduler.config
    flux = FAMILIES[type(pipeline).__name__].tell is _flux
    even = flux and not config.get("use_flow_sigmas")
    if not config.get("use_dynamic_shifting"):
        return None, even
    patch = 2 if flux else int(pipeline.transformer.config.patch_size)
    tokens = (shape[-2] // patch) * (shape[-1] // patch)
    few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15 if flux else 1.16)
    return low + (tokens - few) * (high - low) / (many - few), even
