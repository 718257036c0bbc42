"""To be removed when the solvers of these names are there."""

from __future__ import annotations

from math import expm1, sqrt
from typing import Any

from k_diffusion.sampling.expr import Expr
from k_diffusion.sampling.registry import Trace, solver
from k_diffusion.sampling.solvers.ancestral import ancestral
from k_diffusion.sampling.solvers.exponential import noise_step
from k_diffusion.sampling.solvers.linear import noise_in
from k_diffusion.utils.levels import Level


@solver(order=3, source="scratch")
def dpm_fast(
    x: Expr,
    levels: Any,
    noise: Any,
    *,
    eta: float = 0.0,
    s_noise: float = 1.0,
    tail: tuple[int, ...] = (1,),
) -> Trace:
    """scratch"""
    pairs = len(levels) - 1
    orders = [3] * (pairs - len(tail)) + list(tail)
    for (s, t), order in zip(levels.pairs(), orders, strict=True):
        d = yield x, s
        eps = noise_in(x, d, s)
        down, up = ancestral(s, t, eta)
        low = levels[-1].sigma
        if up > 0 and down.sigma < low:
            down = Level(t.alpha, low)
            up = sqrt(max(t.sigma**2 - low**2, 0.0))
        h = down.half_log_snr - s.half_log_snr
        y = noise_step(x, eps, s, down)
        if order > 1:
            r1 = 1 / order
            m1 = levels.at(s.half_log_snr + r1 * h)
            u1 = noise_step(x, eps, s, m1)
            d1 = yield u1, m1
            change = noise_in(u1, d1, m1) - eps
            if order == 2:
                y = y - down.sigma / (2 * r1) * expm1(h) * change
            else:
                r2 = 2 / 3
                m2 = levels.at(s.half_log_snr + r2 * h)
                u2 = noise_step(x, eps, s, m2)
                u2 = u2 - m2.sigma * (r2 / r1) * (expm1(r2 * h) / (r2 * h) - 1) * change
                d2 = yield u2, m2
                change = noise_in(u2, d2, m2) - eps
                y = y - down.sigma / r2 * (expm1(h) / h - 1) * change
        x = y
        if up > 0:
            x = x + (up * s_noise) * noise(s, t)
    return x
