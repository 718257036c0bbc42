"""Inpainting: a part of the image is known, and the rest is drawn to go with it.

The known part is put into the model's estimate of x0, not into the state. A solver whose estimate
is one point for good carries the state along exactly that point's noised version, at every level
and every inner stage (all of ours do: it is what their exactness tests assert). So the known part
of the state is always `init` noised to the level of the state, the noise being that of the run
itself; no solver needs to know of it, predictors and adaptive steps included. What is drawn is
also a little nearer to its true distribution than where the known part of the state is replaced at
each step, by init with fixed or with fresh noise (benchmarks/inpainting.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from k_diffusion.guidance.base import Wrapper
from k_diffusion.guidance.held import wide_shape
from k_diffusion.utils.levels import Level, Levels

# Keywords that carry the known part to the wrapper: an adaptive solver takes the rows of each.
# They are no names that a model's own keyword could have.
KNOWN, MASK = "k_diffusion known part", "k_diffusion mask"


class Known(Wrapper):
    """A Denoiser whose estimate is the known part where the mask is 0, and the model's where it
    is 1; between, that share of each. Both come as keywords (see `known_part`)."""

    def __call__(self, x: Tensor, sigma: Tensor, **condition: Any) -> Any:
        """The estimate of x0, shape of x (B, ...); or a pair, where the model gives one."""
        known, mask = condition.pop(KNOWN), condition.pop(MASK)
        answer = self.denoiser(x, sigma, **condition)
        if isinstance(answer, (tuple, list)):
            return tuple(_placed(known, d, mask, x) for d in answer)
        return _placed(known, answer, mask, x)


def known_part(init: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """The keywords of `Known`: both of x's number of dimensions, and x's dtype and device."""
    return {KNOWN: init, MASK: mask}


def _placed(known: Tensor, d: Any, mask: Tensor, x: Tensor) -> Any:
    if not isinstance(d, Tensor) or d.shape != x.shape or not d.is_floating_point():
        return d  # for the run to refuse by name
    return torch.lerp(known, d.to(known.dtype), mask)


def check_mask(mask: Any, init: Tensor) -> Tensor:
    """A mask with init's number of dimensions, in its dtype, once it is one.

    Raises:
        TypeError, ValueError: no tensor, on another device, of a shape that does not go with init,
            or with values outside [0, 1].
    """
    if not isinstance(mask, Tensor) or mask.is_complex():
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(
            f"mask must be a tensor, 1 where to repaint and 0 where to keep, got {kind}"
        )
    shape, like = tuple(mask.shape), tuple(init.shape)
    wide = wide_shape(shape, len(like))
    if len(shape) > len(like) or any(m not in (1, n) for m, n in zip(wide, like, strict=True)):
        raise ValueError(
            f"mask has shape {shape}, which does not go with images of shape {like}: give "
            f"{like[2:] or like[1:]}, or {(like[0], 1, *like[2:])}, or the images' own"
        )
    if mask.device != init.device:
        raise ValueError(f"mask is on {mask.device} but init on {init.device}: move one of them")
    if mask.device.type != "meta" and not bool(((mask >= 0) & (mask <= 1)).all()):
        raise ValueError(
            "mask must hold values from 0 (keep) to 1 (repaint): divide an 8-bit mask by 255"
        )
    return mask.reshape(wide).to(init.dtype)


@dataclass(frozen=True)
class Resample:
    """Jumps back during inpainting: each part of the levels is walked several times.

    After each walk over `jump` steps but the last, the noise that they took away is added again,
    and they are walked anew. That harmonises the drawn part with the known one: without it, what
    was drawn at high noise was drawn without seeing the known part well, and stays.

    Calls are better spent on times than on steps or on longer parts: on a mixture, where the right
    distribution is known, 20 Heun steps are off by 0.34 (largest difference of the distribution
    functions) once, 0.21 with 4 times and 0.12 with 10; with 10 times over parts of 5 steps by
    0.21; and 60 steps 4 times by 0.21 (benchmarks/inpainting.py).

    Each walk over a part begins anew, without the history of a multistep method: such a one
    (dpmpp_2m say) is DDIM in parts of one step, and has its order only within longer ones. heun and
    its kin have theirs within a step.

    Source: Lugmayr et al. 2022, arXiv:2201.09865, section 4.2 and appendix (r and j there).

    Attributes:
        times: how often each part is walked; 1 is no jump. Calls of the model grow as much.
        jump: steps in each part.
    """

    times: int = 10
    jump: int = 1

    def __post_init__(self) -> None:
        for name in ("times", "jump"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")


def make_resample(resample: Any, masked: bool) -> Resample | None:
    """A Resample; a number is its times.

    Raises:
        TypeError, ValueError: neither, or there is no mask.
    """
    if resample is None:
        return None
    if not masked:
        raise ValueError("resample fits what is drawn to what a mask keeps: give init and mask")
    if isinstance(resample, bool) or not isinstance(resample, (int, Resample)):
        raise TypeError(f"resample must be a Resample or a number of times, got {resample!r}")
    return resample if isinstance(resample, Resample) else Resample(resample)


@dataclass(frozen=True)
class Stage:
    """Levels that are walked in one go; before it, the state is noised from the level `back_from`
    to their first, where that is given."""

    levels: Levels
    back_from: Level | None = None


def make_stages(levels: Levels, resample: Resample | None) -> tuple[Stage, ...]:
    """What a run walks: all levels once, or each part of them several times."""
    if resample is None or resample.times == 1:
        return (Stage(levels),)
    stages = []
    for start in range(0, len(levels) - 1, resample.jump):
        part = levels[start : start + resample.jump + 1]
        stages += [Stage(part)] + [Stage(part, part[-1])] * (resample.times - 1)
    return tuple(stages)


def noise_back(x: Tensor, noise: Tensor, clean: Level, noisy: Level) -> Tensor:
    """The state x at the level `clean` as it would be at `noisy`, with fresh unit noise."""
    scale = noisy.alpha / clean.alpha
    amount = math.sqrt(max(0.0, noisy.sigma**2 - (scale * clean.sigma) ** 2))
    return (x * scale).add_(noise, alpha=amount)
