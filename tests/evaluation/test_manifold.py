"""Precision, recall, density and coverage on made sets, and against loops over all pairs."""

import numpy as np
import pytest
import torch

from k_diffusion.evaluation import density_coverage, distances, precision_recall
from k_diffusion.evaluation.manifold import reach


def points(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None]


def cloud(count: int, seed: int, mean: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 6, generator=generator, dtype=torch.float64) + mean


def slow(real: torch.Tensor, made: torch.Tensor, k: int) -> tuple[float, ...]:
    """Precision, recall, density, coverage, one pair at a time."""
    x, y = real.numpy(), made.numpy()

    def radius(rows: np.ndarray, i: int) -> float:
        return float(
            sorted(np.linalg.norm(rows[i] - q) for j, q in enumerate(rows) if j != i)[k - 1]
        )

    balls, theirs = [radius(x, i) for i in range(len(x))], [radius(y, j) for j in range(len(y))]
    inside = np.array(
        [[np.linalg.norm(q - p) <= r for p, r in zip(x, balls, strict=True)] for q in y]
    )
    reached = np.array(
        [[np.linalg.norm(p - q) <= r for q, r in zip(y, theirs, strict=True)] for p in x]
    )
    density = inside.sum() / (k * len(y))
    return inside.any(1).mean(), reached.any(1).mean(), density, inside.any(0).mean()


@pytest.mark.parametrize(("m", "n", "k"), [(40, 40, 3), (40, 25, 5), (23, 60, 1)])
@pytest.mark.parametrize("chunk", [7, 256])
def test_against_all_pairs(m: int, n: int, k: int, chunk: int) -> None:
    real, made = cloud(m, 1), cloud(n, 2, mean=0.4)
    found = (
        *precision_recall(real, made, k=k, chunk=chunk),
        *density_coverage(real, made, k=k, chunk=chunk),
    )
    assert np.abs(np.array(found) - slow(real, made, k)).max() < 1e-12
    # Far away from the origin, where squares differ in no digit of the distances.
    found = (
        *precision_recall(real + 1e7, made + 1e7, k=k, chunk=chunk),
        *density_coverage(real + 1e7, made + 1e7, k=k, chunk=chunk),
    )
    assert np.abs(np.array(found) - slow(real + 1e7, made + 1e7, k)).max() < 1e-12


def test_two_clouds_far_apart_from_one_another() -> None:
    # No centre is near to both: the squares of their norms hold no digit of the distances within.
    def both(seed: int) -> torch.Tensor:
        return torch.cat([1e-3 * cloud(20, seed) + 1e7, 1e-3 * cloud(20, seed + 9) - 1e7])

    real, made = both(1), both(2)
    found = (*precision_recall(real, made), *density_coverage(real, made, k=3))
    assert np.abs(np.array(found) - slow(real, made, 3)).max() < 1e-12
    assert found[0] < 1


def test_far_from_the_origin_little_is_computed_anew() -> None:
    for _, block in distances.Distances(cloud(40, 1) + 1e6, cloud(40, 2) + 1e6):
        assert float(block.slack.max()) < 1e-11


def test_known_answers() -> None:
    # Radii of the data by the nearest other: 1, 1, 2, 3 (of 0, 1, 3, 6).
    real = points(0, 1, 3, 6)
    made = points(-0.9, 2, 20, 21)  # their radii: 2.9, 2.9, 1, 1
    found = precision_recall(real, made, k=1)
    # -0.9 lies in 0's ball, 2 in those of 1 and 3; 0, 1 and 3 lie in the balls of -0.9 and 2.
    assert found == (0.5, 0.75)
    # Balls held: 1 of -0.9 and 2 of 2 (that of 6 begins at 3), over 4 samples; of 0, 1 and 3.
    assert density_coverage(real, made, k=1) == (3 / 4, 3 / 4)


def test_a_boundary_belongs_to_the_ball() -> None:
    real = points(0, 1, 3, 6)
    assert precision_recall(real, points(-1, 9, 40, 80), k=1).precision == 0.5
    assert precision_recall(real, points(-1.0000001, 9.0000001, 40, 80), k=1).precision == 0
    assert density_coverage(real, points(9.0), k=1) == (1, 0.25)


def test_one_mode_of_two_and_two_modes_of_one() -> None:
    left, right = cloud(80, 1), cloud(80, 2) + 50
    both = torch.cat([left, right])
    dropped = precision_recall(both, cloud(160, 3))
    assert dropped.precision > 0.9
    assert dropped.recall < 0.51
    assert density_coverage(both, cloud(160, 3)).coverage <= 0.5
    added = precision_recall(left, torch.cat([cloud(80, 3), right]))
    assert added.precision <= 0.5
    assert added.recall > 0.7


def test_sets_far_apart_and_the_same_set() -> None:
    real = cloud(50, 1)
    assert precision_recall(real, real + 1000) == (0, 0)
    assert density_coverage(real, real + 1000) == (0, 0)
    # A copy lies in its original's ball; each ball reaches k others, the k-th on its boundary.
    assert precision_recall(real, real.clone()) == (1, 1)
    assert density_coverage(real, real.clone(), k=5) == (6 / 5, 1)
    # float32 features whose norms are large: nothing is lost between copies.
    large = (real * 3 + 5000).float()
    assert density_coverage(large, large.clone(), k=5) == (6 / 5, 1)


def test_expected_figures_of_one_distribution() -> None:
    found = [density_coverage(cloud(200, s), cloud(200, s + 500)) for s in range(12)]
    density, coverage = np.mean(found, axis=0)
    assert abs(density - 1) < 0.05
    # 1 - (199 ... 195) / (399 ... 395), Naeem et al. 2020, lemma 2
    expected = 1 - np.prod([(200 - i) / (400 - i) for i in range(1, 6)])
    assert abs(coverage - expected) < 0.02


def test_the_papers_neighbours_are_the_usual_ones() -> None:
    real, made = cloud(60, 1), cloud(50, 2) * 1.3
    for measure, k in ((precision_recall, 3), (density_coverage, 5)):
        found = [measure(real, made, k=n) for n in (k - 1, k, k + 1)]
        assert measure(real, made) == found[1] != found[0]
        assert found[1] != found[2]


def test_doubled_points_have_no_reach() -> None:
    assert reach(points(1, 1, 1, 5), 2).tolist() == [0, 0, 0, 4]
    assert precision_recall(points(1, 1, 5), points(1, 1, 2), k=1).precision == 1


def test_the_direct_formula_in_small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    real, made = cloud(40, 1) + 1e7, cloud(25, 2) + 1e7
    whole = precision_recall(real, made)
    monkeypatch.setattr(distances, "PIECE", 20)
    assert precision_recall(real, made) == whole


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"3 data and 9 samples have no 3 neighbours"):
        precision_recall(torch.zeros(3, 2), torch.zeros(9, 2))
    with pytest.raises(ValueError, match=r"\(9, 2\) and \(9, 3\)"):
        density_coverage(torch.zeros(9, 2), torch.zeros(9, 3))
    with pytest.raises(ValueError, match="not finite"):
        precision_recall(torch.zeros(9, 2), torch.full((9, 2), torch.nan))
    with pytest.raises(ValueError, match="not finite"):
        precision_recall(torch.full((9, 2), torch.inf), torch.zeros(9, 2))
