"""Prints how far our solvers are from diffusers' schedulers of the names that lead to them.

    python docs/measure_names.py

Each scheduler as its class makes it (Stable Diffusion's betas, no clipping) draws 20 steps with a
fixed function in the place of a network, in float32, and so does a `PlanScheduler` with our solver
on the same levels, from the same noise and the same generator.
"""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import torch

from k_diffusion.external import PlanScheduler
from k_diffusion.external.names import DIFFUSERS
from k_diffusion.external.settle import own_solver

STEPS = 20
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
OWN_NOISE = ("CosineDPMSolverMultistepScheduler", "DPMSolverSDEScheduler")
"""Those that draw from a Brownian tree of their own, which no generator seeds: no number tells."""


def scheduler_of(name: str) -> Any:
    import diffusers

    kind = getattr(diffusers, name)
    known = inspect.signature(kind.__init__).parameters
    wanted = {**BETAS, "clip_sample": False}
    if name.startswith("Cosine"):
        wanted |= {"prediction_type": "v_prediction", "sigma_data": 1.0}
    return kind(**{k: v for k, v in wanted.items() if k in known})


def drawn(scheduler: Any) -> tuple[torch.Tensor, int]:
    """What a pipeline would draw, and how often it would call its network."""
    scheduler.set_timesteps(STEPS)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 4, 8, 8, generator=generator) * getattr(scheduler, "init_noise_sigma", 1.0)
    told = (
        {"generator": generator}
        if "generator" in inspect.signature(scheduler.step).parameters
        else {}
    )
    for t in scheduler.timesteps:
        seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        answer = torch.tanh(0.7 * seen) + 0.05 * torch.cos(t.float() / 100)
        x = scheduler.step(answer, t, x, **told).prev_sample
    return x, len(scheduler.timesteps)


def measure(name: str) -> tuple[int, int, float | None]:
    """Calls of theirs and of ours, and the largest difference as a share of the largest value."""
    own = scheduler_of(name)
    solver, options = own_solver(own)
    ours, calls = drawn(PlanScheduler.from_config(own, solver=solver, options=options))
    theirs, known = drawn(own)
    if name in OWN_NOISE:
        return known, calls, None
    return known, calls, float((ours - theirs).abs().max() / theirs.abs().max())


def main() -> None:
    warnings.simplefilter("ignore")
    for name in DIFFUSERS:
        known, calls, apart = measure(name)
        print(f'    "{name}": ({known}, {calls}, {apart if apart is None else f"{apart:.1e}"}),')


if __name__ == "__main__":
    main()
