"""The kernel distance against sums over pairs, and its error against many repetitions."""

import itertools

import numpy as np
import pytest
import torch

from k_diffusion.evaluation import kernel_distance, kernel_distance_of_subsets, kid, squared_mmd


def sets(m: int, n: int, size: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(m, size, generator=generator, dtype=torch.float64)
    b = 0.7 * torch.randn(n, size, generator=generator, dtype=torch.float64) + 0.4
    return a, b


def kernel(x: np.ndarray, y: np.ndarray) -> float:
    return float((np.dot(x, y) / len(x) + 1) ** 3)


def slow(a: torch.Tensor, b: torch.Tensor) -> float:
    x, y = a.numpy(), b.numpy()
    within = [
        np.mean([kernel(p, q) for p, q in itertools.permutations(rows, 2)]) for rows in (x, y)
    ]
    return float(sum(within) - 2 * np.mean([kernel(p, q) for p in x for q in y]))


def slow_error(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of the mean over pairs, by what each row adds to it."""
    variance = 0.0
    for one, other in ((a.tolist(), b.tolist()), (b.tolist(), a.tolist())):
        rows = [
            np.mean([kernel(p, q) for j, q in enumerate(one) if j != i])
            - np.mean([kernel(p, q) for q in other])
            for i, p in enumerate(one)
        ]
        variance += 4 * np.var(rows, ddof=1) / len(rows)
    return float(variance**0.5)


@pytest.mark.parametrize(("m", "n"), [(2, 2), (17, 30), (40, 23)])
@pytest.mark.parametrize("chunk", [1, 7, 1024])
def test_all_pairs_in_any_chunks(m: int, n: int, chunk: int) -> None:
    a, b = sets(m, n)
    found = kernel_distance(a, b, chunk=chunk)
    assert abs(found.value - slow(a, b)) < 1e-12
    assert abs(found.error - slow_error(a, b)) < 1e-12
    assert abs(float(squared_mmd(a, b)) - slow(a, b)) < 1e-12


def test_two_points_each_by_hand() -> None:
    # One feature: (1 * 2 + 1)^3 + (0 * 0 + 1)^3 - 2 * (2 * 1 + 2 * 1) / 4 = 27 + 1 - 2
    a, b = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [0.0]])
    assert kernel_distance(a, b).value == 26


def test_the_estimate_is_unbiased_and_its_error_true() -> None:
    found = [kernel_distance(*sets(60, 45, seed=seed)) for seed in range(400)]
    values = torch.tensor([f.value for f in found], dtype=torch.float64)
    errors = torch.tensor([f.error for f in found], dtype=torch.float64)
    # E (s + 1)^3 of s = x.y / 5 by its mean, variance and third central moment, with independent
    # entries of mean 0 and variance 1, or of 0.4 and 0.49: 1.6 + 1.84635824 - 2 * 1.39.
    true = 0.66635824
    assert abs(float(values.mean()) - true) < 4 * float(values.std()) / 20
    assert abs(float(errors.square().mean().sqrt() / values.std()) - 1) < 0.15
    same = [
        kernel_distance(sets(60, 2, seed=s)[0], sets(45, 2, seed=s + 900)[0]) for s in range(99)
    ]
    assert min(f.value for f in same) < 0 < max(f.value for f in same)  # of no distance


def test_subsets() -> None:
    a, b = sets(50, 70)
    found = kernel_distance_of_subsets(a, b, subsets=30, size=20)
    assert found == kernel_distance_of_subsets(a, b, subsets=30, size=20)
    assert found != kernel_distance_of_subsets(a, b, subsets=30, size=20, seed=1)
    assert abs(found.value - kernel_distance(a, b).value) < 3 * found.error / 30**0.5
    draws = torch.Generator().manual_seed(0)
    single = [
        kernel_distance(*(x[torch.randperm(len(x), generator=draws)[:20]] for x in (a, b))).value
        for _ in range(30)
    ]
    assert abs(found.value - np.mean(single)) < 1e-12
    assert abs(found.error - np.std(single, ddof=1)) < 1e-12
    whole = kernel_distance_of_subsets(a, b[:50], subsets=2, size=50)
    assert abs(whole.value - kernel_distance(a, b[:50]).value) < 1e-12
    assert whole.error < 1e-12


def test_established_partitions() -> None:
    a, b = sets(20, 31)
    parts = [slow(a[:7], b[:10]), slow(a[7:13], b[10:21]), slow(a[13:], b[21:])]
    assert abs(float(kid(a, b, max_size=11)) - np.mean(parts)) < 1e-12
    assert abs(float(kid(a, b)) - slow(a, b)) < 1e-12
    stacked = squared_mmd(torch.stack([a, a + 1]), torch.stack([b, b]))
    assert stacked.shape == (2,)
    assert abs(float(stacked[1]) - slow(a + 1, b)) < 1e-12


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"\(1, 2\) and \(3, 2\)"):
        kernel_distance(torch.zeros(1, 2), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="not finite"):
        kernel_distance(torch.full((3, 2), torch.nan), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="not finite"):
        kernel_distance(torch.zeros(3, 2), torch.full((3, 2), torch.inf))
    with pytest.raises(ValueError, match="size = 9, but the sets have 3 and 4 rows: give 2 to 3"):
        kernel_distance_of_subsets(torch.zeros(3, 2), torch.zeros(4, 2), size=9)
    with pytest.raises(ValueError, match="subsets = 1"):
        kernel_distance_of_subsets(torch.zeros(3, 2), torch.zeros(4, 2), size=2, subsets=1)
    with pytest.raises(ValueError, match="sets of 1 and 4 rows"):
        squared_mmd(torch.zeros(1, 2), torch.zeros(4, 2))
