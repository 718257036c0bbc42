"""Explicit Runge-Kutta methods for the probability-flow ODE in sigma, from a tableau as data.

Within a step, stages lie on the straight line from level s to level t in the plane of (alpha,
sigma), where dx = d · dalpha + eps · dsigma has constant factors. On variance-exploding and flow
levels that line is the path itself, and even in sigma; a variance-preserving path is left for the
chord: a stage is scaled to the level of the path that has its signal-to-noise ratio. No slope at
sigma = 0 is ever needed: into it goes one Euler step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from k_diffusion.sampling.expr import Expr
from k_diffusion.sampling.registry import Solver, Trace, solver
from k_diffusion.utils.levels import Level


@dataclass(frozen=True)
class Tableau:
    """Coefficients of an explicit Runge-Kutta method.

    Attributes:
        order: order of convergence.
        rows: for each stage after the first, the weights of the slopes before it.
        weights: the weights of all slopes in the step.

    Raises:
        ValueError: the rows do not grow by one each, the weights do not sum to 1, or a stage lies
            outside the step.
    """

    order: int
    rows: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        for k, row in enumerate(self.rows):
            if len(row) != k + 1:
                raise ValueError(f"row {k + 1} of a tableau needs {k + 1} weights, got {row}")
        if len(self.weights) != len(self.rows) + 1:
            raise ValueError(
                f"a tableau of {len(self.rows) + 1} stages needs as many weights: {self.weights}"
            )
        if abs(math.fsum(self.weights) - 1) > 1e-12:
            raise ValueError(f"the weights of a tableau must sum to 1: {self.weights}")
        if not all(0 <= node <= 1 + 1e-12 for node in self.nodes):
            raise ValueError(f"stages must lie within the step, not at {self.nodes}")

    @property
    def nodes(self) -> tuple[float, ...]:
        """Where the stages lie, as shares of the step."""
        return (0.0, *(math.fsum(row) for row in self.rows))

    @property
    def last_needed(self) -> tuple[int, ...]:
        """For each slope the last stage that it enters; the end of the step is one stage more."""
        stages = len(self.weights)
        return tuple(
            max((i + 1 for i, row in enumerate(self.rows) if any(row[k : k + 1])), default=stages)
            for k in range(stages)
        )


EULER = Tableau(1, (), (1.0,))
MIDPOINT = Tableau(2, ((1 / 2,),), (0.0, 1.0))
HEUN = Tableau(2, ((1.0,),), (1 / 2, 1 / 2))
RALSTON = Tableau(2, ((2 / 3,),), (1 / 4, 3 / 4))
KUTTA = Tableau(3, ((1 / 2,), (-1.0, 2.0)), (1 / 6, 2 / 3, 1 / 6))
RALSTON_3 = Tableau(3, ((1 / 2,), (0.0, 3 / 4)), (2 / 9, 1 / 3, 4 / 9))
SSP_3 = Tableau(3, ((1.0,), (1 / 4, 1 / 4)), (1 / 6, 1 / 6, 2 / 3))
CLASSICAL = Tableau(4, ((1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6))
THREE_EIGHTHS = Tableau(
    4, ((1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)), (1 / 8, 3 / 8, 3 / 8, 1 / 8)
)
DORMAND_PRINCE = Tableau(
    5,
    (
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    ),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)


def _on_line(s: Level, t: Level, share: float) -> Level:
    """The level at a share of the straight line from s to t; it may lie off their path."""
    if share == 1:
        return t
    return Level(s.alpha + share * (t.alpha - s.alpha), s.sigma + share * (t.sigma - s.sigma))


def _steps(tableau: Tableau, x: Expr, levels: Any) -> Trace:
    for s, t in levels.pairs():
        chosen = tableau if t.sigma > 0 else EULER
        end, last = x, chosen.last_needed
        increments: list[Any] = []  # slope times the length of the step
        for stage, (node, row) in enumerate(zip(chosen.nodes, ((), *chosen.rows), strict=True)):
            on_line = _on_line(s, t, node)
            state = x + sum(w * v for w, v in zip(row, increments, strict=True) if w)
            # What no later stage needs goes into the sum at once, and is not held any longer.
            end = end + sum(
                chosen.weights[k] * v for k, v in enumerate(increments) if last[k] == stage
            )
            at, asked = on_line, state
            if 0 < node < 1:
                on_path = levels.at(on_line.half_log_snr)
                size = on_path.sigma / on_line.sigma
                if abs(size - 1) > 1e-12:
                    at, asked = on_path, size * state
            d = yield asked, at
            # dalpha · d + dsigma · eps, with eps = (state - alpha d) / sigma on the line.
            run = (t.sigma - s.sigma) / on_line.sigma
            rise = t.alpha - s.alpha - run * on_line.alpha
            increments.append(rise * d + run * state)
        stage = len(last)
        x = end + sum(chosen.weights[k] * v for k, v in enumerate(increments) if last[k] == stage)
    return x


def runge_kutta(name: str, tableau: Tableau, source: str, summary: str = "") -> Solver:
    """Makes the solver of a tableau, and registers it under a name.

    Args:
        name: what users call it.
        tableau: its coefficients.
        source: authors, year, place.
        summary: a sentence on it, for the docs.

    Raises:
        ValueError: there is a solver of that name.
    """

    def function(x: Expr, levels: Any, noise: Any) -> Trace:
        return (yield from _steps(tableau, x, levels))

    stages = f"{len(tableau.nodes)} evaluations a step; one Euler step to sigma = 0."
    function.__name__ = function.__qualname__ = name
    function.__doc__ = f"{summary or 'Explicit Runge-Kutta method in sigma'}: {stages}"
    return solver(order=tableau.order, source=source, from_pure_noise=True)(function)


BOOK = "Hairer, Norsett, Wanner 1993, Solving Ordinary Differential Equations I"
midpoint = runge_kutta(
    "midpoint", MIDPOINT, f"{BOOK}, II.1", "Midpoint method, with the midpoint in sigma"
)
ralston = runge_kutta(
    "ralston", RALSTON, "Ralston 1962, doi:10.1090/S0025-5718-1962-0150954-0", "Ralston's method"
)
rk3 = runge_kutta("rk3", KUTTA, f"{BOOK}, II.1", "Kutta's method of order 3 in sigma")
ssp_rk3 = runge_kutta(
    "ssp_rk3",
    SSP_3,
    "Shu and Osher 1988, doi:10.1016/0021-9991(88)90177-5",
    "Strong-stability-preserving method of order 3 in sigma",
)
rk4 = runge_kutta(
    "rk4", CLASSICAL, f"{BOOK}, table II.1.2", "Classical Runge-Kutta method of order 4 in sigma"
)
rk4_38 = runge_kutta("rk4_38", THREE_EIGHTHS, f"{BOOK}, table II.1.2", "Kutta's 3/8 rule in sigma")
rk5 = runge_kutta(
    "rk5",
    DORMAND_PRINCE,
    "Dormand and Prince 1980, doi:10.1016/0771-050X(80)90013-3",
    "Dormand and Prince's method of order 5 in sigma, on the levels given",
)
