"""What looks wrong about a run before it begins, in plain words, with the change to try."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from k_diffusion.guidance import Clamp, Contrast, DynamicThreshold, Linear
from k_diffusion.sampling.registry import Solver
from k_diffusion.utils.levels import Level, Levels
from k_diffusion.utils.maths import is_number
from k_diffusion.utils.scheduler import Scheduler

SATURATES = 15.0
"""A scale of linear guidance above which the colours of most models saturate."""
NEAR = math.log(1.5)
"""How far beyond the noisiest level that is known a run may begin, in log(sigma / alpha)."""
FAR = math.log(5.0)
"""How far below it, in the same."""
ENOUGH = 50.0
"""The sigma / alpha that is noise enough for any data, however far a model was trained."""


class SamplingAdvice(UserWarning):
    """Something about a run that will hardly give what is wanted; the message says what to try."""


def advice(
    denoiser: Any,
    solver: Any,
    levels: Levels,
    *,
    scheduler: Scheduler | None = None,
    calls: Callable[[], int] | None = None,
    init: Tensor | None = None,
    whole: bool = True,
) -> list[str]:
    """What to say of a run before it begins; nothing where all is well.

    Args:
        denoiser: of the run, guidance included.
        solver: of fixed or adaptive steps.
        levels: from the first.
        scheduler: that laid them.
        calls: how often a solver of fixed steps calls the model on them.
        init: images that it begins from, or None; its standard deviation is read.
        whole: whether it begins at the noisiest level, not from noised images.
    """
    found = [
        _levels(denoiser, levels, scheduler) if whole else "",
        _steps(solver, len(levels) - 1, calls),
        _data(denoiser, init),
        *_guidance(denoiser),
    ]
    return [line for line in found if line]


def _levels(denoiser: Any, levels: Levels, scheduler: Scheduler | None) -> str:
    process = getattr(denoiser, "process", None)
    first = levels[0]
    if not isinstance(process, Scheduler) or not math.isfinite(first.half_log_snr):
        return ""
    known = process.levels(1).on(levels.path)[0]
    off = _off(first, known)
    # Where a schedule begins unless it is told otherwise is nobody's mistake.
    if not off or any(not _off(first, usual) for usual in _usual(scheduler, process, levels)):
        return ""
    way = f"give the scheduler a sigma_max of {known.ratio:.4g}"
    if known.alpha == 0:
        way = "leave the scheduler's sigma_max open"
    if scheduler is not None and not hasattr(scheduler, "sigma_max"):
        way = f"leave the options of {type(scheduler).__name__} away, or lay karras levels"
    said = f"the run begins at sigma / alpha = {first.ratio:.4g}, but the model was trained up to"
    if off > 0:
        return f"{said} {known.ratio:.4g} only: {way}"
    return (
        f"{said} {known.ratio:.4g}: so little noise leaves of the data what no sample should begin "
        f"with, and samples come out blurred or alike; {way}"
    )


def _off(first: Level, known: Level) -> int:
    """1: a run begins far beyond a known level; -1: far below it; 0: near it."""
    if known.half_log_snr - first.half_log_snr > NEAR:
        return 1
    return -(first.half_log_snr - max(known.half_log_snr, -math.log(ENOUGH)) > FAR)


def _usual(scheduler: Scheduler | None, process: Scheduler, levels: Levels) -> list[Level]:
    """Where the scheduler begins without options, as many steps; nothing of one that needs them."""
    if scheduler is None:
        return []
    try:
        plain = scheduler.usual().within(process)
        return [plain.levels(len(levels) - 1).on(levels.path)[0]]
    except (TypeError, ValueError):
        return []


def _steps(solver: Any, steps: int, calls: Callable[[], int] | None) -> str:
    if not isinstance(solver, Solver) or solver.order < 2 or steps >= solver.order:
        return ""
    # A method of several calls a step has its order within each; one that goes by what earlier
    # steps have shown, or whose one step ends at the clean data, is euler.
    if calls is not None and calls() > steps:
        return ""
    return (
        f"{steps} step{'s are' if steps > 1 else ' is'} too few for {solver.name}, which is of "
        f"order {solver.order} only with {solver.order} or more: take more steps, or euler"
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
