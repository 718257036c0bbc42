"""Samplers with adaptive step control, for every sample of a batch by itself.

`sample_adaptive` carries states between any two levels of a denoiser; `ADAPTIVE` holds the solvers
that KSampler takes by name. The state is float32 or better whatever the denoiser computes in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from k_diffusion.denoiser import make_denoiser
from k_diffusion.guidance.held import bound_rows
from k_diffusion.sampling.noise import SampleNoise
from k_diffusion.sampling.pairs import PAIRS, Chart, Pair, get_pair
from k_diffusion.sampling.registry import SOLVERS, Solver
from k_diffusion.sampling.stepping import Ancestral, Slope, State, StepControl, along, integrate
from k_diffusion.utils import maths
from k_diffusion.utils.levels import Level, Levels, Path

Callback = Callable[[int, Tensor, Tensor, Tensor], None]


@dataclass(frozen=True)
class AdaptiveInfo:
    """What a run took, by sample: steps tried, accepted, refused, and evaluations of the model.

    `calls` counts calls of the model, each on all samples that needed it.
    """

    steps: tuple[int, ...]
    nfe: tuple[int, ...]
    accepted: tuple[int, ...]
    refused: tuple[int, ...]
    calls: int


def take_rows(value: Any, rows: Tensor, batch: int) -> Any:
    """The rows of all tensors in a condition that have one per sample."""
    if isinstance(value, Tensor):
        return value[rows.to(value.device)] if value.shape[:1] == (batch,) else value
    if isinstance(value, Mapping):
        return {key: take_rows(item, rows, batch) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [take_rows(item, rows, batch) for item in value]
        return items if isinstance(value, list) else tuple(items)
    return value


class Query:
    """Asks the denoiser about some samples of a batch, each at a level of its own, and counts.

    Args:
        denoiser: a Denoiser, or anything that `make_denoiser` takes.
        condition: its keyword arguments for the whole batch.
        x: the batch, shape (B, ...), in the dtype of the state.
        compact: hand it only the samples asked about, with their rows of every tensor in the
            condition whose first length is B. Otherwise always the whole batch, the others as they
            were last: for denoisers that hold conditions of the batch's length themselves.
        callback: called as `callback(k, x, sigma, denoised)` after the k-th call.
    """

    def __init__(
        self,
        denoiser: Any,
        condition: Mapping[str, Any] | None,
        x: Tensor,
        compact: bool,
        callback: Callback | None = None,
    ) -> None:
        self.denoiser = make_denoiser(denoiser)
        self.path: Path = self.denoiser.path
        self.condition = {**bound_rows(self.denoiser, x.shape), **(condition or {})}
        self.compact = compact
        self.callback = callback
        self.nfe = [0] * x.shape[0]
        self.calls = 0
        float64 = getattr(self.denoiser, "float64_sigma", False) and x.device.type != "mps"
        self._sigma_dtype = torch.float64 if float64 else x.dtype
        self._parked: Tensor | None = None
        self._sigmas = [0.0] * x.shape[0]

    def __call__(self, rows: Sequence[int], x: Tensor, levels: Sequence[Level]) -> Tensor:
        """The denoiser's answers, shape and dtype of x, for the samples `rows` at `levels`."""
        batch = len(self.nfe)
        condition, sigmas = self.condition, [level.sigma for level in levels]
        chosen: Tensor | None = None
        if len(rows) < batch:
            chosen = torch.tensor(rows, device=x.device)
            if self.compact:
                condition = {k: take_rows(v, chosen, batch) for k, v in condition.items()}
        if not self.compact:
            for row, value in zip(rows, sigmas, strict=True):
                self._sigmas[row] = value
            sigmas = self._sigmas
            if chosen is not None and self._parked is not None:
                x = self._parked.index_copy(0, chosen, x)
            self._parked = x.detach()
        for row in rows:
            self.nfe[row] += 1
        sigma = (
            torch.tensor(sigmas, dtype=torch.float64, device="cpu")
            .to(self._sigma_dtype)
            .to(x.device)
        )
        d = self.denoiser(x, sigma, **condition)
        if not isinstance(d, Tensor):
            raise TypeError(f"the denoiser must return one tensor, got {type(d).__name__}")
        if d.shape != x.shape:
            raise ValueError(
                f"the denoiser returned shape {tuple(d.shape)} for a state of shape "
                f"{tuple(x.shape)}"
            )
        if self.callback is not None:
            self.callback(self.calls, x, sigma, d)
        self.calls += 1
        d = d.to(x.dtype)
        return d if self.compact or chosen is None else d[chosen]

    def check_levels(self, *levels: Level) -> None:
        """Refuses a level that is not on the denoiser's path."""
        for level in levels:
            if abs(self.path.alpha(level.sigma) - level.alpha) > 1e-6:
                raise ValueError(f"{level} does not lie on the denoiser's {self.path} path")

    def levels(self, chart: Chart, clocks: Sequence[float]) -> list[Level]:
        """The levels of the denoiser's path at the clocks of a chart."""
        return [self.path.at(chart.half_log_snr(clock)) for clock in clocks]


@torch.no_grad()
def sample_adaptive(
    denoiser: Any,
    x: Tensor,
    start: Level,
    end: Level,
    *,
    pair: str | Pair = "dpm_23",
    control: StepControl | None = None,
    eta: float = 0.0,
    s_noise: float = 1.0,
    seeds: Sequence[int] | None = None,
    condition: Mapping[str, Any] | None = None,
    first: Level | None = None,
    last: Level | None = None,
    compact: bool = True,
    callback: Callback | None = None,
    noise_on_cpu: bool = False,
) -> tuple[Tensor, AdaptiveInfo]:
    """Carries samples from one level to another with steps as long as their tolerance allows.

    From pure noise (alpha = 0) the DPM pairs, whose clock is infinite there, begin with one DDIM
    step; Runge-Kutta pairs begin there. To clean data (sigma = 0) the last step is DDIM for all.

    Args:
        denoiser: a Denoiser, or anything that `make_denoiser` takes.
        x: states at `start`, shape (B, ...), in the denoiser's coordinates.
        start, end: levels of the denoiser's path; towards noise only with eta = 0.
        pair: an embedded pair or its name: dpm_12, dpm_23, bogacki_shampine, dormand_prince.
        control: tolerances and step control.
        eta: noise of the reverse diffusion, 0 for the ODE. The tolerance is kept by the ODE's part
            of a step alone: with noise, a tolerance counts by the steps that it leads to.
        s_noise: standard deviation of that noise.
        seeds: one per sample, for eta > 0.
        condition: the denoiser's keyword arguments.
        first: where a DDIM step from pure noise leads; None: sigma / alpha = 10 / sqrt(rtol), whose
            error is rtol / 200 of the data's variance.
        last: where the DDIM step to clean data begins; None: sigma / alpha = sqrt(rtol) / 100.
        compact, callback: see `Query`.
        noise_on_cpu: draw the noise on the CPU, where a seed gives the same on every device.

    Returns:
        The states at `end`, shape and dtype of x, and what they took.

    Raises:
        ValueError: a level or option that cannot be; RuntimeError, FloatingPointError: see
            `integrate`.
    """
    pair, control = get_pair(pair), control or StepControl()
    if not x.is_floating_point() or x.ndim < 2 or x.shape[0] == 0:
        raise ValueError(f"x must be floating point, (B, C, ...), got {x.dtype} {tuple(x.shape)}")
    state = x.to(torch.promote_types(x.dtype, torch.float32))
    ask = Query(denoiser, condition, state, compact, callback)
    batch, chart = x.shape[0], pair.chart
    ask.check_levels(start, end)
    forward = end.half_log_snr > start.half_log_snr
    if not forward and (start == end or eta or start.sigma == 0):
        what = "no way at all" if start == end else "from clean data" if eta == 0 else "with eta"
        raise ValueError(f"cannot go from {start} to {end} {what}: begin at a noisier level")
    if not eta >= 0 or not s_noise >= 0:
        raise ValueError(f"eta and s_noise must be 0 or more, got {eta!r} and {s_noise!r}")
    if eta and (seeds is None or len(seeds) != batch):
        raise ValueError(f"eta = {eta} draws noise: {batch} samples need as many seeds")
    everyone = range(batch)
    if forward and not math.isfinite(chart.clock(start.half_log_snr)):
        tolerance = control.rtol or control.atol
        first = first or ask.path.at(0.5 * math.log(tolerance) - math.log(10))
        state = _ddim(ask(everyone, state, [start] * batch), state, start, first)
        start = first
    tail = None
    if end.sigma == 0:
        tolerance = control.rtol or control.atol
        last = last or ask.path.at(math.log(100) - 0.5 * math.log(tolerance))
        tail = end
        end = last
    accepted = refused = [0] * batch
    if not forward or end.half_log_snr > start.half_log_snr:
        noise = None
        if eta:
            sources = [SampleNoise([seed], state[:1], on_cpu=noise_on_cpu) for seed in seeds or ()]
            noise = Ancestral(eta, s_noise, sources)
        begin, stop = (chart.clock(level.half_log_snr) for level in (start, end))
        if not math.isfinite(stop):
            raise ValueError(f"{pair.name} cannot reach {end}: use a Runge-Kutta pair")
        slope = probability_flow(ask, chart)
        parts, accepted, refused = integrate(
            slope, (state / chart.scale(start),), begin, stop, pair, control, noise
        )
        state = parts[0] * chart.scale(end)
        start = end
    if tail is not None:
        state = _ddim(ask(everyone, state, [start] * batch), state, start, tail)
    _check_finite(state)
    steps = tuple(a + r for a, r in zip(accepted, refused, strict=True))
    info = AdaptiveInfo(steps, tuple(ask.nfe), tuple(accepted), tuple(refused), ask.calls)
    return state.to(x.dtype), info


def probability_flow(ask: Query, chart: Chart) -> Slope:
    """The slope of the probability-flow ODE in a chart."""

    def slope(rows: Sequence[int], state: State, clocks: Sequence[float]) -> State:
        levels, (w,) = ask.levels(chart, clocks), state
        d = ask(rows, w * along([chart.scale(level) for level in levels], w), levels)
        return ((w - d) / along([chart.divisor(clock) for clock in clocks], w),)

    return slope


def _ddim(d: Tensor, x: Tensor, s: Level, t: Level) -> Tensor:
    shrink = t.sigma / s.sigma
    return shrink * x + (t.alpha - s.alpha * shrink) * d


def _check_finite(x: Tensor) -> None:
    bad = (~x.isfinite()).flatten(1).any(1)
    if bool(bad.any()):
        raise FloatingPointError(
            f"sample {int(bad.nonzero()[0])} did not come out finite: check the model's last answer"
        )


_OPTIONS = {**asdict(StepControl()), "eta": 0.0, "s_noise": 1.0}


@dataclass(frozen=True)
class AdaptiveSolver:
    """An embedded pair as KSampler's solver; the options are `StepControl`'s, eta and s_noise.

    The scheduler's levels give the range alone: the first and the last, and, where these are pure
    noise or clean data, the next to them as the other end of the DDIM step.
    """

    name: str
    pair: Pair
    options: Mapping[str, Any] = field(default_factory=lambda: dict(_OPTIONS), hash=False)

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Refuses by name an option that there is not, or a value that cannot be."""
        for key, value in options.items():
            if key not in self.options:
                raise ValueError(maths.unknown(f"option of {self.name},", key, self.options))
            if not maths.is_number(value) or not math.isfinite(value):
                raise ValueError(f"{self.name}'s {key} must be a finite number: {value!r}")
            if key in ("eta", "s_noise") and value < 0:
                raise ValueError(f"{self.name}'s {key} must be 0 or more, got {value!r}")
        self.control(options)

    @staticmethod
    def control(options: Mapping[str, Any]) -> StepControl:
        """The step control among the options."""
        names = {f.name for f in fields(StepControl)}
        return StepControl(**{key: value for key, value in options.items() if key in names})

    def run(
        self,
        denoiser: Any,
        x: Tensor,
        levels: Levels,
        options: Mapping[str, Any] = MappingProxyType({}),
        seeds: Sequence[int] | None = None,
        condition: Mapping[str, Any] | None = None,
        callback: Callback | None = None,
        noise_on_cpu: bool = False,
    ) -> tuple[Tensor, AdaptiveInfo]:
        """`sample_adaptive` over the range of `levels`, from a state at the first."""
        inner = levels[1:-1] if len(levels) > 2 else (None,)
        return sample_adaptive(
            denoiser,
            x,
            levels[0],
            levels[-1],
            pair=self.pair,
            control=self.control(options),
            eta=options.get("eta", 0.0),
            s_noise=options.get("s_noise", 1.0),
            seeds=seeds,
            condition=condition,
            first=inner[0],
            last=inner[-1],
            callback=callback,
            noise_on_cpu=noise_on_cpu,
        )


ADAPTIVE: dict[str, AdaptiveSolver] = {
    solver.name: solver
    for solver in (
        AdaptiveSolver("dpm_adaptive", PAIRS["dpm_23"]),
        AdaptiveSolver("dpm_adaptive_12", PAIRS["dpm_12"]),
        AdaptiveSolver("bogacki_shampine", PAIRS["bogacki_shampine"]),
        AdaptiveSolver("dormand_prince", PAIRS["dormand_prince"]),
    )
}


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
