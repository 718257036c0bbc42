"""Multistep solvers in sigma: the slope is a polynomial through the last ones (Adams-Bashforth).

They integrate dx = d · dalpha + eps · dsigma: on levels whose alpha is not constant the data
estimates have a polynomial of their own, in alpha.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from k_diffusion.sampling.expr import Expr
from k_diffusion.sampling.registry import Trace, solver
from k_diffusion.sampling.solvers.exponential import spaced
from k_diffusion.sampling.solvers.linear import noise_in
from k_diffusion.utils.levels import Level
from k_diffusion.utils.maths import lagrange_integrals

Point = tuple[Level, Any, Any]
"""A level, and the estimates of data and noise there."""
Weights = Callable[[Sequence[float], float], list[float]]
"""From the abscissae of the last slopes (the newest at the end) and that of the next level, the
weight of each slope, in their units."""


def _step(x: Expr, history: Sequence[Point], t: Level, weights: Weights) -> Expr:
    by_sigma = weights([p.sigma for p, _, _ in history], t.sigma)
    x = x + sum(w * eps for w, (_, _, eps) in zip(by_sigma, history, strict=True))
    if t.alpha != history[-1][0].alpha:
        by_alpha = weights([p.alpha for p, _, _ in history], t.alpha)
        x = x + sum(w * d for w, (_, d, _) in zip(by_alpha, history, strict=True))
    return x


def adams_bashforth(nodes: Sequence[float], end: float) -> list[float]:
    """The integrals of the Lagrange polynomials from the last node to `end`."""
    return lagrange_integrals(nodes, nodes[-1], end, end - nodes[-1])


@solver(
    order={1: 1, 2: 2, 3: 2, 4: 2},
    source="Adams-Bashforth on uneven steps: Hairer, Norsett, Wanner 1993, III.5",
    from_pure_noise=True,
    any_order=True,
)
def lms(x: Expr, levels: Any, noise: Any, *, order: int = 4) -> Trace:
    """Linear multistep (Adams-Bashforth): the slope is a polynomial through the last ones.

    The order grows by one with each step from 1 on; that start makes the method one of order 2.
    """
    history: list[Point] = []
    for s, t in levels.pairs():
        d = yield x, s
        history = [*spaced(history, levels, s, t), (s, d, noise_in(x, d, s))][-order:]
        x = _step(x, history, t, adams_bashforth)
    return x


FIXED = {
    1: (1.0,),
    2: (-1 / 2, 3 / 2),
    3: (5 / 12, -16 / 12, 23 / 12),
    4: (-9 / 24, 37 / 24, -59 / 24, 55 / 24),
}
"""Coefficients of Adams-Bashforth on even steps, by their number."""


def even_adams_bashforth(nodes: Sequence[float], end: float) -> list[float]:
    """The coefficients of even steps, whatever the steps are."""
    return [(end - nodes[-1]) * c for c in FIXED[len(nodes)]]


def published_adams_bashforth(nodes: Sequence[float], end: float) -> list[float]:
    """The coefficients of iPNDM-v: 1/2, A and B times the differences of order 1, 2, 3 (each scaled
    as on even steps), with h, h1, h2, h3 the steps from the newest back.

    The published A has h (h + h1) / (h1 (h1 + h2)) inside a bracket that it belongs outside of, and
    the published B a sum for a difference: both are kept. The published coefficient of the oldest
    slope ends in h1 / h2 for h2 / h3, so that on uneven steps the four would not sum to 1, and a
    constant slope would be followed wrongly: that one is put right.
    """
    h = end - nodes[-1]
    back = [a - b for a, b in zip(nodes[:0:-1], nodes[-2::-1], strict=True)]
    parts = [1.0] + [0.0] * (len(nodes) - 1)  # from the newest back
    if len(back) >= 1:
        h1 = back[0]
        parts[0] += h / h1 / 2
        parts[1] -= h / h1 / 2
    if len(back) >= 2:
        h2 = back[1]
        a = (1 - h / (3 * (h + h1)) * (h * (h + h1)) / (h1 * (h1 + h2))) / 2
        for k, c in enumerate((1.0, -1 - h1 / h2, h1 / h2)):
            parts[k] += a * c
    if len(back) >= 3:
        h3 = back[2]
        b = (1 - h / (3 * (h + h1))) / 2
        b += (1 - h / (2 * (h + h1))) * h / (6 * (h + h1 + h2))
        b *= h * (h + h1) * (h + h1 + h2) / (h1 * (h1 + h2) * (h1 + h2 + h3))
        oldest = -h1 * (h1 + h2) / (h3 * (h2 + h3))
        second = -(h1 + h2) * (h1 + h2 + h3) / (h2 * (h2 + h3))
        for k, c in enumerate((1.0, second, -1 - second - oldest, oldest)):
            parts[k] += b * c
    return [h * c for c in reversed(parts)]


@solver(
    order={1: 1, 2: 1, 3: 1, 4: 1},
    source="Zhang and Chen 2022, arXiv:2204.13902, improved PNDM, appendix H",
    from_pure_noise=True,
)
def ipndm(x: Expr, levels: Any, noise: Any, *, order: int = 4) -> Trace:
    """iPNDM: Adams-Bashforth with the coefficients of even steps, at every spacing of the levels.

    Of order 2 where the ratio of two steps tends to 1 (a smooth schedule), otherwise 1.
    """
    history: list[Point] = []
    for s, t in levels.pairs():
        d = yield x, s
        history = [*history, (s, d, noise_in(x, d, s))][-order:]
        x = _step(x, history, t, even_adams_bashforth)
    return x


@solver(
    order={1: 1, 2: 2, 3: 2, 4: 2},
    source="Zhang and Chen 2022, arXiv:2204.13902, in the variable-step form in use",
    from_pure_noise=True,
)
def ipndm_v(x: Expr, levels: Any, noise: Any, *, order: int = 4) -> Trace:
    """iPNDM-v: coefficients made for uneven steps, as they are in use; an Euler step to sigma = 0.

    Of order 2: its second and third differences have other weights than a Taylor expansion gives
    them (`lms` has the right ones), and it starts with order 1.
    """
    history: list[Point] = []
    for s, t in levels.pairs():
        d = yield x, s
        kept = spaced(history, levels, s, t)
        history = [*kept, (s, d, noise_in(x, d, s))][-order:]
        used = history if t.sigma > 0 else history[-1:]
        x = _step(x, used, t, published_adams_bashforth)
    return x
