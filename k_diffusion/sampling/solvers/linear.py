"""Solvers of the probability-flow ODE in sigma: dx = d · dalpha + eps · dsigma.

d is the denoiser's estimate of the data and eps = (x - alpha d) / sigma that of the noise. On
variance-exploding levels alpha is constant and this is dx/dsigma = (x - d) / sigma (Karras et al.
2022, arXiv:2206.00364, eq. 1 with s = 1); on flow levels it is dx = (eps - d) dsigma.
"""

from __future__ import annotations

from typing import Any

from k_diffusion.sampling.expr import Expr
from k_diffusion.sampling.registry import Trace, solver
from k_diffusion.utils.levels import Level
from k_diffusion.utils.maths import lagrange_integrals


def noise_in(x: Expr, d: Expr, s: Level) -> Expr:
    """The estimate of the noise, eps = (x - alpha d) / sigma."""
    return (x - s.alpha * d) / s.sigma


@solver(order=1, source="Karras et al. 2022, arXiv:2206.00364, algorithm 2 (with churn)")
def euler(x: Expr, levels: Any, noise: Any) -> Trace:
    """Euler's method: follows the tangent from one level to the next."""
    for s, t in levels.pairs():
        d = yield x, s
        eps = noise_in(x, d, s)
        x = x + (t.alpha - s.alpha) * d + (t.sigma - s.sigma) * eps
    return x


@solver(order=2, source="Karras et al. 2022, arXiv:2206.00364, algorithm 1")
def heun(x: Expr, levels: Any, noise: Any) -> Trace:
    """Heun's method: the mean of the slopes at both ends; one Euler step to sigma = 0."""
    for s, t in levels.pairs():
        d = yield x, s
        eps = noise_in(x, d, s)
        end = x + (t.alpha - s.alpha) * d + (t.sigma - s.sigma) * eps
        if t.sigma > 0:
            d_end = yield end, t
            eps_end = noise_in(end, d_end, t)
            x = (
                x
                + (t.alpha - s.alpha) / 2 * (d + d_end)
                + (t.sigma - s.sigma) / 2 * (eps + eps_end)
            )
        else:
            x = end
    return x


@solver(order=2, source="Karras et al. 2022, arXiv:2206.00364, algorithm 3, midpoint in log sigma")
def dpm_2(x: Expr, levels: Any, noise: Any) -> Trace:
    """Midpoint method, with the midpoint in log-SNR; one Euler step to sigma = 0."""
    for s, t in levels.pairs():
        d = yield x, s
        eps = noise_in(x, d, s)
        if t.sigma > 0:
            m = levels.at((s.half_log_snr + t.half_log_snr) / 2)
            middle = x + (m.alpha - s.alpha) * d + (m.sigma - s.sigma) * eps
            d = yield middle, m
            eps = noise_in(middle, d, m)
        x = x + (t.alpha - s.alpha) * d + (t.sigma - s.sigma) * eps
    return x


@solver(
    order={1: 1, 2: 2, 3: 2, 4: 2},
    source="Adams-Bashforth on uneven steps: Hairer, Norsett, Wanner 1993, III.5",
)
def lms(x: Expr, levels: Any, noise: Any, *, order: int = 4) -> Trace:
    """Linear multistep (Adams-Bashforth): the slope is a polynomial through the last ones.

    The order grows by one with each step from 1 on; that start makes the method one of order 2.
    """
    history: list[tuple[Level, Expr, Expr]] = []
    for s, t in levels.pairs():
        d = yield x, s
        history = [*history, (s, d, noise_in(x, d, s))][-order:]
        by_sigma = lagrange_integrals(
            [p.sigma for p, _, _ in history], s.sigma, t.sigma, t.sigma - s.sigma
        )
        x = x + sum(w * eps for w, (_, _, eps) in zip(by_sigma, history, strict=True))
        if t.alpha != s.alpha:
            by_alpha = lagrange_integrals(
                [p.alpha for p, _, _ in history], s.alpha, t.alpha, t.alpha - s.alpha
            )
            x = x + sum(w * d for w, (_, d, _) in zip(by_alpha, history, strict=True))
    return x
