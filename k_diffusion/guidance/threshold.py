"""Estimates of x0 held to the range of data: clamping and dynamic thresholding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from k_diffusion.guidance.base import Wrapper, along
from k_diffusion.utils.maths import is_number


class Clamp(Wrapper):
    """A Denoiser whose estimates are clamped to a range.

    Args:
        denoiser: a Denoiser, or whatever `make_denoiser` takes.
        low, high: the range of data.

    Raises:
        ValueError: low is not below high.
    """

    def __init__(self, denoiser: Any, low: float = -1.0, high: float = 1.0) -> None:
        super().__init__(denoiser)
        if not (is_number(low) and is_number(high) and low < high):
            raise ValueError(f"clamp to ({low}, {high}): low must be below high")
        self.low, self.high = low, high

    def __call__(self, x: Tensor, sigma: Tensor, **condition: Any) -> Any:
        """The clamped estimate; of a pair, both."""
        return _each(self.denoiser(x, sigma, **condition), lambda d: d.clamp(self.low, self.high))


class DynamicThreshold(Wrapper):
    """A Denoiser whose estimates are brought into the range of data, each sample by its own need.

    s is a quantile of |x0| in the sample, at least the bound; values beyond s are cut off, and all
    are divided by s / bound (Saharia et al. 2022, arXiv:2205.11487, section 2.3). Nothing waits
    for the device.

    Args:
        denoiser: a Denoiser, or whatever `make_denoiser` takes.
        quantile: in (0, 1]; the paper's p.
        bound: the largest absolute value of data.
        largest: of s; None: any.

    Raises:
        ValueError: a quantile or bound out of range.
    """

    def __init__(
        self,
        denoiser: Any,
        quantile: float = 0.995,
        bound: float = 1.0,
        largest: float | None = None,
    ) -> None:
        super().__init__(denoiser)
        if not (is_number(quantile) and 0 < quantile <= 1):
            raise ValueError(f"quantile must lie in (0, 1], got {quantile!r}")
        if not (is_number(bound) and bound > 0):
            raise ValueError(f"bound must be above 0, got {bound!r}")
        if largest is not None and not (is_number(largest) and largest >= bound):
            raise ValueError(f"largest must be at least bound, {bound}, got {largest!r}")
        self.quantile, self.bound, self.largest = quantile, bound, largest

    def __call__(self, x: Tensor, sigma: Tensor, **condition: Any) -> Any:
        """The thresholded estimate; of a pair, both."""
        return _each(
            self.denoiser(x, sigma, **condition),
            lambda d: dynamic_threshold(d, self.quantile, self.bound, self.largest),
        )


def dynamic_threshold(
    x0: Tensor, quantile: float = 0.995, bound: float = 1.0, largest: float | None = None
) -> Tensor:
    """Values of each sample cut at their quantile and scaled into [-bound, bound].

    Args:
        x0: shape (B, ...).
        quantile, bound, largest: see `DynamicThreshold`.
    """
    size = x0.flatten(1).abs().float()
    # The quantile between two values, as usual; by counting: torch.quantile refuses large samples.
    place, last = quantile * (size.shape[1] - 1), size.shape[1] - 1
    below = int(place)
    s = size.kthvalue(below + 1, dim=1).values
    if place > below:
        s = torch.lerp(s, size.kthvalue(min(below + 1, last) + 1, dim=1).values, place - below)
    s = s.clamp(bound, largest)
    s = along(s, x0)
    return x0.clamp(-s, s) * (bound / s)


def _each(estimate: Any, change: Any) -> Any:
    if isinstance(estimate, (tuple, list)):
        return tuple(change(each) for each in estimate)
    return change(estimate)
