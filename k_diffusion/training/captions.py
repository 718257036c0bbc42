"""What pictures show, in words: texts in files beside them, or in tables of a folder's files."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from k_diffusion.training.dataset import DataError

KINDS = ("none", "files", "metadata")
SUFFIX = ".txt"
TABLES = ("metadata.jsonl", "metadata.csv")
"""What a table of captions is called; it stands in the folder of its files or above."""
MAX_TEXT = 1 << 20
"""Bytes of the longest caption."""


class CaptionTable(NamedTuple):
    """A table of captions.

    Attributes:
        name: for messages.
        folder: where it stands, by its parts.
        content: of the file.
    """

    name: str
    folder: tuple[str, ...]
    content: bytes


def decoded(content: bytes) -> str:
    """A caption's text, without the line break at its end.

    Raises:
        DataError: it is too long, or no text.
    """
    if len(content) > MAX_TEXT:
        raise DataError(f"its caption has {len(content)} bytes, more than {MAX_TEXT}")
    try:
        return content.decode("utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError:
        raise DataError("its caption is no text in UTF-8") from None


def read_tables(tables: Sequence[CaptionTable], key: str) -> dict[tuple[str, ...], str]:
    """File, by the parts of its path -> its caption.

    Args:
        tables: JSON lines or CSV; each row has `file_name`, relative to the table's folder.
        key: the column that is the caption.

    Raises:
        DataError: a table is damaged, or a row lacks one of the two.
    """
    found: dict[tuple[str, ...], str] = {}
    for table in tables:
        for number, row in _rows(table):
            for column in ("file_name", key):
                if not isinstance(row.get(column), str):
                    there = ", ".join(map(repr, row)) or "nothing"
                    raise DataError(
                        f"{table.name}, line {number}: no text as {column!r}, but {there}: give "
                        "its name as caption_key"
                    )
            parts = [part for part in row["file_name"].split("/") if part not in ("", ".")]
            found[(*table.folder, *parts)] = row[key]
    return found


def _rows(table: CaptionTable) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        text = table.content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{table.name} is no text in UTF-8") from None
    if table.name.endswith(".csv"):
        reader = csv.DictReader(io.StringIO(text))
        for row in reader:
            yield reader.line_num, row
        return
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{table.name}, line {number} is no JSON ({error})") from None
        if not isinstance(row, dict):
            raise DataError(f"{table.name}, line {number} is no object, {{...}}")
        yield number, row
