"""A training run in a folder: progress, metrics, checkpoints, an orderly end, and going on.

The folder holds `checkpoint-<images seen>.safetensors` (see `retention`), `ema/` with snapshots of
the averages and `previews/` where the config asks for them, `metrics.jsonl` (see `metrics`), and
`.lock` while a run works there.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from k_diffusion.models import Conditioner
from k_diffusion.training.broken import BrokenDataError
from k_diffusion.training.checkpoint import CheckpointError, read_info
from k_diffusion.training.config import TrainConfig
from k_diffusion.training.dataset import DataError, Source
from k_diffusion.training.evaluating import Evaluation
from k_diffusion.training.lock import RunLock
from k_diffusion.training.loggers import Loggers, check_loggers
from k_diffusion.training.metrics import METRICS, Log
from k_diffusion.training.milestones import Act, Milestones
from k_diffusion.training.opening import evaluation_line, micro_batch_line, opening_lines
from k_diffusion.training.previews import Previews
from k_diffusion.training.progress import Progress
from k_diffusion.training.recovery import Recovery
from k_diffusion.training.retention import checkpoint_path, list_checkpoints, remove_surplus
from k_diffusion.training.run_folder import RunFolder, find_folder, remove_after
from k_diffusion.training.signals import StopAsked, StopRequest, agreed, looking, stop_signals
from k_diffusion.training.snapshots import save_snapshot
from k_diffusion.training.trainer import Trainer, TrainState
from k_diffusion.training.writer import CheckpointWriter
from k_diffusion.utils.words import reason_of

__all__ = ["RunResult", "run_training", "stop_signals"]

OnStep = Callable[[Trainer, TrainState], None]


@dataclass(frozen=True)
class RunResult:
    """How a run ended.

    Attributes:
        checkpoint: the last one written.
        sha256: its hash.
        metrics: the metrics file.
        images_seen: the clock at the end.
        loss: mean of the last 50 finite steps of this session; nan where there was none.
        seconds: of this session.
        skipped_steps: steps that were not finite, since the start of the run.
        bad_files: broken image file -> what is wrong with it.
        stopped_by: the signal that ended it before its time (2: Ctrl-C, 15: SIGTERM), or None.
        resumed_from: the checkpoint from which this session went on, or None.
    """

    checkpoint: Path
    sha256: str
    metrics: Path
    images_seen: int
    loss: float
    seconds: float
    skipped_steps: int
    bad_files: dict[str, str]
    stopped_by: int | None
    resumed_from: Path | None


def run_training(
    config: TrainConfig,
    *,
    resume: str | Path | None = None,
    overwrite: bool = False,
    progress: bool = True,
    on_step: OnStep | None = None,
    say: Callable[[str], None] | None = None,
    network: nn.Module | None = None,
    source: Source | None = None,
    conditioner: Conditioner | None = None,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None,
) -> RunResult:
    """Train to the end of the run, or until Ctrl-C or SIGTERM; both leave a checkpoint.

    Args:
        config: the run; its `out` is the folder.
        resume: a checkpoint to go on from; "auto": the newest one in the folder that is whole, or
            the beginning where there is none.
        overwrite: a new run may take the place of one that is in the folder.
        progress: show a line of live progress on stderr.
        on_step: called after each step.
        say: takes each line of news; None: stderr.
        network: trained instead of one built from the config.
        source: trained on instead of the config's data.
        conditioner: makes what the network is told, instead of the config's.
        optimizer: network -> the optimiser to train it with, instead of the config's; its learning
            rate still takes the config's course. Weights that it leaves out stay as they are.

    Raises:
        ConfigError: the folder holds a run that is neither resumed nor to be overwritten (nor is
            one resumed from elsewhere put into it), or the config does not fit the data or the
            machine.
        CheckpointError: the checkpoint to resume from is damaged or of another run, or one cannot
            be written.
        DataError: the data cannot be used.
        TrainingError: too many steps in a row were not finite.

    Besides what is raised, every trouble is a line of news.
    """
    display = Progress(shown=progress)
    tell = say or display.say
    check_loggers(config.loggers)
    folder = find_folder(Path(config.out), resume, overwrite, tell)
    trainer = Trainer(
        config,
        resume=folder.start,
        network=network,
        source=source,
        conditioner=conditioner,
        optimizer=optimizer,
    )
    with ExitStack() as stack:
        stop = stack.enter_context(stop_signals())
        session = _Session(trainer, folder, stop, stack, display, tell)
        try:
            stopped = session.train(on_step, looked=resume is not None)
        except Exception as error:
            session.broke_off(error)
            raise
        return session.end(stopped)


class _Session:
    """What hangs on the steps of a trainer, from a run's start, or going on, to its end.

    Every process has one; the main one alone writes files and speaks.

    Args:
        trainer: at the step where it begins.
        folder: of the run.
        stop: which signal has asked for an end.
        stack: takes what is to be closed.
        display: of the progress.
        tell: takes lines of news.
    """

    def __init__(
        self,
        trainer: Trainer,
        folder: RunFolder,
        stop: StopRequest,
        stack: ExitStack,
        display: Progress,
        tell: Callable[[str], None],
    ) -> None:
        self.trainer, self.folder, self.display, self.tell = trainer, folder, display, tell
        self.config = config = trainer.config
        self.main, on_main = trainer.processes.main, trainer.processes.on_main
        self.tell_once = tell if self.main else lambda line: None  # what all processes know alike
        self.began = time.perf_counter()
        self.previews = Previews(trainer)
        self.evaluation: Evaluation | None = None
        if config.evaluate.every_images is not None:
            self.evaluation = Evaluation(trainer)
        self.lock: RunLock | None = None  # of the main process, as are the loggers
        self.loggers: Loggers | None = None

        def take_folder() -> None:
            self.lock = folder.take(trainer.images_seen, tell)
            stack.callback(self.lock.release)

        def open_loggers() -> None:
            self.loggers = Loggers(config, trainer.images_seen, folder.going_on, tell)
            stack.callback(self.loggers.close)

        on_main(take_folder)
        on_main(open_loggers)
        metrics = folder.path / METRICS if self.main else None
        self.log = Log(trainer, metrics, folder.going_on, tell, self.loggers)
        stack.callback(self.log.close)
        stack.callback(display.close)
        self.writer = CheckpointWriter(background=config.background_checkpoints, say=tell)
        stack.enter_context(self.writer)
        self.recovery = Recovery(trainer, self.log, self.to_go_back_to, self.tell_once)
        self.milestones = Milestones(trainer, self.acts())
        self.asked = lambda: agreed(trainer.accelerator, stop.signal)
        self.look = looking(trainer.accelerator, stop)
        self.checkpoint = folder.start
        self.written = trainer.step if folder.start is not None else -1
        self.micro_batch = trainer.micro_batch
        self.named_files: set[str] = set()

    def acts(self) -> list[Act]:
        """What is done every so many images, in this order: a run that goes on from a checkpoint
        lacks nothing of before it."""
        config, acts = self.config, list[Act]()
        if (every := config.evaluate.every_images) is not None:
            acts += [Act("evaluate", (every,), self.evaluate, can_wait=True)]
        if every := config.ema.snapshot_every_images:
            acts += [Act("snapshot", (every,), lambda: save_snapshot(self.trainer))]
        if (every := config.preview.every_images) is not None:
            acts += [Act("preview", (every,), self.show_preview, can_wait=True)]
        often = (config.checkpoint_every_images, config.keep_every_images)
        return [*acts, Act("checkpoint", often, self.save, at_a_stop=True)]

    # ------------------------------------------------------------ the course of it

    def train(self, on_step: OnStep | None, looked: bool) -> int | None:
        """All steps that are left; the signal that ended them before their time, or None."""
        trainer, steps = self.trainer, self.config.steps
        try:
            stopped = self.begin(looked)
        except StopAsked as asked:
            stopped = asked.signal
        if stopped is not None:
            return self.stop(stopped)
        for state in trainer:
            back = self.take_note(state, on_step)
            ended = state.step == steps and not back
            if self.main:
                besides = 0.0 if ended else self.milestones.seconds_ahead()
                self.display.show(state, self.log.recent, ended, besides)
            stopped = None if ended else self.asked()
            at = state.images_seen
            stopped = self.milestones.reach(at, ended=ended, stopped=stopped, back=back)
            if stopped is None and self.written == trainer.step and not (ended or back):
                stopped = self.asked()  # a signal during the write needs no other checkpoint
            if stopped is not None:
                return self.stop(stopped)
        if self.written != trainer.step:  # the last steps were passed over
            self.log.passed_over_the_end()
            stopped = self.milestones.reach(trainer.images_seen, ended=True)
            if stopped is not None:
                return self.stop(stopped)
        return None

    def begin(self, looked: bool) -> int | None:
        """What comes before the first step; the signal that ended it in the midst of that, if any.

        Raises:
            StopAsked: it came before anything could be missed.
        """
        self.name_broken("skipping")
        for line in opening_lines(self.trainer, self.folder.start, looked=looked):
            self.tell_once(line)
        if self.evaluation is not None:
            self.evaluation.prepare(self.tell_once, self.look)
        return self.milestones.make_up()

    def take_note(self, state: TrainState, on_step: OnStep | None) -> bool:
        """Log a step and tell its news; whether the trainer stands at an earlier one now."""
        if state.micro_batch != self.micro_batch:
            self.tell_once(micro_batch_line(self.micro_batch, state.micro_batch))
            sizes = {"before": self.micro_batch, "now": state.micro_batch}
            at = {"step": state.step, "images_seen": state.images_seen}
            self.log.write("micro_batch", **at, **sizes)
            self.micro_batch = state.micro_batch
        self.log.add(state)
        if on_step is not None:
            on_step(self.trainer, state)
        self.name_broken("replacing")
        if state.skipped:
            self.tell_once(f"step {state.step} skipped as not finite: {state.report}")
        back = self.recovery.went_back(state)
        if back and self.main:
            remove_after(self.folder.path, self.trainer.images_seen, self.tell)
        return back

    def stop(self, number: int) -> int:
        """End before the time, with a checkpoint of this moment."""
        trainer = self.trainer
        if self.written != trainer.step:  # it was stopped before its first step
            self.save()
        self.writer.wait()
        total = self.config.steps * self.config.batch_size
        self.tell_once(
            f"stopped by {signal.Signals(number).name} at {trainer.images_seen} of {total} images; "
            f"checkpoint: {self.checkpoint}"
        )
        return number

    def end(self, stopped: int | None) -> RunResult:
        """The last line of an orderly end."""
        trainer, checkpoint = self.trainer, self.checkpoint
        sha256 = self.writer.wait()
        trainer.accelerator.wait_for_everyone()
        if checkpoint is None or not sha256:  # resumed at the very end: nothing was left to do
            checkpoint = checkpoint or checkpoint_path(self.folder.path, trainer.images_seen)
            sha256 = read_info(checkpoint).sha256
        return RunResult(
            checkpoint=checkpoint,
            sha256=sha256,
            metrics=self.folder.path / METRICS,
            images_seen=trainer.images_seen,
            loss=self.log.recent,
            seconds=self.write_end(checkpoint.name, sha256, stopped),
            skipped_steps=trainer.skipped_steps,
            bad_files=dict(trainer.source.bad_files),
            stopped_by=stopped,
            resumed_from=self.folder.start,
        )

    def broke_off(self, error: Exception) -> None:
        """The same where an error ends the run.

        Data that cannot be read leave a checkpoint, too: the weights are sound, and every process
        stands between two steps. Other errors leave none, so that none from before, which may be
        wanted, has to make room.
        """
        self.name_broken("replacing")
        alike = self.trainer.processes.count == 1 or getattr(error, "everywhere", False)
        try:
            if isinstance(error, DataError) and alike and self.written != self.trainer.step:
                self.save()
                broken = isinstance(error, BrokenDataError)
                once = "where max_bad_share is higher" if broken else "once the data can be read"
                self.tell_once(f"checkpoint: {self.checkpoint}; --resume goes on from it {once}")
            self.writer.wait()
        except CheckpointError as failure:
            self.tell(str(failure))
        if not self.main:
            return
        name = sha256 = None
        if self.checkpoint is not None:
            try:
                name, sha256 = self.checkpoint.name, read_info(self.checkpoint).sha256
            except CheckpointError:  # it could not be written
                name = None
        self.write_end(name, sha256, None, reason=reason_of(error))

    def write_end(
        self, checkpoint: str | None, sha256: str | None, stopped: int | None, **facts: str
    ) -> float:
        """The session's last line; gives how many seconds it took."""
        seconds = time.perf_counter() - self.began
        self.log.write(
            "end",
            images_seen=self.trainer.images_seen,
            checkpoint=checkpoint,
            sha256=sha256,
            seconds=seconds,
            stopped_by=stopped,
            bad_files=self.trainer.source.bad_files,
            **facts,
        )
        return seconds

    # ------------------------------------------------------------ its parts

    def name_broken(self, doing: str) -> None:
        """Tell of the broken files that no line has named yet."""
        for file, reason in self.trainer.source.bad_files.items():
            if file not in self.named_files:
                self.named_files.add(file)
                self.tell_once(f"{doing} broken image {file}: {reason}")

    def evaluate(self) -> None:
        """Measure the average, and tell the figures."""
        assert self.evaluation is not None
        at, line = self.trainer.images_seen, self.evaluation.measure()
        self.log.write("evaluate", step=self.trainer.step, images_seen=at, **line)
        self.tell_once(evaluation_line(at, line))

    def show_preview(self) -> None:
        """Draw samples of the average into their file."""
        grid = self.previews.save(self.tell)
        if grid is not None and self.loggers is not None:
            self.loggers.picture(self.trainer.images_seen, grid)

    def save(self) -> None:
        """Write a checkpoint of this moment."""
        trainer, config = self.trainer, self.config
        # Shards on the way, as they are quick to write; one file that is whole at the end.
        sharded = trainer.is_sharded and trainer.step < config.steps
        path = checkpoint_path(self.folder.path, trainer.images_seen, sharded)
        self.log.flush()
        passed_over = tuple(trainer.passed_over)
        surplus = partial(remove_surplus, path, config, self.tell, passed_over)
        after = (lambda: None) if self.recovery.in_question else surplus
        if self.lock is not None:
            self.lock.renew()
        if sharded:
            trainer.save(path)
            if self.main:
                after()
        else:
            contents = trainer.contents()
            if self.main:
                self.writer.save(path, contents, after=after)
        self.checkpoint, self.written = path, trainer.step

    def to_go_back_to(self) -> list[Path]:
        """The checkpoints that the run could go back to, all of them written."""
        self.writer.wait()
        self.trainer.accelerator.wait_for_everyone()
        start = self.folder.start
        return [*([start] if start is not None else []), *list_checkpoints(self.folder.path)]
