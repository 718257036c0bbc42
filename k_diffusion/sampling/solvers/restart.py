"""Restart: noise is added again at a low level, and what lies between is solved once more.

Source: Xu et al. 2023, arXiv:2306.14878, section 3.1, with Heun steps. The noise contracts what
errors earlier steps left, and the steps back down are those of the probability-flow ODE.
"""

from __future__ import annotations

from collections.abc import Generator
from itertools import pairwise
from math import log, sqrt
from typing import Any

from k_diffusion.sampling.expr import Expr
from k_diffusion.sampling.registry import Trace, solver
from k_diffusion.sampling.solvers.linear import noise_in
from k_diffusion.utils.levels import Level

RHO = 7
"""Exponent of the spacing of inner levels (Karras et al. 2022, arXiv:2206.00364, eq. 5)."""


def _heun(x: Expr, s: Level, t: Level) -> Generator[tuple[Expr, Level], Any, Expr]:
    """A step of `heun`: an Euler step to sigma = 0."""
    d = yield x, s
    eps = noise_in(x, d, s)
    end = x + (t.alpha - s.alpha) * d + (t.sigma - s.sigma) * eps
    if not t.sigma > 0:
        return end
    d_end = yield end, t
    eps_end = noise_in(end, d_end, t)
    return x + (t.alpha - s.alpha) / 2 * (d + d_end) + (t.sigma - s.sigma) / 2 * (eps + eps_end)


def _inner(levels: Any, high: float, end: Level, n: int) -> list[Level]:
    """n intervals from sigma / alpha = high to the level `end`."""
    a, b = high ** (1 / RHO), end.ratio ** (1 / RHO)
    return [levels.at(-RHO * log(a + (b - a) * k / n)) for k in range(n)] + [end]


@solver(
    order=2,
    source="Xu et al. 2023, arXiv:2306.14878, section 3.1, one restart interval",
    stochastic=True,
    from_pure_noise=True,
)
def restart(
    x: Expr,
    levels: Any,
    noise: Any,
    *,
    low: float = 0.1,
    high: float = 2.0,
    times: int = 1,
    inner: int = 0,
    s_noise: float = 1.0,
) -> Trace:
    """Restart: Heun steps; from the level nearest to `low` the noise of `high` is added again, and
    the way back solved anew, `times` times in `inner` steps.

    low and high are in units of sigma / alpha. `inner` = 0 takes as many steps as the levels
    themselves have there. The level nearest to `low` is sought among those after the first, below
    `high` and above sigma = 0; where there is none, nothing is restarted.
    """
    if not 0 < low < high:
        raise ValueError(f"low must lie above 0 and below high, got {low} and {high}")
    if times < 0 or inner < 0:
        raise ValueError(f"times and inner must be 0 or more, got {times} and {inner}")
    every = list(levels)
    between = [level for level in every if 0 < level.ratio <= high * (1 + 1e-12)]
    place: Level | None = min(
        (level for level in every[1:] if 0 < level.ratio < high * (1 - 1e-12)),
        key=lambda level: abs(log(level.ratio / low)),
        default=None,
    )
    for s, t in levels.pairs():
        x = yield from _heun(x, s, t)
        if place is None or t is not place:
            continue
        above = sum(level.ratio > t.ratio for level in between)
        way = _inner(levels, high, t, inner or max(above, 1))
        scale = way[0].alpha / t.alpha
        spread = sqrt((way[0].sigma - scale * t.sigma) * (way[0].sigma + scale * t.sigma))
        for _ in range(times):
            x = scale * x + (spread * s_noise) * noise(t, way[0], fresh=True)
            for a, b in pairwise(way):
                x = yield from _heun(x, a, b)
    return x
