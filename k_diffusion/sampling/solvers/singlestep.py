"""Single-step solvers in half log-SNR: DPM-Solver and DPM-Solver++(2S)."""

from __future__ import annotations

from collections.abc import Generator
from math import expm1, sqrt
from typing import Any

from k_diffusion.sampling.expr import Expr
from k_diffusion.sampling.registry import Trace, solver
from k_diffusion.sampling.solvers.ancestral import ancestral
from k_diffusion.sampling.solvers.exponential import data_step, noise_step
from k_diffusion.sampling.solvers.linear import noise_in
from k_diffusion.utils.levels import Level

Stages = Generator[tuple[Expr, Level], Any, Expr]


def _second(x: Expr, eps: Expr, s: Level, t: Level, levels: Any) -> Stages:
    """A step of DPM-Solver-2 (r1 = 1/2), eps being the estimate at s."""
    m = levels.at((s.half_log_snr + t.half_log_snr) / 2)
    u = noise_step(x, eps, s, m)
    d = yield u, m
    return noise_step(x, noise_in(u, d, m), s, t)


def _third(x: Expr, eps: Expr, s: Level, t: Level, levels: Any) -> Stages:
    """A step of DPM-Solver-3 (r1 = 1/3, r2 = 2/3), eps being the estimate at s."""
    r1, r2 = 1 / 3, 2 / 3
    h = t.half_log_snr - s.half_log_snr
    m1 = levels.at(s.half_log_snr + r1 * h)
    m2 = levels.at(s.half_log_snr + r2 * h)
    u1 = noise_step(x, eps, s, m1)
    d1 = yield u1, m1
    change1 = noise_in(u1, d1, m1) - eps
    u2 = noise_step(x, eps, s, m2)
    u2 = u2 - m2.sigma * (r2 / r1) * (expm1(r2 * h) / (r2 * h) - 1) * change1
    d2 = yield u2, m2
    change2 = noise_in(u2, d2, m2) - eps
    return noise_step(x, eps, s, t) - t.sigma / r2 * (expm1(h) / h - 1) * change2


@solver(order=1, source="Lu et al. 2022, arXiv:2206.00927, eq. 3.7 (the same as DDIM)")
def dpm_solver_1(x: Expr, levels: Any, noise: Any) -> Trace:
    """DPM-Solver-1: the noise estimate is constant over a step."""
    for s, t in levels.pairs():
        d = yield x, s
        x = noise_step(x, noise_in(x, d, s), s, t)
    return x


@solver(order=2, source="Lu et al. 2022, arXiv:2206.00927, algorithm 1 (r1 = 1/2)")
def dpm_solver_2(x: Expr, levels: Any, noise: Any) -> Trace:
    """DPM-Solver-2: one more noise estimate, half-way in log-SNR."""
    for s, t in levels.pairs():
        d = yield x, s
        eps = noise_in(x, d, s)
        if t.sigma > 0:
            x = yield from _second(x, eps, s, t, levels)
        else:
            x = noise_step(x, eps, s, t)
    return x


@solver(order=3, source="Lu et al. 2022, arXiv:2206.00927, algorithm 2 (r1 = 1/3, r2 = 2/3)")
def dpm_solver_3(x: Expr, levels: Any, noise: Any) -> Trace:
    """DPM-Solver-3: two more noise estimates, at one and two thirds in log-SNR."""
    for s, t in levels.pairs():
        d = yield x, s
        eps = noise_in(x, d, s)
        if t.sigma > 0:
            x = yield from _third(x, eps, s, t, levels)
        else:
            x = noise_step(x, eps, s, t)
    return x


@solver(
    order=2,
    claimed=3,
    source="Lu et al. 2022, arXiv:2206.00927, section 3.4 (DPM-Solver-fast), as in use",
)
def dpm_fast(
    x: Expr,
    levels: Any,
    noise: Any,
    *,
    eta: float = 0.0,
    s_noise: float = 1.0,
    tail: tuple[int, ...] = (1,),
) -> Trace:
    """DPM-Solver-fast: steps of DPM-Solver-3, but for the last intervals, whose orders are `tail`.

    A first-order interval among the others makes the whole a method of order 2. With eta, steps go
    to the ancestral level below the next one, but not below the last, and noise leads up again.
    """
    intervals = len(levels) - 1
    if not all(order in (1, 2, 3) for order in tail):
        raise ValueError(f"tail must hold orders of 1 to 3, got {tail}")
    if len(tail) > intervals:
        raise ValueError(f"tail {tail} has more orders than there are intervals ({intervals})")
    orders = [3] * (intervals - len(tail)) + list(tail)
    last = levels[intervals]
    for (s, t), order in zip(levels.pairs(), orders, strict=True):
        d = yield x, s
        eps = noise_in(x, d, s)
        down, up = ancestral(s, t, eta)
        if up > 0:
            down = Level(t.alpha, max(down.sigma, t.alpha * last.ratio))
            up = sqrt(max((t.sigma - down.sigma) * (t.sigma + down.sigma), 0.0))
        if order == 1 or not down.sigma > 0:
            x = noise_step(x, eps, s, down)
        elif order == 2:
            x = yield from _second(x, eps, s, down, levels)
        else:
            x = yield from _third(x, eps, s, down, levels)
        if up > 0:
            x = x + (up * s_noise) * noise(s, t)
    return x


@solver(order=2, source="Lu et al. 2022, arXiv:2211.01095, algorithm 1 (r = 1/2)")
def dpmpp_2s(x: Expr, levels: Any, noise: Any) -> Trace:
    """DPM-Solver++(2S): one more data estimate, half-way in log-SNR."""
    for s, t in levels.pairs():
        d = yield x, s
        if t.sigma > 0:
            m = levels.at((s.half_log_snr + t.half_log_snr) / 2)
            d = yield data_step(x, d, s, m), m
        x = data_step(x, d, s, t)
    return x
