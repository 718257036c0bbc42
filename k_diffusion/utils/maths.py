"""Small mathematics shared by all rooms: functions of floats *or* tensors, tables, seeds, names.

Nothing here imports torch at module level. A function that takes "a float or a tensor" calls the
tensor's own methods, so one formula serves the host (plans, float64) and the device (denoisers).
"""

from __future__ import annotations

import difflib
import functools
import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from typing import Any

Scalar = Any
"""A Python float, or a tensor of any shape."""


def is_number(x: object) -> bool:
    """Whether x is a plain Python number (not a bool, not a tensor)."""
    return isinstance(x, (int, float)) and not isinstance(x, bool)


def exp(x: Scalar) -> Scalar:
    """e**x; a float overflow gives inf, as it does for tensors."""
    if not is_number(x):
        return x.exp()
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf


def log(x: Scalar) -> Scalar:
    """Natural logarithm; log(0) = -inf, as for tensors."""
    if not is_number(x):
        return x.log()
    return math.log(x) if x != 0 else -math.inf


def expm1(x: Scalar) -> Scalar:
    """e**x - 1 without cancellation near 0; a float overflow gives inf."""
    if not is_number(x):
        return x.expm1()
    try:
        return math.expm1(x)
    except OverflowError:
        return math.inf


def log1p(x: Scalar) -> Scalar:
    """log(1 + x) without cancellation near 0."""
    return math.log1p(x) if is_number(x) else x.log1p()


def sqrt(x: Scalar) -> Scalar:
    """Square root of a float or a tensor."""
    return math.sqrt(x) if is_number(x) else x.sqrt()


def sin(x: Scalar) -> Scalar:
    """Sine of a float or a tensor."""
    return math.sin(x) if is_number(x) else x.sin()


def tan(x: Scalar) -> Scalar:
    """Tangent of a float or a tensor."""
    return math.tan(x) if is_number(x) else x.tan()


def atan2(y: Scalar, x: Scalar) -> Scalar:
    """Angle of the point (x, y), in radians; both floats or both tensors."""
    return math.atan2(y, x) if is_number(y) else y.atan2(x)


def clamp(x: Scalar, low: float, high: float) -> Scalar:
    """x limited to [low, high]."""
    return min(max(x, low), high) if is_number(x) else x.clamp(low, high)


def linspace(start: float, end: float, n: int) -> list[float]:
    """n evenly spaced floats with exact ends; n = 1 gives the start."""
    if n == 1:
        return [start]
    return [start + (end - start) * i / (n - 1) for i in range(n - 1)] + [end]


def nearest(name: object, names: Iterable[str]) -> str | None:
    """The known name that most resembles `name`, or None where nothing comes close."""
    close = difflib.get_close_matches(str(name).lower(), list(names), n=1, cutoff=0.5)
    return close[0] if close else None


def unknown(kind: str, name: object, names: Iterable[str]) -> str:
    """One line for an unknown name: what it is, what was meant perhaps, and what there is.

    >>> unknown("sampler", "hein", ["euler", "heun"])
    "unknown sampler 'hein'; did you mean 'heun'? Known: euler, heun"
    """
    names = list(names)
    close = nearest(name, names)
    hint = f"; did you mean {close!r}? Known: " if close else "; known: "
    return f"unknown {kind} {name!r}{hint}{', '.join(names) or 'none'}"


_MASK = (1 << 64) - 1


def fold_seed(seed: int, *keys: int) -> int:
    """Mix a seed with keys (stream, step, index...) into an independent 63-bit seed.

    Streams made from `seed`, `seed + 1`, ... or from the same seed under two keys do not overlap,
    which adding the numbers up would not give.

    Source: the finaliser of SplitMix64 (Steele, Lea and Flood 2014, doi:10.1145/2660193.2660195).
    """
    state = 0
    for key in (seed, *keys):
        state = (state + int(key) + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1


class Table:
    """A piecewise-linear function through given points, for floats and tensors.

    Args:
        xs: strictly increasing abscissae.
        ys: ordinates, as many.

    Outside the points the nearest end value is returned. On a tensor it runs without any device
    synchronisation: the points are copied to each device once and kept there.
    """

    def __init__(self, xs: Sequence[float], ys: Sequence[float]) -> None:
        self.xs = tuple(map(float, xs))
        self.ys = tuple(map(float, ys))
        self._on: dict[Any, tuple[Any, Any]] = {}

    def __call__(self, x: Scalar) -> Scalar:
        """The ordinate at x: a float for a float, a tensor of x's shape for a tensor."""
        return self._at_float(x) if is_number(x) else self._at_tensor(x)

    def _at_float(self, x: float) -> float:
        if x <= self.xs[0]:
            return self.ys[0]
        if x >= self.xs[-1]:
            return self.ys[-1]
        i = bisect_right(self.xs, x) - 1
        w = (x - self.xs[i]) / (self.xs[i + 1] - self.xs[i])
        return self.ys[i] * (1 - w) + self.ys[i + 1] * w

    def _at_tensor(self, x: Any) -> Any:
        key = (x.device, x.dtype)
        if key not in self._on:
            self._on[key] = (x.new_tensor(self.xs), x.new_tensor(self.ys))
        xs, ys = self._on[key]
        x = x.clamp(self.xs[0], self.xs[-1])
        # Counting the points passed takes a comparison with each, and no import of torch.
        i = ((x.unsqueeze(-1) >= xs).sum(-1) - 1).clamp(0, len(self.xs) - 2)
        w = (x - xs[i]) / (xs[i + 1] - xs[i])
        return ys[i].lerp(ys[i + 1], w)


@functools.lru_cache
def gauss_legendre(n: int) -> tuple[tuple[float, float], ...]:
    """Nodes and weights of n-point Gauss-Legendre quadrature on [-1, 1], to full precision."""
    rule = []
    for i in range(n):
        x = math.cos(math.pi * (i + 0.75) / (n + 0.5))
        for _ in range(100):
            p, before = 1.0, 0.0
            for k in range(n):
                p, before = ((2 * k + 1) * x * p - k * before) / (k + 1), p
            slope = n * (x * p - before) / (x * x - 1)
            step = p / slope
            x -= step
            if abs(step) < 1e-16:
                break
        rule.append((x, 2 / ((1 - x * x) * slope * slope)))
    return tuple(rule)


def lagrange_integrals(
    nodes: Sequence[float],
    start: float,
    end: float,
    total: float,
    weight: Callable[[float], float] = lambda u: 1.0,
    clock: Callable[[float], float] = lambda u: u,
    pieces: int = 1,
) -> list[float]:
    """For each node j, the integral from start to end of weight(u) · L_j(clock(u)) du.

    L_j is the Lagrange polynomial that is 1 at node j and 0 at the others: the coefficients of any
    Adams method on uneven steps. 24-point quadrature on each of `pieces` equal parts: exact to
    rounding for polynomials. `total` is the integral of the weight alone, in closed form: the L_j
    sum to 1, so it fixes the last integral without the rounding errors of the others, and a
    constant is integrated exactly.
    """
    half = (end - start) / (2 * pieces)
    others = [
        [(m, node - m) for k, m in enumerate(nodes) if k != j] for j, node in enumerate(nodes[:-1])
    ]
    integrals = [0.0] * len(others)
    for piece in range(pieces):
        centre = start + (2 * piece + 1) * half
        for x, w in gauss_legendre(24):
            u = centre + half * x
            mass, at = half * w * weight(u), clock(u)
            for j, factors in enumerate(others):
                integrals[j] += mass * math.prod([(at - m) / gap for m, gap in factors])
    return [*integrals, total - math.fsum(integrals)]


def phi(k: int, z: float) -> float:
    """φ_k(z), the function of exponential integrators: φ_0 = exp, and from there on the integral of
    exp((1 - θ) z) θ^(k-1) / (k-1)! over [0, 1]; to about 1e-15 relative, at small z too.

    Source: Hochbruck and Ostermann 2010, doi:10.1017/S0962492910000048, eqs. 2.10 and 2.11.
    """
    if k == 0:
        return math.exp(z)
    if abs(z) < 2:  # the recurrence would subtract what is nearly equal
        term = value = 1 / math.factorial(k)
        n = k
        while abs(term) > 1e-18 * abs(value):
            n += 1
            term *= z / n
            value += term
        return value
    value = math.expm1(z) / z
    for j in range(1, k):
        value = (value - 1 / math.factorial(j)) / z
    return value


def phi_weights(nodes: Sequence[float], z: float) -> list[float]:
    """For each node τ_j, the integral of exp((1 - τ) z) · L_j(τ) over τ in [0, 1].

    L_j is the Lagrange polynomial that is 1 at node j and 0 at the others: the coefficients of any
    exponential Adams method, on uneven steps. They sum to φ_1(z) to the last bit or so.
    """
    powers = range(1, len(nodes))
    others = [node - nodes[-1] for node in nodes[:-1]]
    # Moments about the last node: the integral of (τ - c)^k is a sum over those of τ^i, i! φ_i+1.
    about = [
        math.fsum(
            math.comb(k, i) * (-nodes[-1]) ** (k - i) * math.factorial(i) * phi(i + 1, z)
            for i in range(k + 1)
        )
        for k in powers
    ]
    weights = solve_linear([[r**k for r in others] for k in powers], about)
    return [*weights, phi(1, z) - math.fsum(weights)]


def solve_linear(rows: Sequence[Sequence[float]], right: Sequence[float]) -> list[float]:
    """The solution of a small square linear system, by elimination with partial pivoting."""
    n = len(rows)
    table = [[*row, value] for row, value in zip(rows, right, strict=True)]
    for k in range(n):
        pivot = max(range(k, n), key=lambda i: abs(table[i][k]))
        table[k], table[pivot] = table[pivot], table[k]
        for i in range(k + 1, n):
            factor = table[i][k] / table[k][k]
            table[i] = [a - factor * b for a, b in zip(table[i], table[k], strict=True)]
    solution = [0.0] * n
    for k in reversed(range(n)):
        known = sum(table[k][j] * solution[j] for j in range(k + 1, n))
        solution[k] = (table[k][n] - known) / table[k][k]
    return solution
