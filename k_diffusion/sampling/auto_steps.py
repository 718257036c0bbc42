"""As many steps as a sample needs: doubled until they change it by less than a tolerance."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from k_diffusion.utils.maths import is_number


@dataclass(frozen=True)
class AutoSteps:
    """How the number of steps is found, for each sample of a batch by itself.

    A sample is drawn anew from the same noise with 2, 4, 8... times the first number of steps,
    until its values change by no more than the tolerance. A method of order p is then within about
    1 / (2^p - 1) of the last change of its limit. All of it together calls the model twice as
    often as the last run alone, or less.

    Attributes:
        tolerance: the change of a sample, root mean square, as a share of the sample's own.
        first: steps to begin with.
        most: steps that are not exceeded; a sample that still changes there is told of.
    """

    tolerance: float = 0.01
    first: int = 8
    most: int = 512

    def __post_init__(self) -> None:
        if not is_number(self.tolerance) or not 0 < self.tolerance < math.inf:
            raise ValueError(f"tolerance must be a number above 0, got {self.tolerance!r}")
        for name in ("first", "most"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        if self.most < 2 * self.first:
            raise ValueError(
                f"most = {self.most} leaves no room to double first = {self.first}: raise most"
            )

    def unsettled(self, steps: Sequence[int], changes: Sequence[float]) -> str:
        """What to say of samples that still change by more than the tolerance; or nothing."""
        over = [change for change in changes if not change <= self.tolerance]
        if not over:
            return ""
        return (
            f"{len(over)} of {len(changes)} samples still change by up to {max(over):.2g} of their "
            f"size from {max(steps) // 2} to {max(steps)} steps, more than the tolerance "
            f"{self.tolerance:g}: raise most or the tolerance, or take a method of higher order"
        )


def make_auto(steps: Any) -> AutoSteps | None:
    """How to find the number of steps, where `steps` says that it is to be found."""
    if isinstance(steps, AutoSteps):
        return steps
    return AutoSteps() if isinstance(steps, str) and steps == "auto" else None


def refine(
    auto: AutoSteps, batch: int, run: Callable[[Sequence[int], int], Tensor]
) -> tuple[Tensor, tuple[int, ...], tuple[float, ...]]:
    """Draws each sample with as many steps as it needs.

    Args:
        batch: number of samples.
        run: (samples, steps) -> those samples, drawn with so many steps, shape (len(rows), ...).

    Returns:
        The samples; the steps that each took; its last change.
    """
    rows, steps = list(range(batch)), auto.first
    before = run(rows, steps)
    result = torch.empty_like(before)
    taken, changes = [0] * batch, [0.0] * batch
    while True:
        steps *= 2
        after = run(rows, steps)
        change = _change(before, after)
        last = steps * 2 > auto.most
        done = [k for k, value in enumerate(change) if last or value <= auto.tolerance]
        for k in done:
            taken[rows[k]], changes[rows[k]] = steps, change[k]
        result[[rows[k] for k in done]] = after[done]
        if len(done) == len(rows):
            break
        kept = [k for k in range(len(rows)) if k not in set(done)]
        rows, before = [rows[k] for k in kept], after[kept]
    return result, tuple(taken), tuple(changes)


def _change(before: Tensor, after: Tensor) -> list[float]:
    """Root mean square of each sample's change, as a share of its own; nan counts as large."""
    if after.device.type == "meta":
        return [0.0] * len(after)
    difference, size = ((v).flatten(1).norm(dim=1) for v in (after - before, after))
    change = torch.where(difference == 0, 0.0, difference / size)
    return [math.inf if math.isnan(value) else value for value in change.tolist()]
