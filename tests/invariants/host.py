"""Plans run on the host in float64: exact moments on Gaussian data, exact maps on a mixture."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from scipy.integrate import quad
from scipy.optimize import brentq

from k_diffusion.sampling import FLOW, VE, VP, Level, Levels, Plan, Solver, make_plan
from k_diffusion.sampling.plan import Combine
from k_diffusion.utils.levels import Path

Array = np.ndarray
GRIDS = ("even", "uneven")


def execute(
    plan: Plan,
    x0: Array,
    denoise: Callable[[Array, Level], Any],
    noise: Callable[[int], Array] | None = None,
    watch: Callable[[Array, Level], None] | None = None,
) -> Array:
    """A reference engine of a few lines: runs a plan on arrays, dropping nothing.

    Where a solver takes two answers, one alone stands for both.
    """
    values: dict[str, Any] = {"x0": x0}
    drawn = 0

    def perform(operations: Sequence[Any]) -> None:
        nonlocal drawn
        for op in operations:
            if isinstance(op, Combine):
                values[op.name] = sum(c * values[name] for name, c in op.terms)
            else:
                assert noise is not None
                values[op.name] = noise(drawn)
                drawn += 1

    for step in plan.steps:
        perform(step.operations)
        state = values[step.state]
        if watch is not None:
            watch(state, step.level)
        answer = denoise(state, step.level)
        answers = answer if isinstance(answer, tuple) else (answer,) * len(step.answers)
        values.update(zip(step.answers, answers, strict=True))
    perform(plan.last)
    return values[plan.result]


def linear_form(plan: Plan, mean: float, variance: float, watch: Any = None) -> Array:
    """The final state as a vector of weights of (1, x0, z1, z2, ...), on N(mean, variance) data.

    Its best denoiser is affine, so means and variances come out exactly; `variance` 0 is one point.
    """
    size = 2 + len(plan.draws)

    def denoise(x: Array, level: Level) -> Array:
        total = level.alpha**2 * variance + level.sigma**2
        gain = level.alpha * variance / total if total else 0.0
        d = gain * x
        d[0] += mean * (1 - gain * level.alpha)
        return d

    unit = np.eye(size)
    return execute(plan, unit[1], denoise, lambda k: unit[2 + k], watch)


@lru_cache
def levels_between(
    n: int, grid: str, path: Path = VE, start: float = 2.0, end: float = 0.1
) -> Levels:
    """n intervals of sigma / alpha in [end, start]: even in log-SNR, or alternately 1 : 2 long."""
    weights = [1.0 if grid == "even" or k % 2 else 2.0 for k in range(n)]
    marks = np.concatenate([[0.0], np.cumsum(weights) / sum(weights)])
    snr = -np.log(start) + marks * (np.log(start) - np.log(end))
    return Levels([path.at(float(v)) for v in snr], path)


def _shrink(v: float, s: float, t: float, eta: float) -> float:
    """What the reverse diffusion with noise eta (0: the ODE) leaves of a displacement, on data of
    variance v, between two values of sigma / alpha, in units of alpha."""
    return ((v + t**2) / (v + s**2)) ** ((1 + eta**2) / 2)


def _er_shrink(v: float, s: float, t: float, eta: float) -> float:
    """The same for ER-SDE, with phi = u (exp(u^0.3) + 10): log of it is the integral of
    phi' / phi u² / (v + u²) du."""

    def rate(u: float) -> float:
        e = math.exp(u**0.3)
        return (1 / u + 0.3 * u**-0.7 * e / (e + 10)) * u**2 / (v + u**2)

    return math.exp(quad(rate, s, t, epsabs=0, epsrel=1e-12)[0])


def _restart_shrink(v: float, s: float, t: float, eta: float) -> float:
    """The same for restart with its default options, from 2 to 0.1 and once again."""
    return _shrink(v, s, t, 0.0) * _shrink(v, 2.0, 0.1, 0.0)


# Methods whose limit is not the reverse diffusion that their option eta (or none) says.
LIMITS = {
    "ddpm": lambda v, s, t, eta: _shrink(v, s, t, 1.0),
    "er_sde": _er_shrink,
    "restart": _restart_shrink,
}


def gaussian_error(plan: Plan, eta: float) -> float:
    """Largest error of the mean of a displaced start and of the standard deviation of a true one.

    On data N(m, v) the marginal variance is V = alpha² v + sigma². The reverse diffusion, with any
    noise, keeps it, and shrinks a displacement as `_shrink` says.
    """
    limit = LIMITS.get(plan.solver, _shrink)
    s, t = plan.levels[0], plan.levels[-1]
    worst = 0.0
    for mean, v in ((0.7, 0.2), (-0.4, 1.3)):
        form = linear_form(plan, mean, v)
        start, end = (level.alpha**2 * v + level.sigma**2 for level in (s, t))
        shrink = t.alpha / s.alpha * limit(v, s.ratio, t.ratio, eta)
        displaced = s.alpha * mean + 1.5
        mean_error = form[0] + form[1] * displaced - (t.alpha * mean + 1.5 * shrink)
        spread = math.sqrt(form[1] ** 2 * start + float(np.sum(form[2:] ** 2)))
        worst = max(worst, abs(mean_error), abs(spread - math.sqrt(end)))
    return worst


class Mixture:
    """A mixture of Gaussians on the line, whose probability-flow map is known by its quantiles."""

    weights = np.array([0.3, 0.5, 0.2])
    means = np.array([-1.0, 0.4, 1.5])
    variances = np.array([0.1, 0.25, 0.15])
    points = np.array([-2.2, -0.9, -0.1, 0.8, 2.4])

    def _parts(self, level: Level) -> tuple[Array, Array]:
        return level.alpha * self.means, level.alpha**2 * self.variances + level.sigma**2

    def denoise(self, x: Array, level: Level) -> Array:
        """E[x0 | x]."""
        centres, totals = self._parts(level)
        log_w = np.log(self.weights / np.sqrt(totals)) - (x[:, None] - centres) ** 2 / (2 * totals)
        w = np.exp(log_w - log_w.max(axis=1, keepdims=True))
        w /= w.sum(axis=1, keepdims=True)
        gains = level.alpha * self.variances / totals
        return (w * (self.means + gains * (x[:, None] - centres))).sum(axis=1)

    def _cdf(self, x: float, level: Level) -> float:
        centres, totals = self._parts(level)
        z = (x - centres) / np.sqrt(2 * totals)
        return float((self.weights * [0.5 * math.erfc(-v) for v in z]).sum())

    @lru_cache(maxsize=64)  # noqa: B019  (one instance, for the length of a test run)
    def target(self, s: Level, t: Level) -> Array:
        """Where the probability-flow ODE carries `points` (at unit alpha) from s to t."""
        ends = []
        for point in self.points:
            share = self._cdf(s.alpha * point, s)
            ends.append(
                brentq(lambda x, p=share: self._cdf(x, t) - p, -9, 9, xtol=1e-15, rtol=1e-15)
            )
        return np.array(ends)

    def error(self, plan: Plan) -> float:
        """Largest distance of the carried points from where they belong."""
        s, t = plan.levels[0], plan.levels[-1]
        ends = execute(plan, s.alpha * self.points, self.denoise)
        return float(np.abs(ends - self.target(s, t)).max())


MIXTURE = Mixture()


# Extrapolation over uneven steps by polynomials of high degree: slower to show its order.
FINER = {"sa_solver_predictor": (192, 384)}


def slopes(solver: Solver, sizes: Sequence[int] = (), **options: Any) -> dict[str, float]:
    """Measured orders by problem, grid and path: log2 of the error's fall when steps double, at the
    finest pair of grids whose errors stand above 1e-11."""
    sizes = sizes or FINER.get(solver.name, (12, 24, 48, 96, 192))
    eta = float(solver.options.get("eta", 0.0))
    found = {}
    for path in (VE, VP, FLOW):
        for grid in GRIDS:
            grids = [levels_between(n, grid, path) for n in sizes]
            problems = {"gaussian": lambda plan: gaussian_error(plan, eta)}
            if not solver.stochastic:
                problems["mixture"] = MIXTURE.error
            for problem, error in problems.items():
                fine, coarse = _finest_usable(solver, grids, options, error)
                found[f"{problem}, {grid}, {path}"] = math.log2(coarse / fine)
    return found


def _finest_usable(
    solver: Solver, grids: Sequence[Levels], options: Any, error: Callable[[Plan], float]
) -> list[float]:
    """The errors on the two finest of the grids; no plan is made for those that are coarser."""
    usable: list[float] = []
    for levels in reversed(grids):
        measured = error(make_plan(solver, levels, **options))  # made once: plans are cached
        if measured > 1e-11:
            usable.append(measured)
        if len(usable) == 2:
            break
    return usable
