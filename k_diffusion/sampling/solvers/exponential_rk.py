"""Exponential Runge-Kutta methods in half log-SNR, from a tableau of φ functions as data.

With h the step in half log-SNR, a data estimate d and z = -h, stage i at the share c_i of a step is

    x_i = (sigma_i / sigma_s) x + alpha_i h · (sum over j of a_ij(z) d_j),

each a_ij a combination of φ_k(c z) (Hochbruck and Ostermann 2010, doi:10.1017/S0962492910000048,
eq. 2.36); with noise estimates alpha and sigma change places, z = h, and the sum is subtracted.
Into clean data each takes one first-order step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from k_diffusion.sampling.expr import Expr
from k_diffusion.sampling.registry import Solver, Trace, solver
from k_diffusion.sampling.solvers.exponential import DATA, LEAST_SHARE, LogSnrPrediction
from k_diffusion.utils.levels import Level
from k_diffusion.utils.maths import phi

Weight = tuple[tuple[float, int, float], ...]
"""Terms (factor, k, c) whose sum factor · φ_k(c z) is one weight; () is zero."""


@dataclass(frozen=True)
class ExponentialTableau:
    """Coefficients of an explicit exponential Runge-Kutta method.

    Attributes:
        order: order of convergence.
        nodes: where the stages lie, as shares of the step; the first is 0.
        rows: for each stage after the first, the weights of the estimates before it.
        weights: the weights of all estimates in the step.

    Raises:
        ValueError: the numbers of nodes, rows and weights do not fit, a stage lies outside the
            step, or a row does not integrate a constant.
    """

    order: int
    nodes: tuple[float, ...]
    rows: tuple[tuple[Weight, ...], ...]
    weights: tuple[Weight, ...]

    def __post_init__(self) -> None:
        stages = len(self.nodes)
        lengths = [len(row) for row in (*self.rows, self.weights)]
        if not self.nodes or self.nodes[0] != 0 or lengths != list(range(1, stages + 1)):
            raise ValueError(
                f"a tableau with nodes {self.nodes} needs rows of 1 to {stages - 1} weights and "
                f"{stages} weights of the step, got {lengths}; the first node is 0"
            )
        if not all(0 < node <= 1 for node in self.nodes[1:]):
            raise ValueError(f"stages must lie within the step, not at {self.nodes}")
        for node, row in zip((*self.nodes[1:], 1.0), (*self.rows, self.weights), strict=True):
            total = math.fsum(_value(weight, -1.0) for weight in row)
            if abs(total - node * phi(1, -node)) > 1e-12:
                raise ValueError(
                    f"the weights of the stage at {node} must sum to {node:.6g} φ_1({node:.6g} z)"
                )


def _value(weight: Weight, z: float) -> float:
    return math.fsum(factor * phi(k, c * z) for factor, k, c in weight)


def _to(
    prediction: LogSnrPrediction,
    x: Expr,
    row: tuple[Weight, ...],
    estimates: list[Any],
    s: Level,
    m: Level,
    h: float,
) -> Expr:
    """The state at level m, by a row of the tableau over a step that is h long."""
    weights = [prediction.gain(m) * h * _value(w, prediction.exponent * h) for w in row]
    parts = (w * e for w, e in zip(weights, estimates, strict=True) if w)
    return prediction.scale(s, m) * x + sum(parts)


def exponential_steps(
    tableau: ExponentialTableau, prediction: LogSnrPrediction, x: Expr, levels: Any
) -> Trace:
    """The steps of a tableau, on data or noise estimates."""
    for s, t in levels.pairs():
        d = yield x, s
        estimates: list[Any] = [prediction.estimate(x, d, s)]
        if not t.sigma > 0:
            x = prediction.step(x, [(s, estimates[0])], s, t)
            continue
        h = t.half_log_snr - s.half_log_snr
        for node, row in zip(tableau.nodes[1:], tableau.rows, strict=True):
            m = levels.at(s.half_log_snr + node * h) if node < 1 else t
            state = _to(prediction, x, row, estimates, s, m, h)
            d = yield state, m
            estimates.append(prediction.estimate(state, d, m))
        x = _to(prediction, x, tableau.weights, estimates, s, t, h)
    return x


def exponential_runge_kutta(
    name: str,
    tableau: ExponentialTableau,
    source: str,
    summary: str = "",
    prediction: LogSnrPrediction = DATA,
) -> Solver:
    """Makes the solver of a tableau, and registers it under a name.

    Args:
        name: what users call it.
        tableau: its coefficients.
        source: authors, year, place.
        summary: a sentence on it, for the docs.
        prediction: DATA or NOISE, the estimate that it takes.

    Raises:
        ValueError: there is a solver of that name.
    """

    def function(x: Expr, levels: Any, noise: Any) -> Trace:
        return (yield from exponential_steps(tableau, prediction, x, levels))

    stages = f"{len(tableau.nodes)} evaluations a step; one first-order step to sigma = 0."
    function.__name__ = function.__qualname__ = name
    function.__doc__ = f"{summary or 'Exponential Runge-Kutta method'}: {stages}"
    return solver(order=tableau.order, source=source)(function)


def _phi(k: int, c: float = 1.0, factor: float = 1.0) -> Weight:
    """factor · φ_k(c z)."""
    return ((factor, k, c),) if factor else ()


def _scaled(factor: float, weight: Weight) -> Weight:
    return tuple((factor * f, k, c) for f, k, c in weight)


def two_stages(c2: float) -> ExponentialTableau:
    """The methods of order 2 with two stages, eq. 2.39 there."""
    return ExponentialTableau(
        2,
        (0.0, c2),
        ((_phi(1, c2, c2),),),
        (_phi(1) + _phi(2, 1.0, -1 / c2), _phi(2, 1.0, 1 / c2)),
    )


def three_stages(c2: float, c3: float) -> ExponentialTableau:
    """The methods of order 3 with three stages, eqs. 2.41 and 2.42 there."""
    gamma = c3 * (3 * c3 - 2) / (c2 * (2 - 3 * c2))
    total = gamma * c2 + c3
    a32 = _phi(2, c2, gamma * c2) + _phi(2, c3, c3 * c3 / c2)
    return ExponentialTableau(
        3,
        (0.0, c2, c3),
        ((_phi(1, c2, c2),), (_phi(1, c3, c3) + _scaled(-1.0, a32), a32)),
        (
            _phi(1) + _phi(2, 1.0, -(gamma + 1) / total),
            _phi(2, 1.0, gamma / total),
            _phi(2, 1.0, 1 / total),
        ),
    )


_LAST = _phi(2, 1.0, -1.0) + _phi(3, 1.0, 4.0)
_MIDDLE = _phi(2, 1.0, 2.0) + _phi(3, 1.0, -4.0)
_FIRST = _phi(1) + _phi(2, 1.0, -3.0) + _phi(3, 1.0, 4.0)
COX_MATTHEWS = ExponentialTableau(
    4,
    (0.0, 1 / 2, 1 / 2, 1.0),
    (
        (_phi(1, 1 / 2, 1 / 2),),
        ((), _phi(1, 1 / 2, 1 / 2)),
        (_phi(1) + _phi(1, 1 / 2, -1.0), (), _phi(1, 1 / 2)),
    ),
    (_FIRST, _MIDDLE, _MIDDLE, _LAST),
)
KROGSTAD = ExponentialTableau(
    4,
    (0.0, 1 / 2, 1 / 2, 1.0),
    (
        (_phi(1, 1 / 2, 1 / 2),),
        (_phi(1, 1 / 2, 1 / 2) + _phi(2, 1 / 2, -1.0), _phi(2, 1 / 2)),
        (_phi(1) + _phi(2, 1.0, -2.0), (), _phi(2, 1.0, 2.0)),
    ),
    (_FIRST, _MIDDLE, _MIDDLE, _LAST),
)
_A52 = _phi(2, 1 / 2, 1 / 2) + _phi(3, 1.0, -1.0) + _phi(2, 1.0, 1 / 4) + _phi(3, 1 / 2, -1 / 2)
_A54 = _phi(2, 1 / 2, 1 / 4) + _scaled(-1.0, _A52)
HOCHBRUCK_OSTERMANN = ExponentialTableau(
    4,
    (0.0, 1 / 2, 1 / 2, 1.0, 1 / 2),
    (
        (_phi(1, 1 / 2, 1 / 2),),
        (_phi(1, 1 / 2, 1 / 2) + _phi(2, 1 / 2, -1.0), _phi(2, 1 / 2)),
        (_phi(1) + _phi(2, 1.0, -2.0), _phi(2), _phi(2)),
        (_phi(1, 1 / 2, 1 / 2) + _scaled(-2.0, _A52) + _scaled(-1.0, _A54), _A52, _A52, _A54),
    ),
    (_FIRST, (), (), _LAST, _phi(2, 1.0, 4.0) + _phi(3, 1.0, -8.0)),
)


@solver(order=2, source="Zhang et al. 2023, arXiv:2308.02157, single-step form")
def res_2s(x: Expr, levels: Any, noise: Any, *, c2: float = 0.5) -> Trace:
    """RES, the refined exponential solver, single-step, of order 2: one more data estimate at the
    share c2 of a step in log-SNR."""
    if not LEAST_SHARE <= c2 <= 1:
        raise ValueError(f"c2 must lie in [{LEAST_SHARE}, 1], got {c2}")
    return (yield from exponential_steps(two_stages(c2), DATA, x, levels))


@solver(order=3, source="Zhang et al. 2023, arXiv:2308.02157, single-step form")
def res_3s(x: Expr, levels: Any, noise: Any, *, c2: float = 0.5, c3: float = 1.0) -> Trace:
    """RES, the refined exponential solver, single-step, of order 3: two more data estimates at the
    shares c2 and c3 of a step in log-SNR."""
    if not (min(c2, c3) >= LEAST_SHARE and max(c2, c3) <= 1 and abs(c2 - c3) >= LEAST_SHARE):
        raise ValueError(
            f"c2 and c3 must lie in [{LEAST_SHARE}, 1], {LEAST_SHARE} apart or more: got {c2} and "
            f"{c3}"
        )
    if abs(c2 - 2 / 3) < LEAST_SHARE:
        raise ValueError(
            f"there is no method with c2 = 2/3, and c2 = {c2} is too near: take one {LEAST_SHARE} "
            "away or more"
        )
    return (yield from exponential_steps(three_stages(c2, c3), DATA, x, levels))


etdrk4 = exponential_runge_kutta(
    "etdrk4",
    COX_MATTHEWS,
    "Cox and Matthews 2002, doi:10.1006/jcph.2002.6995, eqs. 26 to 29",
    "ETDRK4, of order 4 in log-SNR on data estimates",
)
krogstad = exponential_runge_kutta(
    "krogstad",
    KROGSTAD,
    "Krogstad 2005, doi:10.1016/j.jcp.2004.08.006",
    "Krogstad's method, ETDRK4-B, of order 4 in log-SNR on data estimates",
)
hochbruck_ostermann = exponential_runge_kutta(
    "hochbruck_ostermann",
    HOCHBRUCK_OSTERMANN,
    "Hochbruck and Ostermann 2005, doi:10.1137/040611434, eq. 5.19",
    "Hochbruck and Ostermann's method of order 4 in log-SNR on data estimates",
)
