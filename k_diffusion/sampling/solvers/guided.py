"""CFG++: steps towards the guided data estimate, with the noise of the unguided one.

The denoiser answers with a pair: the guided estimate d and the unconditional one, u (which no
guidance has pushed off the data). Source: Chung et al. 2024, arXiv:2406.08070, algorithm 2: at the
next level d meets the noise that u leaves in x. With u = d each is the plain method of its name;
the multistep and two-stage forms are those in use.
"""

from __future__ import annotations

from math import expm1
from typing import Any

from k_diffusion.sampling.expr import Expr
from k_diffusion.sampling.registry import Trace, solver
from k_diffusion.sampling.solvers.ancestral import ancestral
from k_diffusion.sampling.solvers.exponential import data_step, usable
from k_diffusion.sampling.solvers.linear import noise_in
from k_diffusion.sampling.solvers.sde import slope_weight
from k_diffusion.utils.levels import Level

SOURCE = "Chung et al. 2024, arXiv:2406.08070"


def _renoise(x: Expr, d: Expr, u: Expr, s: Level, t: Level) -> Expr:
    """d at t with the noise that u leaves in x at s."""
    return t.alpha * d + t.sigma * noise_in(x, u, s)


def _pushed(x: Expr, d: Expr, u: Expr, s: Level) -> Expr:
    """x about d as it was about u: a plain step with d from there is `_renoise`."""
    return x + s.alpha * (d - u)


@solver(order=1, source=f"{SOURCE}, algorithm 2", outputs=2)
def euler_cfg_pp(x: Expr, levels: Any, noise: Any) -> Trace:
    """Euler's method, CFG++: the guided data estimate with the unguided noise."""
    for s, t in levels.pairs():
        d, u = yield x, s
        x = _renoise(x, d, u, s, t)
    return x


@solver(order=1, source=f"{SOURCE}, with ancestral noise", stochastic=True, outputs=2)
def euler_ancestral_cfg_pp(
    x: Expr, levels: Any, noise: Any, *, eta: float = 1.0, s_noise: float = 1.0
) -> Trace:
    """Ancestral Euler steps, CFG++: the guided data estimate with the unguided noise."""
    for s, t in levels.pairs():
        d, u = yield x, s
        down, up = ancestral(s, t, eta)
        x = _renoise(x, d, u, s, down)
        if up > 0:
            x = x + (up * s_noise) * noise(s, t)
    return x


@solver(order=2, source=f"{SOURCE}, in dpmpp_2m as in use", outputs=2)
def dpmpp_2m_cfg_pp(x: Expr, levels: Any, noise: Any) -> Trace:
    """DPM-Solver++(2M), CFG++: extrapolates by the change from the last unguided estimate to the
    guided one."""
    last: tuple[Expr, float] | None = None
    for s, t in levels.pairs():
        d, u = yield x, s
        x = _renoise(x, d, u, s, t)
        if last is not None and usable(levels, last[1], s, t):
            h = t.half_log_snr - s.half_log_snr
            r = (s.half_log_snr - last[1]) / h
            x = x - (t.alpha * expm1(-h) / (2 * r)) * (d - last[0])
        last = u, s.half_log_snr
    return x


@solver(
    order=1,
    claimed=2,
    source=f"{SOURCE}, in dpmpp_2s_ancestral as in use",
    stochastic=True,
    outputs=2,
)
def dpmpp_2s_ancestral_cfg_pp(
    x: Expr, levels: Any, noise: Any, *, eta: float = 1.0, s_noise: float = 1.0
) -> Trace:
    """Ancestral DPM-Solver++(2S) steps, CFG++: both stages start where the guidance pushes x."""
    for s, t in levels.pairs():
        d, u = yield x, s
        down, up = ancestral(s, t, eta)
        x = _pushed(x, d, u, s)
        if down.sigma > 0:
            m = levels.at((s.half_log_snr + down.half_log_snr) / 2)
            d, _ = yield data_step(x, d, s, m), m
        x = data_step(x, d, s, down)
        if up > 0:
            x = x + (up * s_noise) * noise(s, t)
    return x


@solver(order=2, source=f"{SOURCE}, in res_multistep as in use", outputs=2)
def res_multistep_cfg_pp(x: Expr, levels: Any, noise: Any) -> Trace:
    """RES multistep (Zhang et al. 2023, arXiv:2308.02157), CFG++: guidance pushes x, and the step
    from there is of the line through the last two unguided estimates."""
    last: tuple[Expr, float] | None = None
    for s, t in levels.pairs():
        d, u = yield x, s
        if last is None or not usable(levels, last[1], s, t):
            x = _renoise(x, d, u, s, t)
        else:
            h = t.half_log_snr - s.half_log_snr
            r = (s.half_log_snr - last[1]) / h
            x = data_step(_pushed(x, d, u, s), u, s, t)
            x = x + (t.alpha * slope_weight(h) / r) * (u - last[0])
        last = u, s.half_log_snr
    return x
