"""Runs of a `PlanScheduler` that begin later than at the first timestep, or end before the last."""

from __future__ import annotations

import diffusers
import pytest
import torch

from k_diffusion.denoiser import EpsDenoiser
from k_diffusion.external.noise import GeneratorNoise
from k_diffusion.external.plan_scheduler import PlanScheduler
from k_diffusion.external.process import read_conventions
from k_diffusion.external.settle import own_solver
from k_diffusion.sampling import KSampler
from k_diffusion.sampling.engine import Run
from k_diffusion.sampling.plan import make_plan
from k_diffusion.sampling.registry import SOLVERS
from tests.external import tiny_pipelines as tiny

# numpy's word about torch, in diffusers' own lines.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
]
ONE_OUTPUT = [name for name, solver in SOLVERS.items() if solver.outputs == 1]
LOW = {"exp_ab": "exp_ab_low", "exp_ab_noise": "deis", "exp_ab_velocity": "exp_ab_velocity_low"}
OWN = diffusers.DDIMScheduler(**tiny.BETAS, clip_sample=False)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def network(x, time):
    return torch.tanh(x) + 0.1 * torch.cos(time / 100).reshape(-1, 1)


class Module(torch.nn.Module):
    def forward(self, x, time):
        return network(x, time)


@pytest.mark.parametrize("strength", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("steps", [2, 10])
@pytest.mark.parametrize("name", [n for n in ONE_OUTPUT if n != "restart"])
def test_a_solver_that_begins_later_is_that_solver_on_the_levels_that_are_left(
    name, steps, strength
):
    scheduler = PlanScheduler.from_config(OWN, solver=name, schedule="karras")
    scheduler.set_timesteps(steps)
    # As image to image has it; with a start of several calls, some solvers have more than these.
    begin = (steps - min(int(steps * strength), steps)) * scheduler.order
    if begin >= len(scheduler.timesteps):
        return
    times = scheduler.timesteps[begin:]
    scheduler.set_begin_index(begin)
    x0, noise = torch.randn(2, 1, 5, generator=seeded()).unbind()
    x = start = scheduler.add_noise(x0, noise, times[:1])
    generator = seeded(7)
    for t in times:
        x = scheduler.step(network(x, t.expand(1)), t, x, generator=generator).prev_sample
    levels = scheduler._visit.levels
    # A start of several calls in the first step puts those after it one or two calls later.
    first = scheduler._visit.level(scheduler._visit.start(begin))
    at = list(levels).index(first)
    assert at == begin // scheduler.order or name in LOW
    rest = make_plan(LOW.get(name, name) if at else name, levels[at:])
    run = Run(rest, start, GeneratorNoise(seeded(7), start), torch.float64)
    denoiser = EpsDenoiser(Module(), read_conventions(OWN).process)
    while not run.done:
        run.advance(denoiser(run.x, run.sigma))
    assert relative(x, run.result) < 1e-6


def test_a_restart_that_began_within_its_loop_is_refused():
    scheduler = PlanScheduler.from_config(OWN, solver="restart", schedule="karras")
    scheduler.set_timesteps(5)
    scheduler.set_begin_index(6)
    x = torch.zeros(1, 5)
    scheduler.step(x, scheduler.timesteps[6], x)  # within a step: goes unused
    scheduler.step(x, scheduler.timesteps[7], x)
    with pytest.raises(ValueError, match="restart asks other questions when it begins at timestep"):
        scheduler.step(x, scheduler.timesteps[8], x)


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "EDMEulerScheduler"])
def test_a_run_that_ends_above_clean_ends_in_the_coordinates_of_the_one_it_replaces(name):
    """Variance-exploding ones hand over x0 + sigma eps there, and an autoencoder decodes it."""
    options = tiny.BETAS if name == "EulerDiscreteScheduler" else {}
    own = getattr(diffusers, name)(final_sigmas_type="sigma_min", **options)
    ends = []
    for scheduler in (own, PlanScheduler.from_config(own, solver="euler")):
        scheduler.set_timesteps(10)
        x = torch.randn(1, 5, generator=seeded()) * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            seen = scheduler.scale_model_input(x, t)
            x = scheduler.step(network(seen, t.expand(1)), t, x).prev_sample
        ends.append(x)
    assert relative(ends[1], ends[0]) < 1e-5
    if name == "EDMEulerScheduler":
        return
    pipe = tiny.tiny_sd(scheduler=own)
    small = {"height": 16, "width": 16}
    theirs = pipe(
        "a red fox", num_inference_steps=5, guidance_scale=1.0, generator=seeded(3),
        output_type="latent", **small,
    ).images  # fmt: skip
    asked = {"steps": 5, "guidance": 1.0, "seeds": [3], "to": "latent", **small}
    sampler = KSampler.from_pipeline(pipe)
    assert relative(sampler.sample("a red fox", **asked), theirs) < 2e-5
    init = torch.zeros(1, 3, 16, 16)
    unchanged = sampler.sample("a red fox", init=init, strength=0.0, **asked)
    assert torch.equal(unchanged, sampler.encode_images(init))


@pytest.mark.parametrize("large", [False, True])
def test_ddpm_takes_the_variance_that_the_config_names(large):
    said = {"variance_type": "fixed_large" if large else "fixed_small", "clip_sample": False}
    own = diffusers.DDPMScheduler(**tiny.BETAS, **said)
    ends = []
    for options in (None, own_solver(own)[1], {"variance": float(not large)}):
        scheduler = own
        if options is not None:
            scheduler = PlanScheduler.from_config(own, solver="ddpm", options=options)
        scheduler.set_timesteps(10)
        generator = seeded(5)
        x = torch.randn(1, 5, generator=generator)
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t.expand(1)), t, x, generator=generator).prev_sample
        ends.append(x)
    assert relative(ends[1], ends[0]) < 1e-5
    assert relative(ends[2], ends[0]) > 1e-3
