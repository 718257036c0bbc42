"""What docs/from-diffusers.md says of its limits is so; where one of these fails, tell it there."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

from k_diffusion import PlanScheduler
from k_diffusion.external import ForeignScheduler, read_conventions
from k_diffusion.guidance import cfg
from k_diffusion.sampling import KSampler
from k_diffusion.utils.scheduler import FlowScheduler, make_scheduler
from tests.external import tiny_pipelines as tiny

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
]
SMALL = {"height": 16, "width": 16, "output_type": "latent"}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def test_our_schedules_know_a_flows_shift() -> None:
    pipe = tiny.tiny_sd3(shift=3.0)
    inside = PlanScheduler.from_config(pipe.scheduler.config, solver="euler", schedule="simple")
    inside.set_timesteps(4)
    for shift, middle in ((3.0, [0.9, 0.75, 0.5]), (5.0, [0.9375, 5 / 6, 0.625])):
        told = make_scheduler("simple", process=FlowScheduler(shift=shift))
        for schedule in ("simple", told) if shift == 3.0 else (told,):
            sampler = KSampler.from_pipeline(pipe, schedule, "euler").ksampler((4, 8, 8))
            assert sampler.levels(4).sigmas == pytest.approx([1, *middle, 0])
    assert inside.sigmas.tolist() == pytest.approx([1, 0.9, 0.75, 0.5, 0])


@pytest.mark.parametrize("kind", ["sd3", "flux", "video", "dit"])
def test_pipelines_that_hand_no_generator_on(kind: str) -> None:
    pipe = getattr(tiny, f"tiny_{kind}")()
    pipe.scheduler = PlanScheduler.from_config(pipe.scheduler, solver="dpmpp_2m_sde")
    asked: dict[str, Any] = {"num_inference_steps": 3}
    if kind == "dit":
        asked |= {"class_labels": [3], "output_type": "np"}
    else:
        asked |= {"prompt": "a red fox", "max_sequence_length": 12, **SMALL}
    asked |= {"num_frames": 5} if kind == "video" else {}

    def draw(seed: int | None) -> torch.Tensor:
        if seed is not None:
            torch.manual_seed(seed)
        return torch.as_tensor(pipe(generator=seeded(7), **asked)[0])

    assert not torch.equal(draw(None), draw(None))
    assert torch.equal(draw(1), draw(1))


def test_base_and_refiner_as_two_pipelines() -> None:
    base = tiny.tiny_sdxl()
    own = base.scheduler.config
    parts = {
        k: v for k, v in base.components.items() if "image_enc" not in k and "feature" not in k
    }
    refiner = diffusers.StableDiffusionXLImg2ImgPipeline(**parts, add_watermarker=False)
    refiner.set_progress_bar_config(disable=True)
    asked = {"num_inference_steps": 10, "guidance_scale": 5.0, **SMALL}

    def plan(solver: str) -> Any:
        return PlanScheduler.from_config(own, solver=solver)

    def both(first: Any, second: Any) -> torch.Tensor:
        base.scheduler, refiner.scheduler = first, second
        x = base("a red fox", denoising_end=0.5, generator=seeded(1), **asked).images
        told = {k: v for k, v in asked.items() if k not in ("height", "width")}
        return refiner("a red fox", image=x, denoising_start=0.5, **told).images

    def one(solver: str) -> torch.Tensor:
        base.scheduler = plan(solver)
        return base("a red fox", generator=seeded(1), **asked).images

    assert torch.equal(both(plan("euler"), plan("euler")), one("euler"))
    euler = diffusers.EulerDiscreteScheduler
    assert far(both(euler.from_config(own), plan("euler")), one("euler")) > 0.1
    assert far(both(plan("euler"), euler.from_config(own)), one("euler")) > 0.1
    assert 0 < far(both(plan("dpmpp_2m"), plan("dpmpp_2m")), one("dpmpp_2m")) < 0.01
    assert far(both(plan("heun"), plan("heun")), one("heun")) > 0.1


def test_dit_is_right_with_a_plan_scheduler_and_not_with_eulers() -> None:
    own = diffusers.EulerDiscreteScheduler(**tiny.BETAS)
    pipe = tiny.tiny_dit(own)
    outside = KSampler.from_pipeline(pipe).sample(labels=[3], seeds=[3], steps=10, to="tensor")
    outside = (outside / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)

    def inside(scheduler: Any) -> float:
        pipe.scheduler = scheduler
        drawn = pipe([3], output_type="np", num_inference_steps=10, generator=seeded(3)).images
        return far(torch.from_numpy(drawn), outside)

    assert inside(own) > 0.1
    assert inside(PlanScheduler.from_config(own, solver="euler")) < 0.01


def test_pipelines_with_arguments_for_their_own_scheduler() -> None:
    pipe = tiny.tiny_sd()
    torch.manual_seed(0)
    config = {k: v for k, v in pipe.unet.config.items() if not k.startswith("_")}
    unet = diffusers.UNet2DConditionModel.from_config({**config, "time_cond_proj_dim": 8}).eval()
    parts = {**pipe.components, "unet": unet, "image_encoder": None}
    parts["scheduler"] = diffusers.LCMScheduler(**tiny.BETAS)
    lcm = diffusers.LatentConsistencyModelPipeline(**parts, requires_safety_checker=False)
    drawn = KSampler.from_pipeline(lcm).sample(
        "a red fox", steps=4, seed=1, height=16, width=16, to="latent"
    )
    assert drawn.isfinite().all()
    lcm.scheduler = PlanScheduler.from_config(lcm.scheduler.config, solver="lcm")
    with pytest.raises(TypeError, match="original_inference_steps"):
        lcm("a red fox", num_inference_steps=4, **SMALL)
    network = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    plain = diffusers.DDIMPipeline(network, diffusers.DDIMScheduler())
    plain.scheduler = PlanScheduler.from_config(plain.scheduler, solver="ddim")
    plain.set_progress_bar_config(disable=True)
    plain(num_inference_steps=2)
    with pytest.raises(ValueError, match="eta"):
        plain(num_inference_steps=2, eta=0.5)


def test_a_compiled_network_is_known_where_it_is_compiled_in_its_place() -> None:
    pipe = tiny.tiny_sd()
    pipe.unet.compile(backend="eager")
    KSampler.from_pipeline(pipe)
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    with pytest.raises(TypeError, match="unknown foreign network 'OptimizedModule'"):
        KSampler.from_pipeline(pipe)


@pytest.mark.parametrize(
    ("options", "schedule", "most"),
    [
        ({"use_karras_sigmas": True}, "karras", 2e-5),
        ({"use_exponential_sigmas": True}, "exponential", 2e-5),
        ({"timestep_spacing": "linspace"}, "linspace", 2e-5),
        ({"timestep_spacing": "trailing"}, "trailing", 2e-5),
        ({"timestep_spacing": "leading"}, "leading", 2e-5),
        ({"use_beta_sigmas": True}, "beta", None),
    ],
)
def test_the_schedules_beside_diffusers_options(
    options: dict[str, Any], schedule: str, most: float | None
) -> None:
    own = diffusers.EulerDiscreteScheduler(**tiny.BETAS, **options)
    theirs = ForeignScheduler(own).levels(10)
    ours = make_scheduler(schedule).within(read_conventions(own).process).levels(10)
    apart = max(
        abs(one.ratio / other.ratio - 1) for one, other in zip(theirs[:-1], ours[:-1], strict=True)
    )
    assert apart > 0.1 if most is None else apart < most


def test_a_strength_walks_a_part_or_lays_a_longer_whole() -> None:
    """What docs/from-comfyui.md says of `denoise`."""
    sampler = KSampler.from_pipeline(tiny.tiny_sd(), "karras", "dpmpp_2m")
    image = torch.zeros(1, 3, 16, 16)
    for steps, walked in ((20, 12), (33, 20)):
        calls: list[int] = []
        sampler.sample(
            "a red fox",
            init=image,
            strength=0.6,
            steps=steps,
            to="latent",
            run={"callback": lambda k, *_, seen=calls: seen.append(k)},
        )
        assert len(calls) == walked


def test_guidance_up_to_1_is_none_but_for_two_outputs() -> None:
    """CFG++ around the network, and in the pipeline's sampler: at all of the paper's scales."""
    asked: dict[str, Any] = {"steps": 4, "seed": 1, "to": "latent", "height": 16, "width": 16}
    plain = KSampler.from_pipeline(tiny.tiny_sd(), "karras", "euler")
    assert torch.equal(*(plain.sample("a red fox", guidance=s, **asked) for s in (0.3, 1.0)))
    sampler = KSampler.from_pipeline(tiny.tiny_sd(), "karras", "euler_cfg_pp")
    told = sampler.encode("a red fox", "green", guidance=5.0, height=16, width=16)
    x = sampler.latents([1], height=16, width=16)
    levels = sampler.ksampler(x.shape[1:]).scheduler
    drawn = {}
    for scale in (0.3, 0.6, 1.0):
        drawn[scale] = sampler.sample("a red fox", "green", guidance=scale, **asked)
        guided = cfg(sampler.denoiser, scale, null=told.negative, pair=True)
        own = KSampler(guided, levels, "euler_cfg_pp")
        begin = x / own.levels(4)[0].sigma  # a pipeline begins with unit noise at its first level
        around = own.sample(begin, 4, told.condition)
        assert far(drawn[scale], around) < 1e-5
    assert torch.equal(sampler.sample("a red fox", "green", **asked), drawn[0.6])
    assert far(drawn[0.3], drawn[1.0]) > 1e-3
