"""Ours: every registered solver and scheduler, and the established functions where they are."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from k_diffusion import sampling
from k_diffusion.sampling import SOLVERS, KSampler, Run, make_plan
from k_diffusion.utils.levels import FLOW, VE, Levels
from k_diffusion.utils.levels import Path as LevelPath
from k_diffusion.utils.scheduler import SCHEDULERS, KarrasScheduler, Scheduler, make_scheduler
from sampler_bench import peer_k_diffusion
from sampler_bench.library import Library, Method, Model, unit

EDM = KarrasScheduler()
HAS_PATH = "noise" in inspect.signature(KSampler.sample).parameters
PATH = ", refinable path"
NOISES = {"eta": 0.0, "tau": 0.0}
"""Options that at 0 make a stochastic solver one of the probability-flow ODE."""


def orders_of(options: Mapping[str, Any]) -> dict[str, int]:
    """The options that are orders; `end_order` where it is not left at 0."""
    found = {k: v for k, v in options.items() if "order" in k and isinstance(v, int)}
    return {k: v for k, v in found.items() if k != "end_order" or v}


def label_of(name: str, options: Mapping[str, Any]) -> str:
    return " ".join([name, *(f"{k}={v:g}" for k, v in options.items())])


def choices(name: str) -> list[dict[str, Any]]:
    """The options to try: every order that a solver can have, and no noise."""
    solver = SOLVERS[name]
    quiet = {k: v for k, v in NOISES.items() if isinstance(solver.options.get(k), float)}
    orders = list(orders_of(solver.options))
    own = {k: solver.options[k] for k in orders}
    tried = [dict.fromkeys(orders, k) for k in range(1, 5)] if orders else []
    found = []
    tried = [own, *(v for v in tried if v != own)]
    if "end_order" in solver.options:
        tried += [{**values, "end_order": 1} for values in tried]
    for values in tried:
        options = {**quiet, **values}
        try:
            plan = make_plan(solver, EDM.levels(8), **options)
        except ValueError:
            continue  # an order that it does not have
        if not plan.stochastic and solver.outputs == 1:
            found.append(options)
    return found


def levels_of(ratios: Sequence[float], path: LevelPath) -> Levels:
    return Levels([path.at(-math.log(r) if r else math.inf) for r in ratios], path)


def carry(name: str, options: dict[str, Any], path: LevelPath) -> Any:
    def exact(model: Model, z: Tensor, ratios: Sequence[float]) -> Tensor:
        levels = levels_of(ratios, path)
        plan = make_plan(name, levels, **options)
        first, last = levels[0], levels[-1]
        run = Run(plan, z * (first.alpha / unit(ratios[0]) if first.alpha else first.sigma))
        while not run.done:
            level = plan.steps[run.k].level
            run.advance(model(run.x, level.alpha, level.sigma))
        return run.result / last.alpha

    return exact


def differs(one: Method, other: Method) -> bool:
    """Whether two methods give different results: most are the same in all coordinates."""
    ratios = [80.0, 9.0, 4.0, 1.0, 0.3, 0.2, 0.04, 0.0]
    z = torch.linspace(-1, 1, 7, dtype=torch.float64)[None]
    ends = []
    for method in (one, other):
        assert method.exact is not None
        model = Model(lambda x, a, s: torch.tanh(x * a / (a * a + s * s)))
        ends.append(method.exact(model, z, ratios))
    return bool((ends[0] - ends[1]).abs().max() > 1e-9)


def quick_for(name: str, **options: Any) -> Callable[..., Any]:
    """With a solver's own options, as `KSampler` is called; its plan is cached after the first."""

    def quick(x: Tensor, model: Any, steps: int) -> Any:
        sampler = KSampler(model, "karras", name)
        return lambda: sampler.sample(x, steps, **options)

    return quick


def methods() -> list[Method]:
    found = []
    for name in sorted(SOLVERS):
        solver = SOLVERS[name]
        if solver.outputs == 1:
            # Cost is measured with the options that a solver has by itself.
            like = label_of(name, orders_of(solver.options))
            found.append(Method(name, like, None, quick_for(name), stochastic=solver.stochastic))
            if solver.stochastic and HAS_PATH:
                quick = quick_for(name, noise="path")
                found.append(Method(f"{name}{PATH}", like, None, quick, stochastic=True))
        for chosen in choices(name):
            label = label_of(name, chosen)
            like = label_of(name, orders_of(chosen))
            found.append(Method(label, like, carry(name, chosen, VE)))
            on_flow = Method(
                f"{label}, flow levels", f"{like}, flow levels", carry(name, chosen, FLOW)
            )
            found += [on_flow] if differs(found[-1], on_flow) else []
    if hasattr(sampling, "sample_euler"):
        found += peer_k_diffusion.methods(sampling)
    return found


def ends_of(scheduler: type[Scheduler]) -> list[dict[str, float]]:
    known = getattr(scheduler, "__dataclass_fields__", {})
    if {"sigma_min", "sigma_max"} <= set(known):
        return [{"sigma_max": 80.0, "sigma_min": low} for low in (0.002, 0.02)]
    return [{}]


def schedules() -> dict[str, Callable[[int], Sequence[float]]]:
    found: dict[str, Callable[[int], Sequence[float]]] = {}
    for name, kind in SCHEDULERS.items():
        for options in ends_of(kind):
            try:
                scheduler = make_scheduler(name, **options).within(EDM)
                scheduler.levels(10)
            except (ValueError, TypeError):
                continue  # one that has no levels of its own, as CustomScheduler

            def levels(n: int, scheduler: Scheduler = scheduler) -> Sequence[float]:
                laid = scheduler.levels(n)
                if laid[-1].sigma > 0:  # it ends in noise: n noisy levels are n - 1 steps of it
                    laid = scheduler.levels(n - 1) if n > 1 else laid
                return [level.ratio for level in laid[:n] if level.sigma > 0]

            low = f" from {options['sigma_min']:g}" if options else ""
            found[f"{name}{low}"] = levels
    return found


def library(folder: Path) -> Library:
    from importlib.metadata import version

    torch.set_grad_enabled(False)
    return Library("k_diffusion (ours)", version("k-diffusion"), methods(), schedules())
