"""A training run killed with `kill -9` at random moments, beside the same run never killed.

    python benchmarks/kill.py                      # 50 kills for 0 and for 2 workers; minutes
    python benchmarks/kill.py --kills 4 --fresh 0 --steps 60 --workers 0

The run trains a small U-Net on the digits and writes a checkpoint every few steps. Most attempts
are forked from a process that has torch imported, a few (`--fresh`) are whole programs through the
command line. Each goes on with `--resume auto`, and is killed at a random moment of one of three
kinds: in its start; within a step's cycle, after a random number of steps; or in a write, when a
half-written checkpoint has appeared after such a number. The run has all that a resume must carry:
averages of three kinds with snapshots, a learned loss, the gradient noise scale, checkpoints that
stay; and in some steps its images are spoilt, so that it diverges and goes back. At the end every
tensor of the last checkpoint and of every snapshot, the state for a resume, which files there are,
and metrics.jsonl apart from speeds must be bitwise those of the run that was never killed. Writes
benchmarks/results/kill.json; exits with 1 where anything differs or an attempt failed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from k_diffusion.training import run_training
from k_diffusion.training.checkpoint import (
    CheckpointError,
    CheckpointInfo,
    read_checkpoint,
    read_info,
)
from k_diffusion.training.config import TrainConfig
from k_diffusion.training.config_file import make_config
from k_diffusion.training.dataset import SOURCES, Batch, Digits, Purpose
from k_diffusion.training.retention import latest_checkpoint, list_checkpoints
from k_diffusion.training.snapshots import snapshot_files
from k_diffusion.utils.maths import fold_seed

HERE = Path(__file__).parent
KINDS = ("step", "write", "step", "start")
OF_THE_CLOCK = ("images_per_second", "seconds")
BATCH = 16
SEED = 7
SPOILT = {step + i for step in (40, 290, 540) for i in range(3)}
"""Steps, counted from 1, whose images are no digits any more: each three a divergence."""
STEPS_A_LINE = 3
STARTS = {True: 3.0, False: 0.6}
"""Seconds within which the kills in a start are spread, of whole programs and of forked ones."""
LIMIT = 120.0
"""Seconds after which an attempt that neither ends nor is killed counts as hung."""
MOST_FAILURES = 3
"""Attempts that end with an error before the run is given up."""


def config_of(out: Path, steps: int, workers: int) -> dict[str, Any]:
    return {
        "out": str(out),
        "model": {
            "type": "unet",
            "channels": 8,
            "channel_mults": [1],
            "blocks": 1,
            "attention": [False],
            "head_channels": 8,
            "num_classes": 10,
            "dropout": 0.1,
            "prediction": "edm",
            "time_convention": "log_sigma",
            "sigma_data": "auto",
        },
        "data": {"source": "digits"},
        "total_images": BATCH * steps,
        "batch_size": BATCH,
        "seed": SEED,
        "workers": workers,
        "micro_batch_size": BATCH // 2,
        "loss": {"uncertainty": True},
        "ema": {"profiles": [0.05, 0.1], "snapshot_every_images": BATCH * 20},
        "noise_scale_decay": 0.9,
        "checkpoint_every_images": BATCH * 5,
        "keep_every_images": BATCH * 50,
        "log_every_images": BATCH * STEPS_A_LINE,
        "spikes": {"factor": 3.0, "window": 20, "patience": 3, "roll_back": True},
    }


class Spoilt(Digits):
    """The digits, but in some steps: which one it is the seeds tell."""

    def __init__(self, split: str = "train", split_seed: int = 0) -> None:
        super().__init__(split, split_seed)
        self.augments = True
        places = (BATCH * (step - 1) + i for step in SPOILT for i in range(BATCH))
        self._spoilt = {fold_seed(SEED, Purpose.AUGMENT, place) for place in places}

    def batch(self, indices: Tensor, seeds: Sequence[int] | None = None) -> Batch:
        batch = super().batch(indices)
        spoilt = torch.tensor([seed in self._spoilt for seed in seeds or ()], dtype=torch.bool)
        if spoilt.any():
            factor = torch.where(spoilt, 30.0, 1.0)[:, None, None, None]
            batch = batch._replace(images=factor * batch.images)
        return batch


def prepare() -> None:
    """Have the run's images spoilt and its sums done by one thread, here and in what is forked.

    Torch adds up in another order with another number of threads, so that a whole program left to
    choose would not end bitwise as the forked attempts do.
    """
    torch.set_num_threads(1)
    SOURCES["digits"] = Spoilt


@dataclass
class Attempt:
    """One start of the run and its end.

    Attributes:
        kind: of the moment.
        fresh: whether it was a whole program.
        began_at, newest: images seen of the newest whole checkpoint, before and after; -1: none.
        half: whether the kill left a half-written checkpoint.
        ended: whether the run reached its end before the kill.
        problem: what it wrote where it ended with an error; else empty.
    """

    kind: str
    fresh: bool
    began_at: int
    newest: int
    half: bool
    ended: bool
    problem: str = ""


def in_short(attempt: Attempt) -> str:
    return (
        f"{attempt.began_at // BATCH}:{attempt.kind or 'end'}"
        + (":program" if attempt.fresh else "")
        + (":half" if attempt.half else "")
        + (":failed" if attempt.problem else "")
    )


def newest_whole(out: Path) -> int:
    try:
        newest = latest_checkpoint(out)
    except CheckpointError:
        return -1
    return read_info(newest).images_seen if newest is not None else -1


def half_written(out: Path) -> list[Path]:
    return list(out.glob(".checkpoint-*.tmp")) if out.exists() else []


def forked(config: TrainConfig, report: Path) -> int:
    """Start an attempt in a child that shares what is imported; its process number."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        with report.open("a", encoding="utf-8") as errors:
            os.dup2(errors.fileno(), 2)
            run_training(config, resume="auto", progress=False)
        code = 0
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def program(config_file: Path, report: Path) -> int:
    plugin = config_file.with_suffix(".py")
    plugin.write_text(
        f"import sys\nsys.path.insert(0, {str(HERE)!r})\nimport kill\nkill.prepare()\n"
    )
    with report.open("a", encoding="utf-8") as errors:
        command = [sys.executable, "-m", "k_diffusion.cli", "train", "--config", str(config_file)]
        started = subprocess.Popen(
            [*command, "--plugin", str(plugin), "--resume", "auto"],
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )
    started.returncode = 0  # `end_of` takes its end away, so Popen need not look for it
    return started.pid


def end_of(child: int) -> int | None:
    """The exit status of a child that has ended; None: it goes on."""
    number, status = os.waitpid(child, os.WNOHANG)
    return None if not number else status


class Watched:
    """How far an attempt is, by the lines of its metrics."""

    def __init__(self, out: Path) -> None:
        self._path = out / "metrics.jsonl"
        self._size = self._bytes()
        self.steps = -1
        """Steps done, or the first ones before; -1 while the attempt has not begun to train."""

    def _bytes(self) -> int:
        try:
            return self._path.stat().st_size
        except OSError:
            return 0

    def look(self) -> None:
        if (size := self._bytes()) != self._size:  # what the last attempt left is cut, or grows
            self._size = size
            self.steps = (self._path.read_bytes().count(b"\n") - 1) * STEPS_A_LINE


def wait_and_kill(
    child: int, kind: str, out: Path, target: int, start: float, soon: float
) -> int | None:
    """Kill an attempt at a moment of a kind; its exit status where it ended before, else None.

    Args:
        target: the step after which it is killed, unless that is in its start.
        start: seconds from its begin, for a kill in its start.
        soon: seconds from the step or from the begin of a write on.
    """
    begin = time.monotonic()
    moment = begin + start if kind == "start" else None
    watched = Watched(out)
    while True:
        if (status := end_of(child)) is not None:
            return status
        now = time.monotonic()
        if now - begin > LIMIT or (moment is not None and now >= moment):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            if moment is None:
                raise TimeoutError(f"an attempt hung for {LIMIT:.0f} s")
            return None
        if moment is None:
            watched.look()
            if watched.steps >= max(0, target) and (kind == "step" or half_written(out)):
                moment = now + soon
        time.sleep(0.0003)


def killed_run(
    out: Path, steps: int, workers: int, kills: int, fresh: int, draw: random.Random
) -> list[Attempt]:
    """The run, killed so often and resumed each time, until its end."""
    data = config_of(out, steps, workers)
    config = make_config(data)
    config_file = out.with_suffix(".json")
    config_file.write_text(json.dumps(data))
    report = out.with_suffix(".log")
    plan = [("forked", KINDS[i % len(KINDS)]) for i in range(kills - fresh)]
    plan += [("fresh", KINDS[i % len(KINDS)]) for i in range(fresh)]
    draw.shuffle(plan)
    attempts: list[Attempt] = []
    while True:
        killed = sum(not (a.ended or a.problem) for a in attempts)
        last = killed == kills
        how, kind = plan[killed] if not last else ("forked", "")
        began_at = newest_whole(out)
        # What is left of the run is to last for the kills that are left.
        done = max(0, began_at) // BATCH
        target = done + int(draw.uniform(0, 2 * (steps - done) / (kills - killed + 1)))
        child = program(config_file, report) if how == "fresh" else forked(config, report)
        if last:
            _, status = os.waitpid(child, 0)
        else:
            start = draw.uniform(0, STARTS[how == "fresh"])
            soon = draw.uniform(0, 0.004 if kind == "write" else 0.05)
            status = wait_and_kill(child, kind, out, target, start, soon)
        problem = (report.read_text() or f"status {status}") if status else ""
        ended = status == 0
        # In a start it may be the one of the kill before, which is not removed yet.
        half = kind != "start" and bool(half_written(out))
        newest = newest_whole(out)
        if newest < began_at:
            problem += f"it lost checkpoints: {newest} images after {began_at}"
        attempts.append(Attempt(kind, how == "fresh", began_at, newest, half, ended, problem))
        if problem:
            print(f"attempt {len(attempts)} failed:\n{problem}", flush=True)
        if ended or sum(bool(a.problem) for a in attempts) == MOST_FAILURES:
            return attempts


def roll_backs(out: Path) -> int:
    """How often the run has gone back, by its metrics as they are, whole lines or not."""
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b'"roll_back", "step"') if path.exists() else 0


def metrics(out: Path) -> list[dict[str, Any]]:
    """The lines without what only the clock or the folder's name decides."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        for key in (*OF_THE_CLOCK, "sha256"):  # the hash is of the config too, with its folder
            line.pop(key, None)
        if "config" in line:
            for key in ("out", "workers"):
                del line["config"][key]
    return lines


def differences(one: Path, other: Path) -> list[str]:
    """What differs between the ends of two runs: files, names of tensors, keys, lines."""
    found = []
    for kind in (list_checkpoints, snapshot_files):
        ours, theirs = ([path.name for path in kind(out)] for out in (one, other))
        found += [f"file {name}" for name in sorted(set(ours) ^ set(theirs))]
    last = list_checkpoints(one)[-1]
    for path in (last, *snapshot_files(one)):
        if (twin := other / path.relative_to(one)).exists():
            found += [f"{path.name}: {what}" for what in _contents_differing(path, twin)]
    ours, theirs = metrics(one), metrics(other)
    if len(ours) != len(theirs):
        found.append(f"{len(ours)} lines of metrics, not {len(theirs)}")
    pairs = zip(ours, theirs, strict=False)
    return found + [f"line {i + 1} of metrics" for i, (x, y) in enumerate(pairs) if x != y]


def compared(out: Path) -> dict[str, int]:
    """How many tensors of each part, snapshots and lines there are to compare in a whole run."""
    names = read_info(list_checkpoints(out)[-1]).tensors
    parts = Counter(name.partition("/")[0] for name in names)
    return {
        **{f"tensors of {part}": count for part, count in sorted(parts.items())},
        "checkpoints": len(list_checkpoints(out)),
        "snapshots": len(snapshot_files(out)),
        "lines of metrics": len(metrics(out)),
        "roll-backs": roll_backs(out),
    }


def _contents_differing(one: Path, other: Path) -> list[str]:
    facts = ("images_seen", "step", "data", "state")
    (a, ours), (b, theirs) = map(_all_of, (one, other))
    found = [key for key in facts if getattr(a, key) != getattr(b, key)]
    found += [f"name {name}" for name in sorted(set(ours) ^ set(theirs))]
    return found + [
        name
        for name in sorted(set(ours) & set(theirs))
        if ours[name].dtype != theirs[name].dtype or not torch.equal(ours[name], theirs[name])
    ]


def _all_of(path: Path) -> tuple[CheckpointInfo, dict[str, torch.Tensor]]:
    info = read_info(path)
    _, parts = read_checkpoint(path, {name.partition("/")[0] for name in info.tensors})
    return info, {f"{p}/{name}": t for p, named in parts.items() for name, t in named.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--fresh", type=int, default=10, help="kills of whole programs among them")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--seed", type=int, default=None, help="of the moments; none: a new one")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "kill.json")
    args = parser.parse_args()
    seed = random.SystemRandom().randrange(2**32) if args.seed is None else args.seed
    draw = random.Random(seed)
    prepare()
    print(f"seed {seed}; torch {torch.__version__}, {platform.machine()}")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole"
        config = make_config(config_of(whole, args.steps, 0))
        # In a child as well: the parent must not have trained when it forks.
        if os.waitpid(forked(config, whole.with_suffix(".log")), 0)[1]:
            sys.exit(whole.with_suffix(".log").read_text())
        if not roll_backs(whole):
            sys.exit("the run never went back: give more --steps")
        for workers in args.workers:
            out = Path(folder) / f"killed{workers}"
            begin = time.monotonic()
            attempts = killed_run(out, args.steps, workers, args.kills, args.fresh, draw)
            ended = attempts[-1].ended
            differing = differences(whole, out) if ended else ["the run did not end"]
            killed = [a for a in attempts if not (a.ended or a.problem)]
            rows.append(
                {
                    "workers": workers,
                    "steps": args.steps,
                    "kills": len(killed),
                    "of_whole_programs": sum(a.fresh for a in killed),
                    "moments": dict(Counter(a.kind for a in killed)),
                    "left_half_a_checkpoint": sum(a.half for a in killed),
                    "with_no_checkpoint_yet": sum(a.newest < 0 for a in killed),
                    "different_checkpoints_resumed": len({a.began_at for a in attempts} - {-1}),
                    "failed_to_resume": sum(bool(a.problem) for a in attempts),
                    "compared": compared(whole),
                    "differing": differing,
                    "seconds": round(time.monotonic() - begin, 1),
                    # Of each start: the step that it went on from (-1: the beginning), the kind of
                    # its end, whether it was a whole program and left half a checkpoint.
                    "attempts": " ".join(map(in_short, attempts)),
                }
            )
            shown = {k: v for k, v in rows[-1].items() if k != "attempts"}
            print("\n".join(f"  {k}: {v}" for k, v in shown.items()), flush=True)
    facts: dict[str, Any] = {
        "seed": seed,
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
    args.out.write_text(json.dumps({**facts, "runs": rows}, indent=1) + "\n")
    if any(row["differing"] or row["failed_to_resume"] for row in rows):
        sys.exit("the killed run failed, or ended otherwise than the one never killed")
    if any(row["kills"] < args.kills for row in rows):
        sys.exit("the run ended before it was killed as often as asked: give more --steps")


if __name__ == "__main__":
    main()
