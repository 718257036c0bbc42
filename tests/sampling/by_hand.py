"""What formulas written out by hand are compared with: plans on float64 arrays, with noise that is
known."""

import math

import numpy as np
import torch
from scipy.integrate import quad

from k_diffusion.sampling import (
    Levels,
    Run,
    make_plan,
)  # fmt: skip

SIGMAS = [10.0, 4.0, 2.5, 0.9, 0.3, 0.1, 0.0]
X = np.array([-12.0, -1.0, 0.5, 7.0])
Z = np.random.default_rng(0).standard_normal((99, X.size))


def d_of(x, sigma):
    """Smooth and nonlinear."""
    return np.tanh(x / (1 + sigma)) / (1 + 0.2 * sigma)


def u_of(x, sigma):
    return 0.7 * np.tanh(x / (2 + sigma)) + 0.1


def ours(name, levels=None, pair=False, churn=None, x=X, carry=False, **options):
    """The plan on float64 arrays with Z as its noise, one a draw, in the solver's order; with
    `carry` the denoiser is the same function of x / alpha and sigma / alpha on every path."""
    levels = Levels.from_sigmas(SIGMAS) if levels is None else levels
    plan = make_plan(name, levels, churn=churn, intervals=True, **options)
    drawn = iter(torch.from_numpy(Z))

    class Source:
        def draw(self, interval):
            return next(drawn)

    run = Run(plan, torch.from_numpy(x), Source())
    while not run.done:
        x, sigma = run.x.numpy(), run.sigma[0].item()
        alpha = levels.path.alpha(sigma) if carry else 1.0
        x, sigma = x / alpha, sigma / alpha
        answers = (d_of(x, sigma), u_of(x, sigma) if pair else d_of(x, sigma))
        run.advance(*map(torch.from_numpy, answers[: plan.outputs]))
    return run.result.numpy()


def check(expected, *args, **kwargs):
    assert np.abs(ours(*args, **kwargs) - expected).max() <= 1e-12


def down_up(s, t, eta):
    up = min(t, eta * math.sqrt(t**2 * (s**2 - t**2) / s**2))
    return math.sqrt(t**2 - up**2), up


def adams(nodes, values, s, t, rate):
    """The integral of (1 + rate) exp((1 + rate) (u - lambda_t)) P(u) du, by scipy."""
    start, end = -math.log(s), -math.log(t)
    total = 0
    for j, value in enumerate(values):

        def basis(u, j=j):
            p = math.prod((u - b) / (nodes[j] - b) for k, b in enumerate(nodes) if k != j)
            return (1 + rate) * math.exp((1 + rate) * (u - end)) * p

        total = total + quad(basis, start, end, epsabs=1e-13, epsrel=1e-13)[0] * value
    return total
