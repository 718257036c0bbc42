"""Pipelines as their own schedulers draw them: their limits, their noise, their levels."""

from __future__ import annotations

import functools
import warnings

import diffusers
import pytest
import torch

from k_diffusion.external import PlanScheduler
from k_diffusion.sampling import KSampler, SamplingAdvice
from tests.external import tiny_pipelines as tiny

# numpy's word about torch, in diffusers' own lines.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
]
SMALL = {"height": 16, "width": 16}
make_sd = functools.cache(tiny.tiny_sd)


def theirs(pipe, steps, seeds=(3,), **asked):
    return pipe(
        ["a red fox"] * len(seeds),
        num_inference_steps=steps,
        guidance_scale=1.0,  # with more, limits make the tiny network's path chaotic
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="latent",
        **SMALL,
        **asked,
    ).images


def ours(pipe, steps, *args, seeds=(3,), **options):
    sampler = KSampler.from_pipeline(pipe, *args, **options)
    return sampler.sample("a red fox", steps=steps, guidance=1.0, seeds=seeds, to="latent", **SMALL)


def far(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


LIMITS = {
    "clip": {"clip_sample": True},
    "clip at 2": {"clip_sample": True, "clip_sample_range": 2.0},
    "threshold": {"thresholding": True, "clip_sample": False, "sample_max_value": 1.5},
}


@pytest.mark.parametrize("steps", [5, 20])
@pytest.mark.parametrize("said", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("limit", LIMITS)
def test_ddim_limits_the_estimate_and_keeps_its_noise(limit, said, steps):
    pipe = make_sd()
    own = diffusers.DDIMScheduler(**tiny.BETAS, prediction_type=said, **LIMITS[limit])
    pipe.scheduler = own
    known = theirs(pipe, steps)
    assert far(ours(pipe, steps), known) < 1e-4
    if steps > 5:
        return
    for solver in ("ddim", "euler"):
        assert far(ours(pipe, steps, None, solver), known) < 1e-4
    pipe.scheduler = PlanScheduler.from_config(own.config, solver="ddim")
    assert far(theirs(pipe, steps), known) < 1e-4
    assert far(ours(pipe, steps), known) < 1e-4
    # The limit is one: without it the latents are others (an x0 network's stay within 2).
    pipe.scheduler = diffusers.DDIMScheduler(**tiny.BETAS, prediction_type=said, clip_sample=False)
    assert said == "sample" or far(ours(pipe, steps), known) > 1e-2


@pytest.mark.parametrize("clip", [True, False])
def test_the_noise_of_a_seed_is_that_of_the_pipelines_generator(clip):
    pipe = make_sd()
    pipe.scheduler = diffusers.DDIMScheduler(**tiny.BETAS, clip_sample=clip)
    known = theirs(pipe, 6, seeds=(3, 8), eta=0.7)
    assert far(ours(pipe, 6, None, "ddim", seeds=(3, 8), eta=0.7), known) < 1e-4
    assert far(ours(pipe, 6, None, "ddim", seeds=(3, 8), eta=0.6), known) > 1e-3
    pipe.scheduler = PlanScheduler.from_config(
        pipe.scheduler.config, solver="ddim", options={"eta": 0.7}
    )
    assert far(theirs(pipe, 6, seeds=(3, 8)), known) < 1e-4
    # Its solver and that solver's options are the scheduler's.
    assert far(ours(pipe, 6, seeds=(3, 8)), known) < 1e-4


SAME = {
    "ddpm": lambda: diffusers.DDPMScheduler(**tiny.BETAS),
    "dpmpp_2m": lambda: diffusers.DPMSolverMultistepScheduler(**tiny.BETAS),
    "euler_ancestral": lambda: diffusers.EulerAncestralDiscreteScheduler(**tiny.BETAS),
    "lcm": lambda: diffusers.LCMScheduler(**tiny.BETAS, clip_sample=False),
}


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("steps", [5, 20])
def test_other_schedulers_give_the_same_too(name, steps):
    pipe = make_sd()
    pipe.scheduler = SAME[name]()
    sampler = KSampler.from_pipeline(pipe)
    assert sampler.solver.name == name
    known = theirs(pipe, steps)
    assert far(ours(pipe, steps), known) < 1e-4
    pipe.scheduler = PlanScheduler.from_config(pipe.scheduler, solver=name)
    assert far(theirs(pipe, steps), known) < 1e-4


def test_latents_of_the_seeds_are_what_is_drawn_without_them():
    sampler = KSampler.from_pipeline(make_sd(), None, "euler_ancestral")
    asked = {"steps": 4, "seeds": [5, 6], "to": "latent", **SMALL}
    prompts = ["a red fox", "blue cat"]
    start = sampler.latents([5, 6], **SMALL)
    drawn = sampler.sample(prompts, **asked)
    assert torch.equal(drawn, sampler.sample(prompts, latents=start, **asked))


@pytest.mark.parametrize("solver", ["dpmpp_3m_sde", "heun", "euler"])
@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3", "flux"])
@pytest.mark.parametrize("schedule", [None, "karras"])
@torch.no_grad()
def test_a_pipeline_with_a_plan_scheduler_is_sampled_as_it_samples(kind, solver, schedule):
    if solver == "dpmpp_3m_sde" and kind in ("sd3", "flux"):
        pytest.skip("this pipeline hands its generators to no scheduler")
    pipe = made(kind)
    pipe.scheduler = PlanScheduler.from_config(config_of(kind), solver=solver, schedule=schedule)
    sampler = KSampler.from_pipeline(pipe)
    assert sampler.solver.name == solver
    short = {} if kind in ("sd", "sdxl") else {"max_sequence_length": 12}
    generator = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    known = pipe(
        ["a red fox", "blue cat"],
        num_inference_steps=5,
        guidance_scale=4.0,
        generator=generator,
        output_type="latent",
        **SMALL,
        **short,
    )[0]
    if kind == "flux":
        known = pipe._unpack_latents(known, 16, 16, pipe.vae_scale_factor)
    drawn = sampler.sample(
        ["a red fox", "blue cat"], steps=5, guidance=4.0, seed=3, to="latent", **SMALL, **short
    )
    assert far(drawn, known) < 1e-4
    # Another choice overrules it.
    other = KSampler.from_pipeline(pipe, "exponential", "ddim")
    assert other.solver.name == "ddim"


SHORT = {"max_sequence_length": 12}
WORDS = {
    "sd": ({}, {}),
    "sd3": (SHORT, SHORT),
    "flux": (SHORT, SHORT),
    "video": ({"num_frames": 5, **SHORT}, {"frames": 5, **SHORT}),
    "stable_audio": ({"audio_end_in_s": 2.0}, {"seconds": 2.0}),
}


@pytest.mark.parametrize("schedule", ["karras", "exponential", "sgm_uniform", "simple", "linspace"])
@pytest.mark.parametrize("kind", WORDS)
@torch.no_grad()
def test_schedules_of_ours_are_laid_over_the_same_process(kind, schedule):
    """With the flow's shift and the range of sigma that the pipeline's config tells."""
    pipe = made(kind)
    inside, outside = WORDS[kind]
    size = {} if kind == "stable_audio" else SMALL
    own = getattr(tiny, f"tiny_{kind}")().scheduler
    pipe.scheduler = own
    sampler = KSampler.from_pipeline(pipe, schedule, "dpmpp_2m")
    pipe.scheduler = PlanScheduler.from_config(own, solver="dpmpp_2m", schedule=schedule)
    known = pipe(
        "a red fox", num_inference_steps=4, guidance_scale=3.0, output_type="latent",
        generator=torch.Generator().manual_seed(3), **size, **inside,
    )[0]  # fmt: skip
    if kind == "flux":
        known = pipe._unpack_latents(known, 16, 16, pipe.vae_scale_factor)
    drawn = sampler.sample(
        "a red fox", steps=4, guidance=3.0, seeds=[3], to="latent", **size, **outside
    )
    assert far(drawn, known) < 1e-4


@functools.cache
def made(kind):
    return getattr(tiny, f"tiny_{kind}")()


@functools.cache
def config_of(kind):
    return made(kind).scheduler.config


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3", "flux", "video", "stable_audio"])
def test_the_levels_of_pipelines_are_nothing_to_warn_of(kind, spacing):
    """`timestep_spacing="leading"` begins below the noisiest level, as its authors mean it."""
    pipe = getattr(tiny, f"tiny_{kind}")()
    if "timestep_spacing" in pipe.scheduler.config:
        pipe.scheduler = type(pipe.scheduler).from_config(
            pipe.scheduler.config, timestep_spacing=spacing
        )
    short = {} if kind in ("sd", "sdxl", "stable_audio") else {"max_sequence_length": 12}
    size = {} if kind == "stable_audio" else SMALL
    extra = {"frames": 5} if kind == "video" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("error", SamplingAdvice)
        for steps in (3, 4):
            for solver in (None, "euler"):
                KSampler.from_pipeline(pipe, None, solver).sample(
                    "a red fox", steps=steps, seed=1, to="latent", **size, **short, **extra
                )
