"""Whole pipelines: our solvers give what the pipelines themselves give."""

from __future__ import annotations

import diffusers
import pytest
import torch

from k_diffusion.external import PipelineSampler
from k_diffusion.sampling import KSampler
from tests.external import tiny_pipelines as tiny

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
]
PROMPT = "a red fox"
SMALL = {"height": 16, "width": 16}
SHORT = {"max_sequence_length": 12}


def _euler(**options):
    return diffusers.EulerDiscreteScheduler(**tiny.BETAS, steps_offset=1, **options)


def _ddim(prediction="epsilon", **options):
    return diffusers.DDIMScheduler(
        **tiny.BETAS, prediction_type=prediction, clip_sample=False, **options
    )


def _flow():
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)


# name: what makes it, the solver that its scheduler stands for, what both are asked for, in the
# pipeline's and in our words.
KINDS = {
    "sd1-ddim": (tiny.tiny_sd, "ddim", SMALL, SMALL),
    "sd1-euler": (lambda: tiny.tiny_sd(scheduler=_euler()), "euler", SMALL, SMALL),
    "sd2-ddim": (lambda: tiny.tiny_sd("v_prediction"), "ddim", SMALL, SMALL),
    "sd2-euler": (
        lambda: tiny.tiny_sd("v_prediction", _euler(prediction_type="v_prediction")),
        "euler",
        SMALL,
        SMALL,
    ),
    "sdxl-euler": (
        tiny.tiny_sdxl,
        "euler",
        SMALL | {"original_size": (32, 24), "crops_coords_top_left": (3, 5)},
        SMALL | {"original_size": (32, 24), "crops_coords_top_left": (3, 5)},
    ),
    "sdxl-ddim": (lambda: tiny.tiny_sdxl(_ddim()), "ddim", SMALL, SMALL),
    "sd3": (tiny.tiny_sd3, "euler", SMALL | SHORT, SMALL | SHORT),
    "sd3-dynamic": (
        lambda: tiny.tiny_sd3(use_dynamic_shifting=True),
        "euler",
        SMALL | SHORT,
        SMALL | SHORT,
    ),
    "flux": (tiny.tiny_flux, "euler", SMALL | SHORT, SMALL | SHORT),
    "flux-negative": (
        tiny.tiny_flux,
        "euler",
        SMALL | SHORT | {"true_cfg_scale": 3.0, "negative_prompt": "green"},
        SMALL | SHORT | {"true_cfg_scale": 3.0, "negative": "green"},
    ),
    "pixart-ddim": (
        lambda: tiny.tiny_pixart(_ddim()),
        "ddim",
        SMALL | SHORT | {"negative_prompt": "green", "use_resolution_binning": False},
        SMALL | SHORT | {"negative": "green"},
    ),
    "pixart-euler": (
        lambda: tiny.tiny_pixart(_euler()),
        "euler",
        SMALL | SHORT | {"use_resolution_binning": False},
        SMALL | SHORT,
    ),
    # Of the large ones, whose networks are told their sizes.
    "pixart-sizes": (
        lambda: tiny.tiny_pixart(_ddim(), size=128),
        "ddim",
        {"height": 24, "width": 16, "use_resolution_binning": False} | SHORT,
        {"height": 24, "width": 16} | SHORT,
    ),
    "audio-ddim": (
        lambda: tiny.tiny_stable_audio(_ddim("v_prediction")),
        "ddim",
        {"audio_end_in_s": 2.0},
        {"seconds": 2.0},
    ),
    "audio-euler": (
        lambda: tiny.tiny_stable_audio(diffusers.EDMEulerScheduler(prediction_type="v_prediction")),
        "euler",
        {"audio_end_in_s": 2.0, "negative_prompt": "blue"},
        {"seconds": 2.0, "negative": "blue"},
    ),
    "video": (
        lambda: tiny.tiny_video(_flow()),
        "euler",
        SMALL | SHORT | {"num_frames": 5},
        SMALL | SHORT | {"frames": 5},
    ),
}


def _theirs(pipeline, steps, seed, **asked):
    generator = torch.Generator().manual_seed(seed)
    made = pipeline(
        PROMPT,
        num_inference_steps=steps,
        guidance_scale=5.0,
        generator=generator,
        output_type="latent",
        **asked,
    )[0]
    if isinstance(pipeline, diffusers.FluxPipeline):
        return pipeline._unpack_latents(made, 16, 16, pipeline.vae_scale_factor)
    return made


def _far(ours, theirs):
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def _changed(module, **options):
    """A module's config with other options."""
    config = {k: v for k, v in module.config.items() if not k.startswith("_")}
    return {**config, **options}


@pytest.mark.parametrize("steps", [5, 20])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_latents_as_the_pipeline(kind, steps):
    make, solver, asked, ours = KINDS[kind]
    pipeline = make()
    sampler = KSampler.from_pipeline(pipeline)
    assert sampler.solver.name == solver
    expected = _theirs(pipeline, steps, 3, **asked)
    drawn = sampler.sample(PROMPT, steps=steps, guidance=5.0, seeds=[3], to="latent", **ours)
    assert _far(drawn, expected) < 2e-5
    # The prompt and the scale are heard: without them it is something else.
    other = sampler.sample("cat", steps=steps, guidance=4.0, seeds=[3], to="latent", **ours)
    assert _far(other, expected) > 1e-3


@pytest.mark.parametrize("steps", [5, 20])
def test_classes_of_a_dit_to_the_same_images(steps):
    pipeline = tiny.tiny_dit()
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    expected = pipeline(
        [3, 7],
        guidance_scale=5.0,
        num_inference_steps=steps,
        generator=generators,
        output_type="pt",
    ).images
    sampler = PipelineSampler(pipeline)
    drawn = sampler.sample(labels=[3, 7], steps=steps, guidance=5.0, seed=3, to="tensor")
    assert ((drawn / 2 + 0.5).clamp(0, 1) - expected).abs().max() < 2e-5


@pytest.mark.parametrize("steps", [5, 20])
def test_classes_of_a_dit_by_an_euler_scheduler(steps):
    """By its loop as it is meant: DiTPipeline steps from the input that was scaled for the network,
    and from unit noise, which is right for DDIM alone."""
    scheduler = _euler()
    pipeline = tiny.tiny_dit(scheduler)
    drawn = PipelineSampler(pipeline).sample(
        labels=[3], steps=steps, guidance=5.0, seed=3, to="latent"
    )
    scheduler.set_timesteps(steps)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    x = x * scheduler.init_noise_sigma
    for time in scheduler.timesteps:
        told = scheduler.scale_model_input(x, time).repeat(2, 1, 1, 1)
        with torch.no_grad():
            out = pipeline.transformer(
                told, timestep=time.expand(2), class_labels=torch.tensor([3, 1000])
            ).sample[:, :4]
        x = scheduler.step(out[1:] + 5.0 * (out[:1] - out[1:]), time, x).prev_sample
    assert _far(drawn, x) < 2e-5


@pytest.mark.parametrize("make", [tiny.tiny_sd, tiny.tiny_sdxl, tiny.tiny_sd3])
def test_the_same_images_after_decoding(make):
    pipeline = make()
    options = SHORT if make is tiny.tiny_sd3 else {}
    expected = pipeline(
        PROMPT,
        num_inference_steps=3,
        generator=torch.Generator().manual_seed(3),
        output_type="pt",
        **SMALL,
        **options,
    ).images
    drawn = PipelineSampler(pipeline).sample(
        PROMPT, steps=3, seed=3, to="tensor", **SMALL, **options
    )
    assert ((drawn / 2 + 0.5).clamp(0, 1) - expected).abs().max() < 2e-5


def test_a_network_that_is_told_its_guidance():
    pipeline = tiny.tiny_sd()
    torch.manual_seed(0)
    config = _changed(pipeline.unet, time_cond_proj_dim=8)
    pipeline = diffusers.LatentConsistencyModelPipeline(
        **{
            **pipeline.components,
            "unet": diffusers.UNet2DConditionModel.from_config(config).eval(),
            "scheduler": _ddim(),
            "image_encoder": None,
        },
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    sampler = PipelineSampler(pipeline)
    told = sampler.encode(PROMPT, guidance=5.0)
    assert told.scale == 1
    assert torch.equal(
        told.condition["timestep_cond"],
        pipeline.get_guidance_scale_embedding(torch.tensor([4.0]), embedding_dim=8),
    )
    one, other = (
        sampler.sample(PROMPT, steps=2, guidance=scale, seed=1, to="latent", **SMALL)
        for scale in (5.0, 2.0)
    )
    assert _far(one, other) > 1e-4
