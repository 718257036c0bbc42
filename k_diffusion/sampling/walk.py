"""One pass of a run: a state carried along its levels by the engine or by an adaptive solver."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from k_diffusion.sampling.adaptive import AdaptiveSolver
from k_diffusion.sampling.brownian import PathNoise
from k_diffusion.sampling.engine import Run, place_sigmas
from k_diffusion.sampling.masks import Known, Stage, noise_back
from k_diffusion.sampling.noise import FRESH, RESAMPLED, CallerNoise, NoiseSource, SampleNoise
from k_diffusion.sampling.nonfinite import WAY_OUT, Told, explain, is_finite, which_samples
from k_diffusion.sampling.plan import Churn, Plan, make_plan
from k_diffusion.sampling.registry import Solver
from k_diffusion.sampling.start import Start
from k_diffusion.utils import maths

NoiseSampler = Callable[[float, float], Tensor]
NOISES: dict[str, type[SampleNoise] | type[PathNoise]] = {
    "independent": SampleNoise,
    "path": PathNoise,
}


@dataclass(eq=False)
class Walk:
    """All that decides a pass, so that it can be done again.

    Attributes:
        denoiser: what is asked, in the coordinates of the stages' levels.
        solver: its name is told; of an adaptive one, what runs.
        options: the solver's own.
        churn: of each step.
        start: seeds, noise and images.
        stages: the levels, in order.
        keywords: the denoiser's, without those of a known part.
        noise: see `KSampler.sample`.
        noise_on_cpu: see there.
        plans: one a stage; none for an adaptive solver.
    """

    denoiser: Any
    solver: Solver | AdaptiveSolver
    options: Mapping[str, Any]
    churn: Churn | None
    start: Start
    stages: tuple[Stage, ...]
    keywords: Mapping[str, Any]
    noise: str | NoiseSampler | NoiseSource = "independent"
    noise_on_cpu: bool = False
    plans: list[Plan] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        if isinstance(self.solver, AdaptiveSolver):
            return
        intervals = callable(self.noise) and not hasattr(self.noise, "draw")
        for stage in self.stages:
            plan = make_plan(
                self.solver, stage.levels, churn=self.churn, intervals=intervals, **self.options
            )
            self.plans.append(plan)

    @property
    def calls(self) -> int | None:
        """Calls of the model; None: not known beforehand."""
        return sum(plan.evaluations for plan in self.plans) if self.plans else None

    @property
    def starts(self) -> list[bool]:
        """Whether each call begins a step."""
        return [step.start for plan in self.plans for step in plan.steps]

    def run(self, told: Told | None = None, tick: Callable[[], Any] | None = None) -> Tensor:
        """The state at the last level, shape (B, ...), in float32 or better; not checked.

        Args:
            told: told of each call of the model.
            tick: called after each.
        """
        start, keywords = self.start, {**self.keywords, **self.start.keywords()}
        denoiser = self.denoiser if start.mask is None else Known(self.denoiser)
        state = start.state(self.stages[0].levels[0])
        make_noise = noise_maker(self.noise, self.noise_on_cpu)
        dtype = torch.float64 if getattr(denoiser, "float64_sigma", False) else state.dtype
        # All at once: a stage of its own for each step would wait for the device at each.
        sigmas = place_sigmas(self.plans, state.device, dtype) if self.plans else ()
        before, jumps = 0, None
        for i, stage in enumerate(self.stages):
            seeds = start.seeds
            if i > 0:  # the same seeds would give the same noise once more
                seeds = [maths.fold_seed(seed, RESAMPLED, i) for seed in seeds]
            if stage.back_from is not None:
                if jumps is None:
                    jumps = SampleNoise(start.seeds, state, RESAMPLED, on_cpu=self.noise_on_cpu)
                state = noise_back(state, jumps.draw(), stage.back_from, stage.levels[0])
            if isinstance(self.solver, AdaptiveSolver):
                state, info = self.solver.run(
                    denoiser,
                    state,
                    stage.levels,
                    self.options,
                    seeds,
                    keywords,
                    _joined(told, tick, before),
                    noise_on_cpu=self.noise_on_cpu,
                )
                before += info.calls
                continue
            plan = self.plans[i]
            source = make_noise(seeds, state) if plan.stochastic else None
            run = Run(plan, state, source, sigmas=sigmas[i])
            del state
            while not run.done:
                if told is not None:
                    answers = _answers(denoiser(run.x, run.sigma, **keywords), plan)
                    told(before + run.k, run.x, run.sigma, answers[0])
                    run.advance(*answers)
                    del answers
                elif plan.outputs == 1:
                    run.advance(denoiser(run.x, run.sigma, **keywords))
                else:
                    run.advance(*_answers(denoiser(run.x, run.sigma, **keywords), plan))
                if tick is not None:
                    tick()
            state = run.result
            del run
            before += plan.evaluations
        return state

    def checked(
        self, x: Tensor, what: str, warn: Callable[[str], Any] | None, hook: Told | None = None
    ) -> Tensor:
        """The result of `run`, read once; where it is not finite, the run is done again to say why.

        Args:
            what: what x is, for the message.
            warn: told of it; None: it is raised.
            hook: see `explain`.

        Raises:
            FloatingPointError: it is not finite.
        """
        if is_finite(x):
            return x
        share = (~x.isfinite()).float().mean().item()
        message = (
            f"{what} is not finite in {share:.1%} of its values, in {which_samples(x)}: "
            f"{explain(self.run, self.step_of, hook)}: {WAY_OUT}"
        )
        if warn is None:
            raise FloatingPointError(message)
        warn(message)
        return x

    def step_of(self, k: int) -> str:
        """The place of the k-th call among all, for a message."""
        starts = self.starts
        return f" of {len(starts)} (step {sum(starts[: k + 1])})" if starts else ""


def noise_maker(
    noise: str | NoiseSampler | NoiseSource, on_cpu: bool
) -> Callable[[Sequence[int], Tensor], NoiseSource]:
    """What makes the noise source of a run, given its seeds and its state."""
    if hasattr(noise, "draw"):  # a source already, which knows its own seeds
        source: Any = noise
        return lambda seeds, like: source
    if isinstance(noise, str):
        if noise not in NOISES:
            raise ValueError(maths.unknown("noise", noise, NOISES))
        return functools.partial(NOISES[noise], on_cpu=on_cpu)
    if not callable(noise):
        raise TypeError(
            f"noise must be {' or '.join(map(repr, NOISES))}, or a function "
            f"noise_sampler(sigma, sigma_next), or a source with draw(interval), got {noise!r}"
        )
    sampler = noise

    def made(seeds: Sequence[int], like: Tensor) -> NoiseSource:
        return CallerNoise(sampler, like, SampleNoise(seeds, like, FRESH, on_cpu=on_cpu))

    return made


def _joined(told: Told | None, tick: Callable[[], Any] | None, before: int) -> Told | None:
    """What an adaptive solver tells of its calls."""
    if told is None and tick is None:
        return None

    def tell(k: int, x: Tensor, sigma: Tensor, denoised: Tensor) -> None:
        if told is not None:
            told(before + k, x, sigma, denoised)
        if tick is not None:
            tick()

    return tell


def _answers(answer: Any, plan: Plan) -> tuple[Any, ...]:
    """The denoiser's answer as the run takes it; for a solver of two, its two parts."""
    if plan.outputs == 1:
        return (answer,)
    if not isinstance(answer, (tuple, list)) or len(answer) != plan.outputs:
        what = (
            f"{len(answer)} of them" if isinstance(answer, (tuple, list)) else type(answer).__name__
        )
        raise TypeError(
            f"{plan.solver} needs a denoiser that returns a pair, the guided and the unconditional "
            f"estimate of x0, got {what}: guide the model so, or use a sampler without cfg_pp"
        )
    return tuple(answer)
