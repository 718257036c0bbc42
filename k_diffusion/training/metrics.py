"""The metrics file of a run: one JSON object a line, whatever happens to the disk or the folder.

- {"event": "start", "config", "data", "parameters", "versions", "band_edges"}: once; the edges are
  the sigmas between the bands of noise levels, each with an equal share of the levels drawn;
- {"event": "train", "step", "images_seen", "loss", "grad_norm", "lr", "ema_decay",
  "skipped_steps", "images_per_second"}: every `log_every_images`; loss and grad_norm are means
  over the finite steps since the line before, null where there was none; images_per_second is null
  where the run ends on steps that it passes over; also "terms", what the
  loss is made of (name -> mean), where it has several, "bands", its mean in each band of levels,
  from the noiseless to the noisy (null: no sample), and "noise_scale", where that is measured;
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
- {"event": "evaluate", "step", "images_seen", "extractor", "samples", "data", "figures", "reason"}:
  every `evaluate.every_images`, and at the end; data is the beginning of the real images' hash;
  figures (name -> value) are null where they could not be had, and only then there is a reason;
- {"event": "end", "images_seen", "checkpoint", "sha256", "seconds", "stopped_by", "bad_files",
  "reason"}: once a session; where an error ended it, and only then, there is a reason, and the
  checkpoint is null where the folder has none.

A resumed run drops the lines that were written after its checkpoint, so the file reads as if the
run had never been stopped. Of a run that was killed at any moment, only `images_per_second` and
`seconds` tell.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from k_diffusion.training.bands import means
from k_diffusion.training.history import METRICS
from k_diffusion.training.learning_rate import learning_rate
from k_diffusion.training.loggers import Loggers
from k_diffusion.training.retention import passed
from k_diffusion.training.trainer import Trainer, TrainState

__all__ = ["METRICS", "LineFile", "Log"]


class Log:
    """What a run tells of itself.

    How many lines there are, and what has been added up since the last, is saved with the
    checkpoint: a resumed run cuts off the lines after it and goes on.

    Args:
        trainer: whose steps are told of.
        path: the file; None: this process writes none.
        resumed: whether the run goes on, so that the lines it has written stay.
        say: takes a line when the file cannot be written.
        loggers: are told each line, too.
    """

    def __init__(
        self,
        trainer: Trainer,
        path: Path | None,
        resumed: bool,
        say: Callable[[str], None],
        loggers: Loggers | None = None,
    ) -> None:
        self.trainer = trainer
        self._loggers = loggers
        self._recent: list[float] = []
        self._file: LineFile | None = None
        sums = self._sums
        if path is None:
            return
        kept: list[str] = []
        if resumed and path.exists():
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            kept = lines[: sums["lines"]] if "lines" in sums else _until(lines, trainer.images_seen)
        if not kept:
            kept = [json.dumps(_start_line(trainer))]
        self._file = LineFile(path, kept, say)
        self._lines = sums["lines"] = len(kept)

    @property
    def _sums(self) -> dict[str, Any]:
        """What is saved; asked for each time, since going back replaces it."""
        sums: dict[str, Any] = self.trainer.extra.setdefault(
            "log", {"steps": 0, "loss": 0.0, "grad_norm": 0.0}
        )
        return sums

    @property
    def recent(self) -> float:
        """Mean loss of the last 50 finite steps."""
        return sum(self._recent) / len(self._recent) if self._recent else math.nan

    def add(self, state: TrainState) -> None:
        """Take note of a step."""
        sums, config = self._sums, self.trainer.config
        if state.report is not None:
            self.write("skipped", images_seen=state.images_seen, **state.report.to_json())
        else:
            self._recent = [*self._recent[-49:], state.loss]
            sums["steps"] += 1
            sums["loss"] += state.loss
            sums["grad_norm"] += state.grad_norm
            terms = sums.setdefault("terms", {})
            for name, value in state.terms.items():
                terms[name] = terms.get(name, 0.0) + value
            before = sums.get("bands") or [0.0] * len(state.bands)
            sums["bands"] = [a + b for a, b in zip(before, state.bands, strict=True)]
        every = config.log_every_images
        if not (passed(state.images_seen, config.batch_size, every) or state.step == config.steps):
            return
        self._train_line(
            state.step,
            state.images_seen,
            noise_scale=state.noise_scale,
            lr=state.lr,
            ema_decay=state.ema_decay,
            skipped_steps=state.skipped_steps,
            images_per_second=round(state.images_per_second, 1),
        )

    def passed_over_the_end(self) -> None:
        """The run is at its end, and its last steps are left out."""
        trainer, config = self.trainer, self.trainer.config
        before = trainer.images_seen - config.batch_size
        self._train_line(
            trainer.step,
            trainer.images_seen,
            noise_scale=trainer.noise_scale.value if trainer.noise_scale else None,
            lr=learning_rate(config.optimizer, before, config.total_images, config.batch_size),
            ema_decay=1.0,
            skipped_steps=trainer.skipped_steps,
            images_per_second=None,
        )

    def _train_line(
        self, step: int, images_seen: int, *, noise_scale: float | None, **facts: Any
    ) -> None:
        sums = self._sums
        steps = sums["steps"]
        terms = {name: total / steps for name, total in sums.get("terms", {}).items()}
        self.write(
            "train",
            step=step,
            images_seen=images_seen,
            loss=sums["loss"] / steps if steps else None,
            grad_norm=sums["grad_norm"] / steps if steps else None,
            **({"terms": terms} if terms else {}),
            **({"bands": means(sums["bands"])} if sums.get("bands") else {}),
            **({} if noise_scale is None else {"noise_scale": noise_scale}),
            **facts,
        )
        sums.update(steps=0, loss=0.0, grad_norm=0.0, terms={}, bands=[])

    def went_back(self) -> None:
        """The trainer has taken up an earlier checkpoint; what was written meanwhile stays."""
        self._recent = []

    def write(self, event: str, **facts: Any) -> None:
        """A line of any kind."""
        if self._file is not None:
            self._file.write(json.dumps({"event": event, **facts}))
            self._lines += 1
            self._sums["lines"] = self._lines
        if self._loggers is not None:
            self._loggers.fact(event, facts)

    def flush(self) -> None:
        """Make the system write all lines to the disk, before a checkpoint that counts them."""
        if self._file is not None:
            self._file.flush()
        if self._loggers is not None:
            self._loggers.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _start_line(trainer: Trainer) -> dict[str, Any]:
    from importlib.metadata import version

    return {
        "event": "start",
        "config": trainer.config.to_json(),
        "data": trainer.source.facts(),
        "band_edges": trainer.bands.edges,
        "parameters": sum(p.numel() for p in trainer.network.parameters()),
        "versions": {name: version(name) for name in ("k-diffusion", "torch", "accelerate")},
    }


def _until(lines: list[str], images_seen: int) -> list[str]:
    """Of the lines, those that a run resumed at `images_seen` would have written.

    For checkpoints of a time when they did not count lines.
    """
    kept = []
    for line in lines:
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


class LineFile:
    """A file to which whole lines are added.

    Lines that the disk refuses wait in memory and are written with the next that it takes; a file
    that has been removed, with its folder or without, is written again in full.

    Args:
        path: the file. It is replaced.
        lines: what it holds at first.
        say: takes a line when it cannot be written, and when it can again.
    """

    def __init__(self, path: Path, lines: Iterable[str], say: Callable[[str], None]) -> None:
        self._path, self._say = path, say
        self._waiting: list[bytes] = []
        self._refused = ""
        for half in path.parent.glob(f".{path.name}.*.tmp"):  # of a run killed in a start
            half.unlink(missing_ok=True)
        self._file = _replace(path, "".join(line + "\n" for line in lines).encode())
        self._size = self._file.seek(0, os.SEEK_END)

    def write(self, line: str) -> None:
        self._waiting.append(line.encode() + b"\n")
        try:
            self._come_back()
            if self._refused:
                self._file.truncate(self._size)  # it may have taken a part of a line
            _write_all(self._file, b"".join(self._waiting))
        except OSError as error:
            if not self._refused:
                self._say(
                    f"{self._path} cannot be written ({error.strerror}): its lines wait in memory "
                    "until it can"
                )
            self._refused = error.strerror or type(error).__name__
            return
        self._waiting.clear()
        self._size = self._file.seek(0, os.SEEK_END)
        if self._refused:
            self._say(f"{self._path} is written again; none of its lines is lost")
            self._refused = ""

    def flush(self) -> None:
        with suppress(OSError):  # the next line will meet it, and say so
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._waiting:
            self._say(
                f"the last {len(self._waiting)} lines of {self._path} could not be written "
                f"({self._refused})"
            )
        with suppress(OSError):
            self._file.close()

    def _come_back(self) -> None:
        """See that the file is where it should be; the handle still has one that was removed."""
        try:
            there = self._path.stat()
        except FileNotFoundError:
            self._file.seek(0)
            whole = self._file.read(self._size)
            self._path.parent.mkdir(parents=True, exist_ok=True)
            file = _replace(self._path, whole)
            self._say(f"{self._path} was removed in mid-run: it is written again in full")
        else:
            if os.path.samestat(there, os.fstat(self._file.fileno())):
                return
            file = self._path.open("a+b", buffering=0)  # someone's copy took its place: go on there
        self._file.close()
        self._file = file
        self._size = file.seek(0, os.SEEK_END)


def _replace(path: Path, content: bytes) -> IO[bytes]:
    """Put a file in place in one go, and open it to add to it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path.open("a+b", buffering=0)


def _write_all(file: IO[bytes], data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]
