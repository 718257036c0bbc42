"""Steps in half log-SNR, lambda = log(alpha / sigma): the ODE's linear part is solved exactly.

With data prediction d, x / sigma gains the integral of exp(lambda) d; with noise prediction eps,
x / alpha loses the integral of exp(-lambda) eps (Lu et al. 2022, arXiv:2206.00927, eq. 3.4, and
arXiv:2211.01095, section 4.1); with velocity prediction, x / (alpha + sigma) gains the integral of
eps - d over sigma / (alpha + sigma). The methods differ in how they interpolate what is predicted.
Into clean data (sigma = 0, lambda infinite) no interpolation reaches, and each takes one
first-order step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from math import ceil, exp, expm1, inf
from typing import Any

from k_diffusion.sampling.expr import Expr
from k_diffusion.sampling.solvers.linear import noise_in
from k_diffusion.utils.levels import Level
from k_diffusion.utils.maths import lagrange_integrals, phi_weights

LEAST_SHARE = 1e-3
"""Where an inner stage may lie at least, as a share of its step: the method divides by it, which
magnifies the rounding of a model's answers."""


def data_step(x: Expr, d: Expr, s: Level, t: Level) -> Expr:
    """The exact step for a constant data estimate; also DDIM, and Euler in sigma."""
    ratio = t.sigma / s.sigma
    return ratio * x + (t.alpha - s.alpha * ratio) * d


def noise_step(x: Expr, eps: Expr, s: Level, t: Level) -> Expr:
    """The exact step for a constant noise estimate: the same as `data_step`, by other terms."""
    ratio = t.alpha / s.alpha
    return ratio * x + (t.sigma - s.sigma * ratio) * eps


Estimate = tuple[Level, Any]
"""A level, and what was predicted there."""


class Prediction(ABC):
    """What a method takes for a polynomial between its nodes: the estimate of data, noise..."""

    @abstractmethod
    def estimate(self, x: Expr, d: Expr, s: Level) -> Expr:
        """What is predicted at x, from the data estimate d."""

    @abstractmethod
    def scale(self, s: Level, t: Level) -> float:
        """What x is multiplied with on the way from s to t."""

    @abstractmethod
    def constant(self, s: Level, t: Level) -> float:
        """The weight of a constant estimate; t may be clean data."""

    @abstractmethod
    def weights(self, nodes: Sequence[Level], s: Level, t: Level) -> list[float]:
        """The weights of estimates at `nodes`, for the polynomial through them; t is not clean."""

    def step(self, x: Expr, estimates: Sequence[Estimate], s: Level, t: Level) -> Expr:
        """From s to t by the polynomial through the estimates; into clean data by the last."""
        if len(estimates) == 1 or not t.sigma > 0:
            return self.scale(s, t) * x + self.constant(s, t) * estimates[-1][1]
        weights = self.weights([node for node, _ in estimates], s, t)
        parts = (w * e for w, (_, e) in zip(weights, estimates, strict=True))
        return self.scale(s, t) * x + sum(parts)


class LogSnrPrediction(Prediction):
    """An estimate that is a polynomial in half log-SNR, under an exponential weight.

    x_t = scale · x + gain · h · (integral of exp((1 - τ) z) estimate over τ in [0, 1]), h being the
    step in half log-SNR and z = exponent · h.
    """

    exponent: float

    @abstractmethod
    def gain(self, t: Level) -> float:
        """The factor of the integral, at the end t of a step."""

    def weights(self, nodes: Sequence[Level], s: Level, t: Level) -> list[float]:
        h = t.half_log_snr - s.half_log_snr
        shares = [(node.half_log_snr - s.half_log_snr) / h for node in nodes]
        return [self.gain(t) * h * w for w in phi_weights(shares, self.exponent * h)]


class _Data(LogSnrPrediction):
    exponent = -1.0

    def estimate(self, x: Expr, d: Expr, s: Level) -> Expr:
        return d

    def scale(self, s: Level, t: Level) -> float:
        return t.sigma / s.sigma

    def constant(self, s: Level, t: Level) -> float:
        if not t.sigma > 0:
            return t.alpha
        return -t.alpha * expm1(s.half_log_snr - t.half_log_snr)

    def gain(self, t: Level) -> float:
        return t.alpha


class _Noise(LogSnrPrediction):
    exponent = 1.0

    def estimate(self, x: Expr, d: Expr, s: Level) -> Expr:
        return noise_in(x, d, s)

    def scale(self, s: Level, t: Level) -> float:
        return t.alpha / s.alpha

    def constant(self, s: Level, t: Level) -> float:
        if not t.sigma > 0:
            return -s.sigma * t.alpha / s.alpha
        return -t.sigma * expm1(t.half_log_snr - s.half_log_snr)

    def gain(self, t: Level) -> float:
        return -t.sigma


class _Velocity(Prediction):
    def estimate(self, x: Expr, d: Expr, s: Level) -> Expr:
        return (x - (s.alpha + s.sigma) * d) / s.sigma  # eps - d

    def scale(self, s: Level, t: Level) -> float:
        return (t.alpha + t.sigma) / (s.alpha + s.sigma)

    def constant(self, s: Level, t: Level) -> float:
        return (t.alpha + t.sigma) * (_flow_time(t) - _flow_time(s))

    def weights(self, nodes: Sequence[Level], s: Level, t: Level) -> list[float]:
        start, end = s.half_log_snr, t.half_log_snr
        integrals = lagrange_integrals(
            [node.half_log_snr for node in nodes],
            start,
            end,
            _flow_time(t) - _flow_time(s),
            _flow_time_slope,
            pieces=ceil(abs(end - start) / 4),  # the slope's nearest pole is pi away
        )
        return [(t.alpha + t.sigma) * w for w in integrals]


def _flow_time(level: Level) -> float:
    """sigma / (alpha + sigma): the sigma of the same level in flow coordinates."""
    return level.sigma / (level.alpha + level.sigma)


def _flow_time_slope(half_log_snr: float) -> float:
    """Its derivative by half log-SNR, -u (1 - u)."""
    return -1 / (2 + exp(half_log_snr) + exp(-half_log_snr))


DATA = _Data()
"""The data estimate d, a polynomial in half log-SNR."""
NOISE = _Noise()
"""The noise estimate eps, a polynomial in half log-SNR."""
VELOCITY = _Velocity()
"""The velocity eps - d of the straight line from data to noise, a polynomial in half log-SNR: what
flow models predict, on any path."""


def _node(estimate: Estimate) -> float:
    return estimate[0].half_log_snr


def usable(levels: Any, node: float, s: Level, t: Level) -> bool:
    """Whether an estimate at half log-SNR `node` may be extrapolated over the step from s to t.

    Not into clean data; else always, on levels as they are laid. Churn goes back to noisier levels,
    near or beyond the earlier nodes, where a polynomial's weights have no bound: there it must lie
    half a step before.
    """
    if not (t.sigma > 0 and levels.churned):
        return t.sigma > 0
    return s.half_log_snr - node >= (t.half_log_snr - s.half_log_snr) / 2


def spaced(
    past: list[Any], levels: Any, s: Level, t: Level, node: Callable[[Any], float] = _node
) -> list[Any]:
    """Those of the remembered estimates, oldest first, that may be extrapolated together: each
    `usable`, and under churn as far from the next newer one as from s."""
    if not levels.churned:
        return past
    kept: list[Any] = []
    far = (t.half_log_snr - s.half_log_snr) / 2 if t.sigma > 0 else inf
    newest = s.half_log_snr
    for estimate in reversed(past):
        if newest - node(estimate) >= far:
            kept.insert(0, estimate)
            newest = node(estimate)
    return kept


def recent(past: list[Estimate], levels: Any, s: Level, t: Level, count: int) -> list[Estimate]:
    """The last `count` of the estimates before s that may be extrapolated; none into clean data."""
    if not t.sigma > 0:
        return []
    kept = spaced(past, levels, s, t)
    return kept[max(len(kept) - count, 0) :]


def share(level: Level, s: Level, t: Level) -> float:
    """How far along the step from s to t a level lies, in half log-SNR."""
    return (level.half_log_snr - s.half_log_snr) / (t.half_log_snr - s.half_log_snr)


def orders(levels: Any, order: int, end_order: int = 0, falls: bool = True) -> list[int]:
    """The order to use in each interval: at the end it falls by one in each, to `end_order` in the
    last one.

    High orders extrapolate badly over last steps that are long in log-SNR. With end_order 0 the
    order falls only on levels down to clean data (to 1), and only where it `falls` by itself.
    """
    if end_order < 0:
        raise ValueError(f"end_order must be 0 or more, got {end_order}")
    n = len(levels) - 1
    last = end_order or (1 if falls and not levels[-1].sigma > 0 else order)
    return [min(order, last + n - 1 - i) for i in range(n)]


def third_order_terms(
    d: Expr, h: float, past: list[tuple[float, Expr]], lam: float
) -> tuple[Expr, Expr]:
    """First and second differences of the data estimate in units of h, from the last three."""
    (l1, d1), (l2, d2) = past[-1], past[-2]
    r0, r1 = (lam - l1) / h, (l1 - l2) / h
    first, second = (d - d1) / r0, (d1 - d2) / r1
    return (
        first + r0 / (r0 + r1) * (first - second),
        (first - second) / (r0 + r1),
    )
