"""Pictures in a folder, or in one folder a class."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

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
        self, path: str | Path, size: int | tuple[int, int], *args: Any, **options: Any
    ) -> None:
        super().__init__(f"data folder {path}", size, *args, **options)
        self.root = Path(path)
        found = _image_files(self.root)
        self._settle(found, [file.relative_to(self.root).parts for file in found])

    def _content(self, file: int) -> Path:
        return Path(self._found[file])


def _image_files(root: Path) -> list[Path]:
    if not root.is_dir():
        raise DataError(f"data folder {root} " + ("is a file" if root.exists() else "is missing"))
    found, visited = [], set()
    for folder, below, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in visited:  # a link to a folder above
            below.clear()
            continue
        visited.add(real)
        below[:] = sorted(name for name in below if not name.startswith("."))
        found += [
            Path(folder, name)
            for name in names
            if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES
        ]
    return sorted(found, key=lambda file: file.relative_to(root).parts)
