"""What a `PlanScheduler` keeps: its state, and where it begins."""

from __future__ import annotations

import functools

import diffusers
import pytest
import torch

from k_diffusion.denoiser import EpsDenoiser, make_denoiser
from k_diffusion.external.networks import limited
from k_diffusion.external.process import read_conventions
from k_diffusion.sampling.engine import Run
from k_diffusion.sampling.registry import SOLVERS, solver
from k_diffusion.utils.levels import FLOW, VP
from tests.external import tiny_pipelines as tiny

from .walked import Network, ddim, plan, relative, seeded, walk

# numpy's word about torch, in diffusers' own lines.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("solver", ["dpmpp_2m", "heun"])
def test_the_state_is_float32_whatever_the_pipeline_computes_in(dtype, solver):
    scheduler = plan(solver=solver, schedule="karras")
    scheduler.set_timesteps(8)
    start = torch.randn(2, 5, generator=seeded()).to(dtype)
    inside = walk(scheduler, start, dtype)

    class Half(Network):
        def forward(self, x, time):
            return super().forward(x.to(dtype), time.to(dtype))

    process = read_conventions(ddim()).process
    denoiser = EpsDenoiser(Half(), process)
    run = Run(scheduler._visit.plan, start, sigma_dtype=torch.float64)
    while not run.done:
        run.advance(denoiser(run.x, run.sigma))
    assert torch.equal(inside, run.result.to(dtype))
    # A copy of each sample keeps what was rounded off, and an edit loses it where it edits.
    scheduler.set_timesteps(8)
    assert torch.equal(walk(scheduler, start, dtype, lambda i, x: x.clone()), inside)
    scheduler.set_timesteps(8)
    part = walk(scheduler, start, dtype, lambda i, x: torch.cat([x[:1] * 1.5, x[1:]]))
    assert torch.equal(part[1:], inside[1:])
    assert not torch.equal(part[:1], inside[:1])


def test_an_edit_between_steps_is_taken_even_in_place():
    scheduler = plan(solver="dpmpp_2m", schedule="karras")
    start = torch.randn(1, 5, generator=seeded())
    results = []
    for edit in (lambda i, x: x, lambda i, x: x + 0.5, lambda i, x: x.add_(0.5)):
        scheduler.set_timesteps(5)
        results.append(walk(scheduler, start, edit=edit))
    assert not torch.equal(results[0], results[1] - 0.5)
    assert torch.equal(results[1], results[2])
    with torch.inference_mode():  # as servers call pipelines
        scheduler.set_timesteps(5)
        assert torch.equal(walk(scheduler, start, edit=lambda i, x: x.add_(0.5)), results[1])


def test_the_callers_tensors_are_not_written_into():
    scheduler = plan(solver="dpmpp_3m_sde", schedule="karras")
    scheduler.set_timesteps(4)
    start = torch.randn(1, 5, generator=seeded())
    before, kept = start.clone(), []
    walk(scheduler, start, edit=lambda i, x: kept.append((x, x.clone())) or x, generator=seeded(1))
    assert torch.equal(before, start)
    assert all(torch.equal(x, copy) for x, copy in kept)


def test_what_is_handed_out_is_not_the_state_itself():
    scheduler = plan(solver="heun", schedule="karras")
    scheduler.set_timesteps(4)
    start = torch.randn(1, 5, generator=seeded())
    shared = []

    def look(i, x):
        if scheduler._run is not None:
            shared.append(x.data_ptr() == scheduler._run.x.data_ptr())
        return x

    walk(scheduler, start, edit=look)
    assert shared == [False] * 6


def test_a_solver_that_corrects_its_samples_refuses_edits_but_takes_copies():
    @solver(order=1, source="made here", predictor=True)
    def corrected(x, levels, noise):
        for s, t in levels.pairs():
            d = yield x, s
            x = (t.sigma / s.sigma) * x + (t.alpha - s.alpha * t.sigma / s.sigma) * d
        return x

    try:
        scheduler = plan(solver="corrected", schedule="karras")
        start = torch.randn(1, 5, generator=seeded())
        scheduler.set_timesteps(5)
        whole = walk(scheduler, start)
        scheduler.set_timesteps(5)
        assert torch.equal(walk(scheduler, start, edit=lambda i, x: x.clone()), whole)
        scheduler.set_timesteps(5)
        with pytest.raises(ValueError, match="assigning x would be undone: use another sampler"):
            walk(scheduler, start, edit=lambda i, x: x + 1)
    finally:
        del SOLVERS["corrected"]


@pytest.mark.parametrize("options", [
    {"clip_sample": True, "clip_sample_range": 0.7},
    {"thresholding": True, "sample_max_value": 1.2, "dynamic_thresholding_ratio": 0.9},
])  # fmt: skip
def test_estimates_are_limited_as_the_config_says(options):
    scheduler = plan(ddim(**options), solver="dpmpp_2m")
    scheduler.set_timesteps(5)
    start = torch.randn(2, 5, generator=seeded())
    said = read_conventions(ddim(**options))
    denoiser = limited(make_denoiser(EpsDenoiser(Network(), said.process)), said)
    run = Run(scheduler._visit.plan, start, sigma_dtype=torch.float64)
    while not run.done:
        run.advance(denoiser(run.x, run.sigma))
    assert relative(walk(scheduler, start), run.result) < 1e-6


def test_variances_that_follow_the_prediction_are_left_out():
    scheduler = plan(solver="euler")
    x = torch.randn(2, 3, 4, 4, generator=seeded())
    output = torch.randn(2, 6, 4, 4, generator=seeded(1))
    scheduler.set_timesteps(5)
    both = scheduler.step(output, scheduler.timesteps[0], x, return_dict=False)
    scheduler.set_timesteps(5)
    first = scheduler.step(output[:, :3], scheduler.timesteps[0], x)
    assert torch.equal(both[0], first.prev_sample)
    assert torch.equal(both[1], first.pred_original_sample)


@functools.cache
def images():
    """An image and a mask of its right half."""
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 8:] = 1
    return torch.rand(1, 3, 16, 16, generator=seeded(9)), mask


def pictured(kind, scheduler, strength, steps=10):
    pipe = tiny.tiny_sd(kind=kind, scheduler=scheduler)
    image, mask = images()
    size = {} if kind == "Img2Img" else {"mask_image": mask, "height": 16, "width": 16}
    return pipe(
        "a red fox", image=image, strength=strength, num_inference_steps=steps,
        generator=seeded(), output_type="latent", **size,
    ).images  # fmt: skip


@pytest.mark.parametrize("strength", [0.6, 1.0])
@pytest.mark.parametrize("kind", ["Img2Img", "Inpaint"])
def test_image_to_image_and_inpainting_give_what_ddim_of_diffusers_gives(kind, strength):
    theirs = pictured(kind, ddim(steps_offset=1), strength)
    scheduler = plan(ddim(steps_offset=1), solver="ddim")
    assert relative(pictured(kind, scheduler, strength), theirs) < 1e-4
    assert scheduler.step_index == 10
    heun = plan(ddim(steps_offset=1), solver="heun", schedule="karras")
    assert pictured(kind, heun, strength).isfinite().all()
    assert heun.begin_index == (0 if strength == 1 else 8)
    sde = plan(ddim(steps_offset=1), solver="dpmpp_3m_sde", schedule="karras")
    assert pictured(kind, sde, strength).isfinite().all()


def test_a_run_that_begins_later_is_that_of_the_last_levels():
    scheduler = plan(solver="dpmpp_2m", schedule="karras")
    scheduler.set_timesteps(10)
    scheduler.set_begin_index(4)
    x0, noise = torch.randn(2, 1, 5, generator=seeded()).unbind()
    x = scheduler.add_noise(x0, noise, scheduler.timesteps[4:5])
    levels = scheduler._visit.levels[4:]
    assert torch.allclose(x, levels[0].alpha * x0 + levels[0].sigma * noise, atol=1e-6)
    assert torch.equal(x, scheduler.scale_noise(x0, scheduler.timesteps[4:5], noise))
    whole = x
    network = Network()
    for t in scheduler.timesteps[4:]:
        output = network(x, t.expand(1))
        x = scheduler.step(output, t, x, return_dict=False)[0]
    other = plan(solver="dpmpp_2m")
    other.set_timesteps(sigmas=[level.ratio for level in levels[:-1]])
    x = whole
    for t in other.timesteps:
        x = other.step(network(x, t.expand(1)), t, x).prev_sample
        last = x
    assert relative(last, x) < 1e-6


def test_flow_from_pure_noise_lists_its_first_call_twice_and_begins_where_pipelines_think():
    own = diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0)
    scheduler = plan(own, solver="dpmpp_2s")
    scheduler.set_timesteps(6)
    assert scheduler.order == 2
    assert len(scheduler.timesteps) == 11
    assert scheduler.timesteps[0] == scheduler.timesteps[1] == 1000
    sigmas = scheduler._visit.levels.sigmas
    for step in range(6):
        assert scheduler.timesteps[2 * step].item() == pytest.approx(1000 * sigmas[step], rel=1e-6)
        assert scheduler._visit.starts[2 * step]
    start = torch.randn(1, 5, generator=seeded())
    inside = walk(scheduler, start)
    denoiser = scheduler._formulas.__class__(Network())
    run = Run(scheduler._visit.plan, start, sigma_dtype=torch.float64)
    while not run.done:
        run.advance(denoiser(run.x, run.sigma))
    assert relative(inside, run.result) < 1e-6
    scheduler.set_timesteps(6)
    scheduler.set_begin_index(4)  # strength 2 / 3
    x = start
    for t in scheduler.timesteps[4:]:
        x = scheduler.step(x, t, x).prev_sample
    assert x.isfinite().all()


def test_a_run_that_begins_inside_a_step_begins_with_the_next():
    scheduler = plan(solver="dpmpp_2s", schedule="karras")
    x0, noise = torch.randn(2, 1, 5, generator=seeded()).unbind()
    network, results = Network(), []
    for begin in (5, 6):
        scheduler.set_timesteps(6)
        scheduler.set_begin_index(begin)
        x = scheduler.add_noise(x0, noise, scheduler.timesteps[begin : begin + 1])
        for t in scheduler.timesteps[begin:]:
            x = scheduler.step(network(x, t.expand(1)), t, x).prev_sample
        results.append(x)
    assert torch.equal(*results)
    # Pipelines that hand over levels take the number of timesteps for that of steps.
    assert scheduler.order == 2
    scheduler.set_timesteps(sigmas=[3.0, 1.0, 0.3])
    assert scheduler.order == 1
    assert scheduler.num_inference_steps == 3
    assert len(scheduler.timesteps) == 5


def test_own_levels_and_the_flows_shift():
    scheduler = plan(solver="euler")
    scheduler.set_timesteps(timesteps=[900, 500.5, 100])
    assert scheduler.timesteps.tolist() == pytest.approx([900, 500.5, 100], rel=1e-6)
    scheduler.set_timesteps(sigmas=[10.0, 3.0, 0.0])
    assert scheduler.num_inference_steps == 2
    assert scheduler.sigmas.tolist() == pytest.approx(
        [VP.at(-torch.tensor(s).log().item()).sigma for s in (10.0, 3.0)] + [0.0], rel=1e-5
    )
    own = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    shifted = [FLOW.at(FLOW.at(0.0).half_log_snr - 0.8).sigma]
    for schedule in (None, "flow", "sgm_uniform"):
        scheduler = plan(own, solver="euler", schedule=schedule)
        scheduler.set_timesteps(sigmas=[1.0, 0.5], mu=0.8)  # even: a pipeline's own
        assert scheduler.num_inference_steps == 2
        if schedule != "flow":
            assert scheduler.sigmas[1].item() == pytest.approx(shifted[0], rel=1e-3)
    scheduler = plan(own, solver="euler", schedule="karras")
    scheduler.set_timesteps(sigmas=[0.9, 0.3], mu=0.8)
    assert scheduler.sigmas.tolist() == pytest.approx([0.9, 0.3, 0.0])
    with pytest.raises(ValueError, match="shifts its levels by the size of the image: give mu"):
        plan(own).set_timesteps(4)
