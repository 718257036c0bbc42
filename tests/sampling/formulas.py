"""What the tests of formulas share: levels, a model, and a plan executed plainly."""

import math

import numpy as np
import pytest

from k_diffusion.sampling.plan import Combine

UNEVEN = (14.0, 9.0, 4.0, 2.5, 1.1, 0.4, 0.3, 0.0)
EVEN_RATIO = (16.0, 8.0, 4.0, 2.0, 1.0, 0.5, 0.25)
X = np.array([-20.0, -3.0, 1.0, 15.0])
GRIDS = pytest.mark.parametrize("sigmas", [UNEVEN, UNEVEN[:-1], UNEVEN[:2], EVEN_RATIO])


def model(x, sigma):
    """Any smooth function will do: formulas are compared, not accuracy."""
    return np.tanh(x / (1 + sigma)) + 0.1 * np.sin(x + sigma)


def run(plan, x=X, noise=()):
    """The plan, executed plainly."""
    values, given = {"x0": x}, iter(noise)
    for step in (*plan.steps, None):
        for op in step.operations if step else plan.last:
            if isinstance(op, Combine):
                values[op.name] = sum(c * values[n] for n, c in op.terms)
            else:
                values[op.name] = next(given)
        if step:
            answer = model(values[step.state], step.level.ratio)
            values[step.answers[0]] = answer
    return values[plan.result]


def close(plan, expected):
    assert np.abs(run(plan) - expected).max() <= 1e-12 * max(1.0, np.abs(expected).max())


def slope(x, sigma):
    return (x - model(x, sigma)) / sigma


def integral(f, a, b):
    """Gauss-Legendre with 100 points, by numpy."""
    x, w = np.polynomial.legendre.leggauss(100)
    return (
        (b - a) / 2 * sum(q * f((a + b) / 2 + (b - a) / 2 * p) for p, q in zip(x, w, strict=True))
    )


def lagrange(nodes, j, u):
    return math.prod((u - m) / (nodes[j] - m) for k, m in enumerate(nodes) if k != j)
