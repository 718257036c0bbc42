"""DPM-Solver++ in the reverse diffusion SDE.

eta scales the noise: 0 is the probability-flow ODE, 1 the reverse diffusion of the forward process.
Between them the established formulas differ: in dpmpp_sde (as in the ancestral methods) the
variance of the noise goes as eta², in the 2M and 3M SDE methods as eta.

On noise a multistep method sees its own past only: the weak order is 2 at most, since the part of
the noise inside a step that later estimates feel is made up for to leading order alone.
"""

from __future__ import annotations

from math import exp, expm1, sqrt
from operator import itemgetter
from typing import Any

from k_diffusion.sampling.expr import Expr
from k_diffusion.sampling.registry import Trace, solver
from k_diffusion.sampling.solvers.ancestral import ancestral
from k_diffusion.sampling.solvers.exponential import (
    LEAST_SHARE,
    data_step,
    spaced,
    third_order_terms,
    usable,
)
from k_diffusion.utils.levels import Level


@solver(
    order=2, source="Lu et al. 2022, arXiv:2211.01095, section 5, single-step form", stochastic=True
)
def dpmpp_sde(
    x: Expr,
    levels: Any,
    noise: Any,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    r: float = 0.5,
) -> Trace:
    """SDE-DPM-Solver++(2S): ancestral steps with one more data estimate at the share r of a step;
    the noise of both belongs to one Brownian path. Of order 2 at eta 0 and 1, 1 between."""
    if not LEAST_SHARE <= r <= 1:
        raise ValueError(f"r must lie in [{LEAST_SHARE}, 1], got {r}")
    for s, t in levels.pairs():
        d = yield x, s
        if not t.sigma > 0:
            x = data_step(x, d, s, t)
            continue
        h = t.half_log_snr - s.half_log_snr
        m = levels.at(s.half_log_snr + r * h)
        down, up = ancestral(s, m, eta)
        middle = data_step(x, d, s, down)
        if up > 0:
            middle = middle + (up * s_noise) * noise(s, m)
        d_middle = yield middle, m
        down, up = ancestral(s, t, eta)
        x = data_step(x, (1 - 1 / (2 * r)) * d + 1 / (2 * r) * d_middle, s, down)
        if up > 0:
            x = x + (up * s_noise) * noise(s, t)
    return x


def sde_scales(s: Level, t: Level, eta: float) -> tuple[float, float]:
    """What the reverse SDE with noise variance eta leaves of x from s to t, both above sigma = 0;
    and the standard deviation of the noise that it puts in."""
    h = t.half_log_snr - s.half_log_snr
    return t.sigma / s.sigma * exp(-eta * h), t.sigma * sqrt(-expm1(-2 * eta * h))


def sde_step(x: Expr, d: Expr, s: Level, t: Level, eta: float) -> tuple[Expr, float, float]:
    """The exact step of the reverse SDE for a constant data estimate, without its noise; the
    noise's standard deviation; and the step h · (1 + eta) in half log-SNR that d is weighted by."""
    if not t.sigma > 0:
        return t.alpha * d, 0.0, float("inf")
    whole = (t.half_log_snr - s.half_log_snr) * (1 + eta)
    decay, up = sde_scales(s, t, eta)
    return decay * x - t.alpha * expm1(-whole) * d, up, whole


def slope_weight(whole: float) -> float:
    """The integral of exp(u - whole) · u / whole over u in [0, whole]: the weight of the change
    over a whole step where the data estimate is a line."""
    return expm1(-whole) / whole + 1


@solver(order=2, source="Lu et al. 2022, arXiv:2211.01095, section 5", stochastic=True)
def dpmpp_2m_sde(
    x: Expr, levels: Any, noise: Any, *, eta: float = 1.0, s_noise: float = 1.0
) -> Trace:
    """SDE-DPM-Solver++(2M): 2M's extrapolated data estimate (midpoint form) in the reverse SDE."""
    last: tuple[Expr, float] | None = None
    for s, t in levels.pairs():
        d = yield x, s
        e = d
        if last is not None and usable(levels, last[1], s, t):
            h = t.half_log_snr - s.half_log_snr
            e = d + h / (2 * (s.half_log_snr - last[1])) * (d - last[0])
        x, up, _ = sde_step(x, e, s, t, eta)
        if up > 0:
            x = x + (up * s_noise) * noise(s, t)
        last = d, s.half_log_snr
    return x


@solver(
    order=2,
    source="Lu et al. 2022, arXiv:2211.01095, section 5, as in k-diffusion",
    stochastic=True,
)
def dpmpp_2m_sde_heun(
    x: Expr, levels: Any, noise: Any, *, eta: float = 1.0, s_noise: float = 1.0
) -> Trace:
    """SDE-DPM-Solver++(2M), Heun form: the line through the last two data estimates, integrated
    exactly in the reverse SDE."""
    last: tuple[Expr, float] | None = None
    for s, t in levels.pairs():
        d = yield x, s
        x, up, whole = sde_step(x, d, s, t, eta)
        if last is not None and usable(levels, last[1], s, t):
            r = (s.half_log_snr - last[1]) / (t.half_log_snr - s.half_log_snr)
            x = x + (t.alpha * slope_weight(whole) / r) * (d - last[0])
        if up > 0:
            x = x + (up * s_noise) * noise(s, t)
        last = d, s.half_log_snr
    return x


@solver(
    order=2,
    claimed=3,
    source="3M as in use, in the SDE of arXiv:2211.01095, section 5",
    stochastic=True,
)
def dpmpp_3m_sde(
    x: Expr, levels: Any, noise: Any, *, eta: float = 1.0, s_noise: float = 1.0
) -> Trace:
    """SDE-DPM-Solver++(3M): 3M's differences of the data estimate in the reverse SDE."""
    past: list[tuple[float, Expr]] = []
    for s, t in levels.pairs():
        d = yield x, s
        x, up, whole = sde_step(x, d, s, t, eta)
        past = spaced(past, levels, s, t, itemgetter(0))
        if past and t.sigma > 0:
            phi2 = slope_weight(whole)
            h = t.half_log_snr - s.half_log_snr
            if len(past) == 1:
                r = (s.half_log_snr - past[-1][0]) / h
                x = x + t.alpha * phi2 * (d - past[-1][1]) / r
            else:
                first, second = third_order_terms(d, h, past, s.half_log_snr)
                x = x + t.alpha * (phi2 * first - (phi2 / whole - 0.5) * second)
        if up > 0:
            x = x + (up * s_noise) * noise(s, t)
        past = [*past, (s.half_log_snr, d)][-2:]
    return x
