"""Exponential Adams-Bashforth methods of order 1 to 4 on data, noise and velocity estimates: the
polynomial through the last ones, integrated exactly on uneven steps.

A method of order 3 or 4 needs a start of sufficient order: one or two inner stages in the first
interval. Those named `_low` do without (no evaluation more, and better for few steps), and are of
order 2 at most; `deis` is the one on noise estimates. `exp_abm_noise` corrects each step by the
next answer (Adams-Bashforth-Moulton); on data estimates that is `sa_solver` with eta = 0.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from k_diffusion.sampling.expr import Expr
from k_diffusion.sampling.registry import Trace, solver
from k_diffusion.sampling.solvers.exponential import (
    DATA,
    NOISE,
    VELOCITY,
    Estimate,
    Prediction,
    recent,
)
from k_diffusion.sampling.solvers.unipc import predict_and_correct
from k_diffusion.utils.levels import Level

SOURCE = "Hochbruck and Ostermann 2010, doi:10.1017/S0962492910000048, section 2.5"
START = {1: (), 2: (), 3: (2 / 3,), 4: (1 / 3, 2 / 3)}
"""By order: where the stages of the first interval lie, as shares of it in half log-SNR.

0 and 2/3 are the nodes of Radau's rule: the line through the estimates there gives order 3.
"""

Queries = Generator[tuple[Expr, Level], Any, Expr]


def _low(prediction: Prediction, x: Expr, levels: Any, order: int) -> Queries:
    past: list[Estimate] = []
    for s, t in levels.pairs():
        d = yield x, s
        past = [*recent(past, levels, s, t, order - 1), (s, prediction.estimate(x, d, s))]
        x = prediction.step(x, past, s, t)
    return x


def _full(prediction: Prediction, x: Expr, levels: Any, order: int) -> Queries:
    past: list[Estimate] = []
    for k, (s, t) in enumerate(levels.pairs()):
        d = yield x, s
        past = [*recent(past, levels, s, t, order - 1), (s, prediction.estimate(x, d, s))]
        if k == 0 and t.sigma > 0:
            stages = past
            for share in START[order]:
                h = t.half_log_snr - s.half_log_snr
                m = levels.at(s.half_log_snr + share * h)
                middle = prediction.step(x, stages, s, m)
                d = yield middle, m
                stages = [*stages, (m, prediction.estimate(middle, d, m))]
            # The last stage alone is exact enough to be remembered.
            past = [*past, *stages[1:][-1:]]
        x = prediction.step(x, past, s, t)
    return x


@solver(order={1: 1, 2: 2, 3: 3, 4: 4}, source=SOURCE)
def exp_ab(x: Expr, levels: Any, noise: Any, *, order: int = 3) -> Trace:
    """Exponential Adams-Bashforth on data estimates, with a start that keeps its order (order 3:
    one evaluation more than intervals; order 4: two)."""
    return (yield from _full(DATA, x, levels, order))


@solver(order={1: 1, 2: 2, 3: 3, 4: 4}, source=SOURCE)
def exp_ab_noise(x: Expr, levels: Any, noise: Any, *, order: int = 3) -> Trace:
    """Exponential Adams-Bashforth on noise estimates, with a start that keeps its order (order 3:
    one evaluation more than intervals; order 4: two)."""
    return (yield from _full(NOISE, x, levels, order))


@solver(order={1: 1, 2: 2, 3: 3, 4: 4}, source=SOURCE)
def exp_ab_velocity(x: Expr, levels: Any, noise: Any, *, order: int = 3) -> Trace:
    """Exponential Adams-Bashforth on the velocity eps - d, with a start that keeps its order (order
    3: one evaluation more than intervals; order 4: two)."""
    return (yield from _full(VELOCITY, x, levels, order))


@solver(order={1: 1, 2: 2, 3: 2, 4: 2}, source=SOURCE)
def exp_ab_low(x: Expr, levels: Any, noise: Any, *, order: int = 3) -> Trace:
    """Exponential Adams-Bashforth on data estimates, whose order grows by one with each step from 1
    on: one evaluation an interval, and order 2 by that start."""
    return (yield from _low(DATA, x, levels, order))


@solver(order={1: 1, 2: 2, 3: 2, 4: 2}, source=SOURCE)
def exp_ab_velocity_low(x: Expr, levels: Any, noise: Any, *, order: int = 3) -> Trace:
    """Exponential Adams-Bashforth on the velocity eps - d, whose order grows by one with each step
    from 1 on: one evaluation an interval, and order 2 by that start."""
    return (yield from _low(VELOCITY, x, levels, order))


@solver(
    order={1: 2, 2: 2, 3: 3, 4: 3},
    source="Xue et al. 2023, arXiv:2309.05019, algorithm 1 with tau = 0, noise prediction",
)
def exp_abm_noise(x: Expr, levels: Any, noise: Any, *, order: int = 3, end_order: int = 0) -> Trace:
    """Exponential Adams-Bashforth-Moulton on noise estimates: predicts by the last `order`
    estimates, and corrects by as many (two at least), the next answer among them (PEC).

    The order grows by one with each step from 1 on, and falls again on the way to clean data.
    """
    return (yield from predict_and_correct(NOISE, None, x, levels, order, end_order, more=0))
