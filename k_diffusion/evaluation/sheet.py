"""Samplers side by side: the same seeds through each method, schedule and number of steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from k_diffusion.sampling import AdaptiveSolver, KSampler, Solver, find_solver, unit_noise
from k_diffusion.utils.scheduler import make_scheduler

REFERENCE = 200
"""Steps of the reference."""


@dataclass(frozen=True)
class Cell:
    """One method on one schedule with one number of steps.

    Attributes:
        sampler, scheduler: names.
        steps: asked for.
        calls: of the model, for each sample (the most, where steps adapt).
        distance: root mean square difference to the reference, over all samples, in data units.
        samples: shape (B, C, ...), on the CPU.
    """

    sampler: str
    scheduler: str
    steps: int
    calls: int
    distance: float
    samples: Tensor


@dataclass(frozen=True)
class Sheet:
    """What was compared.

    Attributes:
        cells: by sampler, then scheduler, then steps.
        references: sampler -> its reference, shape (B, C, ...): that of the probability-flow ODE is
            shared by all deterministic methods.
        seeds: one a sample.
        reference_steps: of the references.
        off_path: samplers that draw noise which lies on no Brownian path (restart), and need not be
            the same at other numbers of steps: their distance holds that, too.
    """

    cells: tuple[Cell, ...]
    references: Mapping[str, Tensor]
    seeds: tuple[int, ...]
    reference_steps: int
    off_path: tuple[str, ...] = ()


def find_comparable(name: str) -> Solver | AdaptiveSolver:
    """A registered solver that draws from a model of one estimate.

    Raises:
        ValueError: an unknown name, or a solver of two estimates.
    """
    solver = find_solver(name)
    if isinstance(solver, Solver) and solver.outputs > 1:
        raise ValueError(
            f"{solver.name} goes by two estimates, the guided and the unconditional one, but a "
            "model that gives one is compared: take a sampler without cfg_pp"
        )
    return solver


def compare_samplers(
    denoiser: Any,
    shape: Sequence[int],
    seeds: Sequence[int],
    *,
    samplers: Sequence[str],
    schedulers: Sequence[str],
    steps: Sequence[int],
    condition: Mapping[str, Tensor] | None = None,
    device: torch.device | str = "cpu",
    reference_steps: int = REFERENCE,
    tick: Callable[[int], object] = lambda calls: None,
) -> Sheet:
    """Draws the same seeds by every method, on every schedule, with every number of steps.

    The distance is that to 200 steps: for a deterministic method those of `heun` on the first
    schedule, as all of them solve one ODE; for a stochastic method its own, on the first schedule,
    with the noise of one Brownian path for each seed, the same for any number of steps.

    Args:
        denoiser: any Denoiser.
        shape: of a sample.
        seeds: one a sample.
        samplers, schedulers, steps: what to compare.
        condition: keyword arguments of the denoiser, a row a sample.
        device: where it computes.
        reference_steps: see above.
        tick: told how many calls of the model were made since it was told last.

    Raises:
        ValueError: an unknown name, a solver of two estimates (CFG++), or a schedule that the
            model cannot take: before anything is drawn.
    """
    noise = unit_noise(tuple(shape), list(seeds), device)

    def draw(sampler: str, scheduler: str, count: int) -> tuple[Tensor, int]:
        solver = find_solver(sampler)
        run = KSampler(denoiser, make_scheduler(scheduler), solver)
        path = isinstance(solver, Solver) and solver.stochastic
        seen = 0

        def told(k: int, *_: Any) -> None:
            nonlocal seen
            seen += 1
            tick(1)

        samples = run.sample(
            noise, count, condition, seed=list(seeds), noise="path" if path else "independent",
            callback=told,
        )  # fmt: skip
        return samples.cpu(), seen

    off_path = []
    for sampler in samplers:
        solver = find_comparable(sampler)
        for scheduler in schedulers:
            run = KSampler(denoiser, make_scheduler(scheduler), solver)
            for count in steps:
                run.levels(count)
        if isinstance(solver, Solver) and any(d.interval.fresh for d in run.plan(steps[0]).draws):
            off_path.append(sampler)
    known: dict[str, Tensor] = {}
    references = {}
    for sampler in samplers:
        solver = find_solver(sampler)
        own = sampler if isinstance(solver, Solver) and solver.stochastic else "heun"
        if own not in known:
            known[own] = draw(own, schedulers[0], reference_steps)[0]
        references[sampler] = known[own]
    cells = []
    for sampler in samplers:
        for scheduler in schedulers:
            for count in steps:
                samples, calls = draw(sampler, scheduler, count)
                distance = (samples - references[sampler]).square().mean().sqrt()
                cells.append(Cell(sampler, scheduler, count, calls, float(distance), samples))
    return Sheet(tuple(cells), references, tuple(seeds), reference_steps, tuple(off_path))
