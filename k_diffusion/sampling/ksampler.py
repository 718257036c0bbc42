"""KSampler: model + scheduler + solver, which is what most people call."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from k_diffusion.denoiser import DENOISERS, FunctionDenoiser, make_denoiser, model_device
from k_diffusion.sampling.adaptive import ADAPTIVE, AdaptiveSolver
from k_diffusion.sampling.brownian import PathNoise
from k_diffusion.sampling.engine import Run
from k_diffusion.sampling.noise import FRESH, CallerNoise, NoiseSource, SampleNoise
from k_diffusion.sampling.plan import Churn, Plan, make_plan
from k_diffusion.sampling.registry import SOLVERS, Solver
from k_diffusion.utils import maths
from k_diffusion.utils.levels import FLOW, Level, Levels, Path
from k_diffusion.utils.scheduler import (
    FlowScheduler,
    KarrasScheduler,
    Scheduler,
    make_scheduler,
)

Callback = Callable[[int, Tensor, Tensor, Tensor], None]
NoiseSampler = Callable[[float, float], Tensor]

NOISES: dict[str, type[SampleNoise] | type[PathNoise]] = {
    "independent": SampleNoise,
    "path": PathNoise,
}


class KSampler:
    """Draws samples from a diffusion or flow model.

    Args:
        model: a Denoiser; a network that carries its conventions, such as `UNet` (its `prediction`,
            `time_convention` and perhaps `process`); or a plain function
            `(x, sigma, **condition) -> x0`, taken to be variance exploding. It is called as it is:
            put a network with dropout into `eval()` first. For a solver of two outputs (CFG++) it
            must return a pair: the guided and the unconditional estimate of x0.
        scheduler: lays the noise levels: a Scheduler or its name. A network that carries no process
            yet takes it as its process too, if it is in the coordinates of the network's kind
            (variance preserving for eps, v and x0). None: the model's own process.
        solver: a registered solver or its name; `k-diffusion samplers` lists them. Or one with
            adaptive step control: dpm_adaptive, dpm_adaptive_12, bogacki_shampine, dormand_prince,
            for which the scheduler gives the range alone (see `AdaptiveSolver`).
        churn: noise added at the start of each step (Karras et al. 2022, algorithm 2).
        options: the solver's own, `eta=0.5` say.

    Raises:
        ValueError: an unknown scheduler, solver or option, by name.

    Example:
        >>> sampler = KSampler(lambda x, sigma: x / (1 + sigma[0] ** 2), "karras", "heun")
        >>> sampler.sample(torch.randn(2, 3, 8, 8), steps=10).shape
        torch.Size([2, 3, 8, 8])
    """

    def __init__(
        self,
        model: Any,
        scheduler: Scheduler | str | None = None,
        solver: Solver | AdaptiveSolver | str = "dpmpp_2m",
        *,
        churn: Churn | None = None,
        **options: Any,
    ) -> None:
        chosen = make_scheduler(scheduler) if isinstance(scheduler, str) else scheduler
        if chosen is not None and not isinstance(chosen, Scheduler):
            raise TypeError(f"scheduler must be a Scheduler or a name, got {type(chosen).__name__}")
        self.model = model
        # A schedule in another kind's coordinates (Karras levels for a noise-predicting network)
        # lays levels, but is no process that such a network can have been trained on.
        kind = DENOISERS.get(str(getattr(model, "prediction", "")))
        own = None if chosen is None else chosen.own_process
        if own is not None and (kind is None or own.path is not kind.path):
            own = None
        made = make_denoiser(model, own)
        process = getattr(made, "process", None)
        if not isinstance(process, Scheduler):  # a program's own attribute of that name
            process = None
        self.denoiser = made if isinstance(made.path, Path) else FunctionDenoiser(made)
        usual = FlowScheduler() if self.denoiser.path is FLOW else KarrasScheduler()
        if chosen is None:
            chosen = process or usual
        self.scheduler: Scheduler = chosen.within(usual if process is None else process)
        self.solver: Solver | AdaptiveSolver = find_solver(solver)
        self.solver.check_options(options)
        self.options = options
        self.churn = churn
        if churn is not None and isinstance(self.solver, AdaptiveSolver):
            raise ValueError(f"{self.solver.name} has no plan to churn: give it eta instead")

    def levels(self, steps: int) -> Levels:
        """The `steps + 1` levels of a run, in the denoiser's coordinates.

        Raises:
            ValueError: steps is not a whole number of at least 1, or the model cannot begin where
                the scheduler does.
        """
        steps = _whole(steps)
        if not isinstance(steps, int) or type(self.scheduler).__hash__ is None:
            levels = self.scheduler.levels(steps).on(self.denoiser.path)
        else:
            levels = _lay(self.scheduler, steps, self.denoiser.path)
        eps = getattr(self.denoiser, "prediction", None) == "eps"
        if eps and self.denoiser.alpha(levels[0].sigma) == 0:
            raise ValueError(
                f"{type(self.scheduler).__name__} begins at pure noise (alpha = 0), where a "
                "noise-predicting network says nothing of the data: begin lower (CosineScheduler "
                "has time_max), or use a v, x0 or flow network"
            )
        return levels

    def plan(self, steps: int, *, intervals: bool = False) -> Plan:
        """What `sample` would do, as data; print it to read it.

        Args:
            steps: number of steps.
            intervals: draw noise as for a caller's own noise sampler; see `make_plan`.
        """
        if isinstance(self.solver, AdaptiveSolver):
            raise ValueError(f"{self.solver.name} lays its steps as it goes: it has no plan")
        return make_plan(
            self.solver,
            self.levels(steps),
            churn=self.churn,
            intervals=intervals,
            **self.options,
        )

    @torch.no_grad()
    def sample(
        self,
        x: Tensor,
        steps: int = 50,
        condition: Tensor | Mapping[str, Any] | None = None,
        *,
        seed: int | Sequence[int] | None = None,
        noise: str | NoiseSampler = "independent",
        noise_on_cpu: bool = False,
        progress: bool = False,
        callback: Callback | None = None,
    ) -> Tensor:
        """Draws samples from noise.

        Args:
            x: unit Gaussian noise, shape (B, C, ...), as from `torch.randn` or `unit_noise`; it is
                scaled to the first level here. It decides dtype and device of the result; the state
                between calls is float32 or better.
            steps: number of steps; a second-order one-step method calls the model about twice in
                each.
            condition: class labels (integers, shape (B,)), an embedding (floats, shape (B, D)), or
                a mapping of the model's keyword arguments.
            seed: for solvers that draw noise: one number per sample, or one number for all, where
                sample i takes seed + i. A sample depends on its own seed alone, not on the batch.
                None: from torch's global generator.
            noise: where a stochastic solver's noise comes from. "independent": drawn anew at each
                step, the cheapest. "path": from a Brownian path that belongs to the seed, the same
                for any number of steps and any levels, so that a sample converges as its steps are
                refined. Or a function `noise_sampler(sigma, sigma_next)`, called with two numbers
                in the solver's order, that returns unit noise of x's shape; noise that lies between
                no two levels (churn) still comes from the seeds.
            noise_on_cpu: make that noise on the CPU, so that seeds give the same on every device.
            progress: show a progress bar on standard error.
            callback: called as `callback(k, x, sigma, denoised)` after the k-th call of the model,
                with its input, noise level (shape (B,)) and answer (of two, the guided one); by an
                adaptive solver with the samples alone that the call was about.

        Returns:
            Samples, shape (B, C, ...), in the scale of the data that the model was trained on.

        Raises:
            TypeError: x, steps, condition, seed or noise of a wrong type; no pair where the solver
                takes two outputs.
            ValueError: x that isn't finite, a condition that the model cannot take, bad steps, an
                unknown noise.
            FloatingPointError: the result is not finite.
        """
        if not isinstance(x, Tensor) or not x.is_floating_point():
            kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"x must be a floating-point tensor of unit noise, got {kind}")
        if x.itemsize < 2:
            raise TypeError(f"x must be float16, bfloat16, float32 or float64, got {x.dtype}")
        if x.ndim < 2 or x.numel() == 0:
            raise ValueError(
                f"x must have shape (B, C, ...) with B >= 1 and no length of 0, got "
                f"{tuple(x.shape)}"
            )
        make_noise = _noise_maker(noise, noise_on_cpu)
        adaptive = isinstance(self.solver, AdaptiveSolver)
        if adaptive and noise != "independent":
            raise ValueError(
                f"{self.solver.name} draws noise for the steps it finds: leave noise alone"
            )
        plan = None if adaptive else self.plan(steps, intervals=callable(noise))
        levels = self.levels(steps) if plan is None else plan.levels
        keywords = self._keywords(condition, x.shape[0])
        home = model_device(self.model)
        if home is not None and home != x.device:
            raise ValueError(f"x is on {x.device} but the model on {home}: move one of them")
        _check_finite(x, "x, the initial noise,")

        first: Level = levels[0]
        # x = alpha x0 + sigma eps without its first term, which is not known, and small there.
        state = x.to(torch.promote_types(x.dtype, torch.float32)) * first.sigma
        seeds = self._seeds(seed, x.shape[0])
        if isinstance(self.solver, AdaptiveSolver):
            return self._adapt(
                self.solver, state, levels, seeds, keywords, progress, callback, noise_on_cpu
            ).to(x.dtype)
        assert plan is not None
        source = make_noise(seeds, state) if plan.stochastic else None
        float64 = getattr(self.denoiser, "float64_sigma", False)
        run = Run(plan, state, source, torch.float64 if float64 else None)
        del state
        bar = _progress_bar(plan.evaluations) if progress else None
        denoiser = self.denoiser
        try:
            while not run.done:
                if callback is not None:
                    answers = _answers(denoiser(run.x, run.sigma, **keywords), plan)
                    callback(run.k, run.x, run.sigma, answers[0])
                    run.advance(*answers)
                elif plan.outputs == 1:
                    run.advance(denoiser(run.x, run.sigma, **keywords))
                else:
                    run.advance(*_answers(denoiser(run.x, run.sigma, **keywords), plan))
                if bar is not None:
                    bar.update()
        finally:
            if bar is not None:
                bar.close()
        _check_finite(run.result, f"the result of {plan.solver} after {steps} steps")
        return run.result.to(x.dtype)

    def _adapt(
        self,
        solver: AdaptiveSolver,
        x: Tensor,
        levels: Levels,
        seeds: Sequence[int],
        keywords: Mapping[str, Any],
        progress: bool,
        callback: Callback | None,
        noise_on_cpu: bool,
    ) -> Tensor:
        bar = _progress_bar(None) if progress else None

        def told(k: int, x: Tensor, sigma: Tensor, denoised: Tensor) -> None:
            if callback is not None:
                callback(k, x, sigma, denoised)
            if bar is not None:
                bar.update()

        try:
            return solver.run(
                self.denoiser,
                x,
                levels,
                self.options,
                seeds,
                keywords,
                told,
                noise_on_cpu=noise_on_cpu,
            )[0]
        finally:
            if bar is not None:
                bar.close()

    def _keywords(self, condition: Any, batch: int) -> dict[str, Any]:
        if condition is None:
            keywords: dict[str, Any] = {}
        elif isinstance(condition, Mapping):
            keywords = dict(condition)
        elif isinstance(condition, Tensor):
            name = "embedding" if condition.is_floating_point() else "class_label"
            keywords = {name: condition}
        else:
            raise TypeError(
                "condition must be class labels (an integer tensor), an embedding (a float tensor) "
                f"or a mapping of keyword arguments, got {type(condition).__name__}"
            )
        check = getattr(self.denoiser, "check_condition", None)
        if check is not None:
            check(batch, **keywords)
        return keywords

    @staticmethod
    def _seeds(seed: int | Sequence[int] | None, batch: int) -> list[int]:
        if seed is None:
            return torch.randint(0, 2**62, (batch,)).tolist()
        one = _whole(seed)
        if isinstance(one, int) and not isinstance(one, bool):
            return [one + i for i in range(batch)]
        if isinstance(seed, Sequence):
            seeds = [_whole(s) for s in seed]
            if all(isinstance(s, int) and not isinstance(s, bool) for s in seeds):
                if len(seeds) != batch:
                    raise ValueError(f"{batch} samples need as many seeds, got {len(seeds)}")
                return seeds
        raise TypeError(f"seed must be a whole number or one per sample, got {seed!r}")


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


def _noise_maker(
    noise: str | NoiseSampler, on_cpu: bool
) -> Callable[[Sequence[int], Tensor], NoiseSource]:
    """What makes the noise source of a run, given its seeds and its state."""
    if isinstance(noise, str):
        if noise not in NOISES:
            raise ValueError(maths.unknown("noise", noise, NOISES))
        return functools.partial(NOISES[noise], on_cpu=on_cpu)
    if not callable(noise):
        raise TypeError(
            f"noise must be {' or '.join(map(repr, NOISES))}, or a function "
            f"noise_sampler(sigma, sigma_next), got {noise!r}"
        )
    sampler = noise

    def made(seeds: Sequence[int], like: Tensor) -> NoiseSource:
        return CallerNoise(sampler, like, SampleNoise(seeds, like, FRESH, on_cpu=on_cpu))

    return made


def _whole(value: Any) -> Any:
    """A whole number of another library (numpy's, say) as Python's; anything else as it is."""
    if isinstance(value, (int, str, Tensor)):
        return value
    try:
        return operator.index(value)
    except TypeError:
        return value


def find_solver(name: Solver | AdaptiveSolver | str) -> Solver | AdaptiveSolver:
    """A registered solver of fixed or of adaptive steps; a solver passes through.

    Raises:
        ValueError: unknown name (the nearest known one is offered).
    """
    if isinstance(name, (Solver, AdaptiveSolver)):
        return name
    known: dict[str, Solver | AdaptiveSolver] = {**SOLVERS, **ADAPTIVE}
    if not isinstance(name, str) or name not in known:
        raise ValueError(maths.unknown("sampler", name, known))
    return known[name]


@functools.lru_cache(maxsize=256, typed=True)  # typed: steps=True must not find what 1 left
def _lay(scheduler: Scheduler, steps: int, path: Path) -> Levels:
    return scheduler.levels(steps).on(path)


def _check_finite(x: Tensor, what: str) -> None:
    # A finite sum proves finite terms, for a fifth of the time; an infinite one may be overflow.
    if x.device.type == "meta" or math.isfinite(x.sum().item()):
        return
    if not bool(torch.isfinite(x).all()):
        share = (~torch.isfinite(x)).float().mean().item()
        error = ValueError if what.startswith("x,") else FloatingPointError
        raise error(
            f"{what} is not finite in {share:.1%} of its values: "
            "check the model's output, the noise and the input for overflow or NaN"
        )


def _progress_bar(total: int | None) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, desc="sampling", unit="call", leave=False)
