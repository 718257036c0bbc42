"""SA-Solver: stochastic Adams methods for the reverse SDE, on data estimates.

Source: Xue et al. 2023, arXiv:2309.05019, algorithm 1. With a noise scale tau, the reverse SDE
makes x_t = decay · x_s + alpha_t · (integral of (1 + tau²) exp((1 + tau²) (u - lambda_t)) d du) +
noise over u = log(alpha / sigma) from lambda_s to lambda_t. d is the polynomial through the last
estimates, integrated exactly on uneven steps; the corrector's goes through the estimate at the end
of the step too.

tau is `eta` where sigma / alpha at the end of a step lies in [s_tmin, s_tmax], and 0 (the
probability-flow ODE) elsewhere; the variance of the noise goes as eta². The order grows by one with
each step from 1 on, and falls again on the way to clean data (sigma = 0); with `end_order`, to that
in the last interval, on any levels.

In the ODE limit (eta = 0) the predictor alone has order 2 at most, since it starts with order 1; a
first step that is corrected allows 3. With noise none is of weak order above 2: an estimate feels
the noise up to its own level only, which a polynomial makes up for to leading order and no further,
whatever its degree.
"""

from __future__ import annotations

from functools import partial
from math import exp, expm1
from operator import itemgetter
from typing import Any

from k_diffusion.sampling.expr import Expr
from k_diffusion.sampling.registry import Trace, solver
from k_diffusion.sampling.solvers.exponential import share, spaced
from k_diffusion.sampling.solvers.sde import sde_scales
from k_diffusion.utils.levels import Level
from k_diffusion.utils.maths import lagrange_integrals

SOURCE = "Xue et al. 2023, arXiv:2309.05019, algorithm 1"
Estimates = list[tuple[float, Expr]]
"""Half log-SNR and data estimate, oldest first."""


def _integral(estimates: Estimates, s: Level, t: Level, rate: float) -> Expr:
    """What the polynomial through the estimates adds to x over a step; rate is tau²."""
    start, end = s.half_log_snr, t.half_log_snr
    weights = lagrange_integrals(
        [u for u, _ in estimates],
        start,
        end,
        -expm1(-(1 + rate) * (end - start)),
        partial(_decay, 1 + rate, end),
    )
    return sum((t.alpha * w) * d for w, (_, d) in zip(weights, estimates, strict=True))  # type: ignore[return-value]


def _decay(rate: float, end: float, u: float) -> float:
    return rate * exp(rate * (u - end))


def _midpoint_integral(estimates: Estimates, s: Level, t: Level, rate: float) -> Expr:
    """The same, where two estimates' slope weighs as at the middle of the step.

    That is h² / 2, without the exponential's decay from there on: another term of order h³.
    """
    added = _integral(estimates, s, t, rate)
    if len(estimates) != 2:
        return added
    (u0, d0), (u1, d1) = estimates
    z = (1 + rate) * (t.half_log_snr - s.half_log_snr)
    more = (z * z / 2 - (z + expm1(-z))) / (1 + rate)
    # z²/2 over (1 + rate) is h²/2 times (1 + rate), the factor of the whole integral.
    return added + (t.alpha * more / (u1 - u0)) * (d1 - d0)


class _Adams:
    """The estimates so far, and the last step made with them."""

    _integral = staticmethod(_integral)

    def __init__(
        self,
        levels: Any,
        noise: Any,
        order: int,
        eta: float,
        s_noise: float,
        span: tuple[float, float],
        corrector_order: int = 0,
        end_order: int = 0,
    ) -> None:
        if end_order < 0:
            raise ValueError(f"end_order must be 0 or more, got {end_order}")
        if corrector_order < 0:
            raise ValueError(f"corrector_order must be 0 or more, got {corrector_order}")
        self._known = (corrector_order or order + 1) - 1
        if not 0 <= span[0] <= span[1]:
            raise ValueError(f"s_tmin must lie in [0, s_tmax], got {span[0]} and {span[1]}")
        self._noise, self._order, self._eta = noise, order, eta
        self._s_noise, self._span = s_noise, span
        self._levels = levels
        self._left = len(levels)
        # By how much the last interval's order exceeds 1; large enough where it does not fall.
        falls = end_order or (0 if levels[-1].sigma > 0 else 1)
        self._more = falls - 1 if falls else order + self._known
        self._estimates: Estimates = []
        self._last: tuple[Level, Level, float, Estimates] | None = None

    def remember(self, d: Expr, s: Level, t: Level) -> None:
        """Begins a step from s, where the estimate is d, to t."""
        kept = spaced(self._estimates, self._levels, s, t, itemgetter(0))
        self._estimates = [*kept, (s.half_log_snr, d)][-max(self._order, self._known) :]

    def predict(self, x: Expr, s: Level, t: Level) -> Expr:
        """The step from s to t."""
        self._left -= 1
        if not t.sigma > 0:
            return t.alpha * self._estimates[-1][1]  # no polynomial reaches infinite log-SNR
        order = min(self._order, self._left + self._more)
        low, high = self._span
        rate = self._eta**2 if low <= t.ratio <= high else 0.0
        decay, up = sde_scales(s, t, rate)
        used = self._estimates[-order:]
        self._last = s, t, rate, used
        x = decay * x + self._integral(used, s, t, rate)
        return x + (up * self._s_noise) * self._noise(s, t) if up > 0 else x

    def correct(self, x: Expr, d: Expr, s: Level) -> Expr:
        """x, predicted for s, as it would be with its estimate d in the polynomial as well.

        Old state and noise are the same in both, so the difference is one of estimates alone.
        """
        if self._last is None:
            return x
        before, t, rate, used = self._last
        if share(s, before, t) < 0.5:  # churn has led back to the old answer, or before it
            return x
        known = min(self._known, self._left + self._more)
        estimates = [*self._estimates, (s.half_log_snr, d)][-known - 1 :]
        added = self._integral(estimates, before, t, rate)
        added = added - self._integral(used, before, t, rate)
        return x + (s.alpha / t.alpha) * added  # churn may have led on from t to s


class _MidpointAdams(_Adams):
    _integral = staticmethod(_midpoint_integral)


@solver(order={1: 1, 2: 2, 3: 2, 4: 2}, source=SOURCE, stochastic=True)
def sa_solver_predictor(
    x: Expr,
    levels: Any,
    noise: Any,
    *,
    order: int = 3,
    eta: float = 1.0,
    s_noise: float = 1.0,
    s_tmin: float = 0.0,
    s_tmax: float = 1e9,
    end_order: int = 0,
) -> Trace:
    """SA-Solver's predictor alone: stochastic Adams-Bashforth."""
    adams = _Adams(levels, noise, order, eta, s_noise, (s_tmin, s_tmax), end_order=end_order)
    for s, t in levels.pairs():
        d = yield x, s
        adams.remember(d, s, t)
        x = adams.predict(x, s, t)
    return x


@solver(order={1: 2, 2: 2, 3: 2, 4: 2}, source=SOURCE, stochastic=True)
def sa_solver(
    x: Expr,
    levels: Any,
    noise: Any,
    *,
    order: int = 3,
    eta: float = 1.0,
    s_noise: float = 1.0,
    s_tmin: float = 0.0,
    s_tmax: float = 1e9,
    corrector_order: int = 0,
    end_order: int = 0,
) -> Trace:
    """SA-Solver: stochastic Adams-Bashforth of `order`, corrected by the estimate that the next
    step needs anyway (PEC), through `corrector_order` estimates (0: one more than `order`)."""
    adams = _Adams(levels, noise, order, eta, s_noise, (s_tmin, s_tmax), corrector_order, end_order)
    return (yield from _pec(adams, x, levels))


@solver(order={1: 1, 2: 2, 3: 2, 4: 2}, source=SOURCE, stochastic=True)
def sa_solver_midpoint(
    x: Expr,
    levels: Any,
    noise: Any,
    *,
    order: int = 2,
    eta: float = 1.0,
    s_noise: float = 1.0,
    s_tmin: float = 0.0,
    s_tmax: float = 1e9,
    corrector_order: int = 0,
    end_order: int = 0,
) -> Trace:
    """SA-Solver for few steps: where two estimates make a step, or correct it, their slope weighs
    as at the step's middle (as in the authors' published program, and in diffusers). It corrects
    through `corrector_order` estimates (0: as many as `order`)."""
    span = (s_tmin, s_tmax)
    known = corrector_order or order
    adams = _MidpointAdams(levels, noise, order, eta, s_noise, span, known, end_order)
    return (yield from _pec(adams, x, levels))


def _pec(adams: _Adams, x: Expr, levels: Any) -> Trace:
    for s, t in levels.pairs():
        d = yield x, s
        x = adams.correct(x, d, s)
        adams.remember(d, s, t)
        x = adams.predict(x, s, t)
    return x


@solver(order={1: 2, 2: 2, 3: 2, 4: 2}, source=SOURCE, stochastic=True)
def sa_solver_pece(
    x: Expr,
    levels: Any,
    noise: Any,
    *,
    order: int = 3,
    eta: float = 1.0,
    s_noise: float = 1.0,
    s_tmin: float = 0.0,
    s_tmax: float = 1e9,
    corrector_order: int = 0,
    end_order: int = 0,
) -> Trace:
    """SA-Solver with a new estimate at each corrected state (PECE): two calls a step."""
    adams = _Adams(levels, noise, order, eta, s_noise, (s_tmin, s_tmax), corrector_order, end_order)
    for i, (s, t) in enumerate(levels.pairs()):
        d = yield x, s
        if i > 0:
            x = adams.correct(x, d, s)
            d = yield x, s
        adams.remember(d, s, t)
        x = adams.predict(x, s, t)
    return x
