"""How two estimates of x0 make a guided one: away from the second, beyond the first.

A rule is a function of both, in data units. Names in the formulas: d the first estimate (with the
condition), u the second (without it, or from a lesser model), w the scale.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from k_diffusion.guidance.base import along


class Rule(Protocol):
    """(d, u, w, x, sigma, begins) -> the guided estimate."""

    def __call__(
        self, d: Tensor, u: Tensor, scale: Any, x: Tensor, sigma: Tensor, begins: bool
    ) -> Tensor:
        """The guided estimate of x0, shape of d.

        Args:
            d, u: the two estimates, shape (B, ...).
            scale: w, a number, or a tensor that multiplies d.
            x: the state that they were made from.
            sigma: its noise standard deviations, shape (B,).
            begins: whether a run begins here: what a rule kept of an earlier one is void.
        """
        ...


class Linear:
    """u + w (d - u): classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598, eq. 6).

    In x0, eps and v alike, as they differ by a factor and a multiple of x. w = 1 is no guidance,
    w = 0 the unconditional model. (The paper's w is this one less 1.)
    """

    def __call__(
        self, d: Tensor, u: Tensor, scale: Any, x: Tensor, sigma: Tensor, begins: bool
    ) -> Tensor:
        """See `Rule`."""
        return torch.lerp(u, d, scale) if not isinstance(scale, Tensor) else u + scale * (d - u)


class Rescaled:
    """Linear guidance whose estimate is drawn towards the standard deviation of d.

    Each sample's g = u + w (d - u) becomes g (share · std(d) / std(g) + 1 - share), which keeps
    strong guidance from over-saturation (Lin et al. 2023, arXiv:2305.08891, eqs. 15 and 16, on the
    estimate of x0).

    Args:
        share: from 0, plain guidance, to 1; the paper's phi, there 0.7.
    """

    def __init__(self, share: float = 0.7) -> None:
        if not 0 <= share <= 1:
            raise ValueError(f"share must lie in [0, 1], got {share}")
        self.share = share

    def __call__(
        self, d: Tensor, u: Tensor, scale: Any, x: Tensor, sigma: Tensor, begins: bool
    ) -> Tensor:
        """See `Rule`."""
        g = u + scale * (d - u)
        wanted, present = (v.flatten(1).std(1, correction=0) for v in (d, g))
        # A constant estimate has no deviation to restore.
        ratio = torch.where(present > 0, wanted / present.clamp_min(1e-30), 1.0)
        return g * along(self.share * ratio + (1 - self.share), g)
