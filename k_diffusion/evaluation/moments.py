"""Mean and covariance of features that come in parts, in float64: nothing is kept of them."""

from __future__ import annotations

import torch
from torch import Tensor


class Moments:
    """Count, mean and scatter of feature rows.

    Parts are merged by their own means, so that no large numbers are subtracted from one another:
    in whatever parts and by whatever processes rows are added, the figures agree to rounding.

    Args:
        size: features a row.
        device: where the sums are; it must know float64.

    Attributes:
        count: rows so far.
        mean: shape (size,), float64.
        scatter: sum over rows of (row - mean)(row - mean)^T, shape (size, size), float64.

    Source: Chan, Golub and LeVeque 1979, "Updating formulae and a pairwise algorithm for computing
    sample variances", equations 2.1.
    """

    def __init__(self, size: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.mean = torch.zeros(size, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(size, size, dtype=torch.float64, device=device)

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """Those of one set of features, shape (count, size)."""
        _check(features, None)
        return cls(features.shape[1], features.device).add(features)

    @property
    def covariance(self) -> Tensor:
        """The unbiased covariance, shape (size, size).

        Raises:
            ValueError: there are fewer than two rows.
        """
        if self.count < 2:
            raise ValueError(f"{self.count} rows of features have no covariance; add at least 2")
        return self.scatter / (self.count - 1)

    def add(self, features: Tensor) -> Moments:
        """Add rows, shape (count, size); any floating dtype.

        Raises:
            ValueError: another shape, or a value that is not finite.
        """
        _check(features, len(self.mean))
        if not len(features):
            return self
        rows = features.detach().to(self.mean)
        if not bool(rows.isfinite().all()):
            raise ValueError("features hold values that are not finite; look at what made them")
        part = Moments.__new__(Moments)
        part.count = len(rows)
        part.mean = rows.mean(0)
        centred = rows - part.mean
        part.scatter = centred.T @ centred
        return self.merge(part)

    def merge(self, other: Moments) -> Moments:
        """Add what another has seen."""
        if other.mean.shape != self.mean.shape:
            raise ValueError(
                f"moments of {len(self.mean)} and {len(other.mean)} features cannot be merged"
            )
        total = self.count + other.count
        if not other.count:
            return self
        apart = other.mean - self.mean
        self.scatter += other.scatter + apart.outer(apart) * (self.count * other.count / total)
        self.mean += apart * (other.count / total)
        self.count = total
        return self


def _check(features: Tensor, size: int | None) -> None:
    if features.ndim != 2 or (size is not None and features.shape[1] != size):
        wanted = "features" if size is None else size
        raise ValueError(f"features have shape {tuple(features.shape)}; (count, {wanted}) fits")
