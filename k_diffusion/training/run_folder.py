"""A run's folder when a session begins: where the run goes on from, and what gives way to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from k_diffusion.training.config import ConfigError
from k_diffusion.training.lock import RunLock, refuse_busy
from k_diffusion.training.previews import remove_previews_after
from k_diffusion.training.retention import (
    latest_checkpoint,
    list_checkpoints,
    put_back,
    remove_all,
    remove_half_written,
    set_aside,
)
from k_diffusion.training.snapshots import remove_snapshots_after, snapshot_files


@dataclass(frozen=True)
class RunFolder:
    """A folder as it was found, before anything was loaded; nothing in it has been changed.

    Attributes:
        path: the folder; it may yet have to be made.
        start: the checkpoint to go on from, here or elsewhere; None: from the beginning.
        found: the checkpoints in it.
        overwrite: whether a new run may take their place.
    """

    path: Path
    start: Path | None
    found: tuple[Path, ...]
    overwrite: bool

    @property
    def going_on(self) -> bool:
        """Whether the run that goes on is this folder's own."""
        return lies_in(self.path, self.start)

    def take(self, images_seen: int, tell: Callable[[str], None]) -> RunLock:
        """Lock it, and remove what the run that begins has not reached; by the main process.

        Args:
            images_seen: where the run stands.
            tell: takes lines of news.

        Raises:
            ConfigError: another run works there, or has written to it meanwhile.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        lock = RunLock(self.path, tell)
        try:
            if tuple(list_checkpoints(self.path)) != self.found:
                raise ConfigError(f"another run has written to out = {str(self.path)!r} meanwhile")
            remove_half_written(self.path)
            if not self.going_on and self.overwrite:
                remove_all(self.path)
            if self.going_on:
                set_aside(self.path, images_seen, tell)
            remove_after(self.path, images_seen if self.going_on else 0, tell)
        except BaseException:
            lock.release()
            raise
        return lock


def find_folder(
    out: Path, resume: str | Path | None, overwrite: bool, tell: Callable[[str], None]
) -> RunFolder:
    """Look into a run's folder; for the arguments see `run_training`.

    Raises:
        ConfigError: it is a file, another run works there, or it holds a run that is neither gone
            on with nor to be overwritten.
        CheckpointError: it holds damaged checkpoints alone.
    """
    refuse_busy(out)
    put_back(out)
    start = start_point(out, resume, overwrite, tell)
    return RunFolder(out, start, tuple(list_checkpoints(out)), overwrite)


def start_point(
    out: Path, resume: str | Path | None, overwrite: bool, tell: Callable[[str], None]
) -> Path | None:
    """The checkpoint to go on from, or None; raises as `find_folder` does."""
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
    if found and not overwrite and not lies_in(out, start):
        raise ConfigError(
            f"out = {str(out)!r} holds a run already ({found[-1].name}): resume it, overwrite "
            "it, or give another folder"
        )
    return start


def lies_in(out: Path, start: Path | None) -> bool:
    """Whether a run goes on in the folder where its checkpoint lies."""
    return start is not None and start.resolve().parent == out.resolve()


def remove_after(out: Path, images_seen: int, tell: Callable[[str], None]) -> None:
    """Remove the snapshots and previews of a time that the run has yet to come to; 0: all."""
    remove_snapshots_after(out, images_seen, tell)
    remove_previews_after(out, images_seen)
