"""Pictures inside zip and tar archives, one or a folder of them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from k_diffusion.training.archive import Archive
from k_diffusion.training.captions import TABLES, CaptionTable
from k_diffusion.training.dataset import DataError
from k_diffusion.training.pictures import SUFFIXES, Pictures

ARCHIVES = (".zip", ".tar")


class Archived(Pictures):
    """The pictures of a zip or an uncompressed tar, or of all in a folder ("shards").

    Nothing is unpacked to disk. Files are taken in the order of the archives' names and of their
    names inside; what has another ending than a picture's is left alone.

    Args:
        path: an archive, or a folder of archives.
        size: height and width in pixels (one number: a square).
        options: see `Pictures`.

    Raises:
        DataError: no archive, no good picture in it, a name that has no place in a data set, or no
            way to tell the classes.
    """

    def __init__(
        self, path: str | Path, size: int | Sequence[int], *args: Any, **options: Any
    ) -> None:
        super().__init__(f"archive {path}", size, *args, **options)
        self.archives = [Archive(shard) for shard in _shards(Path(path))]
        found = sorted(
            (number, PurePosixPath(member.name).parts, index)
            for number, archive in enumerate(self.archives)
            for index, member in enumerate(archive.members)
            if _is_picture(member.name)
        )
        self._places = [(number, index) for number, _, index in found]
        files = [PurePosixPath(self.archives[n].path, *parts) for n, parts, _ in found]
        paths, self._common = _without_common([parts for _, parts, _ in found])
        self._members = [
            {member.name: i for i, member in enumerate(archive.members)}
            if self.captions == "files"
            else {}
            for archive in self.archives
        ]
        self._settle(files, paths)

    def _content(self, file: int) -> io.BytesIO:
        number, index = self._places[file]
        return io.BytesIO(self.archives[number].read(index))

    def _stamps(self) -> list[Any]:
        return [archive.stamp() for archive in self.archives]

    def _beside(self, file: int, suffix: str) -> bytes | None:
        number, index = self._places[file]
        archive = self.archives[number]
        name = str(PurePosixPath(archive.members[index].name).with_suffix(suffix))
        beside = self._members[number].get(name)
        return None if beside is None else archive.read(beside)

    def _tables(self) -> list[CaptionTable]:
        tables = []
        for archive in self.archives:
            for index, member in enumerate(archive.members):
                *folder, name = PurePosixPath(member.name).parts
                if name in TABLES:
                    inside = tuple(folder[len(self._common) :])
                    called = f"{archive.path}/{member.name}"
                    tables.append(CaptionTable(called, inside, archive.read(index)))
        return tables


def _shards(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = sorted(p for p in path.iterdir() if p.suffix.lower() in ARCHIVES)
    if not found:
        raise DataError(f"folder {path} holds no archives: give one with {' or '.join(ARCHIVES)}")
    return found


def _is_picture(name: str) -> bool:
    path = PurePosixPath(name)
    hidden = any(part.startswith((".", "__MACOSX")) for part in path.parts)
    return path.suffix.lower() in SUFFIXES and not hidden


def _without_common(
    paths: list[tuple[str, ...]],
) -> tuple[list[tuple[str, ...]], tuple[str, ...]]:
    """The paths without the folders that all of them lie in, as archives of a folder have; and
    these folders."""
    common: list[str] = []
    while paths and all(len(parts) > 2 and parts[0] == paths[0][0] for parts in paths):
        common.append(paths[0][0])
        paths = [parts[1:] for parts in paths]
    return paths, tuple(common)
