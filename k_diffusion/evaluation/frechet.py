"""Frechet distance between two Gaussians, or between Gaussians fitted to two feature sets.

Source: Dowson and Landau 1982, "The Frechet distance between multivariate normal distributions",
equation 4; as a measure of samples: Heusel et al. 2017, arXiv:1706.08500.
"""

from __future__ import annotations

import torch

from k_diffusion.evaluation.moments import Moments


def gaussian_frechet(
    mean_a: torch.Tensor, cov_a: torch.Tensor, mean_b: torch.Tensor, cov_b: torch.Tensor
) -> float:
    """Squared Frechet (Wasserstein-2) distance between two Gaussians, in float64.

    |mean_a - mean_b|^2 + tr(cov_a) + tr(cov_b) - 2 tr((cov_a cov_b)^(1/2))

    Args:
        mean_a: shape (features,); `mean_b` likewise.
        cov_a: symmetric positive semi-definite, shape (features, features); `cov_b` likewise.

    Raises:
        ValueError: the shapes do not fit one another, or a value is not finite.
    """
    size = mean_a.shape[-1:] if mean_a.ndim == 1 else torch.Size()
    shapes = [tuple(t.shape) for t in (mean_a, cov_a, mean_b, cov_b)]
    if not size or shapes != [tuple(size), tuple(size * 2)] * 2:
        raise ValueError(f"means and covariances have shapes {shapes}; (d,), (d, d) twice fit")
    return _distance(mean_a, _factor(cov_a), mean_b, _factor(cov_b))


def frechet_distance(features_a: torch.Tensor, features_b: torch.Tensor) -> float:
    """Squared Frechet distance between Gaussians fitted to two feature sets, in float64.

    The covariance is the unbiased one (divided by count - 1). The distance grows as the sets
    shrink, so that only distances at the same counts may be compared.

    Args:
        features_a: shape (count, features), at least two rows; `features_b` likewise, with the
            same features and any count.

    Raises:
        ValueError: the shapes do not fit one another, or a value is not finite.
    """
    shapes = [tuple(features.shape) for features in (features_a, features_b)]
    if any(len(s) != 2 or s[0] < 2 for s in shapes) or shapes[0][1] != shapes[1][1]:
        raise ValueError(
            f"feature sets have shapes {shapes[0]} and {shapes[1]}; (count, features) with at "
            "least two rows and the same features fit"
        )
    fitted = []
    for features in (features_a.double(), features_b.double()):
        mean = features.mean(0)
        # With centred rows X = QR the covariance is R^T R / (n - 1): no matrix is squared, so
        # that a set of fewer rows than features loses no digits.
        factor = torch.linalg.qr(features - mean, mode="r").R / (len(features) - 1) ** 0.5
        fitted.append((mean, factor.T))
    return _distance(*fitted[0], *fitted[1])


def moments_frechet(a: Moments, b: Moments) -> float:
    """Squared Frechet distance between Gaussians of the means and unbiased covariances of two sets.

    As `frechet_distance` of the sets themselves, which need not be kept.
    """
    return gaussian_frechet(a.mean, a.covariance, b.mean, b.covariance)


def _factor(cov: torch.Tensor) -> torch.Tensor:
    """A matrix F with F F^T = cov, from the symmetric eigendecomposition."""
    cov = cov.double()
    values, vectors = torch.linalg.eigh((cov + cov.T) / 2)
    return vectors * values.clamp(min=0).sqrt()


def _distance(
    mean_a: torch.Tensor, factor_a: torch.Tensor, mean_b: torch.Tensor, factor_b: torch.Tensor
) -> float:
    """The distance from means and factors: tr((A A^T B B^T)^(1/2)) is the nuclear norm of A^T B."""
    if not all(bool(t.isfinite().all()) for t in (mean_a, factor_a, mean_b, factor_b)):
        raise ValueError("features hold values that are not finite; look at what made them")
    apart = (mean_a.double() - mean_b.double()).square().sum()
    spread = factor_a.square().sum() + factor_b.square().sum()
    shared = torch.linalg.svdvals(factor_a.T @ factor_b).sum()
    return max(0.0, float(apart + spread - 2 * shared))
