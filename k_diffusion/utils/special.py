"""The incomplete beta function and its inverse, in float64 and without scipy.

Nothing here imports torch.
"""

from __future__ import annotations

import math


def incomplete_beta(a: float, b: float, x: float) -> float:
    """The regularised incomplete beta function I_x(a, b): the share of a Beta(a, b) below x.

    Args:
        a: above 0.
        b: above 0.
        x: in [0, 1].

    Source: the continued fraction of DLMF 8.17.22, summed from the front by Lentz's method.
    """
    if not (a > 0 and b > 0):
        raise ValueError(f"a and b must be above 0, got {a} and {b}")
    if not 0 <= x <= 1:
        raise ValueError(f"x must lie in [0, 1], got {x}")
    if x in (0.0, 1.0):
        return x
    if x > (a + 1) / (a + b + 2):  # there the fraction converges faster for the other tail
        return 1 - incomplete_beta(b, a, 1 - x)
    front = math.exp(a * math.log(x) + b * math.log1p(-x) - _log_beta(a, b)) / a
    # 1 + d1 / (1 + d2 / (1 + ...)) is the product of numerator · denominator over the terms, each
    # a ratio of successive convergents' numerators or (inverted) denominators.
    value = numerator = 1.0
    denominator = 0.0
    for k in range(1, 10_000):
        m, odd = divmod(k, 2)
        if odd:
            d = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            d = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        denominator = 1 / (1 + d * denominator)
        numerator = 1 + d / numerator
        value *= numerator * denominator
        if abs(numerator * denominator - 1) < 1e-16:
            break
    return front / value


def inverse_incomplete_beta(a: float, b: float, share: float) -> float:
    """The x below which a share of a Beta(a, b) distribution lies: the inverse of I_x(a, b).

    Newton's method kept inside a shrinking bracket.

    Args:
        a: above 0.
        b: above 0.
        share: in [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must lie in [0, 1], got {share}")
    if share in (0.0, 1.0):
        return share
    if share > 0.5:  # 1 - share is exact here, and the small share of the other tail is, too
        return 1 - inverse_incomplete_beta(b, a, 1 - share)
    low, high, x = 0.0, 1.0, a / (a + b)
    for _ in range(1100):  # by halves alone it takes at most as many down to the least float
        off = incomplete_beta(a, b, x) - share
        low, high = (x, high) if off < 0 else (low, x)
        slope = math.exp((a - 1) * math.log(x) + (b - 1) * math.log1p(-x) - _log_beta(a, b))
        step = x - off / slope if slope else low
        after = step if low < step < high else (low + high) / 2
        if after in (low, high) or abs(after - x) <= 1e-16 * x:
            break
        x = after
    return x


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
