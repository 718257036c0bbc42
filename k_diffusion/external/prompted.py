"""Guidance whose negative condition travels beside the condition, row by row.

A run may take some samples of a batch alone (adaptive steps, samples that are done): what the
second estimate is told must then be cut with them, so it is among the keywords, under a prefix.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from k_diffusion.guidance import Contrast, Linear, Rescaled, Rule, SwitchAt, Wrapper
from k_diffusion.guidance.contrast import batched_call

NEGATIVE = "negative_"
REFINER = "refiner_"


class Told(Wrapper):
    """A Denoiser that hears nothing of what is meant for others: the keywords with a prefix."""

    def __call__(self, x: Tensor, sigma: Tensor, **condition: Any) -> Any:
        """The estimate of x0, shape of x (B, ...)."""
        return self.denoiser(x, sigma, **_own(condition))

    def check_condition(self, batch: int, **condition: Any) -> None:
        """Refuses by name what the denoiser inside cannot take, of either condition."""
        super().check_condition(batch, **_own(condition))
        super().check_condition(batch, **_without(condition, NEGATIVE))


class Negative:
    """The second estimate of classifier-free guidance: told the keywords under "negative_"."""

    def __call__(
        self, denoiser: Any, x: Tensor, sigma: Tensor, condition: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """See `guidance.Second`."""
        own = _own(condition)
        d, u = batched_call(denoiser, x, sigma, [own, {**own, **_without(condition, NEGATIVE)}])
        return d, u


def prompted(denoiser: Any, scale: Any, rescale: float = 0.0, pair: bool = False) -> Any:
    """A guided Denoiser, told a condition and, under "negative_", what else to go away from.

    Args:
        denoiser: a Denoiser.
        scale: of guidance; 1: none.
        rescale: see `guidance.Rescaled`.
        pair: for solvers of two outputs.
    """
    rule: Rule = Rescaled(rescale) if rescale else Linear()
    return Contrast(Told(denoiser), Negative(), scale, rule=rule, pair=pair)


def refined(base: Any, refiner: Any, ratio: float) -> SwitchAt:
    """The base above the level sigma / alpha = ratio, below it the refiner, told what is under
    "refiner_"."""
    return SwitchAt(base, refiner, ratio, told=lambda condition: _without(condition, REFINER))


def joined(told: Any, prefix: str = "") -> dict[str, Any]:
    """A condition and its negative as keywords of one mapping."""
    negative = {NEGATIVE + name: value for name, value in told.negative.items()}
    return {prefix + name: value for name, value in {**told.condition, **negative}.items()}


def _own(condition: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in condition.items() if not k.startswith((NEGATIVE, REFINER))}


def _without(condition: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {k.removeprefix(prefix): v for k, v in condition.items() if k.startswith(prefix)}
