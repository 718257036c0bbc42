"""Writes docs/plan-scheduler.md from the registry; with --check, fails where the file is stale.

Writing runs every solver inside a tiny pipeline and outside it (a minute; it needs diffusers). The
check takes the measured figures as they stand: that each is below 1e-5 is seen to by
tests/external/test_plan_scheduler.py. All else is worked out anew, without diffusers.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from k_diffusion.external.visits import Visit, fixed_solver
from k_diffusion.sampling import ADAPTIVE, SOLVERS
from k_diffusion.utils.levels import VP
from k_diffusion.utils.scheduler import make_scheduler

OUT = Path(__file__).with_name("plan-scheduler.md")
ROOT = Path(__file__).parents[1]
STEPS = 20
HEAD = f"""# Which solvers run inside a diffusers pipeline

Made by `python docs/make_plan_scheduler.py` from the registry: do not edit.
[from-diffusers.md](from-diffusers.md) says what a `PlanScheduler` is.

*Timesteps* are those of {STEPS} steps of the schedule `karras`, which are the calls of the network.
*Order* is the scheduler's attribute of that name: by it pipelines find their place among the
timesteps. *Begins at* counts the steps at which a run may begin, as image to image does: where it
is not {STEPS} of {STEPS}, strength 1 alone is sure to work. *Draws noise*: from the pipeline's
generator, where the pipeline hands it over. *Apart* is the largest difference, as a share of the
largest value, between the latents of a Stable Diffusion pipeline with random weights and those of
`KSampler` outside, from the same latents and generators, 6 steps in float32, over two schedules:
the pipeline's own and `karras`.

| solver | timesteps | order | begins at | draws noise | apart |
| --- | --- | --- | --- | --- | --- |
"""
REFUSED = """
## Which do not

They are refused by name, since what they need is not to be had there. `KSampler.from_pipeline` runs
them all.

| solver | why |
| --- | --- |
"""
WHY = {
    "outputs": "two outputs (CFG++): it needs the guided and the unconditional answer, and a "
    "pipeline hands over one",
    "adaptive": "adaptive: it finds its own steps, and a pipeline asks for all timesteps first",
}
TAIL = """
`restart` goes up again and so has more timesteps than the steps say; `exp_ab` and its kin begin
with one call more, to keep their order; `sa_solver_pece` begins with a step of one call, and all
others take two. So a run of theirs that begins in the middle would ask other questions than the
pipeline has timesteps for, and is refused. From pure noise (flow) solvers that begin with one step
of DDIM and then take several calls list the first timestep `order` times; the repeated answers go
unused.
"""


def refused(name: str) -> str:
    """Why a solver cannot be stepped from outside; "" if it can."""
    try:
        fixed_solver(name)
    except ValueError:
        return "adaptive" if name in ADAPTIVE else "outputs"
    return ""


def visit(name: str) -> Visit:
    levels = make_scheduler("karras", sigma_min=0.03, sigma_max=14.6).levels(STEPS).on(VP)
    return Visit(fixed_solver(name), {}, levels)


def begins(laid: Visit) -> int:
    """At how many of its steps a run may begin."""
    count = 0
    for place in (i for i, start in enumerate(laid.starts) if start):
        try:
            laid.plan_from(place)
        except ValueError:
            continue
        count += 1
    return count


def measure() -> dict[str, str]:
    """The difference of every solver between inside and outside."""
    sys.path.insert(0, str(ROOT))
    import diffusers
    import torch

    from k_diffusion import PlanScheduler
    from k_diffusion.external import ForeignScheduler, GeneratorNoise, foreign_denoiser
    from k_diffusion.sampling import KSampler
    from tests.external import tiny_pipelines

    pipe = tiny_pipelines.tiny_sd()
    own = diffusers.DDIMScheduler(**tiny_pipelines.BETAS, clip_sample=False, steps_offset=1)
    text = pipe.encode_prompt("a red fox", "cpu", 1, False)[0].repeat(2, 1, 1)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))

    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in (3, 4)]

    def apart(name: str, schedule: str | None) -> float:
        pipe.scheduler = PlanScheduler.from_config(own.config, solver=name, schedule=schedule)
        inside = pipe(
            prompt_embeds=text,
            guidance_scale=1.0,
            num_inference_steps=6,
            latents=noise.clone(),
            generator=generators(),
            height=16,
            width=16,
            output_type="latent",
        ).images
        lays = ForeignScheduler(own) if schedule is None else schedule
        sampler = KSampler(foreign_denoiser(pipe.unet, own), lays, name)
        outside = sampler.sample(
            noise / sampler.levels(6)[0].sigma,  # KSampler scales it to the first level
            6,
            {"encoder_hidden_states": text},
            noise=GeneratorNoise(generators(), noise),
        )
        return ((inside - outside).abs().max() / outside.abs().max()).item()

    with torch.no_grad():
        return {
            name: f"{max(apart(name, schedule) for schedule in (None, 'karras')):.0e}"
            for name in SOLVERS
            if not refused(name)
        }


def documented() -> dict[str, str]:
    """The measured differences that the file shows, by solver."""
    rows = [line.strip("| ").split(" | ") for line in OUT.read_text(encoding="utf-8").splitlines()]
    return {row[0][1:-1]: row[-1] for row in rows if len(row) == 6 and row[0].startswith("`")}


def page(measured: Mapping[str, str]) -> str:
    runs, not_run = "", ""
    for name in (*SOLVERS, *ADAPTIVE):
        why = refused(name)
        if why:
            not_run += f"| `{name}` | {WHY[why]} |\n"
            continue
        laid = visit(name)
        cells = (
            f"`{name}`", len(laid.calls), laid.order, f"{begins(laid)} of {sum(laid.starts)}",
            "yes" if laid.plan.stochastic else "", measured.get(name, "not measured"),
        )  # fmt: skip
        runs += "| " + " | ".join(map(str, cells)) + " |\n"
    return HEAD + runs + TAIL + REFUSED + not_run


def main() -> None:
    if "--check" not in sys.argv:
        OUT.write_text(page(measure()), encoding="utf-8")
    elif not OUT.is_file() or OUT.read_text(encoding="utf-8") != page(documented()):
        sys.exit("docs/plan-scheduler.md is stale: run `python docs/make_plan_scheduler.py`")


if __name__ == "__main__":
    main()
