"""Runs a plan the way that programs written for k-diffusion expect a `sample_*` function to run.

They pass a model `(x, sigma (B,), **extra_args) -> denoised`, sigmas that end in 0 or not, and a
callback; the model's input, the callback's tensors and the result are in x's dtype, while the state
between two calls is float32 or better. Names that programs replace in `k_diffusion.sampling` are
looked up there at every use (see `compat_tools.face`).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from k_diffusion.denoiser import Call, mark_call
from k_diffusion.sampling.compat_checks import (
    check_answer,
    check_input,
    check_noise,
    warn_unless_finite,
)
from k_diffusion.sampling.compat_tools import NoiseSampler, face
from k_diffusion.sampling.engine import Run
from k_diffusion.sampling.expr import Interval
from k_diffusion.sampling.noise import NoiseSource
from k_diffusion.sampling.plan import Churn, Plan, make_plan
from k_diffusion.utils.levels import VE, Level, Levels, Path

Model = Callable[..., Any]
Callback = Callable[[dict[str, Any]], Any]
Times = Callable[[Interval], tuple[Tensor, Tensor]]
Describe = Callable[[int, Level], dict[str, Any]]


class Grid:
    """A caller's sigmas: the levels that they stand for, and the tensors that they are.

    Args:
        name: of the function that was called, for its errors.
        sigmas: noise standard deviations in data units, shape (n,), or a sequence of numbers.
        x: gives the dtype and device of sigmas that are no floating-point tensor.
        path: the coordinates of the model.

    Attributes:
        sigmas: floating point, shape (n,).
        values: the same as numbers.
        levels: the same as Levels, repeated ones dropped; None where there is nothing to do.
        starts: for each interval between levels, its index in sigmas.

    Raises:
        TypeError, ValueError: sigmas of a wrong kind, shape, value or order.
    """

    def __init__(self, name: str, sigmas: Any, x: Tensor, path: Path) -> None:
        dtype = torch.promote_types(x.dtype, torch.float32)
        if not isinstance(sigmas, Tensor):
            try:
                sigmas = torch.as_tensor(sigmas, dtype=dtype, device=x.device)
            except (TypeError, ValueError, RuntimeError) as error:
                raise TypeError(
                    f"sigmas of {name} must be a tensor or a sequence of numbers: {error}"
                ) from None
        if sigmas.is_complex() or sigmas.dtype is torch.bool:
            raise TypeError(f"sigmas of {name} must be real numbers, got {sigmas.dtype}")
        if not sigmas.is_floating_point():
            sigmas = sigmas.to(dtype)
        if sigmas.ndim != 1 or len(sigmas) == 0:
            raise ValueError(
                f"sigmas of {name} must have shape (n,) with n >= 1, got {tuple(sigmas.shape)}"
            )
        self.sigmas = sigmas.detach()
        self.values = tuple(map(float, self.sigmas.tolist()))
        self.levels, self.starts = _lay(name, self.values, path)

    @functools.cached_property
    def _points(self) -> dict[float, Tensor]:
        return dict(zip(self.values, self.sigmas.unbind(), strict=True))

    def at(self, level: Level) -> Tensor:
        """sigma of a level, shape (): the caller's own where it is one of his."""
        point = self._points.get(level.sigma)
        return self.sigmas.new_full((), level.sigma) if point is None else point

    def times(self, interval: Interval) -> tuple[Tensor, Tensor]:
        """What a noise sampler is given for an interval."""
        return self.at(interval.start), self.at(interval.end)


@functools.lru_cache(maxsize=256)
def _lay(name: str, values: tuple[float, ...], path: Path) -> tuple[Levels | None, tuple[int, ...]]:
    for i, sigma in enumerate(values):
        if not 0 <= sigma < math.inf:
            raise ValueError(f"sigmas[{i}] of {name} is {sigma}: they must be finite and 0 or more")
    if len(values) == 1:
        return None, ()
    if not any(values):
        raise ValueError(f"sigmas of {name} are all 0: there is no noise to remove")
    starts = tuple(i for i in range(len(values) - 1) if values[i] != values[i + 1])
    if not starts:
        return None, ()
    kept = [values[i] for i in starts] + [values[-1]]
    if all(a > b for a, b in itertools.pairwise(kept)):
        return Levels.from_sigmas(kept, path), starts
    if not all(a < b for a, b in itertools.pairwise(kept)):
        i = next(i for i in starts if (values[i] < values[i + 1]) == (kept[0] > kept[-1]))
        raise ValueError(
            f"sigmas of {name} must go one way, from noisy to clean, but sigmas[{i}] is "
            f"{values[i]} and sigmas[{i + 1}] is {values[i + 1]}: sort them"
        )
    if kept[0] == 0:
        raise ValueError(
            f"sigmas of {name} rise from 0, where x holds no trace of its noise: begin above 0"
        )
    return Levels.from_sigmas(kept[::-1], path).flipped(), starts  # for inversion


class EstablishedNoise:
    """Noise for a run: of a caller's or a patched noise sampler, churn of `torch.randn_like`.

    Args:
        x: gives shape, dtype and device.
        sampler: given two sigmas, tensors of shape (), returns unit noise of x's shape; None where
            churn is all that is drawn.
        times: the two sigmas of an interval.
    """

    def __init__(self, x: Tensor, sampler: NoiseSampler | None, times: Times) -> None:
        self._x = x
        self._dtype = torch.promote_types(x.dtype, torch.float32)
        self._sampler = sampler
        self._times = times

    def draw(self, interval: Interval) -> Tensor:
        if self._sampler is None:
            noise, source = face().torch.randn_like(self._x), "torch.randn_like"
        else:
            noise, source = self._sampler(*self._times(interval)), "noise_sampler"
        return check_noise(source, noise, self._x).to(self._dtype)


def _answers(name: str, plan: Plan, answer: Any, x: Tensor) -> tuple[Tensor, ...]:
    """The model's answer as the plan takes it, once it is what it should be."""
    if plan.outputs == 1:
        answers: tuple[Any, ...] = (answer,)
    elif isinstance(answer, (tuple, list)) and len(answer) == plan.outputs:
        answers = tuple(answer)
    else:
        raise TypeError(
            f"the model must return a pair (denoised, uncond_denoised) for {name}, got "
            f"{type(answer).__name__}"
        )
    for each in answers:
        check_answer(name, each, x)
    return answers


def _edited(own: Tensor, shown: Tensor) -> Tensor:
    """Takes over what a callback has written into a copy that it was shown in a lower precision."""
    return torch.where(shown == own.to(shown.dtype), own, shown.to(own.dtype))


def _outlives(plan: Plan, k: int) -> bool:
    """Whether an answer to query k is needed after query k + 1."""
    if k + 1 == len(plan.steps):
        return False
    operations = plan.steps[k + 1].operations
    dead = {*plan.steps[k].drop, *(name for op in operations for name in op.drop)}
    return not dead.issuperset(plan.steps[k].answers)


def drive(
    name: str,
    plan: Plan,
    model: Any,
    x: Tensor,
    extra_args: Mapping[str, Any] | None,
    callback: Callback | None,
    noise: NoiseSource | None,
    intervals: Iterable[int],
    describe: Describe,
    skipped: Sequence[int] = (),
    asked: Callable[[], Any] | None = None,
    passed: Callable[[int], Any] | None = None,
    copied: bool = False,
    stacklevel: int = 5,
) -> Tensor:
    """Runs a plan interval by interval.

    Args:
        name: of the function that was called, for its errors.
        intervals: their indices; where it ends early, the state so far is the result.
        describe: what the callback is told of an interval, by its index and first level, besides
            x, i and denoised.
        skipped: indices of intervals of no length.
        asked: called after each call of the model.
        passed: called at the end of each interval with its index.
        copied: whether an answer that is needed after the next call of the model is copied, in
            case the model writes each into the same buffer.
        stacklevel: how many calls up the program is that a warning is for.

    Returns:
        The final state, in x's dtype.
    """
    extra_args = {} if extra_args is None else extra_args
    run = Run(plan, x, noise)
    steps, dtype = plan.steps, x.dtype
    sigmas = torch.tensor([step.level.sigma for step in steps], dtype=torch.float64, device="cpu")
    # Rows of their own, since a model may write into its sigma.
    rows = sigmas.to(dtype).to(x.device).unsqueeze(1).repeat(1, x.shape[0]).unbind()
    itself = object()
    for k, (step, row) in enumerate(zip(steps, rows, strict=True)):
        mark_call(row, Call(k, step.level, itself))
    for i in intervals:
        if i in skipped or run.done:
            continue
        start = True
        while start or not (run.done or steps[run.k].start):
            k = run.k
            state = run.x
            shown = state.to(dtype)
            answers = _answers(name, plan, model(shown, rows[k], **extra_args), x)
            if asked is not None:
                asked()
            if start and callback is not None:
                denoised = answers[0].to(dtype)
                info = {"x": shown, "i": i, **describe(i, steps[k].level), "denoised": denoised}
                callback(info)
                if shown is not state and not plan.predictor:
                    run.x = _edited(state, shown)
                if denoised is not answers[0]:
                    answers = (_edited(answers[0], denoised), *answers[1:])
                del denoised, info
            if copied and _outlives(plan, k):
                answers = tuple(a.clone() if a.dtype == run.dtype else a for a in answers)
            del shown, state
            run.advance(*answers)
            del answers
            start = False
        if passed is not None:
            passed(i)
    result = run.result if run.done else run.x
    warn_unless_finite(name, result, stacklevel)
    return result.to(dtype)


def sample(
    name: str,
    solver: str,
    model: Any,
    x: Tensor,
    sigmas: Any,
    extra_args: Mapping[str, Any] | None,
    callback: Callback | None,
    disable: bool | None,
    options: Mapping[str, Any],
    *,
    churn: Churn | None = None,
    noise_sampler: NoiseSampler | None = None,
    make_noise: Callable[[Tensor, Grid], NoiseSampler] | None = None,
    make_times: Callable[[Grid], Times] | None = None,
    intervals: bool = True,
    idle: bool = False,
    copied: bool = False,
) -> Tensor:
    """What every `sample_*` function with sigmas does.

    Args:
        name: of the function, for its errors.
        solver: name of the registered solver.
        model to disable: the established arguments.
        options: the solver's own.
        churn: noise added at the start of each interval.
        noise_sampler: the caller's, if any.
        make_noise: makes one where the caller gives none; None: `default_noise_sampler(x)`.
        make_times: the sigmas that it is given, if not the ends of the interval.
        intervals: whether noise is drawn once per interval in the solver's order, not on atoms.
        idle: whether the caller's noise sampler is called once per interval if the solver needs
            none of its noise, too, as it is established.
        copied: see `drive`.

    Returns:
        The samples, shape and dtype of x.
    """
    check_input(name, model, x)
    path = getattr(model, "path", VE)
    grid = Grid(name, sigmas, x, path if isinstance(path, Path) else VE)
    if grid.levels is None:
        return x
    plan = make_plan(
        solver,
        grid.levels,
        churn=churn,
        intervals=intervals or noise_sampler is not None,
        **options,
    )
    noise: NoiseSource | None = None
    if churn is not None and plan.stochastic:
        noise = EstablishedNoise(x, None, grid.times)
    elif plan.stochastic:
        if noise_sampler is None:
            own = make_noise(x, grid) if make_noise else face().default_noise_sampler(x)
        else:
            own = noise_sampler
        noise = EstablishedNoise(x, own, make_times(grid) if make_times else grid.times)

    n = sum(step.start for step in plan.steps)
    own_grid = n != len(grid.starts)  # the solver goes along levels of its own making
    if not own_grid:
        n = len(grid.values) - 1
    skipped = [] if own_grid else sorted(set(range(n)) - set(grid.starts))

    def describe(i: int, level: Level) -> dict[str, Any]:
        hat = grid.at(level)
        return {"sigma": hat if own_grid else grid.sigmas[i], "sigma_hat": hat}

    passed = None
    if idle and noise is None and noise_sampler is not None:
        values, points = grid.values, grid.sigmas

        def passed(i: int) -> None:
            if values[i + 1] > 0:
                noise_sampler(points[i], points[i + 1])

    bar = face().trange(n, disable=disable)
    return drive(
        name,
        plan,
        model,
        x,
        extra_args,
        callback,
        noise,
        bar,
        describe,
        skipped,
        passed=passed,
        copied=copied,
    )
