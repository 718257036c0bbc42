"""What a `PlanScheduler` keeps: its config; what it refuses, and what pipelines hand to it."""

from __future__ import annotations

import copy
import json
import pickle

import diffusers
import pytest
import torch

import k_diffusion
from k_diffusion.denoiser import EpsDenoiser
from k_diffusion.external.lays import ForeignScheduler
from k_diffusion.external.noise import GeneratorNoise
from k_diffusion.external.plan_scheduler import PlanScheduler
from k_diffusion.external.process import read_conventions
from k_diffusion.external.settle import own_solver
from k_diffusion.external.visits import visited
from k_diffusion.sampling.engine import Run
from tests.external import tiny_pipelines as tiny

from .walked import SIZE, Network, ddim, levels_of_own, plan, relative, seeded, walk

# numpy's word about torch, in diffusers' own lines.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
]


def test_the_config_is_that_of_the_one_it_replaces(tmp_path):
    own = ddim(steps_offset=1, prediction_type="v_prediction")
    scheduler = plan(own, solver="dpmpp_2m_sde", schedule="karras", options={"eta": 0.5},
                     schedule_options={"rho": 5.0})  # fmt: skip
    for key, value in own.config.items():
        assert key.startswith("_") or scheduler.config[key] == value
    assert scheduler.config.prediction_type == "v_prediction"
    scheduler.save_pretrained(tmp_path)
    json.loads((tmp_path / "scheduler_config.json").read_text())
    loaded = PlanScheduler.from_pretrained(tmp_path)
    kept = {k: v for k, v in scheduler.config.items() if k != "_diffusers_version"}
    assert {**loaded.config} == kept
    again = PlanScheduler.from_config(loaded.config, solver="euler")
    assert again.config.options == {}
    assert again.config.schedule_options == {"rho": 5.0}
    for one in (scheduler, loaded):
        one.set_timesteps(5)
    assert loaded._visit.plan is scheduler._visit.plan
    back = diffusers.DDIMScheduler.from_config(scheduler.config)
    assert {k: v for k, v in back.config.items() if k in own.config and k[0] != "_"} == {
        k: v for k, v in own.config.items() if k[0] != "_"
    }
    assert len(scheduler) == 1000


def test_a_whole_pipeline_is_saved_and_loaded_with_it(tmp_path):
    pipe = tiny.tiny_sd(scheduler=plan(ddim(steps_offset=1), solver="heun", schedule="karras"))
    call = {"num_inference_steps": 3, **SIZE}
    before = pipe("a red fox", generator=seeded(), **call).images
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == [PlanScheduler.__module__, "PlanScheduler"]
    again = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path, local_files_only=True)
    again.set_progress_bar_config(disable=True)
    assert type(again.scheduler) is k_diffusion.PlanScheduler
    assert torch.equal(again("a red fox", generator=seeded(), **call).images, before)


@pytest.mark.parametrize(("options", "message"), [
    ({"solver": "eluer"}, "unknown sampler 'eluer'"),
    ({"solver": "dpm_adaptive"}, "finds its own steps, which a pipeline cannot follow"),
    ({"solver": "euler_cfg_pp"}, "use KSampler, or a solver without cfg_pp"),
    ({"schedule": "karas"}, "unknown scheduler 'karas'"),
    ({"options": {"etta": 1.0}}, "unknown option of dpmpp_2m, 'etta'"),
    ({"schedule": "karras", "schedule_options": {"roh": 1.0}}, "unknown option of scheduler"),
    ({"schedule_options": {"rho": 1.0}}, "need a schedule"),
    ({"steps_ofset": 1}, "unknown option of PlanScheduler for DDIMScheduler, 'steps_ofset'"),
])  # fmt: skip
def test_what_is_unknown_is_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        plan(**options)


def test_misuse_is_refused_by_name():
    x = torch.zeros(1, 3, 4, 4)
    scheduler = plan(solver="heun", schedule="karras")
    with pytest.raises(RuntimeError, match="no levels yet: call set_timesteps first"):
        scheduler.step(x, 1, x)
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="timestep 3 begins no step of this run"):
        scheduler.step(x, 3, x)
    other = plan(ddim(set_alpha_to_one=False), solver="rk3")
    other.set_timesteps(4)
    other.set_begin_index(len(other.timesteps) - 1)
    with pytest.raises(ValueError, match="after which no step begins: take a larger strength"):
        other.step(x, other.timesteps[-1], x)
    scheduler = plan(solver="heun", schedule="karras")
    scheduler.set_timesteps(1)
    t = scheduler.timesteps[0]
    with pytest.raises(ValueError, match="model_output has shape"):
        scheduler.step(x[:, :2], t, x)
    scheduler.set_timesteps(1)
    x = scheduler.step(x, t, x).prev_sample
    with pytest.raises(RuntimeError, match="has made its 1 calls"):
        scheduler.step(x, t, x)
    for told, message in (
        ({}, "needs num_inference_steps, sigmas or timesteps"),
        ({"num_inference_steps": 0}, "whole number above 0, got 0"),
        ({"sigmas": [1.0], "timesteps": [1.0]}, "not both"),
        ({"num_inference_steps": 3, "sigmas": [1.0]}, "but 1 levels were given"),
        ({"sigmas": [-1.0]}, "is no level of the vp path"),
    ):
        with pytest.raises(ValueError, match=message):
            scheduler.set_timesteps(**told)
    zero = ddim(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    with pytest.raises(ValueError, match="begins at pure noise"):
        plan(zero).set_timesteps(4)
    scheduler = plan(solver="dpmpp_sde", schedule="karras")
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="2 samples need as many generators"):
        scheduler.step(torch.zeros(2, 3), scheduler.timesteps[0], torch.zeros(2, 3),
                       generator=[seeded()] * 3)  # fmt: skip


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "PNDMScheduler",
                                  "UniPCMultistepScheduler", "LMSDiscreteScheduler"])  # fmt: skip
def test_a_config_without_its_class_is_known_by_its_keys(name):
    own = getattr(diffusers, name)()
    assert "_class_name" not in own.config
    scheduler = PlanScheduler.from_config(own.config, solver="euler")
    assert scheduler.config.lays == name
    theirs = levels_of_own(own)
    assert visited(scheduler.config, 5, None, None, None).sigmas == pytest.approx(theirs)


def test_a_config_that_one_scheduler_took_over_from_another_is_known_by_the_keys_of_its_own():
    euler = diffusers.EulerDiscreteScheduler.from_config(ddim().config)
    assert "clip_sample" in euler.config
    assert PlanScheduler.from_config(euler.config).config.lays == "EulerDiscreteScheduler"
    unipc = diffusers.UniPCMultistepScheduler.from_config(euler.config)
    assert PlanScheduler.from_config(unipc.config).config.lays == "UniPCMultistepScheduler"


def test_a_class_that_is_told_counts_more_than_the_keys(tmp_path):
    """Those of LCM and TCD, and of LMS and KDPM2, are the same."""
    for name in ("LCMScheduler", "TCDScheduler", "LMSDiscreteScheduler", "KDPM2DiscreteScheduler",
                 "KDPM2AncestralDiscreteScheduler", "DDIMParallelScheduler"):  # fmt: skip
        kind = getattr(diffusers, name)
        own = kind(**tiny.BETAS)
        assert PlanScheduler.from_config(own).config.lays == name
        own.save_pretrained(tmp_path)
        loaded = kind.from_pretrained(tmp_path)
        assert PlanScheduler.from_config(loaded.config).config.lays == name
        # By its keys alone it may be another, which lays the same.
        guessed = PlanScheduler.from_config(own.config)
        theirs = ForeignScheduler(own).levels(5)
        assert visited(guessed.config, 5, None, None, None).sigmas == theirs.sigmas


def test_what_a_plan_scheduler_left_in_a_config_decides_nothing():
    left = diffusers.EulerDiscreteScheduler.from_config(plan(solver="heun").config)
    assert left.config["solver"] == "heun"
    assert own_solver(left) == ("euler", {})
    again = PlanScheduler.from_config(left.config)
    assert again.config.solver == "dpmpp_2m"
    assert again.config.lays == "EulerDiscreteScheduler"
    assert own_solver(plan(solver="dpmpp_sde", options={"eta": 0.5})) == (
        "dpmpp_sde", {"eta": 0.5}
    )  # fmt: skip


@pytest.mark.parametrize("solver", ["dpmpp_2m", "heun"])
@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_steps_are_as_asked_where_the_last_level_is_there_twice(name, solver):
    own = getattr(diffusers, name)(use_karras_sigmas=True, final_sigmas_type="sigma_min")
    own.set_timesteps(5)
    assert own.sigmas[-1] == own.sigmas[-2]
    scheduler = plan(own, solver=solver)
    scheduler.set_timesteps(5)
    assert scheduler.num_inference_steps == 5
    assert len(scheduler.timesteps) == 5 * scheduler.order
    start = torch.randn(1, 5, generator=seeded())
    denoiser = EpsDenoiser(Network(), read_conventions(own).process)
    run = Run(scheduler._visit.plan, start, sigma_dtype=torch.float64)
    while not run.done:
        run.advance(denoiser(run.x, run.sigma))
    assert relative(walk(scheduler, start), run.result) < 1e-6
    scheduler.set_timesteps(5)
    scheduler.set_begin_index(2 * scheduler.order)
    x = start
    for t in scheduler.timesteps[2 * scheduler.order :]:
        x = scheduler.step(x, t, x).prev_sample
    assert x.isfinite().all()


def test_it_can_be_copied_within_a_run_and_pickled_before():
    scheduler = plan(solver="dpmpp_2m", schedule="karras")
    start = torch.randn(1, 5, generator=seeded())
    scheduler.set_timesteps(4)
    whole = walk(scheduler, start)
    scheduler.set_timesteps(4)
    assert torch.equal(walk(pickle.loads(pickle.dumps(scheduler)), start), whole)
    x = start
    for i, t in enumerate(scheduler.timesteps):
        if i == 2:
            scheduler = copy.deepcopy(scheduler)
        x = scheduler.step(Network()(x, t.expand(1)), t, x).prev_sample
    assert relative(x, whole) < 1e-6


def test_timesteps_come_in_the_shapes_and_precisions_of_pipelines():
    scheduler = plan(diffusers.FlowMatchEulerDiscreteScheduler(), solver="euler")
    x = torch.randn(2, 5, generator=seeded())
    results = []
    for told in (lambda t: t, lambda t: t.expand(2), lambda t: t.bfloat16(), lambda t: t.long()):
        scheduler.set_timesteps(4)
        results.append(scheduler.step(x, told(scheduler.timesteps[0]), x).prev_sample)
    assert all(torch.equal(results[0], other) for other in results[1:])
    with pytest.raises(ValueError, match="begin_index -1 is none of the 4 timesteps"):
        scheduler.set_begin_index(-1)
    with pytest.raises(ValueError, match="begin_index 4 is none"):
        scheduler.set_begin_index(4)


def test_each_step_may_bring_its_own_generator():
    scheduler = plan(solver="euler_ancestral", schedule="karras")
    start, network = torch.randn(1, 5, generator=seeded()), Network()
    scheduler.set_timesteps(4)
    x, expected = start, start
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(network(x, t.expand(1)), t, x, generator=seeded(i)).prev_sample
    denoiser = EpsDenoiser(network, read_conventions(ddim()).process)
    run = Run(scheduler._visit.plan, expected, noise := GeneratorNoise(None, start), torch.float64)
    for i in range(4):
        noise.generators = seeded(i)
        run.advance(denoiser(run.x, run.sigma))
    assert relative(x, run.result) < 1e-6


def test_what_a_pipeline_amends_in_the_config_counts():
    scheduler = plan(solver="euler")
    scheduler.register_to_config(prediction_type="v_prediction", steps_offset=1)
    other = plan(ddim(prediction_type="v_prediction", steps_offset=1), solver="euler")
    start = torch.randn(1, 5, generator=seeded())
    for one in (scheduler, other):
        one.set_timesteps(5)
    assert torch.equal(walk(scheduler, start), walk(other, start))


@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_a_dynamic_shift_under_a_schedule_of_ours_is_theirs(kind):
    own = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=kind)
    own.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=0.8)
    scheduler = plan(own, solver="euler", schedule="sgm_uniform")
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=0.8)
    assert scheduler.sigmas.tolist() == pytest.approx(own.sigmas.tolist(), abs=1e-3)
    fixed = diffusers.UniPCMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    )
    scheduler = plan(fixed, solver="euler", schedule="sgm_uniform")
    scheduler.set_timesteps(4)
    shifted = [3 * s / (1 + 2 * s) for s in (1.0, 0.75, 0.5, 0.25, 0.0)]
    assert scheduler.sigmas.tolist() == pytest.approx(shifted, abs=1e-3)


def test_what_pipelines_hand_to_every_scheduler():
    unet = diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    ).eval()  # fmt: skip
    pipe = diffusers.DDIMPipeline(unet, ddim())
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(generator=seeded(), num_inference_steps=4, output_type="np").images
    pipe.scheduler = plan(solver="ddim")
    ours = pipe(generator=seeded(), num_inference_steps=4, output_type="np").images
    assert abs(ours - theirs).max() < 1e-4
    with pytest.raises(ValueError, match="eta \\(0.5\\) and use_clipped_model_output do nothing"):
        pipe(generator=seeded(), num_inference_steps=4, eta=0.5, output_type="np")
    x = torch.zeros(1, 3)
    scheduler = plan(solver="euler")
    scheduler.set_timesteps(3)
    scheduler.step(x, scheduler.timesteps[0], x)
    with pytest.raises(ValueError, match="sample has shape \\(1, 4\\), but the run began with"):
        scheduler.step(torch.zeros(1, 4), scheduler.timesteps[1], torch.zeros(1, 4))
