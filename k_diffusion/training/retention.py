"""Which checkpoints of a run's folder there are, which one to go on from, and which ones stay."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from k_diffusion.training.checkpoint import SUFFIX, CheckpointError, read_info, read_record

if TYPE_CHECKING:
    from k_diffusion.training.config import TrainConfig

_NAME = re.compile(rf"checkpoint-([0-9]{{12}})({re.escape(SUFFIX)})?")


def checkpoint_path(folder: str | Path, images_seen: int, sharded: bool = False) -> Path:
    """Where a run's checkpoint of this moment lies: a file, or a folder of shards."""
    return Path(folder) / f"checkpoint-{images_seen:012d}{'' if sharded else SUFFIX}"


def images_of(path: Path) -> int:
    """Images seen, by a checkpoint's name."""
    found = _NAME.fullmatch(path.name)
    assert found is not None, path
    return int(found[1])


def list_checkpoints(folder: str | Path) -> list[Path]:
    """The checkpoints that `run_training` left in a folder, oldest first."""
    found = [p for p in Path(folder).glob("checkpoint-*") if _NAME.fullmatch(p.name)]
    # A folder has shards; of one moment the file, which is whole for itself, counts as the newer.
    return sorted(p for p in found if p.suffix == SUFFIX or p.is_dir())


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


def passed(images_seen: int, batch_size: int, every: int | None) -> bool:
    """Whether the step that ended at `images_seen` reached or passed a multiple of `every`."""
    return every is not None and images_seen // every > (images_seen - batch_size) // every


def surplus(
    found: Iterable[int], newest: int, *, keep: int, keep_every: int | None, batch_size: int
) -> tuple[list[int], list[int]]:
    """Which of a run's checkpoints go, each by its images seen.

    Args:
        found: all that are there.
        newest: the one just written.
        keep: how many of the newest stay.
        keep_every: those stay too that were the first at or after a multiple of this.
        batch_size: images a step.

    Returns:
        Those later than the newest, of a run given up by a resume; and the old ones. Oldest first.
    """
    found = sorted(found)
    past = [n for n in found if n <= newest]
    old = [n for n in past[:-keep] if not passed(n, batch_size, keep_every)]
    return [n for n in found if n > newest], old


def gave_up(
    step: int, theirs: Iterable[Sequence[int]], passed_over: Iterable[Sequence[int]]
) -> bool:
    """Whether a checkpoint is of a line of steps that its run gave up by going back.

    Args:
        step: the checkpoint's.
        theirs: the (start, stop) of steps left out, counted from 0, as the checkpoint has them.
        passed_over: the same, as the run has them now.
    """
    known = {tuple(part) for part in theirs}
    return any(a < step <= b and (a, b) not in known for a, b in map(tuple, passed_over))


def _given_up(path: Path, batch_size: int, passed_over: Sequence[Sequence[int]]) -> bool:
    """`gave_up` of a file; no tensor is read, and nothing at all of one outside the ranges."""
    step = images_of(path) // batch_size
    if not gave_up(step, (), passed_over):
        return False
    try:
        theirs = read_record(path)["state"].get("passed_over", [])
    except CheckpointError:
        theirs = []  # damaged: no use to the run that stands either
    return gave_up(step, theirs, passed_over)


def remove_surplus(
    newest: Path,
    config: TrainConfig,
    say: Callable[[str], None],
    passed_over: Sequence[Sequence[int]] = (),
) -> None:
    """Remove what need not stay beside a checkpoint that is written and verified.

    One that cannot be removed is told, and ends nothing.

    Args:
        newest: the checkpoint; the others lie beside it.
        config: of its run.
        say: takes lines of news.
        passed_over: (start, stop) of the steps that the run left out by going back, counted from 0.
            What it had written in these before goes, and takes no place among those that stay.
    """
    found = list_checkpoints(newest.parent)
    batch_size = config.batch_size
    diverged = [p for p in found if p != newest and _given_up(p, batch_size, passed_over)]
    later, old = surplus(
        {images_of(path) for path in found if path not in diverged},
        images_of(newest),
        keep=config.keep_checkpoints,
        keep_every=config.keep_every_images,
        batch_size=config.batch_size,
    )
    aside = sorted(newest.parent.glob(".given-up-checkpoint-*"))
    for path in (*aside, *found):
        if path in aside:
            pass  # told when it was set aside
        elif path not in diverged and images_of(path) not in (*later, *old):
            continue
        elif path in diverged:
            say(f"removing {path}: the run has gone back, and passes over its last steps")
        elif images_of(path) in later:
            say(f"removing {path}, which the resumed run has not reached")
        try:
            _empty(path) if path in aside else _remove(path)
        except OSError as error:
            say(f"{path} cannot be removed ({error.strerror}): it stays")


def remove_all(folder: Path) -> None:
    """Remove all checkpoints of a run that is begun anew."""
    for path in folder.glob(".given-up-checkpoint-*"):
        _empty(path)
    for path in list_checkpoints(folder):
        _remove(path)


def _remove(path: Path) -> None:
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    # What is left of one that is removed in part would count as damaged.
    hidden = path.with_name(f".{path.name}.gone.tmp")
    _empty(hidden)
    path.rename(hidden)
    shutil.rmtree(hidden)


def set_aside(folder: Path, images_seen: int, say: Callable[[str], None]) -> None:
    """Hide the checkpoints from after a time at which a run goes on.

    No later start takes them for the newest; they go once a new one is written.
    """
    for path in list_checkpoints(folder):
        if images_of(path) > images_seen:
            say(f"removing {path}, which the resumed run has not reached")
            _empty(hidden := path.with_name(f".given-up-{path.name}"))
            path.rename(hidden)


def _empty(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def put_back(folder: Path) -> None:
    """Give shards their name again that a run, killed there, had set aside for newer ones."""
    for old in folder.glob(".checkpoint-*.old.tmp"):
        there = old.with_name(old.name.removeprefix(".").removesuffix(".old.tmp"))
        if _NAME.fullmatch(there.name) and not there.exists():
            with suppress(OSError):  # another process of the run has done it
                old.rename(there)


def remove_half_written(folder: Path) -> None:
    """Remove what a run left that was killed in a write."""
    for half in folder.glob(f".checkpoint-*{SUFFIX}.*.tmp"):
        half.unlink(missing_ok=True)
    for half in folder.glob(".checkpoint-*.tmp"):
        if half.is_dir():
            shutil.rmtree(half)
