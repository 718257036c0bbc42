"""How two estimates of x0 make a guided one: away from the second, beyond the first.

Names in the formulas: d the first estimate (with the condition), u the second (without it, or from
a lesser model), w the scale. w = 1 is no guidance, w = 0 the second estimate, for all rules but
those that say otherwise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from k_diffusion.denoiser import Call
from k_diffusion.guidance.base import along
from k_diffusion.guidance.memory import RunMemory
from k_diffusion.utils.levels import FLOW, VE, Path
from k_diffusion.utils.maths import is_number


@dataclass(frozen=True)
class Pair:
    """Two estimates of x0 and what they were made from.

    Attributes:
        d, u: the estimates, shape (B, ...).
        x: the noisy data, in the coordinates of `path`.
        sigma: its noise standard deviations, shape (B,).
        path: the coordinates.
        call: what the host knows of the call; None: nothing.
    """

    d: Tensor
    u: Tensor
    x: Tensor
    sigma: Tensor
    path: Path
    call: Call | None = None

    @property
    def begins(self) -> bool:
        """Whether this is a run's first call, which a rule need not be asked at: one that remembers
        tells runs apart by `call.run` (see `RunMemory`)."""
        return self.call is not None and self.call.k == 0


class Rule(Protocol):
    """(pair, w) -> the guided estimate of x0."""

    def __call__(self, pair: Pair, scale: Any) -> Tensor:
        """The guided estimate, shape of d; scale: w, a number or a tensor that multiplies d."""
        ...


class Linear:
    """u + w (d - u): classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598, eq. 6).

    The same in x0, eps and v, which differ by a factor and a multiple of x. (The paper's w is this
    one less 1.)
    """

    def __call__(self, pair: Pair, scale: Any) -> Tensor:
        """See `Rule`."""
        return linear(pair.d, pair.u, scale)


class Rescaled:
    """Linear guidance whose estimate is drawn towards the standard deviation of d.

    Each sample's g = u + w (d - u) becomes g (share · std(d) / std(g) + 1 - share), which keeps
    strong guidance from over-saturation (Lin et al. 2023, arXiv:2305.08891, eqs. 15 and 16, on the
    estimate of x0).

    Args:
        share: from 0, plain guidance, to 1; the paper's phi, there 0.7.
    """

    def __init__(self, share: float = 0.7) -> None:
        self.share = _within("rescale", share, 0.0, 1.0)

    def __call__(self, pair: Pair, scale: Any) -> Tensor:
        """See `Rule`."""
        g = linear(pair.d, pair.u, scale)
        wanted, present = (v.flatten(1).std(1, correction=0) for v in (pair.d, g))
        # A constant estimate has no deviation to restore.
        ratio = torch.where(present > 0, wanted / present.clamp_min(1e-30), 1.0)
        return g * along(self.share * ratio + (1 - self.share), g)


class Projected:
    """Adaptive projected guidance: d + (w - 1) (orthogonal + parallel · eta), of the difference.

    The difference d - u is averaged with earlier ones (by a negative momentum, which pushes away
    from the direction so far), cut to a norm, and split into a part along d, which only makes the
    estimate stronger, and one across it (Sadat et al. 2024, arXiv:2410.02416, algorithm 1). Without
    momentum and cut, parallel = 1 is linear guidance. It remembers within one run of fixed steps:
    give each sampler that runs at the same time one of its own. Elsewhere (adaptive steps, levels
    that differ within a batch) calls are tried, refused and made for some samples alone, and there
    is no momentum.

    Args:
        parallel: eta, the share that is kept of the part along d.
        momentum: beta, the share of the running difference that is kept, in (-1, 1).
        norm: r, the largest norm of a sample's difference, in data units; inf: any.
    """

    def __init__(
        self, parallel: float = 0.0, momentum: float = -0.5, norm: float = math.inf
    ) -> None:
        self.parallel = _within("parallel", parallel, 0.0, math.inf)
        self.momentum = _within("momentum", momentum, -1.0, 1.0)
        self.norm = _within("norm", norm, 0.0, math.inf)
        if not norm > 0:
            raise ValueError(f"norm must be above 0, got {norm}")
        self._memory: RunMemory[Tensor | None] = RunMemory(lambda: None)

    def __call__(self, pair: Pair, scale: Any) -> Tensor:
        """See `Rule`."""
        d = pair.d
        away = d - pair.u
        if self.momentum and pair.call is not None:
            self._memory.turn(pair.call, away.shape)
            running = self._memory.kept
            if running is not None:
                away = away + self.momentum * running
            self._memory.kept = away
        if self.norm < math.inf:
            length = _dot(away, away).sqrt()
            away = away * along((self.norm / length.clamp_min(1e-30)).clamp(max=1.0), d)
        share = _dot(away, d) / _dot(d, d).clamp_min(1e-30)
        along_d = along(share, d) * d
        return d + (scale - 1) * (away - (1 - self.parallel) * along_d)


class ZeroStar:
    """CFG-Zero*: the second velocity is first scaled to lie as near to the first as it can.

    s u_v + w (d_v - s u_v), in the velocities d_v and u_v along the path, s = <d_v, u_v> / |u_v|²
    for each sample; and no motion at all in the first calls from pure noise, where a velocity is
    least true (Fan et al. 2025, arXiv:2503.18886, eqs. 8 to 10). w = 0 is s u_v, not u_v. The
    velocity is dx by dsigma but for a factor: that of a flow, the v of a variance-preserving path,
    and the noise on a variance-exploding one.

    Args:
        still: calls at the start of a run that leave x where it is; of a run from pure noise
            (alpha = 0). One from an image, or on the variance-exploding path, holds a signal at
            once, and the noise that its first step would take away would stay.
    """

    def __init__(self, still: int = 1) -> None:
        if isinstance(still, bool) or not isinstance(still, int) or still < 0:
            raise ValueError(f"still must be a whole number of calls, 0 or more, got {still!r}")
        self.still = still
        self._from_noise: object = self  # the last run that was seen to begin at pure noise

    def __call__(self, pair: Pair, scale: Any) -> Tensor:
        """See `Rule`."""
        call = pair.call
        if call is not None and call.k == 0:
            self._from_noise = call.run if call.level.alpha == 0 else self
        if call is not None and call.k < self.still and call.run is self._from_noise:
            return _estimate(torch.zeros_like(pair.d), pair)
        first, second = (_velocity(estimate, pair) for estimate in (pair.d, pair.u))
        share = _dot(first, second) / _dot(second, second).clamp_min(1e-30)
        return _estimate(linear(first, along(share, second) * second, scale), pair)


def linear(d: Tensor, u: Tensor, scale: Any) -> Tensor:
    """u + scale (d - u); at a scale of 1 it is d to the last bit."""
    return torch.lerp(u, d, scale.to(d.dtype) if isinstance(scale, Tensor) else scale)


def _velocity(estimate: Tensor, pair: Pair) -> Tensor:
    """dx / dsigma along the path, but for a factor: see `ZeroStar`."""
    sigma = along(pair.sigma, pair.x)
    if pair.path is VE or pair.path is FLOW:
        return (pair.x - estimate) / sigma
    alpha = along(pair.path.alpha(pair.sigma), pair.x)
    return (alpha * pair.x - estimate) / sigma  # alpha eps - sigma x0


def _estimate(velocity: Tensor, pair: Pair) -> Tensor:
    """The estimate of x0 whose velocity is given."""
    sigma = along(pair.sigma, pair.x)
    if pair.path is VE or pair.path is FLOW:
        return pair.x - sigma * velocity
    return along(pair.path.alpha(pair.sigma), pair.x) * pair.x - sigma * velocity


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """The inner product of each sample, shape (B,)."""
    return (a * b).flatten(1).sum(1)


def _within(name: str, value: Any, low: float, high: float) -> float:
    if not is_number(value) or not low <= value <= high:
        raise ValueError(f"{name} must lie in [{low:g}, {high:g}], got {value!r}")
    return float(value)
