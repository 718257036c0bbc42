"""Pictures of a data set in the format of Hugging Face's datasets, from disk or the hub."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from k_diffusion.external.text import not_there
from k_diffusion.training.dataset import DataError
from k_diffusion.training.pictures import Pictures
from k_diffusion.utils.words import reason_of

LABELS = ("label", "labels")
"""Columns that are taken as the class where none is named."""


class HuggingFace(Pictures):
    """The pictures of one split, each read by its place; decoded here, like those of a folder.

    Needs the datasets package. No code that comes with the data is run.

    Args:
        path: a folder that `save_to_disk` wrote, a folder of parquet files or pictures, or a data
            set's id on the hub.
        size: height and width in pixels (one number: a square).
        name: of the data set's configuration, where it has several.
        split: such as "train", or "train[:1000]".
        revision: a branch, tag or commit on the hub; "": its main one.
        image_key: the column of the pictures.
        label_key: the column of the classes; "auto": "label" or "labels", where there is one.
        options: see `Pictures`. Of captions, "metadata" takes the column `caption_key`.

    Raises:
        DataError: datasets is not installed, it cannot be loaded, or a column is missing.
    """

    def __init__(
        self,
        path: str | Path,
        size: int | Sequence[int],
        *args: Any,
        name: str = "",
        split: str = "train",
        revision: str = "",
        image_key: str = "image",
        label_key: str = "auto",
        **options: Any,
    ) -> None:
        super().__init__(f"data set {path}", size, *args, **options)
        if self.classes == "folders" or self.captions == "files":
            key, value, way = (
                ("classes", self.classes, "'auto' or 'none'")
                if self.classes == "folders"
                else ("captions", self.captions, "'metadata', and caption_key to its column,")
            )
            raise DataError(f"{self.where} has columns, no {value}: set {key} to {way}")
        rows = _load(str(path), name, split, revision)
        self._need(rows, image_key)
        if self.captions == "metadata":
            self._need(rows, self.caption_key)
        if label_key == "auto":
            label_key = next((key for key in LABELS if key in rows.column_names), "")
        classes: tuple[list[str], list[int]] = ([], [0] * len(rows))
        if label_key and self.classes != "none":
            self._need(rows, label_key)
            classes = _classes(rows, label_key, self.where)
        self._pictures = _undecoded(rows, image_key)
        self._told_rows = rows.select_columns([self.caption_key]) if self.captions != "none" else ()
        self._image_key = image_key
        files = [PurePosixPath(f"{path}[{split}]", str(i)) for i in range(len(rows))]
        self._settle(files, [(file.name,) for file in files], classes)

    def _need(self, rows: Any, key: str) -> None:
        if key not in rows.column_names:
            raise DataError(
                f"{self.where} has no column {key!r}, but {', '.join(map(repr, rows.column_names))}"
            )

    def _content(self, file: int) -> Path | io.BytesIO:
        value = self._pictures[file][self._image_key]
        if isinstance(value, dict):
            content, path = value.get("bytes"), value.get("path")
            if content is None and path:
                return Path(path)
            value = content
        if not isinstance(value, bytes):
            raise DataError("no picture: the column holds neither a file nor its bytes")
        return io.BytesIO(value)

    def _tables(self) -> list[Any]:
        return []  # each row has its own

    def _caption(self, file: int) -> str:
        text = self._told_rows[file][self.caption_key]
        if not isinstance(text, str):
            raise DataError(f"no caption: {self.caption_key!r} is no text")
        return text


def _load(path: str, name: str, split: str, revision: str) -> Any:
    if not_there(path):  # else the hub would be asked for it
        raise DataError(f"data set {path} does not exist: give a folder, or an id on the hub")
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"data set {path} needs the datasets package, which cannot be imported ({error}): "
            "pip install 'k-diffusion[data]'"
        ) from None
    folder = Path(path)
    try:
        if (folder / "dataset_dict.json").is_file():
            folder = folder / split
        if (folder / "state.json").is_file():
            return datasets.load_from_disk(str(folder))
        options = {"name": name or None, "revision": revision or None}
        return datasets.load_dataset(path, split=split, **options)
    except Exception as error:  # its own kinds, those of the hub, of Arrow, of the disk
        reason = reason_of(error)[:300]
        raise DataError(f"data set {path} cannot be loaded: {reason}") from None


def _undecoded(rows: Any, key: str) -> Any:
    """The column of pictures, as files or bytes."""
    import datasets

    rows = rows.select_columns([key])
    if isinstance(rows.features[key], datasets.Image):
        rows = rows.cast_column(key, datasets.Image(decode=False))
    return rows.with_format(None)


def _classes(rows: Any, key: str, where: str) -> tuple[list[str], list[int]]:
    """Names of the classes, and the class of each row."""
    values = list(rows.with_format(None)[key])
    known = getattr(rows.features[key], "names", None)
    if known is None:
        known = sorted(set(values))
        if not all(isinstance(value, (str, int)) for value in known):
            raise DataError(f"{where}: column {key!r} holds neither numbers nor names of classes")
        index = {value: i for i, value in enumerate(known)}
        values = [index[value] for value in values]
    if any(value is None or value < 0 for value in values):
        raise DataError(
            f"{where}: a row has no class in column {key!r}: set classes to 'none', or give a "
            "split that has them"
        )
    return [str(name) for name in known], values
