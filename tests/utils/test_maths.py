import decimal
import math

import numpy as np
import pytest
import torch

from k_diffusion.utils import maths


def test_gauss_legendre_is_exact_for_polynomials():
    for n in (1, 5, 24):
        rule = maths.gauss_legendre(n)
        for degree in range(2 * n):
            exact = 0.0 if degree % 2 else 2 / (degree + 1)
            assert abs(sum(w * x**degree for x, w in rule) - exact) <= 1e-14


def test_lagrange_integrals():
    nodes, start, end = [3.0, 2.2, 1.5], 1.5, 0.4
    weights = maths.lagrange_integrals(nodes, start, end, end - start)
    for power in range(3):
        exact = (end ** (power + 1) - start ** (power + 1)) / (power + 1)
        assert abs(sum(w * n**power for w, n in zip(weights, nodes, strict=True)) - exact) <= 1e-14
    weights = maths.lagrange_integrals([0.0, 1.0], 1.0, 3.0, math.e**3 - math.e, math.exp)
    exact = 2 * math.e**3  # of u exp(u): (u - 1) exp(u) from 1 to 3
    assert abs(weights[1] - exact) <= 1e-12


def test_solve_linear():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((4, 4)), rng.standard_normal(4)
    a[0, 0] = 0.0  # needs a pivot
    assert (
        np.abs(np.array(maths.solve_linear(a.tolist(), b.tolist())) - np.linalg.solve(a, b)).max()
        <= 1e-12
    )


def test_table_agrees_on_floats_and_tensors():
    table = maths.Table([-1.0, 0.0, 2.0], [5.0, 1.0, 9.0])
    points = [-7.0, -1.0, -0.25, 0.0, 1.0, 2.0, 9.0, -math.inf, math.inf]
    expected = [5.0, 5.0, 2.0, 1.0, 5.0, 9.0, 9.0, 5.0, 9.0]
    assert [table(p) for p in points] == expected
    for dtype in (torch.float32, torch.float64):
        assert table(torch.tensor(points, dtype=dtype)).tolist() == expected


def test_floats_and_tensors_have_one_formula():
    for function, points in [
        (maths.exp, [-800.0, 0.5, 800.0]), (maths.log, [0.0, 0.5, 3.0]), (maths.sqrt, [0.0, 2.0]),
        (maths.sin, [0.0, 2.0]), (lambda x: maths.clamp(x, 0.0, 1.0), [-1.0, 0.5, 3.0]),
    ]:  # fmt: skip
        on_tensor = function(torch.tensor(points, dtype=torch.float64)).tolist()
        assert [function(p) for p in points] == pytest.approx(on_tensor, rel=1e-15)


def test_fold_seed_separates_seeds_and_keys():
    seeds = {maths.fold_seed(s, *k) for s in range(200) for k in [(), (0,), (1,), (0, 0), (0, 1)]}
    assert len(seeds) == 1000
    assert all(0 <= s < 2**63 for s in seeds)
    assert maths.fold_seed(1, 2) != maths.fold_seed(2, 1)
    bits = np.array([[(maths.fold_seed(s) >> b) & 1 for b in range(63)] for s in range(2000)])
    assert np.abs(bits.mean(axis=0) - 0.5).max() < 0.05


def test_unknown_names_get_the_nearest():
    assert maths.nearest("Hein", ["euler", "heun"]) == "heun"
    assert maths.nearest("zzz", ["euler", "heun"]) is None
    assert maths.unknown("sampler", "zzz", ["a", "b"]) == "unknown sampler 'zzz'; known: a, b"


@pytest.mark.parametrize("k", range(6))
@pytest.mark.parametrize(
    "z", [-40.0, -2.0, -1.999, -1e-3, -1e-9, 0.0, 1e-12, 0.3, 1.999, 2.0, 30.0]
)
def test_phi_to_the_last_digits(k, z):
    """Against its power series in 80 decimal digits."""
    with decimal.localcontext() as context:
        context.prec = 80
        exact = decimal.Decimal(0)
        for n in range(400):
            exact += (
                decimal.Decimal(z) ** n / math.factorial(n + k)
                if n
                else 1 / decimal.Decimal(math.factorial(k))
            )
        assert abs(decimal.Decimal(maths.phi(k, z)) / exact - 1) <= decimal.Decimal("4e-15")


@pytest.mark.parametrize("nodes", [(0.0,), (-0.7, 0.0), (-3.0, -1.2, -0.5, 0.0), (0.0, 0.6)])
@pytest.mark.parametrize("z", [-9.0, -0.5, -1e-8, 1e-4, 2.0, 9.0])
def test_weights_of_exponential_adams(nodes, z):
    """The weights of 1, τ, τ²... are k! φ_k+1(z), as far as the nodes determine them."""
    weights = maths.phi_weights(nodes, z)
    assert math.fsum(weights) == pytest.approx(maths.phi(1, z), rel=1e-15)
    for k in range(len(nodes)):
        exact = math.factorial(k) * maths.phi(k + 1, z)
        moment = math.fsum(w * node**k for w, node in zip(weights, nodes, strict=True))
        assert abs(moment - exact) <= 1e-13 * max(map(abs, weights))


def test_lagrange_integrals_in_another_clock_and_in_pieces():
    """Of exp(3u) times the line through nodes in u²: by hand."""
    nodes = (0.3, 1.2)
    total = (math.exp(3 * 2.0) - math.exp(3 * 0.5)) / 3
    weights = maths.lagrange_integrals(
        nodes, 0.5, 2.0, total, lambda u: math.exp(3 * u), lambda u: u * u, pieces=3
    )

    def antiderivative(u):  # of exp(3u) u²
        return math.exp(3 * u) * (u * u / 3 - 2 * u / 9 + 2 / 27)

    first = antiderivative(2.0) - antiderivative(0.5)
    assert weights[0] * nodes[0] + weights[1] * nodes[1] == pytest.approx(first, rel=1e-13)
    assert sum(weights) == pytest.approx(total, rel=1e-15)
