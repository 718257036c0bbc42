"""Pictures in a folder, or in one folder a class."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from k_diffusion.training.captions import MAX_TEXT, TABLES, CaptionTable
from k_diffusion.training.dataset import DataError
from k_diffusion.training.pictures import SUFFIXES, Pictures


class Folder(Pictures):
    """The pictures of a folder, or of one folder a class, decoded when they are asked for.

    Files are taken in the sorted order of their names, whatever the file system says.

    Args:
        path: the folder; subfolders are searched too, names with a leading dot are not.
        size: height and width in pixels (one number: a square).
        options: see `Pictures`.

    Raises:
        DataError: no such folder, no good image in it, or no way to tell the classes.
    """

    def __init__(
        self, path: str | Path, size: int | Sequence[int], *args: Any, **options: Any
    ) -> None:
        super().__init__(f"data folder {path}", size, *args, **options)
        self.root = Path(path)
        found, self._table_files = image_files(self.root)
        self._names = list(map(str, found))  # which a path would put together each time anew
        self._settle(found, [file.relative_to(self.root).parts for file in found])

    def _content(self, file: int) -> str:
        return self._names[file]

    def _stamps(self) -> list[Any]:
        """Names, sizes and times of change: a file that is altered and given back both its size
        and its time is taken for the one it was."""
        found = []
        for file in self._found:
            facts = os.stat(file)
            name = Path(file).relative_to(self.root).as_posix()
            found.append([name, facts.st_size, facts.st_mtime_ns])
        return found

    def _beside(self, file: int, suffix: str) -> bytes | None:
        try:
            with open(Path(self._found[file]).with_suffix(suffix), "rb") as opened:
                return opened.read(MAX_TEXT + 1)
        except FileNotFoundError:
            return None

    def _tables(self) -> list[CaptionTable]:
        return [
            CaptionTable(str(file), file.parent.relative_to(self.root).parts, file.read_bytes())
            for file in self._table_files
        ]


def image_files(root: Path) -> tuple[list[Path], list[Path]]:
    """The image files in a folder and the folders below it, and the tables of captions beside them.

    Raises:
        DataError: no such folder.
    """
    if not root.is_dir():
        raise DataError(f"data folder {root} " + ("is a file" if root.exists() else "is missing"))
    found, tables, visited = [], [], set()
    for folder, below, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in visited:  # a link to a folder above
            below.clear()
            continue
        visited.add(real)
        below[:] = sorted(name for name in below if not name.startswith("."))
        tables += [Path(folder, name) for name in sorted(names) if name in TABLES]
        found += [
            Path(folder, name)
            for name in names
            if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES
        ]
    return sorted(found, key=lambda file: file.relative_to(root).parts), tables
