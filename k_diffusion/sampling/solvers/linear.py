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


def noise_in(x: Expr, d: Expr, s: Level) -> Expr:
    """The estimate of the noise, eps = (x - alpha d) / sigma."""
    return (x - s.alpha * d) / s.sigma


@solver(
    order=1,
    source="Karras et al. 2022, arXiv:2206.00364, algorithm 2 (with churn)",
    from_pure_noise=True,
)
def euler(x: Expr, levels: Any, noise: Any) -> Trace:
    """Euler's method: follows the tangent from one level to the next."""
    for s, t in levels.pairs():
        d = yield x, s
        eps = noise_in(x, d, s)
        x = x + (t.alpha - s.alpha) * d + (t.sigma - s.sigma) * eps
    return x


@solver(order=2, source="Karras et al. 2022, arXiv:2206.00364, algorithm 1", from_pure_noise=True)
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
    order=1, claimed=2, source="Heun++ 2, as in use in diffusion front ends", from_pure_noise=True
)
def heunpp2(x: Expr, levels: Any, noise: Any) -> Trace:
    """Heun++ 2: Euler steps over two intervals, and the mean of the slopes on the way, weighted by
    their sigma; over one before the last interval, an Euler step in it.

    Of order 1: the weights tend to fixed shares of the first sigma, not to those of a quadrature.
    """
    first, count = levels[0].sigma, len(levels)
    for i, (s, t) in enumerate(levels.pairs()):
        rise, run = t.alpha - s.alpha, t.sigma - s.sigma
        d = yield x, s
        slope = rise * d + run * noise_in(x, d, s)
        if i + 2 == count:
            x = x + slope
            continue
        end = x + slope
        d = yield end, t
        eps = noise_in(end, d, t)
        if i + 3 == count:
            share = t.sigma / (2 * first)
            x = x + (1 - share) * slope + share * (rise * d + run * eps)
            continue
        after = levels[i + 2]
        share, share_after = t.sigma / (3 * first), after.sigma / (3 * first)
        x = x + (1 - share - share_after) * slope + share * (rise * d + run * eps)
        beyond = end + (after.alpha - t.alpha) * d + (after.sigma - t.sigma) * eps
        d = yield beyond, after
        x = x + share_after * (rise * d + run * noise_in(beyond, d, after))
    return x


@solver(
    order=1, source="Permenter and Yuan 2023, arXiv:2306.04848, section 5", from_pure_noise=True
)
def gradient_estimation(x: Expr, levels: Any, noise: Any, *, gamma: float = 2.0) -> Trace:
    """Gradient estimation: Euler's method with the slope gamma · this one + (1 - gamma) · the last.

    gamma = 1 is Euler, 1.5 on even steps Adams-Bashforth of order 2.
    """
    last: tuple[Expr, Expr] | None = None
    for s, t in levels.pairs():
        d = yield x, s
        eps = noise_in(x, d, s)
        x = x + (t.alpha - s.alpha) * d + (t.sigma - s.sigma) * eps
        if last is not None:
            x = x + (gamma - 1) * (t.alpha - s.alpha) * (d - last[0])
            x = x + (gamma - 1) * (t.sigma - s.sigma) * (eps - last[1])
        last = d, eps
    return x
