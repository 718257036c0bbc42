"""Guidance by two estimates: one to go to, one to go away from.

The second is the same model's without its condition or with a negative one (classifier-free
guidance), that of a lesser model (autoguidance), or of the model with its attention spoilt
(perturbed-attention guidance); a `Rule` makes a guided estimate of both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from k_diffusion.denoiser import call_of, make_denoiser, mark_call
from k_diffusion.guidance.base import (
    Interval,
    Scale,
    Wrapper,
    check_scale,
    noise_to_signal,
    per_sample_scale,
)
from k_diffusion.guidance.held import (
    Held,
    Holder,
    Keywords,
    beside,
    bound_rows,
    keywords_of,
    without,
)
from k_diffusion.guidance.on_path import OnPath, with_path
from k_diffusion.guidance.rules import Linear, Pair, Rule

Null = Mapping[str, Any] | Callable[[Mapping[str, Any]], Mapping[str, Any]] | None
"""What a model is told instead of the condition: the keywords that differ (None: not told), or a
function of the condition that gives all keywords; None: what the network calls no condition."""


class Second(Protocol):
    """Where the second estimate comes from."""

    def __call__(
        self, denoiser: Any, x: Tensor, sigma: Tensor, condition: Keywords
    ) -> tuple[Tensor, Tensor]:
        """The first and the second estimate, shape of x each.

        Args:
            denoiser: makes the first one.
            x: noisy data, shape (B, ...).
            sigma: noise standard deviations, shape (B,).
            condition: keyword arguments of the first.
        """
        ...


class Contrast(Wrapper):
    """A guided Denoiser: a rule on two estimates, at the levels in an interval.

    Outside the interval there is no guidance: the second estimate is not made where the host knows
    the level, as in all runs of fixed steps; elsewhere it has no weight.

    Args:
        denoiser: makes the first estimate.
        second: makes both; see `Second`.
        scale: w of the rule: a number, one a sample, a function of sigma / alpha, or the name of a
            keyword; see `Scale`.
        rule: what makes the guided estimate; None: `Linear`.
        interval: bounds of sigma / alpha.
        pair: return the guided estimate and the second one, for the CFG++ solvers. Outside the
            interval that is the first one twice.

    Raises:
        TypeError, ValueError: a scale or an interval that is none.
    """

    def __init__(
        self,
        denoiser: Any,
        second: Second,
        scale: Scale,
        *,
        rule: Rule | None = None,
        interval: tuple[float, float] | None = None,
        pair: bool = False,
    ) -> None:
        super().__init__(denoiser)
        check_scale("scale", scale)
        self.second, self.scale, self.rule = second, scale, rule or Linear()
        self.interval = Interval.of(interval)
        self.pair = pair

    def held(self) -> tuple[Held, ...]:
        """See `Holder`."""
        return (Held(self, "scale"),)

    def inside(self) -> tuple[Any, ...]:
        """See `Holder`."""
        return (self.denoiser, self.second)

    def models(self) -> tuple[Any, ...]:
        """The denoiser, and the one that the second estimate is made with, if it is another."""
        other = getattr(self.second, "denoiser", None)
        return (self.denoiser,) if other is None else (self.denoiser, other)

    @property
    def float64_sigma(self) -> bool:
        """Whether one of these wants sigma in float64."""
        return any(getattr(model, "float64_sigma", False) for model in self.models())

    def check_condition(self, batch: int, **condition: Any) -> None:
        """Refuses by name what either cannot take."""
        super().check_condition(batch, **condition)
        for other in self.models()[1:]:
            check = getattr(other, "check_condition", None)
            if check is not None:
                check(batch, **self.passed(condition, other))

    def __call__(self, x: Tensor, sigma: Tensor, **condition: Any) -> Any:
        """The guided estimate of x0, or a pair; see above."""
        inside = self.interval.holds(call_of(sigma))
        if inside is False or (_is_one(self.scale) and not self.pair):
            d = self.denoiser(x, sigma, **self.passed(condition, self.denoiser))
            return (d, d) if self.pair else d
        given = Held(self, "scale").beside(condition, x)
        check_scale("scale", given)
        told = self.passed(condition, self.denoiser, self.second)
        d, u = self.second(self.denoiser, x, sigma, told)
        scale = per_sample_scale(given, x, lambda: noise_to_signal(self, sigma))
        guided = self.rule(Pair(d, u, x, sigma, self.path, call_of(sigma)), scale)
        if inside is None:
            within = self.interval.inside(noise_to_signal(self, sigma))
            within = within.reshape(-1, *[1] * (x.ndim - 1))
            guided, u = torch.where(within, guided, d), torch.where(within, u, d)
        return (guided, u) if self.pair else guided


def _is_one(scale: Scale) -> bool:
    return not isinstance(scale, Tensor) and not callable(scale) and scale == 1


class Unconditional(Holder):
    """The second estimate of classifier-free guidance: the same model without its condition.

    Args:
        null: what it is told instead; see `Null`.
        batched: ask for both in one call on twice the samples, which is faster and takes twice the
            memory; else in two calls.
    """

    def __init__(self, null: Null = None, *, batched: bool = True) -> None:
        self.null, self.batched = null, batched

    def held(self) -> tuple[Held, ...]:
        """See `Holder`."""
        return (Held(self, "null"),)

    def __call__(
        self, denoiser: Any, x: Tensor, sigma: Tensor, condition: Keywords
    ) -> tuple[Tensor, Tensor]:
        """See `Second`."""
        null = Held(self, "null").of(condition)
        condition = without(condition, self.own_keywords() - keywords_of(denoiser))
        null = null_condition(null, denoiser, condition, x)
        d, u = batched_call(denoiser, x, sigma, [condition, null], self.batched)
        return d, u


class Weaker(Holder):
    """The second estimate of autoguidance: a smaller or less trained model's (Karras et al. 2024,
    arXiv:2406.02507, eq. 3).

    Args:
        denoiser: the lesser model. In other coordinates than the first it is asked at equal signal-
            to-noise ratio; at pure noise, which a variance-exploding one does not reach, there is
            no guidance.

    Raises:
        ValueError: it is on an unknown path.
    """

    def __init__(self, denoiser: Any) -> None:
        self.denoiser = with_path("weaker", make_denoiser(denoiser))

    def inside(self) -> tuple[Any, ...]:
        """See `Holder`."""
        return (self.denoiser,)

    def __call__(
        self, denoiser: Any, x: Tensor, sigma: Tensor, condition: Keywords
    ) -> tuple[Tensor, Tensor]:
        """See `Second`."""
        first, second = keywords_of(denoiser), keywords_of(self.denoiser)
        d = denoiser(x, sigma, **without(condition, second - first))
        if (lesser := self.denoiser).path is not denoiser.path:
            lesser = OnPath(lesser, with_path("model", denoiser).path)
            if (call := call_of(sigma)) is not None and not lesser.reaches(call.level):
                return d, d
        u = lesser(x, sigma, **without(condition, first - second))
        if lesser is not self.denoiser and call_of(sigma) is None:
            reached = lesser.own(sigma).isfinite().reshape(-1, *[1] * (x.ndim - 1))
            u = torch.where(reached, u, d)
        return d, u


def null_condition(null: Null, denoiser: Any, condition: Keywords, x: Tensor) -> Keywords:
    """The keywords of the unconditional estimate.

    Args:
        null: see `Null`.
        denoiser: whose network may know its own, by a `drop_condition`.
        condition: the keywords of the conditional one.
        x: noisy data, shape (B, ...).

    What is for guidance inside the denoiser stays as it is.
    """
    names = keywords_of(denoiser)
    own = {name: value for name, value in condition.items() if name in names}
    condition = without(condition, names)
    if callable(null):
        return {**null(condition), **own}
    if null is not None:
        changed = {**own, **condition, **null}
        return {name: value for name, value in changed.items() if value is not None}
    drop = getattr(getattr(denoiser, "network", None), "drop_condition", None)
    if drop is None:
        return own
    return {**drop(condition, x.new_ones(x.shape[:1], dtype=torch.bool)), **own}


def batched_call(
    denoiser: Any, x: Tensor, sigma: Tensor, conditions: Sequence[Keywords], batched: bool = True
) -> list[Tensor]:
    """The estimate under each of several conditions.

    Args:
        denoiser: a Denoiser.
        x: noisy data, shape (B, ...).
        sigma: noise standard deviations, shape (B,).
        conditions: keyword arguments.
        batched: in one call on B samples for each condition, if they can stand in one batch.

    Returns:
        One tensor of x's shape for each condition.
    """
    joined = None
    if batched:
        bound = bound_rows(denoiser, x.shape)
        each = [beside(denoiser, {**bound, **condition}, x) for condition in conditions]
        joined = _joined(each, len(x))
    if joined is None:
        return [denoiser(x, sigma, **condition) for condition in conditions]
    count = len(conditions)
    sigmas = torch.cat([sigma] * count)
    if (call := call_of(sigma)) is not None:
        mark_call(sigmas, call)
    return list(denoiser(torch.cat([x] * count), sigmas, **joined).chunk(count))


_APART: Any = object()


def _joined(conditions: Sequence[Mapping[str, Any]], batch: int) -> Keywords | None:
    """All conditions as one of as many times the length; None: they cannot stand in one batch."""
    first = conditions[0]
    if any(condition.keys() != first.keys() for condition in conditions):
        return None
    joined = {
        name: _together([condition[name] for condition in conditions], batch) for name in first
    }
    return None if any(value is _APART for value in joined.values()) else joined


def _together(values: Sequence[Any], batch: int) -> Any:
    """A keyword's values as one; `_APART` where they cannot stand in one batch."""
    first = values[0]
    if isinstance(first, Tensor):
        rows = first.shape[:1] == (batch,) and all(_alike(value, first) for value in values)
        return torch.cat(list(values)) if rows else _APART
    if isinstance(first, Mapping) and all(isinstance(value, Mapping) for value in values):
        joined = _joined(values, batch)
        return _APART if joined is None else joined
    return first if all(value is first for value in values) else _APART


def _alike(one: Any, other: Tensor) -> bool:
    return isinstance(one, Tensor) and one.shape == other.shape and one.dtype == other.dtype
