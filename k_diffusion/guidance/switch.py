"""Two models for one run: one for the noisy levels, another for the clean ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from k_diffusion.denoiser import call_of, make_denoiser
from k_diffusion.guidance.base import Interval, Wrapper, noise_to_signal
from k_diffusion.guidance.held import keywords_of, without
from k_diffusion.guidance.on_path import OnPath, with_path
from k_diffusion.utils.maths import is_number


class SwitchAt(Wrapper):
    """A base model above a level, and a refiner at it and below.

    In a run of fixed steps one of them is called each time. Where the host does not know the level,
    as with an adaptive solver, whose samples have levels of their own, both are.

    Args:
        base: a Denoiser, or whatever `make_denoiser` takes; its coordinates are those of the whole.
        refiner: the same; in other coordinates it is asked at equal signal-to-noise ratio.
        ratio: the level sigma / alpha, which is sigma for an EDM network.
        told: what the refiner is told: a function of the base's keywords; None: the same.

    Raises:
        ValueError: ratio is not above 0.

    Source: Podell et al. 2023, arXiv:2307.01952, section 2.5; Balaji et al. 2022, arXiv:2211.01324
    (an expert for each range of levels).
    """

    def __init__(
        self,
        base: Any,
        refiner: Any,
        ratio: float,
        *,
        told: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None,
    ) -> None:
        super().__init__(base)
        if not is_number(ratio) or not 0 < ratio < math.inf:
            raise ValueError(f"ratio must be a number above 0, sigma / alpha, got {ratio!r}")
        with_path("base", self.denoiser)
        refiner = with_path("refiner", make_denoiser(refiner))
        same = refiner.path is self.denoiser.path
        self.refiner: Any = refiner if same else OnPath(refiner, self.denoiser.path)
        self.ratio = float(ratio)
        self._noisy = Interval(self.ratio)
        self.told = told

    @property
    def float64_sigma(self) -> bool:
        """Whether either wants sigma in float64."""
        return any(getattr(d, "float64_sigma", False) for d in (self.denoiser, self.refiner))

    def models(self) -> tuple[Any, ...]:
        """Both."""
        return (self.denoiser, self.refiner)

    def check_condition(self, batch: int, **condition: Any) -> None:
        """Refuses by name what either cannot take."""
        super().check_condition(batch, **condition)
        check = getattr(self.refiner, "check_condition", None)
        if check is not None:
            check(batch, **self._refined(condition))

    def inside(self) -> tuple[Any, ...]:
        """See `Holder`."""
        return (self.denoiser, self.refiner)

    def __call__(self, x: Tensor, sigma: Tensor, **condition: Any) -> Any:
        """The estimate of x0, shape of x (B, ...), of the model whose level it is."""
        noisy = self._noisy.holds(call_of(sigma))
        told = self.passed(condition, self.denoiser)
        if noisy:
            return self.denoiser(x, sigma, **told)
        refined = self.refiner(x, sigma, **self._refined(condition))
        if noisy is False:
            return refined
        d = self.denoiser(x, sigma, **told)
        inside = self._noisy.inside(noise_to_signal(self, sigma))
        if isinstance(d, (tuple, list)):
            return tuple(_either(inside, a, b) for a, b in zip(d, refined, strict=True))
        return _either(inside, d, refined)

    def _refined(self, condition: dict[str, Any]) -> dict[str, Any]:
        if self.told is None:
            return self.passed(condition, self.refiner)
        own = {k: v for k, v in condition.items() if k in keywords_of(self.refiner)}
        return {**self.told(without(condition, keywords_of(self))), **own}


def _either(mask: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(mask.reshape(-1, *[1] * (a.ndim - 1)), a, b)
