"""The last stage of a run: samples brought into the range of an image, and to bytes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from k_diffusion.guidance.threshold import dynamic_threshold
from k_diffusion.utils import maths

Normalise = str | Callable[[Tensor], Tensor] | None
SHARE = 0.995
"""Of a sample's values, those that dynamic normalisation leaves inside the range."""


def clamp(x: Tensor) -> Tensor:
    """What lies outside [-1, 1] is put on its edge."""
    return x.clamp(-1, 1)


def dynamic(x: Tensor, share: float = SHARE) -> Tensor:
    """Each sample is clipped to the amplitude that `share` of its values keep to, and divided by
    it where it is more than 1: strong contrast is brought into range instead of burnt out.

    Args:
        x: shape (B, ...), in units where images lie in [-1, 1].

    Source: Saharia et al. 2022, arXiv:2205.11487, section 2.3 (there at every step).
    """
    return dynamic_threshold(x, share)


NORMALISERS: dict[str, Callable[[Tensor], Tensor]] = {"clamp": clamp, "dynamic": dynamic}


def with_known(x: Tensor, init: Tensor | None, mask: Tensor | None) -> Tensor:
    """x, but init exactly where a mask is 0."""
    return x if init is None or mask is None else torch.where(mask == 0, init, x)


def make_finish(
    normalise: Normalise, to: str | None, dtype: torch.dtype
) -> Callable[[Tensor, Tensor | None, Tensor | None], Tensor]:
    """What makes the result of a run's last state.

    Args:
        normalise: a name in `NORMALISERS`, a function of samples, or None: left as they are.
        to: "uint8": values in [-1, 1] to 0..255, rounded, what is not finite to 0; None: `dtype`.
        dtype: of the result otherwise.

    Returns:
        A function (x, init, mask) -> samples; where mask is 0 they are init, normalised or not.

    Raises:
        TypeError, ValueError: an unknown name.
    """
    if normalise is not None and not callable(normalise):
        if normalise not in NORMALISERS:
            raise ValueError(maths.unknown("normalise", normalise, NORMALISERS))
        normalise = NORMALISERS[normalise]
    if to not in (None, "uint8"):
        raise ValueError(maths.unknown("to", to, ["uint8"]))
    function = normalise

    def finish(x: Tensor, init: Tensor | None, mask: Tensor | None) -> Tensor:
        if function is not None:
            shape = x.shape
            x = function(x)
            if not isinstance(x, Tensor) or x.shape != shape:
                got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
                raise ValueError(f"normalise returned {got} for samples of shape {tuple(shape)}")
        x = with_known(x, init, mask)
        if to is None:
            return x.to(dtype)
        # Not `to_uint8`, which refuses what is not finite: a report may have let it through.
        return ((x.nan_to_num(-1.0, -1.0, -1.0) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)

    return finish
