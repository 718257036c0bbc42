"""Solvers as schedulers inside diffusers' pipelines, against loops outside and diffusers' own."""

from __future__ import annotations

import functools

import diffusers
import pytest
import torch

from k_diffusion.external.lays import ForeignScheduler
from k_diffusion.external.networks import foreign_denoiser
from k_diffusion.external.noise import GeneratorNoise
from k_diffusion.external.plan_scheduler import PlanScheduler
from k_diffusion.external.process import read_conventions
from k_diffusion.sampling import KSampler
from k_diffusion.sampling.engine import Run
from k_diffusion.sampling.plan import make_plan
from k_diffusion.sampling.registry import SOLVERS
from k_diffusion.utils.scheduler import make_scheduler
from tests.external import tiny_pipelines as tiny

# numpy's word about torch, in diffusers' own lines.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
]
ONE_OUTPUT = [name for name, solver in SOLVERS.items() if solver.outputs == 1]
LATENT = {"height": 16, "width": 16, "output_type": "latent"}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


make_sd = functools.cache(tiny.tiny_sd)


def text_of(pipe):
    return pipe.encode_prompt("a red fox", "cpu", 1, False)[0]


def loop(solver, levels, denoiser, x, generator, **condition):
    """The solver outside, as the library runs it."""
    plan = make_plan(solver, levels)
    run = Run(plan, x, GeneratorNoise(generator, x), torch.float64)
    while not run.done:
        run.advance(denoiser(run.x, run.sigma, **condition))
    return run.result


@pytest.mark.parametrize("schedule", [None, "karras"])
@pytest.mark.parametrize("name", ONE_OUTPUT)
@torch.no_grad()
def test_every_solver_in_the_pipeline_is_the_solver_outside(name, schedule):
    pipe = make_sd()
    own = diffusers.DDIMScheduler(**tiny.BETAS, clip_sample=False, steps_offset=1)
    steps = 6
    pipe.scheduler = PlanScheduler.from_config(own.config, solver=name, schedule=schedule)
    embedding = text_of(pipe)
    noise = torch.randn(2, 4, 8, 8, generator=seeded(1))
    inside = pipe(
        prompt_embeds=embedding.repeat(2, 1, 1),
        guidance_scale=1.0,
        num_inference_steps=steps,
        latents=noise.clone(),
        generator=[seeded(3), seeded(4)],
        **LATENT,
    ).images
    process = read_conventions(own).process
    lays = ForeignScheduler(own) if schedule is None else make_scheduler(schedule).within(process)
    levels = lays.levels(steps).on(process.path)
    denoiser = foreign_denoiser(pipe.unet, own)
    told = {"encoder_hidden_states": embedding.repeat(2, 1, 1)}
    outside = loop(name, levels, denoiser, noise, [seeded(3), seeded(4)], **told)
    assert relative(inside, outside) < 1e-5


CALLS = {
    "sd": lambda pipe, **k: pipe("a red fox", negative_prompt="blue", **LATENT, **k).images,
    "sdxl": lambda pipe, **k: pipe("a red fox", **LATENT, **k).images,
    "sd3": lambda pipe, **k: pipe("a red fox", **LATENT, **k).images,
    "flux": lambda pipe, **k: pipe("a red fox", max_sequence_length=12, **LATENT, **k).images,
    "pixart": lambda pipe, **k: (
        pipe(
            "a red fox", max_sequence_length=12, use_resolution_binning=False, **LATENT, **k
        ).images
    ),
    "dit": lambda pipe, **k: torch.from_numpy(pipe([3, 7], output_type="np", **k).images),
    "video": lambda pipe, **k: (
        pipe("a red fox", num_frames=5, max_sequence_length=12, **LATENT, **k).frames
    ),
    "stable_audio": lambda pipe, **k: (
        pipe("a red fox", audio_end_in_s=2.0, output_type="latent", **k).audios
    ),
}


@functools.cache
def made(name):
    return getattr(tiny, f"tiny_{name}")()


OWN = {
    "sd": lambda: diffusers.DDIMScheduler(**tiny.BETAS, clip_sample=False, set_alpha_to_one=False),
    "sd v": lambda: diffusers.DDIMScheduler(
        **tiny.BETAS, clip_sample=False, prediction_type="v_prediction",
        timestep_spacing="trailing", rescale_betas_zero_snr=True,
    ),
    "sd euler": lambda: diffusers.EulerDiscreteScheduler(**tiny.BETAS, use_karras_sigmas=True),
    "sdxl": lambda: diffusers.EulerDiscreteScheduler(**tiny.BETAS, timestep_spacing="leading"),
    "sd3": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "flux": lambda: diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    "dit": lambda: diffusers.DDIMScheduler(clip_sample=False),
    "pixart": lambda: diffusers.DDIMScheduler(clip_sample=False),
    "video": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0),
    "sd edm": lambda: diffusers.EDMEulerScheduler(),
    "stable_audio": lambda: diffusers.EDMEulerScheduler(prediction_type="v_prediction"),
}  # fmt: skip


@pytest.mark.parametrize("steps", [5, 20])
@pytest.mark.parametrize("case", OWN)
@pytest.mark.filterwarnings("ignore:.*timestep_type:UserWarning")
def test_ddim_and_euler_give_what_those_of_diffusers_give(case, steps):
    pipe = made(case.split()[0])
    call = functools.partial(CALLS[case.split()[0]], pipe, num_inference_steps=steps)
    own = OWN[case]()
    pipe.scheduler = own
    theirs = call(generator=seeded())
    pipe.scheduler = PlanScheduler.from_config(own.config, solver="euler")
    ours = call(generator=seeded())
    assert relative(ours, theirs) < 1e-4


@pytest.mark.parametrize("solver", ["dpmpp_3m_sde", "heun"])
@pytest.mark.parametrize("name", CALLS)
def test_pipelines_run_unchanged(name, solver):
    pipe = made(name)
    pipe.scheduler = OWN.get(name, lambda: tiny.tiny_stable_audio().scheduler)()
    pipe.scheduler = PlanScheduler.from_config(
        pipe.scheduler.config, solver=solver, schedule="karras"
    )
    seen = []

    def told(pipe, step, timestep, kept):
        seen.append(step)
        return kept

    keywords = {"callback_on_step_end": told}
    if name == "dit":
        keywords = {}
    elif name in ("stable_audio", "pixart"):
        keywords = {"callback": lambda step, timestep, latents: seen.append(step)}
    out = CALLS[name](pipe, num_inference_steps=4, generator=seeded(), **keywords)
    assert out.isfinite().all()
    calls = 4 if solver == "dpmpp_3m_sde" else 7
    assert len(pipe.scheduler.timesteps) == calls
    # Flux hands over its levels, and so takes the number of timesteps for that of steps.
    assert pipe.scheduler.order == (1 if calls == 4 or name == "flux" else 2)
    assert pipe.scheduler.step_index == calls
    assert name == "dit" or len(seen) == (4 if "callback" in keywords else calls)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument:UserWarning")
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
def test_whole_pipelines_are_saved_and_loaded_with_it(name, tmp_path):
    pipe = made(name)
    own = OWN[name]()
    if name == "sd":  # else StableDiffusionPipeline amends it when it is loaded
        own = diffusers.DDIMScheduler(**tiny.BETAS, clip_sample=False, steps_offset=1)
    pipe.scheduler = PlanScheduler.from_config(own, solver="heun", schedule="karras")
    pipe.save_pretrained(tmp_path)
    again = type(pipe).from_pretrained(tmp_path, local_files_only=True)
    again.set_progress_bar_config(disable=True)
    assert type(again.scheduler) is PlanScheduler
    assert dict(again.scheduler.config) == {
        key: value for key, value in pipe.scheduler.config.items() if key != "_diffusers_version"
    }
    drawn = [CALLS[name](p, num_inference_steps=2, generator=seeded()) for p in (pipe, again)]
    assert relative(*drawn) < 1e-5


def test_the_audio_network_sees_the_time_and_the_noise_that_the_loop_outside_gives():
    pipe = tiny.tiny_stable_audio()
    own = pipe.scheduler
    told = {}

    def call(module, args, kwargs):
        told.update(kwargs, x=args[0] if args else kwargs["hidden_states"])
        seen.append((float(args[1] if len(args) > 1 else kwargs["timestep"]), told["x"].clone()))

    seen = []
    pipe.transformer.register_forward_pre_hook(call, with_kwargs=True)
    pipe.scheduler = PlanScheduler.from_config(own.config, solver="heun")
    out = pipe(
        "a fox", num_inference_steps=5, guidance_scale=1.0, audio_end_in_s=2.0,
        generator=seeded(), output_type="latent",
    ).audios  # fmt: skip
    start, count = seen[0][1], len(seen)
    denoiser = foreign_denoiser(pipe.transformer, own)
    condition = {k: told[k] for k in ("encoder_hidden_states", "global_hidden_states")}
    with torch.no_grad():
        levels = ForeignScheduler(own).levels(5)
        outside = loop("heun", levels, denoiser, start, None, **condition)
    times = [[time for time, _ in part] for part in (seen[:count], seen[count:])]
    assert times[0] == pytest.approx(times[1], rel=1e-6)
    assert relative(out, outside) < 1e-5


def test_a_sampler_outside_takes_the_same_noise():
    own = diffusers.DDIMScheduler(**tiny.BETAS, clip_sample=False)
    pipe = make_sd()
    embedding = text_of(pipe)
    pipe.scheduler = PlanScheduler.from_config(own.config, solver="dpmpp_sde")
    noise = torch.randn(1, 4, 8, 8, generator=seeded(1))
    inside = pipe(
        prompt_embeds=embedding, guidance_scale=1.0, num_inference_steps=5, generator=seeded(3),
        latents=noise, **LATENT,
    ).images  # fmt: skip
    sampler = KSampler(foreign_denoiser(pipe.unet, own), ForeignScheduler(own), "dpmpp_sde")
    start = noise / sampler.levels(5)[0].sigma  # KSampler scales it to the first level
    told = {"encoder_hidden_states": embedding}
    outside = sampler.sample(start, 5, told, noise=GeneratorNoise(seeded(3), noise))
    assert relative(inside, outside) < 1e-5


def test_a_batch_with_a_generator_for_each_is_its_single_runs():
    pipe = make_sd()
    config = diffusers.DDIMScheduler(**tiny.BETAS, clip_sample=False).config
    pipe.scheduler = PlanScheduler.from_config(config, solver="dpmpp_2m_sde", schedule="karras")
    call = functools.partial(pipe, num_inference_steps=5, **LATENT)
    both = call(["a red fox", "a blue cat"], generator=[seeded(5), seeded(6)]).images
    for i, (prompt, seed) in enumerate([("a red fox", 5), ("a blue cat", 6)]):
        single = call(prompt, generator=seeded(seed)).images
        assert relative(both[i], single[0]) < 1e-4


@pytest.mark.parametrize("kind", ["Img2Img", "Inpaint"])
def test_flux_begins_at_the_strength_for_solvers_of_several_calls_too(kind):
    base = made("flux")
    own = OWN["flux"]()
    without = ("image_encoder", "feature_extractor")
    parts = {name: part for name, part in base.components.items() if name not in without}
    pipe = getattr(diffusers, f"Flux{kind}Pipeline")(**parts)
    pipe.set_progress_bar_config(disable=True)
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 8:] = 1
    given = {"image": torch.rand(1, 3, 16, 16, generator=seeded(9)), "strength": 0.6}
    if kind == "Inpaint":
        given["mask_image"] = mask
    results = []
    for scheduler in (
        own,
        PlanScheduler.from_config(own.config, solver="euler"),
        PlanScheduler.from_config(own.config, solver="heun"),
    ):
        pipe.scheduler = scheduler
        results.append(CALLS["flux"](pipe, num_inference_steps=10, generator=seeded(), **given))
    assert relative(results[1], results[0]) < 1e-4
    assert relative(results[2], results[0]) < 0.1
