import math
import random

import pytest
from scipy import special

from k_diffusion.utils.special import incomplete_beta, inverse_incomplete_beta

SHAPES = [(0.6, 0.6), (0.1, 0.1), (0.5, 3.0), (1.0, 1.0), (2.0, 0.3), (30.0, 4.0), (7.5, 40.0)]


@pytest.mark.parametrize(("a", "b"), SHAPES)
def test_incomplete_beta_is_scipy_s(a, b):
    xs = [i / 200 for i in range(201)] + [1e-300, 1e-12, 1e-5, 1 - 1e-5, 1 - 1e-12]
    assert max(abs(incomplete_beta(a, b, x) - special.betainc(a, b, x)) for x in xs) <= 1e-13


@pytest.mark.parametrize(("a", "b"), SHAPES)
def test_the_inverse_is_scipy_s(a, b):
    shares = [i / 1000 for i in range(1001)] + [1e-12, 1e-5, 1 - 1e-5, 1 - 1e-12]
    found = [inverse_incomplete_beta(a, b, share) for share in shares]
    expected = [special.betaincinv(a, b, share) for share in shares]
    assert max(abs(x - e) for x, e in zip(found, expected, strict=True)) <= 1e-11
    assert (found[0], found[1000]) == (0.0, 1.0)


def test_closed_forms():
    """Beta(1, b) is 1 - (1 - x)^b; Beta(1/2, 1/2) the arcsine law."""
    rng = random.Random(0)
    for _ in range(200):
        x, b = rng.random(), rng.uniform(0.2, 20)
        assert incomplete_beta(1.0, b, x) == pytest.approx(1 - (1 - x) ** b, abs=1e-14)
        arcsine = 2 / math.pi * math.asin(math.sqrt(x))
        assert incomplete_beta(0.5, 0.5, x) == pytest.approx(arcsine, abs=1e-14)
        assert inverse_incomplete_beta(0.5, 0.5, arcsine) == pytest.approx(x, abs=1e-13)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: incomplete_beta(0.0, 1.0, 0.5), "a and b must be above 0, got 0.0 and 1.0"),
        (lambda: incomplete_beta(1.0, 1.0, 1.5), r"x must lie in \[0, 1\], got 1.5"),
        (lambda: inverse_incomplete_beta(1.0, 1.0, -0.1), r"share must lie in \[0, 1\], got -0.1"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
