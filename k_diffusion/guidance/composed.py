"""Several conditions at once, each with a weight and a region of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from k_diffusion.denoiser import call_of
from k_diffusion.guidance.base import Interval, Wrapper, per_sample_scale
from k_diffusion.guidance.contrast import Null, batched_call, null_condition
from k_diffusion.guidance.held import Held, Keywords
from k_diffusion.utils.maths import is_number


@dataclass(frozen=True)
class Part:
    """One of several conditions.

    Attributes:
        condition: keyword arguments that take the place of the run's, or join them.
        weight: strength of its guidance: a number, one a sample, or a keyword's name.
        mask: where it holds, from 0 to 1: broadcasts to a sample, such as (1, H, W), or to all of
            them, (B, 1, H, W); or the name of a keyword that is one of the latter; None:
            everywhere.
    """

    condition: Mapping[str, Any]
    weight: float | Tensor | str = 1.0
    mask: Tensor | str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        _check_weight(self.weight)
        if self.mask is not None and not isinstance(self.mask, (str, Tensor)):
            raise TypeError(f"mask must be a tensor or a keyword's name, got {self.mask!r}")


class Composed(Wrapper):
    """u + sum of weight · mask · (d - u) over the parts' estimates d: composed guidance.

    With one part, weight w and no mask it is `cfg` at scale w. Masks that sum to 1 with equal
    weights give each region its own condition.

    Args:
        denoiser: a Denoiser, or whatever `make_denoiser` takes.
        parts: the conditions.
        null: what u is told; see `cfg`.
        interval: bounds of sigma / alpha; outside, the estimate is the parts' weighted mean, that
            is with weights that sum to 1 at every place (and u where none holds).
        batched: all estimates in one call, on as many times the samples; else one after another.

    Raises:
        ValueError: no part, or a mask that does not fit.

    Source: Liu et al. 2022, arXiv:2206.01714, eq. 11; masks: Bar-Tal et al. 2023, arXiv:2302.08113.
    """

    def __init__(
        self,
        denoiser: Any,
        parts: Sequence[Part],
        *,
        null: Null = None,
        interval: tuple[float, float] | None = None,
        batched: bool = True,
    ) -> None:
        super().__init__(denoiser)
        if not parts:
            raise ValueError("composed guidance needs at least one Part")
        self.parts, self.null, self.batched = tuple(parts), null, batched
        self.interval = Interval(*(interval or ()))

    def __call__(self, x: Tensor, sigma: Tensor, **condition: Any) -> Tensor:
        """The composed estimate of x0."""
        told = [self._told(condition, part) for part in self.parts]
        null = Held(self, "null").of(condition)
        null = null_condition(null, self.denoiser, told[0], x)
        u, *each = batched_call(self.denoiser, x, sigma, [null, *told], self.batched)
        weights = [_weight(part, x, condition) for part in self.parts]
        inside = self.interval.holds(call_of(sigma))
        if inside is not False:
            guided = u
            for d, weight in zip(each, weights, strict=True):
                guided = guided + weight * (d - u)
            if inside:
                return guided
        total = sum(
            torch.as_tensor(w).expand_as(x) if isinstance(w, Tensor) else w for w in weights
        )
        plain = u
        for d, weight in zip(each, weights, strict=True):
            plain = plain + weight / _nonzero(total, x) * (d - u)
        if inside is False:
            return plain
        ratio = sigma / self.alpha(sigma)
        within = self.interval.inside(ratio).reshape(-1, *[1] * (x.ndim - 1))
        return torch.where(within, guided, plain)

    def check_condition(self, batch: int, **condition: Any) -> None:
        """Refuses by name what the denoiser cannot take, of each part."""
        for part in self.parts:
            super().check_condition(batch, **{**condition, **part.condition})

    def held(self) -> tuple[Held, ...]:
        """See `Holder`."""
        return (Held(self, "null"), *(held for part in self.parts for held in _held(part)))

    def _told(self, condition: Keywords, part: Part) -> Keywords:
        own = Held(part, "condition").of(condition)
        return {**self.passed(condition, self.denoiser), **own}


def _held(part: Part) -> tuple[Held, Held, Held]:
    """Its weight, its mask and its condition."""
    return Held(part, "weight"), Held(part, "mask", like_x=True), Held(part, "condition")


def _check_weight(weight: Any) -> None:
    named = isinstance(weight, str) and weight.isidentifier()
    if not named and not isinstance(weight, Tensor) and not is_number(weight):
        raise TypeError(
            f"weight must be a number, one a sample or a keyword's name, got {weight!r}"
        )


def _weight(part: Part, x: Tensor, condition: Keywords) -> Any:
    """The share of a part at every place, which multiplies x."""
    weights, masks, _ = _held(part)
    given, mask = weights.of(condition), masks.of(condition)
    _check_weight(given)
    # A number or a tensor: it needs no level.
    weight = per_sample_scale(given, x, lambda: x, "weight")
    if mask is None:
        return weight
    mask = mask.to(x.device, x.dtype)
    try:
        fits = torch.broadcast_shapes(mask.shape, x.shape) == x.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"mask of shape {tuple(mask.shape)} does not broadcast to samples of shape "
            f"{tuple(x.shape)}"
        )
    return weight * mask


def _nonzero(total: Any, x: Tensor) -> Any:
    """The sum of the weights, or 1 where it is 0 and so all of them are void."""
    if isinstance(total, Tensor):
        return torch.where(total == 0, 1.0, total)
    return total or 1.0
