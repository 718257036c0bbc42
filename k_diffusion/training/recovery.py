"""What a run does about loss spikes: it tells them, and where it has diverged it goes back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from k_diffusion.training.checkpoint import CheckpointError, CheckpointInfo, read_info
from k_diffusion.training.metrics import Log
from k_diffusion.training.retention import gave_up
from k_diffusion.training.spikes import Divergence, SpikeWatch, times
from k_diffusion.training.trainer import Trainer, TrainState


class Recovery:
    """Looks at each step, and takes the trainer back where its run has diverged.

    What the watch remembers is saved with the checkpoint. Since every step is a function of (seed,
    step), a run that went back is bitwise one that passed over the same steps from the beginning,
    and so is one that was killed anywhere on this way.

    Args:
        trainer: whose steps are looked at.
        log: takes the events.
        checkpoints: gives those that it could go back to, from the oldest to the newest, once all
            that were begun are written.
        say: takes lines of news.
    """

    def __init__(
        self,
        trainer: Trainer,
        log: Log,
        checkpoints: Callable[[], Sequence[Path]],
        say: Callable[[str], None],
    ) -> None:
        config = trainer.config
        self._trainer, self._log, self._checkpoints, self._say = trainer, log, checkpoints, say
        self._config = config.spikes
        self._watch = SpikeWatch(config.spikes, config.max_skipped)

    @property
    def in_question(self) -> bool:
        """Whether checkpoints may soon be needed that are older than those that always stay."""
        memory = self._trainer.extra.get("spikes")
        in_a_row = self._trainer.skipped_in_a_row
        return self._config.roll_back and bool(in_a_row or (memory and memory["first"]))

    def went_back(self, state: TrainState) -> bool:
        """Judge a step that was just done; whether the trainer stands at an earlier one now."""
        if self._config.factor is None and not self._config.roll_back:
            return False
        trainer = self._trainer
        memory: dict[str, Any] = trainer.extra.setdefault("spikes", self._watch.begin())
        verdict = self._watch.add(
            memory, state.step, state.loss, state.skipped, trainer.skipped_in_a_row
        )
        at = {"step": state.step, "images_seen": state.images_seen}
        if (median := verdict.median) is not None:
            self._log.write("spike", **at, loss=state.loss, median=median)
            self._say(
                f"step {state.step} is a spike: loss {state.loss:.4g}, {times(state.loss, median)}"
            )
        if (divergence := verdict.divergence) is None:
            return False
        self._log.write("diverged", **at, first_step=divergence.first, reason=divergence.reason)
        return self._go_back(divergence)

    def _go_back(self, divergence: Divergence) -> bool:
        trainer, first, last = self._trainer, divergence.first, divergence.last
        begun = f"diverged from step {first} on ({divergence.reason})"
        if not self._config.roll_back:
            self._say(f"{begun}: spikes.roll_back is off, so it goes on as it is")
            return False
        if len(trainer.passed_over) >= self._config.most_roll_backs:
            self._say(
                f"{begun}: spikes.most_roll_backs = {self._config.most_roll_backs} is used up"
            )
            return False
        if (info := self._newest_before(first)) is None:
            self._say(f"{begun}: there is no checkpoint from before to go back to")
            return False
        trainer.go_back(info.path, first, last)
        self._log.went_back()
        self._log.write(
            "roll_back", step=info.step, images_seen=info.images_seen, passed_over=[first, last]
        )
        self._say(f"{begun}: back to {info.path}, and passing over steps {first} to {last}")
        return True

    def _newest_before(self, step: int) -> CheckpointInfo | None:
        """The newest whole checkpoint from before a step, counted from 1; of the run that stands,
        not of a line that it gave up."""
        for path in reversed(self._checkpoints()):
            try:
                info = read_info(path)
            except CheckpointError as error:
                self._say(f"passing over {error}")
                continue
            theirs = info.state.get("passed_over", [])
            if info.step < step and not gave_up(info.step, theirs, self._trainer.passed_over):
                return info
        return None
