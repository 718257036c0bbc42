"""A training run in a folder: progress, metrics, checkpoints, an orderly end, and going on.

The folder holds `checkpoint-<images seen>.safetensors` (see `retention`), `ema/` with snapshots of
the averages where the config asks for them, `metrics.jsonl`, and `.lock` while a run works there.
The metrics are one JSON object a line:

- {"event": "start", "config", "data", "parameters", "versions"}: once;
- {"event": "train", "step", "images_seen", "loss", "grad_norm", "lr", "ema_decay",
  "skipped_steps", "images_per_second"}: every `log_every_images`; loss and grad_norm are means
  over the finite steps since the line before, null where there was none; images_per_second is null
  where the run ends on steps that it passes over; also "terms", what the
  loss is made of (name -> mean), where it has several, and "noise_scale", where that is measured;
- {"event": "skipped", "images_seen", "step", "loss", "grad_norm", "images", "more_images",
  "sigmas", "where"}: for each step that was not finite, see `BadStep`; loss and grad_norm are
  words where they are no number ("nan", "inf");
- {"event": "micro_batch", "step", "images_seen", "before", "now"}: the most images that a process
  computes at once; before is null where "auto" has found it, else memory ran out;
- {"event": "spike", "step", "images_seen", "loss", "median"}: for each loss far above the median
  of those before, see `SpikeWatch`;
- {"event": "diverged", "step", "images_seen", "first_step", "reason"}: the run does not come back
  from these by itself;
- {"event": "roll_back", "step", "images_seen", "passed_over"}: after that, where it went back to,
  and first and last of the steps that it leaves out this time. Of lines with the same images_seen
  the last one holds;
- {"event": "end", "images_seen", "checkpoint", "sha256", "seconds", "stopped_by", "bad_files"}.

A resumed run drops the lines that were written after its checkpoint, so the file reads as if the
run had never been stopped. Of a run that was killed at any moment, only `images_per_second` and
`seconds` tell.
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
from k_diffusion.training.checkpoint import read_info
from k_diffusion.training.config import ConfigError, TrainConfig
from k_diffusion.training.dataset import Source
from k_diffusion.training.lock import RunLock, refuse_busy
from k_diffusion.training.metrics import METRICS, Log
from k_diffusion.training.opening import micro_batch_line, opening_lines
from k_diffusion.training.progress import Progress
from k_diffusion.training.recovery import Recovery
from k_diffusion.training.retention import (
    checkpoint_path,
    latest_checkpoint,
    list_checkpoints,
    passed,
    put_back,
    remove_all,
    remove_half_written,
    remove_surplus,
    set_aside,
)
from k_diffusion.training.signals import agreed, stop_signals
from k_diffusion.training.snapshots import remove_snapshots_after, save_snapshot, snapshot_files
from k_diffusion.training.trainer import Trainer, TrainState
from k_diffusion.training.writer import CheckpointWriter


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
    on_step: Callable[[Trainer, TrainState], None] | None = None,
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
    out = Path(config.out)
    display = Progress(shown=progress)
    tell = say or display.say
    refuse_busy(out)
    put_back(out)
    start = _start_point(out, resume, overwrite, tell)
    found, going_on = list_checkpoints(out), _lies_in(out, start)
    trainer = Trainer(
        config,
        resume=start,
        network=network,
        source=source,
        conditioner=conditioner,
        optimizer=optimizer,
    )
    main = trainer.accelerator.is_main_process
    tell_once = tell if main else lambda line: None  # what all processes know alike
    config = trainer.config
    began, written = time.perf_counter(), trainer.step if start is not None else -1
    checkpoint = start
    with ExitStack() as stack:
        stop = stack.enter_context(stop_signals())

        lock: RunLock | None = None  # of the main process

        def take_folder() -> None:
            nonlocal lock
            out.mkdir(parents=True, exist_ok=True)
            lock = RunLock(out, tell)
            stack.callback(lock.release)
            if list_checkpoints(out) != found:
                raise ConfigError(f"another run has written to out = {str(out)!r} meanwhile")
            _make_room(out, going_on, overwrite)
            if going_on:
                set_aside(out, trainer.images_seen, tell)
            remove_snapshots_after(out, trainer.images_seen if going_on else 0, tell)

        trainer.processes.on_main(take_folder)
        log = Log(trainer, out / METRICS if main else None, resumed=going_on, say=tell)
        stack.callback(log.close)
        stack.callback(display.close)
        for file, reason in trainer.source.bad_files.items():
            tell_once(f"skipping broken image {file}: {reason}")
        named = set(trainer.source.bad_files)
        for line in opening_lines(trainer, start, looked=resume is not None):
            tell_once(line)
        micro_batch = trainer.micro_batch

        def to_go_back_to() -> list[Path]:
            writer.wait()
            trainer.accelerator.wait_for_everyone()
            return [*([start] if start is not None else []), *list_checkpoints(out)]

        writer = CheckpointWriter(background=config.background_checkpoints, say=tell)
        stack.enter_context(writer)
        recovery = Recovery(trainer, log, to_go_back_to, tell_once)

        def save(ended: bool) -> Path:
            # Shards on the way, as they are quick to write; one file that is whole at the end.
            sharded = trainer.is_sharded and not ended
            path = checkpoint_path(out, trainer.images_seen, sharded)
            log.flush()
            all_stay = recovery.in_question
            passed_over = tuple(trainer.passed_over)
            surplus = partial(remove_surplus, path, config, tell, passed_over)
            after = (lambda: None) if all_stay else surplus
            if lock is not None:
                lock.renew()
            if sharded:
                trainer.save(path)
                if main:
                    after()
            else:
                contents = trainer.contents()
                if main:
                    writer.save(path, contents, after=after)
            return path

        for state in trainer:
            if state.micro_batch != micro_batch:
                tell_once(micro_batch_line(micro_batch, state.micro_batch))
                log.write(
                    "micro_batch",
                    step=state.step,
                    images_seen=state.images_seen,
                    before=micro_batch,
                    now=state.micro_batch,
                )
                micro_batch = state.micro_batch
            log.add(state)
            if on_step is not None:
                on_step(trainer, state)
            for file in set(trainer.source.bad_files) - named:
                named.add(file)
                tell_once(f"replacing broken image {file}: {trainer.source.bad_files[file]}")
            if state.skipped:
                tell_once(f"step {state.step} skipped as not finite: {state.report}")
            back = recovery.went_back(state)
            if back and main:
                remove_snapshots_after(out, trainer.images_seen, tell)
            ended = state.step == config.steps and not back
            if main:
                display.show(state, log.recent, last=ended)
            stopped = agreed(trainer.accelerator, stop.signal) if not ended else None
            every = config.ema.snapshot_every_images
            if (
                every
                and not back
                and (ended or passed(state.images_seen, config.batch_size, every))
            ):
                # Before the checkpoint: a run that goes on from that one lacks none.
                save_snapshot(trainer)
            if ended or stopped is not None or (_due(state, config) and not back):
                checkpoint, written = save(ended), trainer.step
                if not ended and stopped is None:  # a signal during the write needs no other one
                    stopped = agreed(trainer.accelerator, stop.signal)
            if stopped is not None:
                writer.wait()
                tell_once(
                    f"stopped by {signal.Signals(stopped).name} at {trainer.images_seen} of "
                    f"{state.total_images} images; checkpoint: {checkpoint}"
                )
                break
        else:
            stopped = None
            if written != trainer.step:  # the last steps were passed over
                log.passed_over_the_end()
                if config.ema.snapshot_every_images:
                    save_snapshot(trainer)
                checkpoint = save(True)
        sha256 = writer.wait()
        trainer.accelerator.wait_for_everyone()
        if checkpoint is None or not sha256:  # resumed at the very end: nothing was left to do
            checkpoint = checkpoint or checkpoint_path(out, trainer.images_seen)
            sha256 = read_info(checkpoint).sha256
        seconds = time.perf_counter() - began
        log.write(
            "end",
            images_seen=trainer.images_seen,
            checkpoint=checkpoint.name,
            sha256=sha256,
            seconds=seconds,
            stopped_by=stopped,
            bad_files=trainer.source.bad_files,
        )
    return RunResult(
        checkpoint=checkpoint,
        sha256=sha256,
        metrics=out / METRICS,
        images_seen=trainer.images_seen,
        loss=log.recent,
        seconds=seconds,
        skipped_steps=trainer.skipped_steps,
        bad_files=dict(trainer.source.bad_files),
        stopped_by=stopped,
        resumed_from=start,
    )


# ---------------------------------------------------------------- the folder


def _start_point(
    out: Path, resume: str | Path | None, overwrite: bool, tell: Callable[[str], None]
) -> Path | None:
    if out.exists() and not out.is_dir():
        raise ConfigError(f"out = {str(out)!r} is a file; give a folder")
    if str(resume) == "auto":
        return latest_checkpoint(out, tell)
    start = None if resume is None else Path(resume)
    if start is not None and not start.exists():
        return start  # which is refused with a better guess
    found = list_checkpoints(out)
    if start is not None:
        found = [*snapshot_files(out), *found]
    if found and not overwrite and not _lies_in(out, start):
        raise ConfigError(
            f"out = {str(out)!r} holds a run already ({found[-1].name}): resume it, overwrite "
            "it, or give another folder"
        )
    return start


def _lies_in(out: Path, start: Path | None) -> bool:
    """Whether a run goes on in the folder where its checkpoint lies."""
    return start is not None and start.resolve().parent == out.resolve()


def _make_room(out: Path, going_on: bool, overwrite: bool) -> None:
    out.mkdir(parents=True, exist_ok=True)
    remove_half_written(out)
    if not going_on and overwrite:
        remove_all(out)


def _due(state: TrainState, config: TrainConfig) -> bool:
    """Whether a checkpoint is to be written after this step."""
    return any(
        passed(state.images_seen, config.batch_size, every)
        for every in (config.checkpoint_every_images, config.keep_every_images)
    )
