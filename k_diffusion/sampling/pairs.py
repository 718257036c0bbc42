"""Embedded pairs for adaptive step control: two results of one step, whose distance is its error.

A pair is data, and knows no tensor: nodes, and weights of the slopes for every inner state and for
both results. Each is written in the coordinates that suit it, its chart. The state is w = m · x /
alpha and the slope at clock u is (w - d) / q(u), with d the denoiser's answer:

=============  ============================  ==========  ====  ==================================
chart          clock u                       m           q     slope
=============  ============================  ==========  ====  ==================================
`LOG_SNR`      log(alpha / sigma)            1           r     the noise: dw = slope · dr, exactly
`STRAIGHT`     sigma / (alpha + sigma) = s   1 / (1+r)   s     dw/du: eps - d on the straight path
=============  ============================  ==========  ====  ==================================

with r = sigma / alpha. Neither depends on the denoiser's own path, so that variance-exploding,
variance-preserving and flow models take the same steps at equal log-SNR.

Runge-Kutta pairs go by the straight chart, whatever the path of the model: its clock is finite from
pure noise to clean data, and the solution bends least there. On a Gaussian with a decaying spectrum
and on a mixture, Dormand-Prince from ratio 80 to 0.002 at rtol 1e-5 took 97 and 49 evaluations in
it, 145 and 115 in half log-SNR and 235 and 169 in sigma of the variance-exploding path, at the same
error or less; Bogacki-Shampine 97, 328 and 193.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import expm1

from k_diffusion.utils import maths
from k_diffusion.utils.levels import Level

Rows = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Chart:
    """Coordinates in which a pair steps; see the module's table.

    Attributes:
        clock: from log(alpha / sigma).
        half_log_snr: the inverse of `clock`.
        scale: what multiplies w to give the denoiser's x at a level.
        divisor: q of the slope (w - d) / q, at a clock.
        unit: m, at a clock: w = m · x / alpha.
    """

    clock: Callable[[float], float]
    half_log_snr: Callable[[float], float]
    scale: Callable[[Level], float]
    divisor: Callable[[float], float]
    unit: Callable[[float], float]


def _ratio(half_log_snr: float) -> float:
    return maths.exp(-half_log_snr)


LOG_SNR = Chart(
    clock=lambda half_log_snr: half_log_snr,
    half_log_snr=lambda clock: clock,
    scale=lambda level: level.alpha,
    divisor=_ratio,
    unit=lambda clock: 1.0,
)
STRAIGHT = Chart(
    clock=lambda half_log_snr: 1 / (1 + maths.exp(half_log_snr)),
    half_log_snr=lambda clock: maths.log(1 - clock) - maths.log(clock),
    scale=lambda level: level.alpha + level.sigma,
    divisor=lambda clock: clock,
    unit=lambda clock: 1 - clock,
)


@dataclass(frozen=True)
class Weights:
    """Weights of one step's slopes: for each inner state after the first, and for both results."""

    inner: Rows
    high: tuple[float, ...]
    low: tuple[float, ...]


@dataclass(frozen=True)
class Pair:
    """An embedded pair of one-step methods.

    Attributes:
        name: what users call it.
        order: order of the result that goes on; the other's is one less.
        nodes: where the slopes are asked for, as shares of the step; the first is 0.
        weights: from the step's two clocks.
        chart: the coordinates it steps in.
        carries: whether its last slope is the next step's first.
        source: authors, year, place.
    """

    name: str
    order: int
    nodes: tuple[float, ...]
    weights: Callable[[float, float], Weights]
    chart: Chart
    carries: bool
    source: str


def runge_kutta(
    name: str,
    order: int,
    nodes: Sequence[float],
    matrix: Sequence[Sequence[float]],
    high: Sequence[float],
    low: Sequence[float],
    source: str,
) -> Pair:
    """An explicit Runge-Kutta pair from its tableau: the matrix without its first, empty row."""
    rows = tuple(tuple(map(float, row)) for row in matrix)

    def weights(start: float, end: float) -> Weights:
        h = end - start
        return Weights(
            tuple(tuple(h * a for a in row) for row in rows),
            tuple(h * b for b in high),
            tuple(h * b for b in low),
        )

    carries = rows[-1] == tuple(high[:-1]) and high[-1] == 0
    return Pair(name, order, tuple(nodes), weights, STRAIGHT, carries, source)


def _dpm_12(start: float, end: float) -> Weights:
    """DPM-Solver-1 within DPM-Solver-2 (r1 = 1/2)."""
    h, r = end - start, _ratio(end)
    first = -r * expm1(h)
    middle = -_ratio(start + h / 2) * expm1(h / 2)
    return Weights(((middle,),), (0.0, first), (first, 0.0))


def _dpm_23(start: float, end: float) -> Weights:
    """DPM-Solver-2 (r1 = 1/3) within DPM-Solver-3 (r1 = 1/3, r2 = 2/3)."""
    h, r = end - start, _ratio(end)
    first = -r * expm1(h)
    # The last factor of either correction is (e^u - 1) / u - 1, the share that a slope rising along
    # the step adds.
    one, two = _ratio(start + h / 3), _ratio(start + 2 * h / 3)
    second = -two * 2 * _rise(2 * h / 3)
    third = -r * 1.5 * _rise(h)
    inner = ((-one * expm1(h / 3),), (-two * expm1(2 * h / 3) - second, second))
    low = 1.5 * first
    return Weights(inner, (first - third, 0.0, third), (first - low, low, 0.0))


def _rise(u: float) -> float:
    """(e^u - 1) / u - 1, by its series near 0, where the difference would lose all digits."""
    if abs(u) > 0.03:
        return expm1(u) / u - 1
    return u / 2 * (1 + u / 3 * (1 + u / 4 * (1 + u / 5 * (1 + u / 6 * (1 + u / 7 * (1 + u / 8))))))


_LU = "Lu et al. 2022, arXiv:2206.00927, appendix C"
PAIRS: dict[str, Pair] = {
    pair.name: pair
    for pair in (
        Pair("dpm_12", 2, (0.0, 1 / 2), _dpm_12, LOG_SNR, False, _LU),
        Pair("dpm_23", 3, (0.0, 1 / 3, 2 / 3), _dpm_23, LOG_SNR, False, _LU),
        runge_kutta(
            "bogacki_shampine",
            3,
            (0, 1 / 2, 3 / 4, 1),
            ((1 / 2,), (0, 3 / 4), (2 / 9, 1 / 3, 4 / 9)),
            (2 / 9, 1 / 3, 4 / 9, 0),
            (7 / 24, 1 / 4, 1 / 3, 1 / 8),
            "Bogacki and Shampine 1989, doi:10.1016/0893-9659(89)90079-7",
        ),
        runge_kutta(
            "dormand_prince",
            5,
            (0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1),
            (
                (1 / 5,),
                (3 / 40, 9 / 40),
                (44 / 45, -56 / 15, 32 / 9),
                (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
                (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
                (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
            ),
            (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0),
            (5179 / 57600, 0, 7571 / 16695, 393 / 640, -92097 / 339200, 187 / 2100, 1 / 40),
            "Dormand and Prince 1980, doi:10.1016/0771-050X(80)90013-3, table 2",
        ),
    )
}


def get_pair(name: str | Pair) -> Pair:
    """A pair by its name; a Pair passes through.

    Raises:
        ValueError: unknown name (the nearest known one is offered).
    """
    if isinstance(name, Pair):
        return name
    if name not in PAIRS:
        raise ValueError(maths.unknown("embedded pair", name, PAIRS))
    return PAIRS[name]
