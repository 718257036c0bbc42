"""Ancestral solvers: a deterministic step below the next level, then noise that leads up to it.

eta scales the noise's standard deviation: 0 is the probability-flow ODE, 1 the reverse diffusion of
the forward process (in the limit of small steps). Above 1 a long step may leave nothing below the
next level to step down to: there the state becomes the data estimate and noise alone.

With eta above 0 each step splits the reverse diffusion into its two halves, one after the other:
the mean of the result is of weak order 1, however well the step down is solved.
"""

from __future__ import annotations

from math import sqrt
from typing import Any

from k_diffusion.sampling.expr import Expr
from k_diffusion.sampling.registry import Trace, solver
from k_diffusion.sampling.solvers.exponential import data_step
from k_diffusion.sampling.solvers.linear import noise_in
from k_diffusion.utils.levels import Level


def ancestral(s: Level, t: Level, eta: float) -> tuple[Level, float]:
    """Where to step down to, and the standard deviation of the noise that leads up again to t.

    At eta = 1 that is the posterior of the forward process given the data (Ho et al. 2020,
    arXiv:2006.11239, eq. 7; Song et al. 2021, arXiv:2010.02502, eq. 16), in any coordinates.
    """
    up = min(t.sigma, eta * t.sigma * sqrt(max(1 - (t.ratio / s.ratio) ** 2, 0.0)))
    return Level(t.alpha, sqrt(max((t.sigma - up) * (t.sigma + up), 0.0))), up


@solver(order=1, source="Song et al. 2021, arXiv:2010.02502, eqs. 12 and 16")
def ddim(x: Expr, levels: Any, noise: Any, *, eta: float = 0.0) -> Trace:
    """DDIM: the data and noise estimates put together again at the next level."""
    for s, t in levels.pairs():
        d = yield x, s
        down, up = ancestral(s, t, eta)
        x = data_step(x, d, s, down)
        if up > 0:
            x = x + up * noise(s, t)
    return x


@solver(order=1, source="Ho et al. 2020, arXiv:2006.11239, algorithm 2 and eq. 7", stochastic=True)
def ddpm(x: Expr, levels: Any, noise: Any, *, s_noise: float = 1.0, variance: float = 0.0) -> Trace:
    """DDPM: draws from the posterior of the forward process, given the data estimate; the variance
    is its own (the smaller of the authors' two, the one that is exact on a single data point).

    With `variance` at 1 it is the larger of the two, the forward process's; between, its logarithm
    is linear (Nichol and Dhariwal 2021, arXiv:2102.09672, equation 15).
    """
    for s, t in levels.pairs():
        d = yield x, s
        # q(x_t | x_s, x0): precisions add up, that of x_t given the data and that of x_s given x_t.
        keep = (t.ratio / s.ratio) ** 2
        x = (keep * s.alpha * t.alpha / s.alpha**2) * x + (t.alpha * (1 - keep)) * d
        if t.sigma > 0:
            # The larger is the smaller times the noise variances' ratio, at unit total variance.
            larger = ((1 + t.ratio**-2) / (1 + s.ratio**-2)) ** (variance / 2)
            x = x + (t.sigma * sqrt(1 - keep) * larger * s_noise) * noise(s, t)
    return x


@solver(order=1, source="Song et al. 2021, arXiv:2011.13456, appendix F", stochastic=True)
def euler_ancestral(
    x: Expr, levels: Any, noise: Any, *, eta: float = 1.0, s_noise: float = 1.0
) -> Trace:
    """Euler steps below the next level, with noise that leads up to it again."""
    for s, t in levels.pairs():
        d = yield x, s
        down, up = ancestral(s, t, eta)
        x = data_step(x, d, s, down)
        if up > 0:
            x = x + (up * s_noise) * noise(s, t)
    return x


@solver(order=1, claimed=2, source="dpm_2 below the next level, as in k-diffusion", stochastic=True)
def dpm_2_ancestral(
    x: Expr, levels: Any, noise: Any, *, eta: float = 1.0, s_noise: float = 1.0
) -> Trace:
    """Midpoint steps (as `dpm_2`) below the next level, with noise that leads up to it again: of
    order 2 at eta 0 only, since step and noise are split."""
    for s, t in levels.pairs():
        d = yield x, s
        eps = noise_in(x, d, s)
        down, up = ancestral(s, t, eta)
        if down.sigma > 0:
            m = levels.at((s.half_log_snr + down.half_log_snr) / 2)
            middle = x + (m.alpha - s.alpha) * d + (m.sigma - s.sigma) * eps
            d = yield middle, m
            eps = noise_in(middle, d, m)
        x = x + (down.alpha - s.alpha) * d + (down.sigma - s.sigma) * eps
        if up > 0:
            x = x + (up * s_noise) * noise(s, t)
    return x


@solver(
    order=1, claimed=2, source="dpmpp_2s below the next level, as in k-diffusion", stochastic=True
)
def dpmpp_2s_ancestral(
    x: Expr, levels: Any, noise: Any, *, eta: float = 1.0, s_noise: float = 1.0
) -> Trace:
    """DPM-Solver++(2S) steps below the next level, with noise that leads up to it again: of order 2
    at eta 0 only, since step and noise are split."""
    for s, t in levels.pairs():
        d = yield x, s
        down, up = ancestral(s, t, eta)
        if down.sigma > 0:
            m = levels.at((s.half_log_snr + down.half_log_snr) / 2)
            d = yield data_step(x, d, s, m), m
        x = data_step(x, d, s, down)
        if up > 0:
            x = x + (up * s_noise) * noise(s, t)
    return x


@solver(
    order=0,
    claimed=0,
    source="Song et al. 2023, arXiv:2303.01469, algorithm 1; Luo et al. 2023, arXiv:2310.04378",
    stochastic=True,
)
def lcm(x: Expr, levels: Any, noise: Any) -> Trace:
    """Consistency steps: the data estimate with wholly new noise at each level.

    For consistency models, whose estimate is a sample already. With a plain denoiser it is the mean
    of the data that the state could come from, and more steps do not lead to the data's
    distribution: it converges to nothing (order 0).
    """
    for s, t in levels.pairs():
        d = yield x, s
        x = t.alpha * d
        if t.sigma > 0:
            x = x + t.sigma * noise(s, t)
    return x
