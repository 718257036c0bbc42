"""The kinds of guidance by two estimates, by the names they go by."""

from __future__ import annotations

import math
from typing import Any

from k_diffusion.guidance.base import Scale
from k_diffusion.guidance.contrast import Contrast, Null, Unconditional, Weaker
from k_diffusion.guidance.rules import Linear, Projected, Rescaled, Rule, ZeroStar


def cfg(
    denoiser: Any,
    scale: Scale,
    *,
    null: Null = None,
    rescale: float = 0.0,
    interval: tuple[float, float] | None = None,
    batched: bool = True,
    pair: bool = False,
) -> Contrast:
    """Classifier-free guidance: u + scale (d - u), with d told the condition and u not.

    Args:
        denoiser: a Denoiser, or whatever `make_denoiser` takes.
        scale: 1 is no guidance, 0 the unconditional model; a number, one a sample (B,), a function
            of sigma / alpha, or the name of the run's keyword that is one of these.
        null: what u is told instead: a negative condition, say. None: what the network calls no
            condition, or nothing at all.
        rescale: share of the deviation that is restored; see `Rescaled`.
        interval: (low, high), bounds of sigma / alpha outside which there is no guidance, and no
            second call.
        batched: both estimates in one call, on twice the samples.
        pair: for the CFG++ solvers: returns the guided estimate and u.

    Source: Ho and Salimans 2022, arXiv:2207.12598; interval: Kynkäänniemi et al. 2024,
    arXiv:2404.07724; rescale: Lin et al. 2023, arXiv:2305.08891, section 3.4.
    """
    rule: Rule = Rescaled(rescale) if rescale else Linear()
    second = Unconditional(null, batched=batched)
    return Contrast(denoiser, second, scale, rule=rule, interval=interval, pair=pair)


def apg(
    denoiser: Any,
    scale: Scale,
    *,
    parallel: float = 0.0,
    momentum: float = -0.5,
    norm: float = math.inf,
    null: Null = None,
    interval: tuple[float, float] | None = None,
    batched: bool = True,
) -> Contrast:
    """Adaptive projected guidance: classifier-free guidance that does not saturate.

    Args:
        denoiser, scale, null, interval, batched: see `cfg`.
        parallel, momentum, norm: see `Projected`; 1, 0, inf are plain guidance.

    Source: Sadat et al. 2024, arXiv:2410.02416, algorithm 1.
    """
    return Contrast(
        denoiser,
        Unconditional(null, batched=batched),
        scale,
        rule=Projected(parallel, momentum, norm),
        interval=interval,
    )


def cfg_zero_star(
    denoiser: Any,
    scale: Scale,
    *,
    still: int = 1,
    null: Null = None,
    interval: tuple[float, float] | None = None,
    batched: bool = True,
) -> Contrast:
    """CFG-Zero*, for flow models: the unconditional velocity scaled to fit, and a still start.

    Args:
        denoiser, scale, null, interval, batched: see `cfg`.
        still: see `ZeroStar`.

    Source: Fan et al. 2025, arXiv:2503.18886, eqs. 8 to 10.
    """
    second = Unconditional(null, batched=batched)
    return Contrast(denoiser, second, scale, rule=ZeroStar(still), interval=interval)


def autoguidance(
    denoiser: Any,
    weaker: Any,
    scale: Scale,
    *,
    interval: tuple[float, float] | None = None,
) -> Contrast:
    """Guidance away from a lesser copy of the model: u + scale (d - u), both told the condition.

    Args:
        denoiser: the model.
        weaker: a smaller or less trained one, in the same coordinates.
        scale, interval: see `cfg`.

    Source: Karras et al. 2024, arXiv:2406.02507, eq. 3.
    """
    return Contrast(denoiser, Weaker(weaker), scale, interval=interval)
