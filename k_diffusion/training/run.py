"""A training run in a folder: progress, metrics, checkpoints, an orderly end, and going on.

The folder holds `checkpoint-<images seen>.safetensors` (the newest few), `ema/` with snapshots of
the averages where the config asks for them, and `metrics.jsonl`. With sharded weights checkpoints
on the way are folders, `checkpoint-<images seen>`; the last one is a file. Of several processes the
main one speaks and writes. The metrics are one JSON object a line:

- {"event": "start", "config", "data", "parameters", "versions"}: once;
- {"event": "train", "step", "images_seen", "loss", "grad_norm", "lr", "ema_decay",
  "skipped_steps", "images_per_second"}: every `log_every_images`; loss and grad_norm are means
  over the finite steps since the line before; "noise_scale" too, where that is measured;
- {"event": "skipped", "images_seen", and what `BadStep` has}: for each step that was not finite;
- {"event": "end", "images_seen", "checkpoint", "sha256", "seconds", "stopped_by", "bad_files"}.

A resumed run drops the lines that lie after its checkpoint, so the file reads as if the run had
never been stopped.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from torch import nn

from k_diffusion.models import Conditioner
from k_diffusion.training.checkpoint import SUFFIX, CheckpointError, read_info
from k_diffusion.training.config import ConfigError, TrainConfig
from k_diffusion.training.dataset import Source
from k_diffusion.training.devices import is_main_process
from k_diffusion.training.snapshots import remove_snapshots_after, save_snapshot
from k_diffusion.training.trainer import Trainer, TrainState

METRICS = "metrics.jsonl"


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

    Raises:
        ConfigError: the folder holds a run that is neither resumed nor to be overwritten, or the
            config does not fit the data or the machine.
        CheckpointError: the checkpoint to resume from is damaged or of another run.
        DataError: the data cannot be used.
        TrainingError: too many steps in a row were not finite.
    """
    out = Path(config.out)
    bar: Any = None

    def tell(line: str) -> None:
        if not is_main_process():
            return
        if say is not None:
            say(line)
        elif bar is not None:
            bar.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)

    start = _start_point(out, resume, overwrite, tell)
    trainer = Trainer(config, resume=start, network=network, source=source, conditioner=conditioner)
    main = trainer.accelerator.is_main_process
    config = trainer.config
    if main:
        _make_room(out, start, overwrite)
        remove_snapshots_after(out, trainer.images_seen, tell)
    trainer.processes.wait()
    for file, reason in trainer.source.bad_files.items():
        tell(f"skipping broken image {file}: {reason}")
    named = set(trainer.source.bad_files)
    began, state, sha256 = time.perf_counter(), None, ""
    checkpoint = start
    log = Log(trainer, out / METRICS if main else None, resumed=start is not None)
    try:
        with stop_signals() as stop:
            if progress and main:
                bar = _bar(trainer)
            for state in trainer:
                log.add(state)
                if on_step is not None:
                    on_step(trainer, state)
                for file in set(trainer.source.bad_files) - named:
                    named.add(file)
                    tell(f"replacing broken image {file}: {trainer.source.bad_files[file]}")
                if state.skipped:
                    tell(f"step {state.step} skipped as not finite: {state.report}")
                if bar is not None:
                    bar.set_postfix_str(f"loss {log.recent:.4f}", refresh=False)
                    bar.update(config.batch_size)
                ended = state.step == config.steps
                stopped = _agreed(trainer, stop.signal) if not ended else None
                every = config.ema.snapshot_every_images
                if every and (ended or _passed(state, config, every)):
                    # Before the checkpoint: a run that goes on from that one lacks none.
                    save_snapshot(trainer)
                every = config.checkpoint_every_images
                if ended or stopped is not None or (every and _passed(state, config, every)):
                    checkpoint = _path(out, state.images_seen, trainer.is_sharded and not ended)
                    sha256 = trainer.save(checkpoint)
                    if main:
                        _remove_old(out, checkpoint, config.keep_checkpoints, tell)
                if stopped is not None:
                    tell(
                        f"stopped by {signal.Signals(stopped).name} at {state.images_seen} of "
                        f"{state.total_images} images; checkpoint: {checkpoint}"
                    )
                    break
            else:
                stopped = None
            if checkpoint is None or not sha256:  # resumed at the very end: nothing was left to do
                checkpoint = checkpoint or _path(out, trainer.images_seen)
                sha256 = read_info(checkpoint).sha256
        seconds = time.perf_counter() - began
        log.end(
            images_seen=trainer.images_seen,
            checkpoint=checkpoint.name,
            sha256=sha256,
            seconds=seconds,
            stopped_by=stopped,
            bad_files=trainer.source.bad_files,
        )
    finally:
        log.close()
        if bar is not None:
            bar.close()
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


# ---------------------------------------------------------------- checkpoints in a folder


def list_checkpoints(folder: str | Path) -> list[Path]:
    """The checkpoints that `run_training` left in a folder, oldest first."""
    name = f"checkpoint-{'[0-9]' * 12}"
    sharded = [path for path in Path(folder).glob(name) if path.is_dir()]
    return sorted([*sharded, *Path(folder).glob(name + SUFFIX)])


def latest_checkpoint(
    folder: str | Path, say: Callable[[str], None] = lambda line: None
) -> Path | None:
    """The newest checkpoint in a folder that is whole; None where there is none at all.

    Args:
        folder: of a run.
        say: takes a line for each damaged one that is passed over.

    Raises:
        CheckpointError: there are some, and all are damaged.
    """

    def whole(path: Path) -> bool:
        try:
            read_info(path)
        except CheckpointError as error:
            say(f"passing over {error}")
            return False
        return True

    found = list_checkpoints(folder)
    if (newest := next(filter(whole, reversed(found)), None)) is not None:
        return newest
    if found:
        raise CheckpointError(f"all {len(found)} checkpoints in {folder} are damaged: begin anew")
    return None


def _path(out: Path, images_seen: int, sharded: bool = False) -> Path:
    return out / f"checkpoint-{images_seen:012d}{'' if sharded else SUFFIX}"


def _remove(checkpoint: Path) -> None:
    if not checkpoint.is_dir():
        checkpoint.unlink(missing_ok=True)
        return
    # What is left of one that is removed in part would count as damaged.
    hidden = checkpoint.with_name(f".{checkpoint.name}.old.tmp")
    checkpoint.rename(hidden)
    shutil.rmtree(hidden)


def _start_point(
    out: Path, resume: str | Path | None, overwrite: bool, tell: Callable[[str], None]
) -> Path | None:
    if out.exists() and not out.is_dir():
        raise ConfigError(f"out = {str(out)!r} is a file; give a folder")
    if resume is None:
        found = list_checkpoints(out)
        if found and not overwrite:
            raise ConfigError(
                f"out = {str(out)!r} holds a run already ({found[-1].name}): resume it, overwrite "
                "it, or give another folder"
            )
        return None
    if str(resume) != "auto":
        return Path(resume)
    return latest_checkpoint(out, tell)


def _make_room(out: Path, start: Path | None, overwrite: bool) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for half in out.glob(f".checkpoint-*{SUFFIX}.*.tmp"):  # of a run that was killed in a write
        half.unlink(missing_ok=True)
    for half in out.glob(".checkpoint-*.tmp"):
        if half.is_dir():
            shutil.rmtree(half)
    if start is None and overwrite:
        for old in list_checkpoints(out):
            _remove(old)


def _remove_old(out: Path, newest: Path, keep: int, tell: Callable[[str], None]) -> None:
    """Leave `keep` checkpoints up to the newest; later ones are of a run given up by a resume."""
    found = list_checkpoints(out)
    for later in (path for path in found if path.stem > newest.stem):
        tell(f"removing {later}, which the resumed run has not reached")
        _remove(later)
    for old in [path for path in found if path.stem <= newest.stem][:-keep]:
        _remove(old)


def _passed(state: TrainState, config: TrainConfig, every: int) -> bool:
    """Whether this step reached or passed a multiple of `every` images."""
    return state.images_seen // every > (state.images_seen - config.batch_size) // every


# ---------------------------------------------------------------- signals


class StopRequest:
    """Which signal asked for an end, once one has."""

    signal: int | None = None


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Within the block the first Ctrl-C or SIGTERM only sets `.signal`; a second acts as before."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request  # Python gives signals to the main thread alone
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def ask(number: int, frame: FrameType | None) -> None:
        request.signal = number
        restore()

    try:
        for number in before:
            signal.signal(number, ask)
        yield request
    finally:
        restore()


def _agreed(trainer: Trainer, stopped_by: int | None) -> int | None:
    """The signal, once any process has one: all of them must stop after the same step."""
    if trainer.accelerator.num_processes == 1:
        return stopped_by
    import torch

    flags = torch.tensor([stopped_by or 0], device=trainer.device)
    return int(trainer.accelerator.gather(flags).max()) or None


# ---------------------------------------------------------------- metrics and progress


class Log:
    """The metrics file. What it has added up since its last line is saved with the checkpoint."""

    def __init__(self, trainer: Trainer, path: Path | None, resumed: bool) -> None:
        self.trainer = trainer
        self.sums = trainer.extra.setdefault("log", {"steps": 0, "loss": 0.0, "grad_norm": 0.0})
        self._recent: list[float] = []
        self._file: TextIO | None = None
        if path is None:
            return
        kept = _lines_until(path, trainer.images_seen) if resumed and path.exists() else []
        if not kept:
            kept = [json.dumps(_start_line(trainer))]
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        os.replace(temporary, path)
        self._file = path.open("a", encoding="utf-8")

    @property
    def recent(self) -> float:
        """Mean loss of the last 50 finite steps."""
        return sum(self._recent) / len(self._recent) if self._recent else math.nan

    def add(self, state: TrainState) -> None:
        sums, config = self.sums, self.trainer.config
        if state.report is not None:
            self._write(event="skipped", images_seen=state.images_seen, **state.report.to_json())
        else:
            self._recent = [*self._recent[-49:], state.loss]
            sums["steps"] += 1
            sums["loss"] += state.loss
            sums["grad_norm"] += state.grad_norm
        if not (_passed(state, config, config.log_every_images) or state.step == config.steps):
            return
        steps = sums["steps"]
        self._write(
            event="train",
            step=state.step,
            images_seen=state.images_seen,
            loss=sums["loss"] / steps if steps else None,
            grad_norm=sums["grad_norm"] / steps if steps else None,
            lr=state.lr,
            ema_decay=state.ema_decay,
            skipped_steps=state.skipped_steps,
            images_per_second=round(state.images_per_second, 1),
            **({"noise_scale": state.noise_scale} if self.trainer.noise_scale else {}),
        )
        sums.update(steps=0, loss=0.0, grad_norm=0.0)

    def end(self, **facts: Any) -> None:
        self._write(event="end", **facts)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _write(self, **line: Any) -> None:
        if self._file is not None:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()


def _start_line(trainer: Trainer) -> dict[str, Any]:
    from importlib.metadata import version

    return {
        "event": "start",
        "config": trainer.config.to_json(),
        "data": trainer.source.facts(),
        "parameters": sum(p.numel() for p in trainer.network.parameters()),
        "versions": {name: version(name) for name in ("k-diffusion", "torch", "accelerate")},
    }


def _lines_until(path: Path, images_seen: int) -> list[str]:
    """The lines of a metrics file that a run resumed at `images_seen` would have written."""
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            fact = json.loads(line)
        except json.JSONDecodeError:  # cut by a kill
            continue
        event = fact.get("event") if isinstance(fact, dict) else None
        if event == "start" or (
            event in ("train", "skipped") and fact["images_seen"] <= images_seen
        ):
            kept.append(line)
    return kept


def _bar(trainer: Trainer) -> Any:
    from tqdm import tqdm

    config = trainer.config
    return tqdm(
        total=config.steps * config.batch_size,
        initial=trainer.images_seen,
        unit=" images",
        unit_scale=True,
        dynamic_ncols=True,
        file=sys.stderr,
        # A file or a log gets a line now and then, a terminal a living one.
        mininterval=0.2 if sys.stderr.isatty() else 10.0,
        smoothing=0.05,
        bar_format="{percentage:3.0f}% {bar:20} {n_fmt} of {total_fmt} images | {rate_fmt}"
        "{postfix} | {remaining} left",
    )
