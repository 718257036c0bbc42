"""One run a folder: a lock that its process holds, and that the system drops when it ends.

The lock is the system's, on the file `.lock`, so one that a killed process left is free at once,
whatever process has its number now, and over a network file system too. What the file says, the
process's number and machine, is for messages alone.
"""

from __future__ import annotations

import errno
import os
import platform
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

from k_diffusion.training.config import ConfigError

LOCK = ".lock"

_HELD: dict[Path, int] = {}
"""Locks of this process by its number, which a forked child does not share. The system would let a
process take its own lock again, and drop it when any handle on the file is closed."""


def refuse_busy(folder: Path) -> None:
    """See that no other run works in a folder, without taking it.

    Raises:
        ConfigError: one does.
    """
    path = folder / LOCK
    if _is_held_here(path):
        raise _busy(folder, f"process {os.getpid()}, which is this one")
    try:
        with path.open("r+b") as file:
            if not _try_lock(file, shared=True):
                raise _busy(folder, _owner(file))
    except OSError:  # no lock, or none that can be had: `RunLock` says so
        return


class RunLock:
    """The lock on a run's folder.

    Args:
        folder: of the run; it is there.
        say: takes a line where a run that is gone left its lock, or where none can be had.

    Raises:
        ConfigError: another run works there.
    """

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self._folder, self._say = folder, say
        self._path = folder / LOCK
        self._file: IO[bytes] | None = None
        self._begin()

    def _begin(self) -> None:
        folder, say = self._folder, self._say
        if _is_held_here(self._path):
            raise _busy(folder, f"process {os.getpid()}, which is this one")
        try:
            self._file = self._take(folder)
        except OSError as error:
            say(
                f"{self._path} cannot be locked ({error.strerror}): see to it that no other run "
                "writes there"
            )
            return
        _HELD[self._path.resolve()] = os.getpid()
        if left := _owner(self._file):
            say(f"taking over {folder} from {left}, which is gone")
        self._file.truncate(0)
        self._file.write(f"{os.getpid()} {platform.node()}\n".encode())
        self._file.flush()

    def _take(self, folder: Path) -> IO[bytes]:
        while True:
            file = self._path.open("a+b")
            try:
                if not _try_lock(file, shared=False):
                    raise _busy(folder, _owner(file))
                # A run that has just ended may have taken the file away since it was opened.
                with suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(file.fileno()), self._path.stat()):
                        return file
            except BaseException:
                file.close()
                raise
            file.close()

    def renew(self) -> None:
        """See that the lock is still there: its folder may have been removed and made anew.

        Raises:
            ConfigError: another run works there by now.
        """
        if self._file is None:
            return
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(self._file.fileno()), self._path.stat()):
                return
        self._file.close()
        self._file = None
        _HELD.pop(self._path.resolve(), None)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._begin()

    def release(self) -> None:
        """Let others in; a second time it does nothing."""
        if self._file is None:
            return
        if os.name == "nt":  # where an open file cannot be removed
            self._file.close()
        with suppress(OSError):
            self._path.unlink()
        self._file.close()
        self._file = None
        _HELD.pop(self._path.resolve(), None)


def _is_held_here(path: Path) -> bool:
    return _HELD.get(path.resolve()) == os.getpid()


def _busy(folder: Path, owner: str) -> ConfigError:
    return ConfigError(
        f"out = {str(folder)!r} is in use by another run, {owner or 'which has just begun'}: wait "
        "for its end, stop it, or give another folder"
    )


def _owner(file: IO[bytes]) -> str:
    """Who wrote a lock file, in words; empty where it says nothing."""
    file.seek(0)
    number, _, machine = file.read(300).decode(errors="replace").strip().partition(" ")
    if not number:
        return ""
    return f"process {number}" + (f" on {machine}" if machine not in ("", platform.node()) else "")


if sys.platform == "win32":
    import msvcrt

    def _try_lock(file: IO[bytes], shared: bool) -> bool:
        """Lock a byte far beyond the text, since Windows lets nobody read what is locked."""
        file.seek(1 << 20)
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EDEADLOCK):
                return False
            raise
        if shared:
            file.seek(1 << 20)
            msvcrt.locking(file.fileno(), msvcrt.LK_UNLCK, 1)
        return True

else:
    import fcntl

    def _try_lock(file: IO[bytes], shared: bool) -> bool:
        """Whether the lock could be had at once; many may share one for a look."""
        try:
            fcntl.lockf(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            raise
        return True
