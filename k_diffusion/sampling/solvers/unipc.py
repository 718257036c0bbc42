"""UniPC: a multistep predictor whose result is corrected by the answer that the next step needs
anyway (Zhao et al. 2023, arXiv:2302.04867, algorithms 1 and 2).

From two unknown weights on they are those of the polynomial through the estimates, whatever B(h);
where there is one, the authors set it to B(h) / 2, with B1 = h or B2 = exp(h) - 1 (the sign of h
being that of the prediction).

Prediction and correction begin at the same old state, so their difference is made of estimates
alone: what is corrected is the queried state itself, and no other is held. Noise added to it, or
an edit of it, stays.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from math import expm1, fsum
from typing import Any

from k_diffusion.sampling.expr import Expr
from k_diffusion.sampling.registry import Trace, solver
from k_diffusion.sampling.solvers.exponential import (
    DATA,
    NOISE,
    Estimate,
    LogSnrPrediction,
    orders,
    recent,
    share,
)
from k_diffusion.utils.levels import Level

SOURCE = "Zhao et al. 2023, arXiv:2302.04867, algorithms 1 and 2"
B = Callable[[float], float] | None
"""B(h), or None for the weights of the line through the two estimates."""


def b1(z: float) -> float:
    """B1(h) = h."""
    return z


def b2(z: float) -> float:
    """B2(h) = exp(h) - 1."""
    return expm1(z)


def _weights(
    prediction: LogSnrPrediction, b: B, nodes: Sequence[Level], origin: int, s: Level, t: Level
) -> list[float]:
    """Weights of the estimates at `nodes` for the step from s, nodes[origin], to t."""
    if len(nodes) == 1 or not t.sigma > 0:
        weights = [0.0] * len(nodes)
        weights[origin] = prediction.constant(s, t)
        return weights
    if len(nodes) > 2 or b is None:
        return prediction.weights(nodes, s, t)
    h = t.half_log_snr - s.half_log_snr
    along = share(nodes[1 - origin], s, t)
    z = prediction.exponent * h
    change = prediction.gain(t) * b(z) / prediction.exponent / (2 * along)
    return [change, prediction.constant(s, t) - change][:: 1 if origin else -1]


def _predict(
    prediction: LogSnrPrediction, b: B, x: Expr, levels: Any, order: int, end_order: int
) -> Generator[tuple[Expr, Level], Any, Expr]:
    past: list[Estimate] = []
    for (s, t), k in zip(levels.pairs(), orders(levels, order, end_order), strict=True):
        d = yield x, s
        past = [*recent(past, levels, s, t, k - 1), (s, prediction.estimate(x, d, s))]
        weights = _weights(prediction, b, [p for p, _ in past], len(past) - 1, s, t)
        parts = (w * e for w, (_, e) in zip(weights, past, strict=True))
        x = prediction.scale(s, t) * x + sum(parts)
    return x


def predict_and_correct(
    prediction: LogSnrPrediction,
    b: B,
    x: Expr,
    levels: Any,
    order: int,
    end_order: int,
    more: int = 1,
) -> Generator[tuple[Expr, Level], Any, Expr]:
    """Multistep PEC: predicts by the last `order` estimates, and corrects by `order + more` of
    them, the last of which is the answer for the predicted state; by one more than predicted where
    the order falls."""
    past: list[Estimate] = []
    predicted: list[float] = []
    step: tuple[Level, Level] | None = None
    used = 0
    for (s, t), k in zip(levels.pairs(), orders(levels, order, end_order), strict=True):
        d = yield x, s
        e = prediction.estimate(x, d, s)
        # The answer may be at a noisier level than the prediction's (churn): it corrects where it
        # still lies in the latter half of the step, and is not needed nearer to the old answer.
        if step is not None and share(s, *step) >= 0.5:
            skipped = max(len(past) - max(min(order + more, used + 1) - 1, 1), 0)
            nodes = [*(p for p, _ in past[skipped:]), s]
            better = _weights(prediction, b, nodes, len(nodes) - 2, *step)
            better = [0.0] * skipped + better
            changes = [w - v for w, v in zip(better, predicted, strict=False)]
            changes.append(-fsum(changes))  # so that equal estimates correct nothing, exactly
            estimates = [*(q for _, q in past), e]
            parts = (c * q for c, q in zip(changes, estimates, strict=True))
            x = x + (s.alpha / step[1].alpha) * sum(parts)
        past, used = [*recent(past, levels, s, t, k - 1), (s, e)], k
        predicted = _weights(prediction, b, [p for p, _ in past], len(past) - 1, s, t)
        parts = (w * q for w, (_, q) in zip(predicted, past, strict=True))
        x = prediction.scale(s, t) * x + sum(parts)
        step = s, t
    return x


@solver(order={1: 2, 2: 3, 3: 3}, source=f"{SOURCE}, B2(h)")
def unipc(x: Expr, levels: Any, noise: Any, *, order: int = 3, end_order: int = 0) -> Trace:
    """UniPC on data estimates: a multistep predictor, corrected by the next step's answer.

    The order grows by one with each step from 1 on, and falls again on the way to clean data
    (sigma = 0); with `end_order`, to that in the last interval, on any levels. The last state is
    predicted only, and with it the order given.
    """
    return (yield from predict_and_correct(DATA, b2, x, levels, order, end_order))


@solver(order={1: 2, 2: 3, 3: 3}, source=f"{SOURCE}, B1(h)")
def unipc_bh1(x: Expr, levels: Any, noise: Any, *, order: int = 3, end_order: int = 0) -> Trace:
    """UniPC on data estimates with B1(h): other than `unipc` in its first steps and order 1."""
    return (yield from predict_and_correct(DATA, b1, x, levels, order, end_order))


@solver(order={1: 2, 2: 3, 3: 3, 4: 3}, source=f"{SOURCE}, B2(h), noise prediction")
def unipc_noise(x: Expr, levels: Any, noise: Any, *, order: int = 3, end_order: int = 0) -> Trace:
    """UniPC on noise estimates: a multistep predictor, corrected by the next step's answer."""
    return (yield from predict_and_correct(NOISE, b2, x, levels, order, end_order))


@solver(order={1: 1, 2: 2, 3: 2}, source=f"{SOURCE}, B2(h), predictor alone")
def unip(x: Expr, levels: Any, noise: Any, *, order: int = 3, end_order: int = 0) -> Trace:
    """UniP on data estimates: the predictor of `unipc` alone, of order 2 at most by its start."""
    return (yield from _predict(DATA, b2, x, levels, order, end_order))
