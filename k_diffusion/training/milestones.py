"""What a run does every so many images and at its end, in which order, and how a stop meets it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from k_diffusion.training.retention import passed
from k_diffusion.training.signals import StopAsked

if TYPE_CHECKING:
    from k_diffusion.training.trainer import Trainer

OWED = "owed"
"""In `Trainer.extra`, and so in a checkpoint: names of acts that a stop has put off."""


@dataclass
class Act:
    """One of those things. All are done at the end of the run.

    Attributes:
        name: by which a checkpoint says that it is owed.
        every: it is done after each step that reaches or passes a multiple of one of these many
            images; None: that one is not asked for.
        do: does it; all processes call it. It may raise `StopAsked`.
        can_wait: whether it only looks at the weights, and may take long. At a stop it is not
            begun, or is cut short, and is owed: a run that goes on does it first, from the same
            weights. Its time is none of training's.
        at_a_stop: whether a stop makes it due.
        seconds: how long it took the last time in this session; None: not done yet.
    """

    name: str
    every: tuple[int | None, ...]
    do: Callable[[], object]
    can_wait: bool = False
    at_a_stop: bool = False
    seconds: float | None = None

    def due(self, images_seen: int, batch_size: int) -> bool:
        """Whether it is done after the step that ended there."""
        return any(passed(images_seen, batch_size, every) for every in self.every)

    def times_ahead(self, images_seen: int, batch_size: int, total: int) -> int:
        """How often it is done after the steps from there to the end of the run.

        Args:
            images_seen: after the last step done, a multiple of `batch_size`.
            batch_size: images a step.
            total: images seen at the end, a multiple of it too.
        """
        steps = (total - images_seen) // batch_size
        # A step passes several multiples at most where each passes one.
        found = [
            min(steps, total // every - images_seen // every)
            for every in self.every
            if every is not None
        ]
        return max(found, default=0) + (steps > 0 and not self.due(total, batch_size))


class Milestones:
    """A run's acts, done after the steps where they are due.

    Args:
        trainer: between whose steps they are done.
        acts: in the order in which they are done. What a checkpoint has to know of stands before
            it.
    """

    def __init__(self, trainer: Trainer, acts: Sequence[Act]) -> None:
        self._trainer, self._acts = trainer, tuple(acts)

    def reach(
        self,
        images_seen: int,
        *,
        ended: bool,
        stopped: int | None = None,
        back: bool = False,
    ) -> int | None:
        """Do what is due after a step; every process calls it.

        Args:
            images_seen: after the step.
            ended: the run is at its end.
            stopped: the signal that has ended it before, if any.
            back: the run has just gone back: what is due here was done when it first came by.

        Returns:
            The signal that has ended it by now.
        """
        size = self._trainer.config.batch_size
        due = [] if back else [a.name for a in self._acts if ended or a.due(images_seen, size)]
        return self._do(due, stopped)

    def make_up(self) -> int | None:
        """Do what the checkpoint that the run goes on from owes, and write it anew without debts;
        the signal that has ended this, if any."""
        owed = self._trainer.extra.pop(OWED, [])
        known = [act.name for act in self._acts if act.name in owed]
        checkpoints = [act.name for act in self._acts if act.at_a_stop]
        return self._do([*known, *checkpoints], None) if known else None

    def _do(self, due: Sequence[str], stopped: int | None) -> int | None:
        owed: list[str] = []
        for act in self._acts:
            if act.name not in due and not (act.at_a_stop and stopped is not None):
                continue
            if not act.can_wait:
                if owed:
                    self._trainer.extra[OWED] = owed
                act.do()
                continue
            if stopped is None:
                try:
                    self._timed(act)
                    continue
                except StopAsked as asked:
                    stopped = asked.signal
            owed.append(act.name)
        return stopped

    def _timed(self, act: Act) -> None:
        began = time.perf_counter()
        with self._trainer.speed.standing():
            act.do()
        act.seconds = time.perf_counter() - began

    def seconds_ahead(self) -> float:
        """What those acts that take time of their own will take until the end of the run, by how
        long each took the last time; those not yet done in this session count nothing."""
        trainer = self._trainer
        size = trainer.config.batch_size
        total = trainer.config.steps * size
        return sum(
            act.seconds * act.times_ahead(trainer.images_seen, size, total)
            for act in self._acts
            if act.can_wait and act.seconds is not None
        )
