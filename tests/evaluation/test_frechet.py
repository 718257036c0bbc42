"""The Frechet distance against closed forms and against a slow definition."""

import numpy as np
import pytest
import scipy.linalg
import torch

from k_diffusion.evaluation import frechet_distance, gaussian_frechet


def eye(size: int) -> torch.Tensor:
    return torch.eye(size, dtype=torch.float64)


def spd(size: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return root @ root.T / size + 0.05 * eye(size)


def slow(mean_a, cov_a, mean_b, cov_b) -> float:
    product = scipy.linalg.sqrtm((cov_a @ cov_b).numpy())
    apart = ((mean_a - mean_b) ** 2).sum()
    return float(apart + torch.trace(cov_a) + torch.trace(cov_b) - 2 * np.trace(product).real)


def test_gaussians_that_share_their_axes() -> None:
    # sum of (mean difference)^2 + (standard deviation difference)^2
    a, b = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([3.0, 1.0, 0.5])
    mean = torch.tensor([0.5, -1.0, 2.0])
    found = gaussian_frechet(torch.zeros(3), a.square().diag(), mean, b.square().diag())
    assert abs(found - (5.25 + 4 + 1)) < 1e-12


def test_singular_covariances() -> None:
    # A line along x against a line along y: nothing is shared.
    x, y = torch.tensor([1.0, 0.0]).diag(), torch.tensor([0.0, 4.0]).diag()
    assert abs(gaussian_frechet(torch.zeros(2), x, torch.zeros(2), y) - 5) < 1e-12
    assert abs(gaussian_frechet(torch.zeros(2), x, torch.zeros(2), 0 * y) - 1) < 1e-12


@pytest.mark.parametrize("size", [1, 2, 30])
def test_any_gaussians_against_the_slow_definition(size: int) -> None:
    mean_a, mean_b = torch.zeros(size).double(), torch.linspace(0, 1, size).double()
    found = gaussian_frechet(mean_a, spd(size, 1), mean_b, spd(size, 2))
    assert abs(found - slow(mean_a, spd(size, 1), mean_b, spd(size, 2))) < 1e-9
    back = gaussian_frechet(mean_b, spd(size, 2), mean_a, spd(size, 1))
    assert abs(found - back) < 1e-12
    assert gaussian_frechet(mean_a, spd(size, 1), mean_a, spd(size, 1)) < 1e-12


def test_features_are_fitted_with_the_unbiased_covariance() -> None:
    # Two rows each: variances 2 and 8, means 1 and 5 apart by 4: 16 + (sqrt 2 - sqrt 8)^2.
    a, b = torch.tensor([[0.0], [2.0]]), torch.tensor([[3.0], [7.0]])
    assert abs(frechet_distance(a, b) - (16 + 2)) < 1e-12


@pytest.mark.parametrize(("count_a", "count_b"), [(200, 150), (20, 200), (11, 7)])
def test_features_equal_their_gaussians(count_a: int, count_b: int) -> None:
    generator = torch.Generator().manual_seed(3)
    a = torch.randn(count_a, 24, generator=generator) @ spd(24, 4).float()
    b = torch.randn(count_b, 24, generator=generator) + 0.1
    gaussians = [t for x in (a, b) for t in (x.double().mean(0), torch.cov(x.double().T))]
    assert abs(frechet_distance(a, b) - gaussian_frechet(*gaussians)) < 1e-6
    assert frechet_distance(a, a.flip(0)) < 1e-12


def test_it_is_never_below_0() -> None:
    """Of equal sets it is 0 but for rounding, either way."""
    for seed in range(40):
        a = torch.randn(30, 8, generator=torch.Generator().manual_seed(seed)) * 50
        assert 0 <= frechet_distance(a, a.flip(0)) < 1e-9


def test_refuses_what_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match=r"\(4, 3\) and \(4, 2\)"):
        frechet_distance(torch.zeros(4, 3), torch.zeros(4, 2))
    with pytest.raises(ValueError, match="at least two rows"):
        frechet_distance(torch.zeros(1, 3), torch.zeros(4, 3))
    with pytest.raises(ValueError, match="not finite"):
        frechet_distance(torch.full((4, 2), torch.nan), torch.zeros(4, 2))
    with pytest.raises(ValueError, match=r"\(3, 3\), \(2,\)"):
        gaussian_frechet(torch.zeros(2), torch.zeros(3, 3), torch.zeros(2), torch.zeros(2, 2))
