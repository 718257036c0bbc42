"""ER-SDE: the extended reverse SDE, whose noise is a function of the level.

Source: Cui et al. 2023, arXiv:2309.06169, the solvers of the variance-exploding SDE, here in
y = x / alpha and u = sigma / alpha, where all paths coincide. With a function phi, dy = d is drawn
to as phi falls: y_t = phi_t / phi_s y_s + (integral over u from t to s of phi_t phi' / phi² d) +
noise of variance u_t² - (u_s phi_t / phi_s)². phi = u is the probability-flow ODE, u² the reverse
diffusion; the authors' choice is u · (exp(u^0.3) + 10), with little noise at low levels. Here phi =
u · (exp(u^0.3) + 10)^eta, so that the variance of the noise goes as eta.
"""

from __future__ import annotations

from math import exp, expm1, log, log1p, sqrt
from typing import Any

from k_diffusion.sampling.expr import Expr
from k_diffusion.sampling.registry import Trace, solver
from k_diffusion.sampling.solvers.exponential import usable
from k_diffusion.utils.levels import Level
from k_diffusion.utils.maths import gauss_legendre


def log_growth(u: float) -> float:
    """log(exp(u^0.3) + 10): the logarithm of phi / u for eta = 1, at u = sigma / alpha."""
    return u**0.3 + log1p(10 * exp(-(u**0.3)))


def growth_rate(u: float) -> float:
    """The derivative of `log_growth` by log u."""
    return 0.3 * u**0.3 / (1 + 10 * exp(-(u**0.3)))


def _moments(s: Level, t: Level, eta: float) -> tuple[float, float]:
    """The integrals of phi_t phi' / phi² (u - u_s)^k / k! over u from t to s, for k = 1 and 2."""
    start, end = s.half_log_snr, t.half_log_snr
    first = second = 0.0
    for node, weight in gauss_legendre(24):
        lam = start + (end - start) * (1 + node) / 2
        u = exp(-lam)
        pull = exp(lam - end + eta * (log_growth(t.ratio) - log_growth(u)))
        mass = weight * (end - start) / 2 * pull * (1 + eta * growth_rate(u))
        first += mass * (u - s.ratio)
        second += mass * (u - s.ratio) ** 2 / 2
    return first, second


@solver(
    order={1: 1, 2: 2, 3: 2},
    source="Cui et al. 2023, arXiv:2309.06169, ER-SDE-Solver-1 to 3",
    stochastic=True,
)
def er_sde(
    x: Expr,
    levels: Any,
    noise: Any,
    *,
    order: int = 3,
    eta: float = 1.0,
    s_noise: float = 1.0,
) -> Trace:
    """ER-SDE: a Taylor polynomial of the data estimate in sigma / alpha, by backward differences of
    the last ones.

    The integrals are exact; published code sums 200 rectangles, an error of some percent in the
    corrections. Order 3 has order 2 in the ODE limit too: its first difference belongs to the
    middle of the last step, not to the present.
    """
    last: tuple[Expr, float] | None = None
    slope_last: tuple[Expr, float] | None = None
    for s, t in levels.pairs():
        d = yield x, s
        u = s.ratio
        slope: tuple[Expr, float] | None = None
        # The node of the slope before is the newest but one: far enough, if this one is.
        if last is not None and order > 1 and usable(levels, -log(last[1]), s, t):
            slope = (d - last[0]) / (u - last[1]), last[1]
        if not t.sigma > 0:
            x = t.alpha * d
        else:
            keep = exp(eta * (log_growth(t.ratio) - log_growth(u)))
            whole = keep * t.ratio / u
            x = (t.sigma / s.sigma * keep) * x + (t.alpha * (1 - whole)) * d
            first, second = _moments(s, t, eta)
            if slope is not None:
                x = x + (t.alpha * first) * slope[0]
                if slope_last is not None and order > 2:
                    x = x + (2 * t.alpha * second / (u - slope_last[1])) * (
                        slope[0] - slope_last[0]
                    )
            up = t.sigma * sqrt(max(-expm1(2 * eta * (log_growth(t.ratio) - log_growth(u))), 0.0))
            if up > 0:
                x = x + (up * s_noise) * noise(s, t)
        last, slope_last = (d, u), slope
    return x
