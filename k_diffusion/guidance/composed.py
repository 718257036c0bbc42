"""Several conditions at once, each with a weight and a region of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from k_diffusion.denoiser import call_of
from k_diffusion.guidance.base import Interval, Wrapper, noise_to_signal, per_sample_scale
from k_diffusion.guidance.contrast import Null, batched_call, null_condition
from k_diffusion.guidance.held import Held, Keywords, placed, wide_shape
from k_diffusion.utils.maths import is_number


@dataclass(frozen=True)
class Part:
    """One of several conditions.

    Attributes:
        condition: keyword arguments that take the place of the run's, or join them.
        weight: strength of its guidance: a number, one a sample, or a keyword's name.
        mask: where it holds, from 0 to 1: (H, W), (1, H, W), or one a sample, (B, 1, H, W); or the
            name of a keyword that is one of the latter; None: everywhere.
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
        interval: bounds of sigma / alpha; outside, the estimate is the weighted mean of the parts
            with weights above 0, which there sum to 1 at every place (and u where none holds). The
            others are not asked for then, nor is u if the parts without a mask or with masks that
            were bound here leave it no place.
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
        self.interval = Interval.of(interval)
        self._everywhere = _covers(self.parts)

    def __call__(self, x: Tensor, sigma: Tensor, **condition: Any) -> Tensor:
        """The composed estimate of x0."""
        inside = self.interval.holds(call_of(sigma))
        # Outside, what is known to be no weighted mean's is not asked for. It comes last, as does
        # the null condition: what is asked at all levels keeps its place (see `RunMemory`).
        void = {k for k, part in enumerate(self.parts) if _void(part, condition)}
        parts = [part for k, part in enumerate(self.parts) if k not in void]
        told, asked = [self._told(condition, part) for part in parts], len(parts)
        if not (alone := inside is False and self._everywhere):
            null, first = Held(self, "null").of(condition), self._told(condition, self.parts[0])
            told.append(null_condition(null, self.denoiser, first, x))
        if inside is not False:
            parts += [self.parts[k] for k in sorted(void)]
            told += [self._told(condition, part) for part in parts[asked:]]
        estimates = batched_call(self.denoiser, x, sigma, told, self.batched)
        u = estimates[0] if alone else estimates.pop(asked)
        weights = [_weight(part, x, condition) for part in parts]
        guided = u
        if inside is not False:
            for d, weight in zip(estimates, weights, strict=True):
                guided = guided + weight * (d - u)
            if inside:
                return guided
        shares = [w.clamp_min(0) if isinstance(w, Tensor) else max(w, 0.0) for w in weights]
        total = sum(w.expand_as(x) if isinstance(w, Tensor) else w for w in shares)
        plain = u
        for d, share in zip(estimates, shares, strict=True):
            plain = plain + share / _nonzero(total) * (d - u)
        if inside is False:
            return plain
        within = self.interval.inside(noise_to_signal(self, sigma))
        return torch.where(within.reshape(-1, *[1] * (x.ndim - 1)), guided, plain)

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
    given, mask = weights.beside(condition, x), masks.beside(condition, x)
    _check_weight(given)
    # A number or a tensor: it needs no level.
    weight = per_sample_scale(given, x, lambda: x, "weight")
    if mask is None:
        return weight
    shape = wide_shape(tuple(mask.shape), x.ndim)
    if len(shape) > x.ndim or any(m not in (1, n) for m, n in zip(shape, x.shape, strict=True)):
        raise ValueError(
            f"mask of shape {tuple(mask.shape)} does not broadcast to samples of shape "
            f"{tuple(x.shape)}"
        )
    return weight * placed(mask, x.device, x.dtype).reshape(shape)


def _void(part: Part, condition: Keywords) -> bool:
    """Whether a part is known to have no share of a weighted mean."""
    weight = Held(part, "weight").of(condition)
    _check_weight(weight)
    return not isinstance(weight, Tensor) and weight <= 0


def _covers(parts: Sequence[Part]) -> bool:
    """Whether at every place a part's weight is known to be above 0; masks are read here, once."""
    known = [p for p in parts if is_number(p.weight) and p.weight > 0]  # type: ignore[operator]
    if any(part.mask is None for part in known):
        return True
    masks = [part.mask.detach().float() for part in known if isinstance(part.mask, Tensor)]
    try:
        return bool(masks) and bool((sum(torch.broadcast_tensors(*masks)) > 0).all())
    except RuntimeError:  # of shapes that do not go together, or on several devices
        return False


def _nonzero(total: Any) -> Any:
    """The sum of the shares, or 1 where it is 0 and so all of them are void."""
    if isinstance(total, Tensor):
        return torch.where(total == 0, 1.0, total)
    return total or 1.0
