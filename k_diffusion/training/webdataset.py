"""Samples in tar shards as WebDataset lays them out, read by their places rather than as a stream.

Files whose names agree up to the first dot of the last part are one sample: `000/17.jpg`,
`000/17.cls`, `000/17.txt`. The tars' directories are read once; then any sample can be had, so that
the order of training is a function of (seed, place) here too. The webdataset package is not needed.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from itertools import product
from pathlib import Path, PurePosixPath
from typing import Any

from k_diffusion.training import captions as texts
from k_diffusion.training.archive import Archive
from k_diffusion.training.dataset import DataError
from k_diffusion.training.decoding import SUFFIXES
from k_diffusion.training.pictures import Pictures

CLASS, JSON = "cls", "json"


class WebShards(Pictures):
    """The pictures of WebDataset shards.

    A class is the whole number in a sample's .cls. Of captions, "files" takes a sample's .txt,
    "metadata" what stands at `caption_key` in its .json.

    Args:
        path: a tar, a folder of tars, or several with braces: `shards/{00000..00009}.tar`.
        size: height and width in pixels (one number: a square).
        class_names: one name a class; none: their numbers.
        options: see `Pictures`; `classes` is "auto" (where samples have a .cls) or "none".

    Raises:
        DataError: no such shard, no good picture, or a name that has no place in a data set.
    """

    def __init__(
        self,
        path: str | Path,
        size: int | Sequence[int],
        *args: Any,
        class_names: Sequence[str] = (),
        **options: Any,
    ) -> None:
        super().__init__(f"shards {path}", size, *args, **options)
        if self.classes == "folders":
            raise DataError(
                "classes of WebDataset shards are numbers in .cls files: set classes to 'auto' or "
                "'none'"
            )
        self.archives = [Archive(shard) for shard in shards_of(str(path))]
        self._samples: list[tuple[int, dict[str, int]]] = []
        files: list[PurePosixPath] = []
        for number, archive in enumerate(self.archives):
            for called, members in _samples(archive).items():
                picture = next((e for e in members if f".{e}" in SUFFIXES), None)
                if picture is not None:
                    self._samples.append((number, {**members, "": members[picture]}))
                    files.append(PurePosixPath(archive.path, f"{called}.{picture}"))
        found: list[int | None] = [None] * len(files)
        self._classed = self.classes == "auto" and any(CLASS in m for _, m in self._samples)
        if self._classed:
            found = [self._class(file) for file in range(len(files))]
        numbers = [-1 if number is None else number for number in found]
        count = max(numbers, default=-1) + 1
        names = (tuple(class_names) or tuple(map(str, range(count)))) if self._classed else ()
        if len(names) < count:
            raise DataError(
                f"{self.where}: there are {count} classes, but {len(names)} class_names: give each"
            )
        self._numbers = numbers
        self._settle(files, [file.parts for file in files], (names, [max(0, n) for n in numbers]))

    def _class(self, file: int) -> int | None:
        """The number in a sample's .cls; None: it has none that can be read."""
        try:
            content = self._member(file, CLASS)
        except DataError:
            return None
        text = (content or b"").strip()
        return int(text) if re.fullmatch(rb"[0-9]{1,9}", text) else None

    def _member(self, file: int, ending: str) -> bytes | None:
        number, members = self._samples[file]
        return None if ending not in members else self.archives[number].read(members[ending])

    def _content(self, file: int) -> io.BytesIO:
        return io.BytesIO(self._member(file, "") or b"")

    def _stamps(self) -> list[Any]:
        return [archive.stamp() for archive in self.archives]

    def _beside(self, file: int, suffix: str) -> bytes | None:
        return self._member(file, suffix[1:])

    def _tables(self) -> list[texts.CaptionTable]:
        return []  # each sample has its own

    def _caption(self, file: int) -> str:
        if self.captions == "files":
            return super()._caption(file)
        content = self._member(file, JSON)
        try:
            row = json.loads(content or b"null")
        except (ValueError, RecursionError):
            raise DataError("its .json is damaged") from None
        text = row.get(self.caption_key) if isinstance(row, dict) else None
        if not isinstance(text, str):
            raise DataError(f"no caption: its .json has no text as {self.caption_key!r}")
        return text

    def _quick_look(self, file: int) -> str | tuple[int, int]:
        if self._classed and self._numbers[file] < 0:
            return "no class: it has no .cls with a whole number"
        return super()._quick_look(file)


def _samples(archive: Archive) -> dict[str, dict[str, int]]:
    """A sample's name -> ending in lower case -> which file of the archive; in order."""
    found: dict[str, dict[str, int]] = {}
    for index, member in enumerate(archive.members):
        path = PurePosixPath(member.name)
        if path.name.startswith("."):
            continue
        stem, _, ending = path.name.partition(".")
        found.setdefault(str(path.with_name(stem)), {}).setdefault(ending.lower(), index)
    return found


def shards_of(path: str) -> list[Path]:
    """The tars that a path means, in the order of their names.

    Args:
        path: a tar, a folder of tars, or several with braces: {00000..00009} and {a,b}.

    Raises:
        DataError: there are none.
    """
    if "{" in path:
        return [Path(one) for one in _braces(path)]
    if Path(path).is_dir():
        found = sorted(Path(path).glob("*.tar"))
        if not found:
            raise DataError(f"folder {path} holds no shards: give one with .tar files")
        return found
    return [Path(path)]


def _braces(path: str) -> list[str]:
    """All that a path with braces stands for."""
    pieces = re.split(r"\{([^{}]*)\}", path)
    if any(sign in piece for piece in pieces for sign in "{}"):
        raise DataError(f"shards {path}: its braces do not match: give such as {{00000..00009}}")
    choices = [[piece] if i % 2 == 0 else _choices(piece, path) for i, piece in enumerate(pieces)]
    return ["".join(parts) for parts in product(*choices)]


def _choices(inner: str, path: str) -> list[str]:
    span = re.fullmatch(r"([0-9]+)\.\.([0-9]+)", inner)
    if span is None:
        if ".." in inner:
            raise DataError(f"shards {path}: {{{inner}}} is no span: give such as {{00000..00009}}")
        return inner.split(",")
    first, last = span.groups()
    if int(last) < int(first) or int(last) - int(first) > 10**6:
        raise DataError(f"shards {path}: {{{inner}}} counts down, or too far")
    return [f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1)]
