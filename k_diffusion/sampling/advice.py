"""What looks wrong about a run before it begins, in plain words, with the change to try."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from k_diffusion.guidance import Clamp, Contrast, DynamicThreshold, Linear
from k_diffusion.sampling.registry import Solver
from k_diffusion.utils.levels import Levels
from k_diffusion.utils.maths import is_number
from k_diffusion.utils.scheduler import Scheduler

SATURATES = 15.0
"""A scale of linear guidance above which the colours of most models saturate."""
NEAR = math.log(1.5)
"""How far the first level may lie from the model's range, in log(sigma / alpha)."""
FAR = math.log(5.0)


class SamplingAdvice(UserWarning):
    """Something about a run that will hardly give what is wanted; the message says what to try."""


def advice(
    denoiser: Any,
    solver: Any,
    levels: Levels,
    *,
    steps: int,
    init: Tensor | None = None,
    whole: bool = True,
) -> list[str]:
    """What to say of a run before it begins; nothing where all is well.

    Args:
        denoiser: of the run, guidance included.
        solver: of fixed or adaptive steps.
        levels: from the first.
        steps: number of steps.
        init: images that it begins from, or None; its standard deviation is read.
        whole: whether it begins at the noisiest level, not from noised images.
    """
    found = [
        _levels(denoiser, levels) if whole else "",
        _steps(solver, steps),
        _data(denoiser, init),
        *_guidance(denoiser),
    ]
    return [line for line in found if line]


def _levels(denoiser: Any, levels: Levels) -> str:
    process = getattr(denoiser, "process", None)
    if not isinstance(process, Scheduler):
        return ""
    first, known = levels[0], process.levels(1).on(levels.path)[0]
    if not (math.isfinite(first.half_log_snr) and math.isfinite(known.half_log_snr)):
        return ""
    above = known.half_log_snr - first.half_log_snr
    said = f"the run begins at sigma / alpha = {first.ratio:.4g}, but the model was trained up to"
    way = f"give the scheduler a sigma_max of {known.ratio:.4g}"
    if above > NEAR:
        return f"{said} {known.ratio:.4g} only: {way}"
    if above < -FAR:
        return (
            f"{said} {known.ratio:.4g}: so little noise leaves of the data what no sample should "
            f"begin with, and samples come out blurred or alike; {way}"
        )
    return ""


def _steps(solver: Any, steps: int) -> str:
    if not isinstance(solver, Solver) or solver.order < 2 or steps >= solver.order:
        return ""
    return (
        f"{steps} step{'s are' if steps > 1 else ' is'} too few for {solver.name}, which is of order "
        f"{solver.order} only with {solver.order} or more: take more steps, or euler"
    )


def _data(denoiser: Any, init: Tensor | None) -> str:
    expected: Any = getattr(denoiser, "sigma_data", None)
    if init is None or not is_number(expected):
        return ""
    found = float(init.float().std(correction=0)) if init.numel() > 1 else 0.0
    if found == 0 or 1 / 4 < found / expected < 4:
        return ""
    return (
        f"init has a standard deviation of {found:.3g}, but the model's data have {expected:.3g}: "
        "bring it to the scale of training, [-1, 1] for images"
    )


def _guidance(denoiser: Any) -> list[str]:
    found, held = [], False
    inner = denoiser
    while inner is not None:
        held = held or isinstance(inner, (Clamp, DynamicThreshold))
        if isinstance(inner, Contrast) and isinstance(inner.rule, Linear) and not held:
            scale = inner.scale
            if is_number(scale) and abs(float(scale)) > SATURATES:  # type: ignore[arg-type]
                found.append(
                    f"guidance of scale {scale:g} saturates most models: take less, or apg, "
                    "rescale=0.7, or DynamicThreshold around it"
                )
        inner = getattr(inner, "denoiser", None)
    return found
