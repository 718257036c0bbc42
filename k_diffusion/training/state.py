"""What the loop says after each step, or in place of one that cannot be."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from k_diffusion.training.health import BadStep

SPEED_STEPS = 50
"""Steps over which the speed is measured."""


class TrainingError(RuntimeError):
    """Training cannot go on; the message is one line."""

    everywhere = True  # as in ConfigError


@dataclass(frozen=True)
class TrainState:
    """What is known after a step.

    Attributes:
        step: steps done, skipped ones included.
        images_seen: the clock.
        total_images: where the run ends.
        loss: mean over the batch; not finite in a skipped step.
        grad_norm: norm of the gradient before clipping.
        lr: learning rate of this step.
        ema_decay: what this step keeps of the average, by its profile; 1 where it was skipped.
        skipped: whether this step changed nothing, because loss or gradient were not finite.
        report: what was wrong with a skipped step.
        terms: name -> mean over the batch of what the loss is made of, see `Objective.terms`.
        bands: sums of losses and numbers of samples by noise level, see `SigmaBands.sums`.
        noise_scale: the gradient noise scale in images; None where it is not measured, or not yet
            told from noise.
        micro_batch: the most images that a process computes at once.
        skipped_steps: how many have been, since the start of the run.
        images_per_second: over the last steps of this session, without evaluations and previews.
        seconds_left: at that speed, to the end of the run; of its steps alone.
    """

    step: int
    images_seen: int
    total_images: int
    loss: float
    grad_norm: float
    lr: float
    ema_decay: float
    skipped: bool
    skipped_steps: int
    images_per_second: float
    seconds_left: float
    report: BadStep | None = None
    terms: Mapping[str, float] = field(default_factory=dict)
    bands: Sequence[float] = ()
    noise_scale: float | None = None
    micro_batch: int | None = None


class Speed:
    """Images a second over the last `SPEED_STEPS` steps; the clock starts when it is made."""

    def __init__(self) -> None:
        self._images = 0
        self._aside = 0.0
        self._clock = deque([(time.perf_counter(), 0)], maxlen=SPEED_STEPS + 1)

    @contextmanager
    def standing(self) -> Iterator[None]:
        """Time within the block does not count: it is no training."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._aside += time.perf_counter() - began

    def after(self, images: int) -> float:
        """The speed, once a step of so many images is done."""
        self._images += images
        self._clock.append((time.perf_counter() - self._aside, self._images))
        (began, before), (now, done) = self._clock[0], self._clock[-1]
        return (done - before) / max(now - began, 1e-9)
