"""The loop of adaptive step control: each sample of a batch has its own clock, step and controller.

A plan is fixed before the model is first called; here each step's length depends on the answers. A
step is accepted or refused for each sample by itself, whose result is therefore the same alone, in
any batch and in any order. The loop waits for the device once a step, to read the errors. Clocks,
steps and weights are float64 on the host.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from k_diffusion.sampling.noise import SampleNoise
from k_diffusion.sampling.pairs import Chart, Pair
from k_diffusion.utils import maths

State = tuple[Tensor, ...]
"""What is integrated: tensors of shape (B, ...) that share a step; each keeps the tolerance."""
Slope = Callable[[Sequence[int], State, Sequence[float]], State]
"""Slopes of a state whose rows are the samples `rows`, each at its own clock."""


MOST_SAFETY = 2.5
"""A bound on `accept_safety`: below what the limiter lets a step grow by, 1 + pi / 2."""


class PIDStepSizeController:
    """A PID controller for one sample's step size.

    Args:
        h: the first step, of either sign.
        pcoeff, icoeff, dcoeff: of the proportional, integral and derivative terms.
        order: the power of the step that its error goes by.
        accept_safety: a step is accepted where the next would be at least this many times as long;
            at 0.81 and order 3 that lets errors up to 1.9 times the tolerance through.
        eps: added to the error, so that its inverse is finite.

    Source: Söderlind 2003, doi:10.1145/641876.641877 (controller and limiter).
    """

    def __init__(
        self,
        h: float,
        pcoeff: float,
        icoeff: float,
        dcoeff: float,
        order: float = 1,
        accept_safety: float = 0.81,
        eps: float = 1e-8,
    ) -> None:
        if not accept_safety < MOST_SAFETY:
            raise ValueError(
                f"accept_safety must be below {MOST_SAFETY}, got {accept_safety!r}: the next step "
                "is never longer than 2.57 times, so none would be accepted"
            )
        self.h, self.accept_safety, self.eps = h, accept_safety, eps
        # Powers of the inverse errors of this step and the two accepted before it.
        powers = (pcoeff + icoeff + dcoeff, -(pcoeff + 2 * dcoeff), dcoeff)
        self.b1, self.b2, self.b3 = (power / order for power in powers)
        self.errs: list[float] = []

    def limiter(self, x: float) -> float:
        """Keeps the change of a step between 0.21 and 2.57 times, smoothly."""
        return math.atan(x - 1) + 1

    def propose_step(self, error: float) -> bool:
        """Whether to accept a step of this error, in units of the tolerance; sets the next `h`."""
        inverse = 1 / (float(error) + self.eps)
        _, *before = self.errs or [inverse] * 3
        self.errs = [inverse, *before]
        powers = (self.b1, self.b2, self.b3)
        change = self.limiter(math.prod(e**b for e, b in zip(self.errs, powers, strict=True)))
        self.h *= change
        if not change >= self.accept_safety:  # nor where it is no number
            return False
        self.errs = [inverse, inverse, before[0]]
        return True

    def retreat(self) -> bool:
        """Shrinks the next step as far as it may, after one without a finite error; False."""
        self.h *= self.limiter(0.0)
        return False


@dataclass(frozen=True)
class StepControl:
    """How long the steps are.

    Attributes:
        rtol: tolerance of a step's error relative to the state, with the signal's scale at 1.
        atol: the least tolerance, in data units. The larger of the two counts, as the root of the
            mean square over a sample's values.
        h_init: the first step, in the clock of the pair: half log-SNR for the DPM pairs, sigma /
            (alpha + sigma) for the Runge-Kutta pairs.
        pcoeff, icoeff, dcoeff, accept_safety: see `PIDStepSizeController`.
        max_steps: steps, accepted or refused, after which a sample is given up.
    """

    rtol: float = 0.05
    atol: float = 0.0078
    h_init: float = 0.05
    pcoeff: float = 0.0
    icoeff: float = 1.0
    dcoeff: float = 0.0
    accept_safety: float = 0.81
    max_steps: int = 10_000

    def __post_init__(self) -> None:
        for name in ("rtol", "atol", "h_init", "accept_safety", "max_steps"):
            value = getattr(self, name)
            if not value > 0 and not (name in ("rtol", "atol") and value == 0):
                raise ValueError(f"{name} must be above 0, got {value!r}")
        if self.max_steps % 1 != 0:
            raise ValueError(f"max_steps must be a whole number, got {self.max_steps!r}")
        self.controller(1, 1)  # refuses what it cannot take
        if self.rtol == self.atol == 0:
            raise ValueError("rtol and atol are both 0, which no step can meet: set either")

    def controller(self, order: float, sign: int) -> PIDStepSizeController:
        """A fresh controller for one sample."""
        gains = self.pcoeff, self.icoeff, self.dcoeff
        return PIDStepSizeController(sign * self.h_init, *gains, order, self.accept_safety)


def along(values: Sequence[float], like: Tensor) -> Tensor:
    """One number per sample, made to multiply a tensor of shape (B, ...)."""
    column = torch.tensor(values, dtype=torch.float64, device="cpu").to(like.dtype)
    return column.reshape(-1, *[1] * (like.ndim - 1)).to(like.device)


class Ancestral:
    """Makes a step a step of the reverse diffusion: down to a lower level, then up by fresh noise.

    Noise is drawn only for accepted steps: what a refused one had drawn would be noise chosen by
    its error.

    Args:
        eta: 0 is the ODE, 1 the full reverse diffusion.
        s_noise: standard deviation of the noise that is added.
        sources: one noise source per sample.
    """

    def __init__(self, eta: float, s_noise: float, sources: Sequence[SampleNoise]) -> None:
        self.eta, self.s_noise, self.sources = eta, s_noise, sources

    def aim(
        self, chart: Chart, clocks: Sequence[float], targets: Sequence[float], end: float
    ) -> list[float]:
        """The clocks to step down to, none beyond the end (so that the last step adds none)."""
        aims = []
        for clock, target in zip(clocks, targets, strict=True):
            s, t = (maths.exp(-chart.half_log_snr(u)) for u in (clock, target))
            up = min(1.0, self.eta * math.sqrt(max(0.0, 1 - (t / s) ** 2)))
            down = chart.clock(-maths.log(t * math.sqrt((1 - up) * (1 + up))))
            aims.append(down if (end - down) * (end - target) > 0 else end)
        return aims

    def renew(
        self,
        chart: Chart,
        state: Tensor,
        rows: Sequence[int],
        good: Sequence[bool],
        aims: Sequence[float],
        targets: Sequence[float],
    ) -> Tensor:
        """The states carried from `aims` up to `targets`; noise is drawn where `good`."""
        keep, scale, drawn = [], [], []
        for row, fine, aim, target in zip(rows, good, aims, targets, strict=True):
            down, t = (maths.exp(-chart.half_log_snr(u)) for u in (aim, target))
            keep.append(chart.unit(target) / chart.unit(aim))
            amount = math.sqrt(max(0.0, (t - down) * (t + down))) * self.s_noise
            scale.append(amount * chart.unit(target))
            drawn.append(self.sources[row].draw() if fine else torch.zeros_like(state[:1]))
        return state * along(keep, state) + torch.cat(drawn) * along(scale, state)


def integrate(
    slope: Slope,
    state: State,
    start: float,
    end: float,
    pair: Pair,
    control: StepControl,
    noise: Ancestral | None = None,
) -> tuple[State, list[int], list[int]]:
    """Carries every sample from clock `start` to clock `end`, each by steps of its own.

    Args:
        slope: see `Slope`.
        state: tensors of shape (B, ...), in the coordinates of the pair's chart.
        start, end: clocks of the pair's chart, in either order.
        noise: makes the first of `state` a reverse diffusion.

    Returns:
        the state at `end`; how many steps each sample accepted; how many it refused.

    Raises:
        RuntimeError: a sample needs more than `max_steps`, or its step has shrunk to nothing.
        FloatingPointError: the model's answer for a sample isn't finite.
    """
    batch, sign = state[0].shape[0], 1 if end > start else -1
    if max(control.rtol, control.atol) < 4 * torch.finfo(state[0].dtype).eps:
        raise ValueError(
            f"rtol {control.rtol:g} and atol {control.atol:g} are below the rounding of "
            f"{state[0].dtype}: raise them, or give x in float64"
        )
    order = 1.5 if noise is not None else pair.order  # noise goes by the root of the step
    pids = [control.controller(order, sign) for _ in range(batch)]
    clocks = [start] * batch
    accepted, refused = [0] * batch, [0] * batch
    results = tuple(torch.empty_like(part) for part in state)
    # The last accepted state of the lower order is what the tolerance is taken from in the source.
    previous, first = state, None
    alive, known = list(range(batch)), [False] * batch
    tiny = 1e-13 * abs(end - start)
    while alive:
        now = [clocks[i] for i in alive]
        targets = [_reach(clock, pids[i].h, end, tiny) for i, clock in zip(alive, now, strict=True)]
        aims = targets if noise is None else noise.aim(pair.chart, now, targets, end)
        first = _first_slopes(slope, state, first, alive, known, now)
        low, high, last = _step(slope, state, first, alive, now, aims, pair)
        errors = _errors(low, high, previous, control)
        good = []
        for k, i in enumerate(alive):
            error = errors[k]
            finite = math.isfinite(error)
            if not finite and not all(bool(part[k].isfinite().all()) for part in first):
                raise FloatingPointError(
                    f"the denoiser's answer for sample {i} at {_place(pair.chart, now[k])} is not "
                    "finite: check the model for overflow or NaN"
                )
            # Where only later answers aren't finite, the step may have gone too far.
            good.append(pids[i].propose_step(error) if finite else pids[i].retreat())
            (accepted if good[k] else refused)[i] += 1
            if good[k]:
                clocks[i] = targets[k]
            known[i] = not good[k] or (pair.carries and noise is None)
            if clocks[i] == end:
                continue
            if accepted[i] + refused[i] >= control.max_steps or abs(pids[i].h) <= tiny:
                raise RuntimeError(_stuck(i, pair, clocks[i], pids[i].h, finite, control))
        if noise is not None and any(good):
            high = (noise.renew(pair.chart, high[0], alive, good, aims, targets), *high[1:])
        state, previous = _where(good, high, state), _where(good, low, previous)
        if pair.carries and noise is None:
            first = _where(good, last, first)
        over = [k for k, i in enumerate(alive) if clocks[i] == end]
        if over:
            ended = torch.tensor([alive[k] for k in over], device=state[0].device)
            for result, part in zip(results, state, strict=True):
                result[ended] = part[over]
            keep = [k for k, i in enumerate(alive) if clocks[i] != end]
            alive = [alive[k] for k in keep]
            state, previous, first = (
                tuple(part[keep] for part in parts) for parts in (state, previous, first)
            )
    return results, accepted, refused


def _reach(clock: float, h: float, end: float, tiny: float) -> float:
    """Where a step leads: not past the end, and onto it rather than to just before it."""
    return end if abs(h) >= abs(end - clock) - tiny else clock + h


def _first_slopes(
    slope: Slope,
    state: State,
    first: State | None,
    alive: Sequence[int],
    known: Sequence[bool],
    clocks: Sequence[float],
) -> State:
    """The slopes at the states themselves: asked for only where no earlier step left them."""
    need = [k for k, i in enumerate(alive) if not known[i]]
    if first is None or len(need) == len(alive):
        return slope(alive, state, clocks)
    if not need:
        return first
    part = tuple(values[need] for values in state)
    fresh = slope([alive[k] for k in need], part, [clocks[k] for k in need])
    index = torch.tensor(need, device=state[0].device)
    return tuple(old.index_copy(0, index, new) for old, new in zip(first, fresh, strict=True))


def _step(
    slope: Slope,
    state: State,
    first: State,
    alive: Sequence[int],
    clocks: Sequence[float],
    aims: Sequence[float],
    pair: Pair,
) -> tuple[State, State, State]:
    """One step of every sample: the results of lower and higher order, and the last slope."""
    table = [pair.weights(s, t) for s, t in zip(clocks, aims, strict=True)]
    slopes = [first]

    def combine(rows: Sequence[Sequence[float]]) -> State:
        total = state
        for j, values in enumerate(slopes[: len(rows[0])]):
            weights = [row[j] for row in rows]
            if any(weights):
                total = tuple(
                    part.addcmul(along(weights, part), value)
                    for part, value in zip(total, values, strict=True)
                )
        return total

    for stage, node in enumerate(pair.nodes[1:]):
        inner = combine([weights.inner[stage] for weights in table])
        at = [s + node * (t - s) if node < 1 else t for s, t in zip(clocks, aims, strict=True)]
        slopes.append(slope(alive, inner, at))
    low, high = (combine([getattr(w, kind) for w in table]) for kind in ("low", "high"))
    return low, high, slopes[-1]


def _errors(low: State, high: State, previous: State, control: StepControl) -> list[float]:
    """Each sample's error in units of the tolerance: the largest over the state's parts."""
    worst = None
    for a, b, before in zip(low, high, previous, strict=True):
        delta = (torch.maximum(a.abs(), before.abs()) * control.rtol).clamp_min(control.atol)
        # A value that is 0 twice within a purely relative tolerance is exact, not 0 / 0.
        scaled = torch.where(a == b, torch.zeros_like(a), (a - b) / delta).flatten(1)
        error = torch.linalg.vector_norm(scaled, dim=1) / scaled.shape[1] ** 0.5
        worst = error if worst is None else torch.maximum(worst, error)
    assert worst is not None
    return worst.tolist()


def _where(good: Sequence[bool], new: State, old: State) -> State:
    if all(good):
        return new
    if not any(good):
        return old
    mask = torch.tensor(good, device=new[0].device)
    return tuple(
        torch.where(mask.reshape(-1, *[1] * (a.ndim - 1)), a, b)
        for a, b in zip(new, old, strict=True)
    )


def _place(chart: Chart, clock: float) -> str:
    return f"sigma / alpha = {maths.exp(-chart.half_log_snr(clock)):.4g}"


def _stuck(
    sample: int, pair: Pair, clock: float, h: float, finite: bool, control: StepControl
) -> str:
    where = f"sample {sample} is at {_place(pair.chart, clock)} with {pair.name}"
    if not finite:
        return f"{where}, and no step from there has a finite result: check the model for NaN"
    cause = f"its step has shrunk to {abs(h):.1g}"
    if abs(h) > 1e-12:
        cause = f"it has tried {control.max_steps} steps, the next is {abs(h):.1g} long"
    return f"{where}: {cause}; raise rtol ({control.rtol:g}), atol ({control.atol:g}) or max_steps"
