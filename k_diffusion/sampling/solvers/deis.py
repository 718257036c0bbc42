"""DEIS: the noise estimate as a polynomial in some time, integrated exactly from step to step.

In the established three the order grows by one with each step from 1 on; that start makes them
methods of order 2. They differ in the time in which the estimate is a polynomial.
"""

from __future__ import annotations

from math import ceil, exp, log1p, sqrt
from typing import Any

from k_diffusion.sampling.expr import Expr
from k_diffusion.sampling.registry import Trace, solver
from k_diffusion.sampling.solvers.exponential import NOISE, Estimate, noise_step, orders, spaced
from k_diffusion.sampling.solvers.linear import noise_in
from k_diffusion.utils.maths import lagrange_integrals

SOURCE = "Zhang and Chen 2022, arXiv:2204.13902"


@solver(order={1: 1, 2: 2, 3: 2, 4: 2}, source=f"{SOURCE}, polynomials in log rho")
def deis(x: Expr, levels: Any, noise: Any, *, order: int = 3, end_order: int = 0) -> Trace:
    """DEIS in log-SNR: exponential Adams-Bashforth on the noise estimate.

    The order grows by one with each step from 1 on; that start makes the method one of order 2.
    With `end_order` it falls to that in the last interval, by one in each before.
    `exp_ab_noise` is the same with a start that keeps the order.
    """
    past: list[Estimate] = []
    for (s, t), k in zip(levels.pairs(), orders(levels, order, end_order, False), strict=True):
        d = yield x, s
        past = [*spaced(past, levels, s, t), (s, noise_in(x, d, s))][-k:]
        x = NOISE.step(x, past, s, t)
    return x


@solver(order={1: 1, 2: 2, 3: 2}, source=f"{SOURCE}, section 3.2, rhoAB")
def deis_rhoab(x: Expr, levels: Any, noise: Any, *, order: int = 3) -> Trace:
    """DEIS rhoAB: Adams-Bashforth on the noise estimate, a polynomial in rho = sigma / alpha.

    The order grows by one with each step from 1 on; that start makes the method one of order 2.
    """
    past: list[Estimate] = []
    for s, t in levels.pairs():
        d = yield x, s
        past = [*spaced(past, levels, s, t), (s, noise_in(x, d, s))][-order:]
        if not t.sigma > 0:
            x = noise_step(x, past[-1][1], s, t)
            continue
        # x / alpha gains the integral of eps over rho.
        ends = s.ratio, t.ratio
        weights = lagrange_integrals([p.ratio for p, _ in past], *ends, ends[1] - ends[0])
        parts = (t.alpha * w * e for w, (_, e) in zip(weights, past, strict=True))
        x = (t.alpha / s.alpha) * x + sum(parts)
    return x


# The times t of dx = -beta(t) x / 2 dt + ... with beta linear, for which log(1 + rho²) is
# (slope / 2) t² + start t, are fixed by rho = 80 at t = 1 and rho = 0.002 at t = 0.001: the range
# of Karras et al. 2022, arXiv:2206.00364, as the code in use has it for every model.
_HIGH, _LOW, _EPSILON = log1p(80.0**2), log1p(0.002**2), 1e-3
_SLOPE = 2 * (_LOW / _EPSILON - _HIGH) / (_EPSILON - 1)
_START = _HIGH - _SLOPE / 2


def _time(half_log_snr: float) -> float:
    return (sqrt(_START**2 + 2 * _SLOPE * log1p(exp(-2 * half_log_snr))) - _START) / _SLOPE


def _ratio_slope(half_log_snr: float) -> float:
    """The derivative of rho = sigma / alpha by half log-SNR."""
    return -exp(-half_log_snr)


@solver(order={1: 1, 2: 2, 3: 2}, source=f"{SOURCE}, section 3.2, tAB, as in use for any model")
def deis_tab(x: Expr, levels: Any, noise: Any, *, order: int = 3) -> Trace:
    """DEIS tAB: the noise estimate is a polynomial in the time of a linear variance-preserving
    process, whose constants are fixed (sigma / alpha from 0.002 to 80).

    The order grows by one with each step from 1 on; that start makes the method one of order 2.
    """
    past: list[Estimate] = []
    for s, t in levels.pairs():
        d = yield x, s
        past = [*spaced(past, levels, s, t), (s, noise_in(x, d, s))][-order:]
        if not t.sigma > 0:
            x = noise_step(x, past[-1][1], s, t)
            continue
        start, end = s.half_log_snr, t.half_log_snr
        weights = lagrange_integrals(
            [_time(p.half_log_snr) for p, _ in past],
            start,
            end,
            t.ratio - s.ratio,
            _ratio_slope,
            _time,
            pieces=ceil(abs(end - start) / 2),
        )
        parts = (t.alpha * w * e for w, (_, e) in zip(weights, past, strict=True))
        x = (t.alpha / s.alpha) * x + sum(parts)
    return x
