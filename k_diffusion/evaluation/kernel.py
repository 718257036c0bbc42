"""Kernel distance (KID): the squared maximum mean discrepancy of two feature sets, unbiased.

Source: Binkowski et al. 2018, arXiv:1801.01401, section 4, with its kernel (x.y / d + 1)^3; the
unbiased estimate: Gretton et al. 2012, "A kernel two-sample test", equation 3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 1024


@dataclass(frozen=True)
class KernelDistance:
    """An estimate of the squared MMD, which may come out below 0 where the sets agree.

    Attributes:
        value: the estimate.
        error: of it, see the function that gave it.
    """

    value: float
    error: float


def polynomial_kernel(x: Tensor, y: Tensor) -> Tensor:
    """(x.y / d + 1)^3 of each row of x, shape (..., m, d), with each of y: (..., m, n)."""
    return (x @ y.mT / x.shape[-1] + 1) ** 3


def kernel_distance(
    features_a: Tensor, features_b: Tensor, *, chunk: int = CHUNK
) -> KernelDistance:
    """The unbiased estimate from all pairs, in float64, with its standard error.

    The error is the first-order one, sqrt(4 var(u) / m + 4 var(v) / n), where u of a row of a is
    its mean kernel with the other rows of a less that with b, and v likewise for b. It is too small
    where the two sets come from one distribution, where that term vanishes.

    Args:
        features_a: shape (m, d), at least two rows; `features_b` (n, d).
        chunk: rows that meet at a time; bounds the memory to chunk^2 numbers.

    Source of the error: Bounliphone et al. 2016, arXiv:1511.04581, section 3 (the variance of a
    U-statistic: Serfling 1980, section 5.5.1).
    """
    a, b = _pair(features_a, features_b)
    m, n = len(a), len(b)
    within_a, within_b = _row_sums(a, a, chunk, own=True), _row_sums(b, b, chunk, own=True)
    across_a, across_b = _row_sums(a, b, chunk), _row_sums(b, a, chunk)
    u = within_a / (m - 1) - across_a / n
    v = within_b / (n - 1) - across_b / m
    error = (4 * u.var() / m + 4 * v.var() / n).sqrt()
    # The mean kernel between the sets is in u and in v, once each.
    return KernelDistance(float(u.mean() + v.mean()), float(error))


def kernel_distance_of_subsets(
    features_a: Tensor, features_b: Tensor, *, subsets: int = 100, size: int = 1000, seed: int = 0
) -> KernelDistance:
    """The mean of estimates from random subsets, as the literature often gives it.

    The error is the standard deviation between subsets: of one subset's estimate, not of the mean.

    Args:
        features_a: shape (m, d); `features_b` (n, d).
        subsets: how many.
        size: rows of each set in a subset, none twice.
        seed: of the choice.

    Raises:
        ValueError: a set has fewer rows than a subset, or there are fewer than two subsets.
    """
    a, b = _pair(features_a, features_b)
    if not 2 <= size <= min(len(a), len(b)):
        raise ValueError(
            f"size = {size}, but the sets have {len(a)} and {len(b)} rows: give 2 to "
            f"{min(len(a), len(b))}"
        )
    if subsets < 2:
        raise ValueError(f"subsets = {subsets}; give at least 2, for an error")
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(subsets):
        x, y = (
            rows[torch.randperm(len(rows), generator=generator)[:size].to(rows.device)]
            for rows in (a, b)
        )
        found.append(kernel_distance(x, y).value)
    values = torch.tensor(found, dtype=torch.float64)
    return KernelDistance(float(values.mean()), float(values.std()))


def _pair(features_a: Tensor, features_b: Tensor) -> tuple[Tensor, Tensor]:
    shapes = [tuple(features.shape) for features in (features_a, features_b)]
    if any(len(s) != 2 or s[0] < 2 for s in shapes) or shapes[0][1] != shapes[1][1]:
        raise ValueError(
            f"feature sets have shapes {shapes[0]} and {shapes[1]}; (count, features) with at "
            "least two rows and the same features fit"
        )
    a, b = features_a.detach().double(), features_b.detach().double()
    if not bool(a.isfinite().all() & b.isfinite().all()):
        raise ValueError("features hold values that are not finite; look at what made them")
    return a, b


def _row_sums(x: Tensor, y: Tensor, chunk: int, own: bool = False) -> Tensor:
    """The sum over y of the kernel with each row of x; own: without the row itself."""
    sums = x.new_zeros(len(x))
    for start in range(0, len(x), chunk):
        rows = x[start : start + chunk]
        for first in range(0, len(y), chunk):
            values = polynomial_kernel(rows, y[first : first + chunk])
            if own and first == start:
                values.fill_diagonal_(0)
            sums[start : start + chunk] += values.sum(1)
    return sums
