"""Moments that come in parts against the definition over all rows."""

import numpy as np
import pytest
import scipy.linalg
import torch

from k_diffusion.evaluation import Moments, frechet_distance, moments_frechet


def rows(count: int, size: int = 7, seed: int = 0, mean: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return torch.randn(count, size, generator=generator, dtype=torch.float64) @ mix + mean


@pytest.mark.parametrize("parts", [[100], [1, 99], [30, 0, 50, 20], [1] * 100])
def test_parts_give_the_definition(parts: list[int]) -> None:
    # A mean a million deviations away: sums of squares would keep no digit of the covariance.
    features = rows(100, mean=1e6)
    moments = Moments(7)
    for part in features.split(parts):
        moments.add(part)
    assert moments.count == 100
    assert (moments.mean.numpy() - features.numpy().mean(0)).max() < 1e-9
    assert abs(moments.covariance.numpy() - np.cov(features.numpy().T)).max() < 1e-6


def test_merging_in_any_order() -> None:
    features = rows(90, mean=3)
    one, two, three = (Moments.of(part) for part in features.split([20, 1, 69]))
    whole = Moments.of(features)
    for merged in (
        Moments.of(features[:20]).merge(two).merge(three),
        Moments.of(features[21:]).merge(one).merge(two),
        Moments(7).merge(whole),
        Moments.of(features).merge(Moments(7)),
    ):
        assert merged.count == 90
        assert (merged.mean - whole.mean).abs().max() < 1e-13
        assert (merged.scatter - whole.scatter).abs().max() < 1e-11


def test_half_precision_features_are_summed_in_double() -> None:
    features = torch.full((3000, 1), 0.1, dtype=torch.float16)
    moments = Moments.of(features)
    assert moments.mean.dtype == torch.float64
    assert abs(float(moments.mean) - float(torch.tensor(0.1).half())) < 1e-12
    assert float(moments.covariance) < 1e-20


@pytest.mark.parametrize(("count", "other"), [(300, 200), (60, 40)])
def test_frechet_of_moments_is_that_of_the_sets(count: int, other: int) -> None:
    a, b = rows(count, 30, 1), rows(other, 30, 2, mean=0.5)
    moments = [Moments(30), Moments(30)]
    for m, features in zip(moments, (a, b), strict=True):
        for part in features.split(17):
            m.add(part)
    found = moments_frechet(*moments)
    assert abs(found - frechet_distance(a, b)) < 1e-9 * found
    mean, cov = [x.numpy().mean(0) for x in (a, b)], [np.cov(x.numpy().T) for x in (a, b)]
    root = scipy.linalg.sqrtm(cov[0] @ cov[1])
    slow = ((mean[0] - mean[1]) ** 2).sum() + np.trace(cov[0] + cov[1] - 2 * root.real)
    assert abs(found - slow) < 1e-6


def test_many_samples_of_gaussians_come_to_the_closed_form() -> None:
    # Standard deviations 1, 2, 3 against 2, 2, 1, means apart by (1, 0, 2): 5 + 1 + 0 + 4.
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 200_000, 3, generator=generator, dtype=torch.float64)
    a = noise[0] * torch.tensor([1.0, 2.0, 3.0])
    b = noise[1] * torch.tensor([2.0, 2.0, 1.0]) + torch.tensor([1.0, 0.0, 2.0])
    assert abs(moments_frechet(Moments.of(a), Moments.of(b)) - 10) < 0.1


def test_refusals() -> None:
    with pytest.raises(ValueError, match="not finite"):
        Moments(2).add(torch.tensor([[0.0, torch.inf]]))
    with pytest.raises(ValueError, match=r"shape \(3, 4\); \(count, 2\)"):
        Moments(2).add(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="1 rows of features have no covariance"):
        _ = Moments.of(torch.zeros(1, 2)).covariance
    with pytest.raises(ValueError, match="2 and 3 features"):
        Moments(2).merge(Moments(3))
