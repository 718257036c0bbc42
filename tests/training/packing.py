"""Folders as archives."""

from __future__ import annotations

import tarfile
import zipfile
from pathlib import Path


def packed(root: Path, path: Path, above: str = "") -> Path:
    """All files of a folder, in a zip or a tar by its name, under names that begin with `above`."""
    files = sorted(file for file in root.rglob("*") if file.is_file())
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for file in files:
                archive.write(file, above + file.relative_to(root).as_posix())
    else:
        with tarfile.open(path, "w") as tar:
            for file in files:
                tar.add(file, above + file.relative_to(root).as_posix())
    return path
