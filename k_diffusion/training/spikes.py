"""Loss spikes: when a step's loss is out of the ordinary, and when a run has diverged.

A run that has diverged goes back to a checkpoint from before, and passes over the batches on which
it did. Source: Chowdhery et al. 2022, PaLM, arXiv:2204.02311, section 5.1, where the same batches
seen from another checkpoint did no harm: it takes both, the data and the state of the weights.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from k_diffusion.training.sections import SpikesConfig


@dataclass(frozen=True)
class Divergence:
    """A run that does not come back by itself.

    Attributes:
        first: the first of its steps that were out of the ordinary, counted from 1.
        last: the present one.
        reason: what was seen, in words.
    """

    first: int
    last: int
    reason: str


@dataclass(frozen=True)
class Verdict:
    """What to say of a step.

    Attributes:
        median: of the losses before, where this one is a spike above it; else None.
        divergence: where the run has diverged; else None.
    """

    median: float | None = None
    divergence: Divergence | None = None


class SpikeWatch:
    """Judges each step's loss by the usual ones before it.

    A spike is a loss above `factor` times the median of the last `window` usual losses, once there
    are so many. From the first spike on, the median is held for `patience` steps; if by then most
    of these were spikes or not finite, the run has diverged. It has too after `max_skipped` steps
    in a row that were not finite.

    Args:
        config: see there.
        max_skipped: as in the run's config.
    """

    def __init__(self, config: SpikesConfig, max_skipped: int) -> None:
        self.config, self.max_skipped = config, max_skipped

    def begin(self) -> dict[str, Any]:
        """The memory of a watch that has seen nothing: JSON data, for the checkpoint."""
        return {"usual": [], "first": None, "since": []}

    def add(
        self, memory: dict[str, Any], step: int, loss: float, skipped: bool, skipped_in_a_row: int
    ) -> Verdict:
        """Judge a step, and remember it.

        Args:
            memory: from `begin`; it is changed.
            step: counted from 1.
            loss: mean over the batch.
            skipped: whether loss or gradient were not finite.
            skipped_in_a_row: how many steps were not, this one included.
        """
        median = self._median(memory, None if skipped else loss)
        if skipped_in_a_row >= self.max_skipped:
            first = step - skipped_in_a_row + 1
            reason = f"{skipped_in_a_row} steps in a row were not finite"
            return Verdict(median, self._diverged(memory, first, step, reason))
        if median is not None and memory["first"] is None:
            memory["first"] = step
        if memory["first"] is None:
            if not skipped and self.config.factor is not None:
                memory["usual"] = [*memory["usual"], loss][-self.config.window :]
            return Verdict()
        # One entry a step: the loss, and whether it was far above the median; JSON has no nan.
        memory["since"].append([None if skipped else loss, skipped or median is not None])
        if len(memory["since"]) < self.config.patience:
            return Verdict(median)
        far = sum(is_far for _, is_far in memory["since"])
        if 2 * far > self.config.patience:
            reason = f"{far} of {self.config.patience} losses were spikes"
            return Verdict(median, self._diverged(memory, step, step, reason))
        usual = [loss for loss, is_far in memory["since"] if not is_far]
        memory.update(usual=[*memory["usual"], *usual][-self.config.window :], first=None, since=[])
        return Verdict(median)

    def _median(self, memory: dict[str, Any], loss: float | None) -> float | None:
        """The median of the usual losses, if this loss is far above it."""
        factor, usual = self.config.factor, memory["usual"]
        if factor is None or loss is None or len(usual) < self.config.window:
            return None
        median = statistics.median(usual)
        # Some losses may fall below zero: the distance above the median counts, in its size.
        return median if loss > median + (factor - 1) * abs(median) else None

    def _diverged(self, memory: dict[str, Any], first: int, last: int, reason: str) -> Divergence:
        """What is seen now is the usual, should the run go on from here all the same."""
        if memory["first"] is not None:
            first = min(first, memory["first"])
        usual = [loss for loss, _ in memory["since"] if loss is not None]
        memory.update(usual=usual[-self.config.window :], first=None, since=[])
        return Divergence(first, last, reason)


def without(ranges: Sequence[Sequence[int]], start: int, stop: int) -> Iterator[tuple[int, int]]:
    """What is left of the numbers from start until stop without those of some ranges, in order.

    Args:
        ranges: (start, stop) of each, in any order; they may overlap.
    """
    for first, last in sorted((int(a), int(b)) for a, b in ranges):
        if start < min(first, stop):
            yield start, min(first, stop)
        start = max(start, last)
    if start < stop:
        yield start, stop


def times(loss: float, median: float) -> str:
    """How far a loss is above the median, in words."""
    if median > 0 and math.isfinite(loss):
        return f"{loss / median:.3g} times the usual {median:.4g}"
    return f"where {median:.4g} is usual"
