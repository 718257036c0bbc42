"""Multistep solvers in half log-SNR on data estimates, by the formulas in use: DPM-Solver++(2M)
and (3M), RES. `adams.py` holds those of any order."""

from __future__ import annotations

from math import expm1
from operator import itemgetter
from typing import Any

from k_diffusion.sampling.expr import Expr
from k_diffusion.sampling.registry import Trace, solver
from k_diffusion.sampling.solvers.exponential import (
    DATA,
    Estimate,
    data_step,
    orders,
    spaced,
    third_order_terms,
    usable,
)


@solver(order=2, source="Lu et al. 2022, arXiv:2211.01095, algorithm 2")
def dpmpp_2m(x: Expr, levels: Any, noise: Any, *, end_order: int = 0) -> Trace:
    """DPM-Solver++(2M): extrapolates the data estimate from the last two.

    With end_order = 1 it does not in the last interval.
    """
    last: tuple[Expr, float] | None = None
    for (s, t), k in zip(levels.pairs(), orders(levels, 2, end_order, False), strict=True):
        d = yield x, s
        e = d
        if last is not None and k > 1 and usable(levels, last[1], s, t):
            h = t.half_log_snr - s.half_log_snr
            e = d + h / (2 * (s.half_log_snr - last[1])) * (d - last[0])
        x = data_step(x, e, s, t)
        last = d, s.half_log_snr
    return x


@solver(order=2, source="Lu et al. 2022, arXiv:2211.01095, as in its published code, Heun form")
def dpmpp_2m_heun(x: Expr, levels: Any, noise: Any, *, end_order: int = 0) -> Trace:
    """DPM-Solver++(2M), Heun form: the difference of the last two data estimates gets the weight
    that integrates their line exactly, where `dpmpp_2m` takes its value half-way."""
    last: tuple[Expr, float] | None = None
    for (s, t), k in zip(levels.pairs(), orders(levels, 2, end_order, False), strict=True):
        d = yield x, s
        step = data_step(x, d, s, t)
        if last is not None and k > 1 and usable(levels, last[1], s, t):
            h = t.half_log_snr - s.half_log_snr
            slope = (d - last[0]) / (s.half_log_snr - last[1])
            step = step + t.alpha * (h + expm1(-h)) * slope
        x = step
        last = d, s.half_log_snr
    return x


@solver(order=2, claimed=3, source="Lu et al. 2022, arXiv:2211.01095, as in its published code")
def dpmpp_3m(x: Expr, levels: Any, noise: Any, *, end_order: int = 0) -> Trace:
    """DPM-Solver++(3M) as it is in use: of order 2, since its second difference has half the
    weight that a Taylor expansion gives it; `exp_ab` has order 3.

    Steps of order 2, at the start say, are `dpmpp_2m`'s. With `end_order` the order falls to that
    in the last interval, by one in each before.
    """
    past: list[tuple[float, Expr]] = []
    for (s, t), k in zip(levels.pairs(), orders(levels, 3, end_order, False), strict=True):
        d = yield x, s
        step = data_step(x, d, s, t)
        past = spaced(past, levels, s, t, itemgetter(0))
        if past and k > 1 and t.sigma > 0:
            h = t.half_log_snr - s.half_log_snr
            if len(past) == 1 or k == 2:
                r = (s.half_log_snr - past[-1][0]) / h
                step = step - t.alpha * expm1(-h) / 2 * (d - past[-1][1]) / r
            else:
                first, second = third_order_terms(d, h, past, s.half_log_snr)
                phi2 = expm1(-h) / h + 1
                step = step + t.alpha * (phi2 * first - (phi2 / h - 0.5) * second)
        x = step
        past = [*past, (s.half_log_snr, d)][-2:]
    return x


@solver(order=2, source="Zhang et al. 2023, arXiv:2308.02157, multistep form")
def res_multistep(x: Expr, levels: Any, noise: Any) -> Trace:
    """RES, the refined exponential solver, multistep: φ-function weights on the last two data
    estimates. The same as `dpmpp_2m_heun`, by the terms in which its authors write it."""
    past: list[Estimate] = []
    for s, t in levels.pairs():
        d = yield x, s
        past = [*spaced(past, levels, s, t), (s, d)][-2:]
        x = DATA.step(x, past, s, t)
    return x
