"""The levels and calls of a `PlanScheduler` between two `set_timesteps`.

Everything here is numbers on the host: which levels a run visits, with which plan, and which call
of the network each of a pipeline's timesteps is.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from k_diffusion.denoiser import DENOISERS, EDMDenoiser, NetworkDenoiser
from k_diffusion.external.lays import levels_of
from k_diffusion.external.process import OURS, Conventions, config_of, installed, read_conventions
from k_diffusion.sampling.ksampler import find_solver
from k_diffusion.sampling.plan import Plan, make_plan
from k_diffusion.sampling.registry import SOLVERS, Solver
from k_diffusion.utils.levels import CLEAN, FLOW, VP, Level, Levels
from k_diffusion.utils.scheduler import (
    FlowScheduler,
    Scheduler,
    ShiftedCosineScheduler,
    make_scheduler,
)


def named(config: Any) -> dict[str, Any]:
    """A config with the class that it belongs to as `_class_name`.

    Configs that were saved or loaded tell it. That of a scheduler made in code does not, and is
    known by its keys: those of its class come first, before what it took over from another. Of
    classes with the same keys, which lay the same levels, the one of the shortest name is taken.
    """
    plain = dict(getattr(config, "config", config))
    own = set(plain)
    if "_use_default_values" in plain:
        names = list(plain)
        own = set(names[: names.index("_use_default_values")])
        plain.pop("_use_default_values")
    if hasattr(config, "config"):
        plain["_class_name"] = type(config).__name__
    if "_class_name" not in plain:
        keys = {key for key in own if not key.startswith("_")}
        fits = [name for name in installed() if _keys(name) == keys]
        if fits:
            plain["_class_name"] = min(fits, key=len)
    return plain


def _keys(name: str) -> set[str]:
    return {k for k in config_of({"_class_name": name}) if not k.startswith("_")}


def original(config: Mapping[str, Any]) -> Any:
    """The diffusers scheduler in whose place a config's `PlanScheduler` stands, made anew."""
    import diffusers

    known = config_of(config)
    options = {k: v for k, v in known.items() if not k.startswith("_") and k not in OURS}
    return getattr(diffusers, known["_class_name"])(**options)


def formulas(said: Conventions) -> NetworkDenoiser:
    """The denoiser of a kind of network, for its formulas alone: it holds no network."""
    none = nn.Identity()
    none.time_convention = said.time_convention  # type: ignore[assignment]
    if said.prediction == "edm":
        return EDMDenoiser(none, said.sigma_data, said.process)
    return DENOISERS[said.prediction](none, said.process)


def visited(
    config: Mapping[str, Any],
    steps: int | None,
    sigmas: Sequence[float] | None,
    timesteps: Sequence[float] | None,
    mu: float | None,
) -> Levels:
    """The levels of a run, on the path of the network's kind.

    Args:
        config: of a `PlanScheduler`.
        steps: number of steps; or
        sigmas: to lay; where the config names no schedule, whatever the diffusers scheduler makes
            of them, which for flows is a shift. Else sigma / alpha, or sigma for flows. Or
        timesteps: to lay.
        mu: of a flow's dynamic shift, which only configs with `use_dynamic_shifting` take.

    Raises:
        ValueError: not one of the three; a level that is none; a missing mu.
    """
    if (steps is None) + (sigmas is None) + (timesteps is None) == 3:
        raise ValueError("set_timesteps needs num_inference_steps, sigmas or timesteps")
    if sigmas is not None and timesteps is not None:
        raise ValueError("set_timesteps takes sigmas or timesteps, not both")
    own = sigmas if sigmas is not None else timesteps
    own = None if own is None else [float(value) for value in own]
    if own is not None and (not own or steps not in (None, len(own))):
        raise ValueError(
            f"num_inference_steps is {steps}, but {len(own)} levels were given: leave it out"
        )
    said = read_conventions(config)
    process, name = said.process, config["schedule"]
    over = shifted(config, mu)
    if sigmas is not None and own is not None and name is not None and _even(own):
        steps, own, sigmas = len(own), None, None  # what pipelines hand over unasked
    if own is None and name is not None:
        schedule = make_scheduler(name, **config["schedule_options"]).within(over)
        return schedule.levels(_whole(steps)).on(process.path)
    if name is None:
        told: dict[str, Any] = {"sigmas": own} if sigmas is not None else {"timesteps": own}
        if own is None:
            told = {"num_inference_steps": _whole(steps)}
        scheduler = original(config)
        takes = inspect.signature(scheduler.set_timesteps).parameters
        if told.keys() <= takes.keys():
            if "mu" in takes and config_of(config).get("use_dynamic_shifting"):
                told["mu"] = mu
            scheduler.set_timesteps(**told, device="cpu")
            return Levels(levels_of(scheduler), process.path)
    assert own is not None
    laid = [_at_sigma(s, process) if sigmas is not None else at_timestep(s, process) for s in own]
    return Levels(laid if laid[-1].sigma == 0 else [*laid, CLEAN], process.path)


def shifted(config: Mapping[str, Any], mu: float | None) -> Scheduler:
    """What a schedule of ours is laid over: the process with the flow's shift, and in its range.

    Args:
        config: of a diffusers scheduler.
        mu: of a flow's dynamic shift.
    """
    process, shift = read_conventions(config).process, _shift(config, mu)
    if isinstance(process, FlowScheduler) and shift != 1:
        return dataclasses.replace(process, shift=shift)
    if isinstance(process, ShiftedCosineScheduler):  # its range is in the config alone
        least, most = (-2 * math.log(config[key]) for key in ("sigma_max", "sigma_min"))
        return dataclasses.replace(process, log_snr_min=least, log_snr_max=most)
    return process


def at_timestep(timestep: float, process: Scheduler) -> Level:
    """The level of a timestep of the process."""
    return process.level(timestep / process.timesteps)


def _at_sigma(sigma: float, process: Scheduler) -> Level:
    if not 0 <= sigma < math.inf or (process.path is FLOW and sigma > 1):
        raise ValueError(f"sigma {sigma} is no level of the {process.path} path")
    if process.path is VP:
        return VP.at(-math.log(sigma)) if sigma else CLEAN
    return Level(process.path.alpha(sigma), sigma)


def _whole(steps: Any) -> int:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"num_inference_steps must be a whole number above 0, got {steps!r}")
    return steps


def _even(sigmas: Sequence[float]) -> bool:
    """Whether they are 1, 1 - 1 / n, ..., 1 / n."""
    n = len(sigmas)
    return all(abs(sigma - (1 - i / n)) < 1e-4 for i, sigma in enumerate(sigmas))


def _shift(config: Mapping[str, Any], mu: float | None) -> float:
    """The shift of a flow's levels, under a schedule of ours too; 1 where there is none."""
    known = config_of(config)
    if known.get("use_dynamic_shifting"):
        if mu is None:
            raise ValueError(
                f"{known['_class_name']} shifts its levels by the size of the image: give mu"
            )
        return mu if known.get("time_shift_type") == "linear" else math.exp(mu)
    return float(known.get("shift", known.get("flow_shift")) or 1.0)


def fixed_solver(name: str) -> Solver:
    """A solver that can be stepped from outside, by one answer at a time."""
    solver = find_solver(name)
    if not isinstance(solver, Solver):
        raise ValueError(
            f"{solver.name} finds its own steps, which a pipeline cannot follow: use KSampler, or "
            "a solver of fixed steps"
        )
    if solver.outputs != 1:
        raise ValueError(
            f"{solver.name} needs the guided and the unconditional answer, of which a pipeline "
            "hands over one: use KSampler, or a solver without cfg_pp"
        )
    return solver


_LOW = {"exp_ab": "exp_ab_low", "exp_ab_noise": "deis", "exp_ab_velocity": "exp_ab_velocity_low"}
"""The solver that is another without its start."""


class Visit:
    """What one `set_timesteps` settled: levels, their plan, and the calls in a pipeline's order.

    A pipeline finds step i at `timesteps[i * order]`. From pure noise every solver begins with one
    DDIM step, of one call; where all others take more, that call is listed as often, and the
    pipeline's repeated answers go unused: so the arithmetic holds.

    Args:
        solver: of fixed steps and one output.
        options: its own.
        levels: from `visited`.
        steps: that the pipeline counts. Where a spacing names a level twice (its last one, in
            some), there are fewer; then the last call is listed again, its answer unused.

    Attributes:
        calls: of each timestep of the pipeline, the number of its query in the plan.
        starts: of each, whether a step begins there.
        order: calls of most steps.
    """

    def __init__(
        self,
        solver: Solver,
        options: Mapping[str, Any],
        levels: Levels,
        steps: int | None = None,
    ) -> None:
        self._solver, self._options = solver, options
        self.levels = levels
        self.plan: Plan = make_plan(solver, levels, **options)
        begins = [k for k, step in enumerate(self.plan.steps) if step.start]
        ends = [*begins[1:], self.plan.evaluations]
        sizes = [end - begin for begin, end in zip(begins, ends, strict=True)]
        self.order = max(sizes, key=lambda size: (sizes.count(size), size))
        self.calls = list(range(self.plan.evaluations))
        if levels[0].alpha == 0 and len(sizes) > 2 and sizes[0] == 1 and min(sizes[1:-1]) > 1:
            self.calls = [0] * (self.order - 1) + self.calls
        self.steps = max(steps or 0, len(levels) - 1)
        self.calls += self.calls[-1:] * (self.order * (self.steps - len(levels) + 1))
        self.starts = [
            self.plan.steps[k].start and (i == 0 or self.calls[i - 1] != k)
            for i, k in enumerate(self.calls)
        ]
        # A method that asks twice at a level, of a predicted and of the corrected state, can begin
        # with either; where pipelines look for a step, the second is.
        for i in range(1, len(self.calls) - 1):
            here, then = (self.plan.steps[k] for k in self.calls[i : i + 2])
            if self.starts[i] and here is not then and here.level == then.level:
                self.starts[i : i + 2] = False, True

    def level(self, place: int) -> Level:
        """That of a timestep of the pipeline; past the last, the one that the run ends at."""
        ended = place >= len(self.calls)
        return self.levels[-1] if ended else self.plan.steps[self.calls[place]].level

    def start(self, place: int) -> int:
        """The timestep at which the first step begins that begins at `place` or after it.

        Raises:
            ValueError: none does.
        """
        for i in range(place, len(self.calls)):
            if i >= 0 and self.starts[i]:
                return i
        raise ValueError(
            f"{self._solver.name} cannot begin at timestep {place} of {len(self.calls)}, after "
            "which no step begins: take a larger strength, or a solver of one call a step"
        )

    def plan_from(self, place: int) -> tuple[Plan, frozenset[int]]:
        """The plan of the rest, for a sample that begins at this start, without history.

        Solvers that make their history by more calls in their first step, for which a pipeline
        has no room here, begin as their relatives do that make it on the way (`_LOW`).

        Returns:
            The plan, and the timesteps whose answers it takes, a query each; others go unused.

        Raises:
            ValueError: the rest would ask at levels at which the network is not called.
        """
        count = len(self.calls)
        # Of a call that is listed several times, the last answer counts.
        last = [i for i in range(place, count) if self.calls[i] not in self.calls[i + 1 :]]
        if place == 0:
            return self.plan, frozenset(last)
        laid = list(self.levels)
        begins = laid.index(self.level(place))
        low = _LOW.get(self._solver.name)
        for solver in (self._solver, *([SOLVERS[low]] if low else [])):
            plan = make_plan(solver, self.levels[begins:], **self._options)
            taken: list[int] = []
            for i in last:
                if len(taken) < plan.evaluations and plan.steps[len(taken)].level == self.level(i):
                    taken.append(i)
            if len(taken) == plan.evaluations and taken[-1:] == last[-1:]:
                return plan, frozenset(taken)
        raise ValueError(
            f"{self._solver.name} asks other questions when it begins at timestep {place} of "
            f"{count}: take strength 1, or another solver"
        )
