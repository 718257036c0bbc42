"""Files: fetched and checked before they are put in place, logged line by line, looked into."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file beside `path`, then rename it: `path` is whole or untouched."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a file of text, in UTF-8; whole, or not at all."""
    write_whole(path, lambda file: file.write_text(text, encoding="utf-8"))


def download_file(path: Path | str, url: str, digest: str | None = None) -> Path:
    """Fetch a file unless it is there already.

    It is written beside `path` and renamed when it is whole and its hash is right: a broken
    transfer leaves nothing behind.

    Args:
        path: where to put it; folders are made.
        url: https, http or file.
        digest: SHA-256, hexadecimal, which a file that is there already must have too.

    Raises:
        OSError: it cannot be fetched, is not whole, or has another hash.
    """
    path = Path(path)
    if path.exists():
        _check_digest(path, path, url, digest)
        return path
    path.parent.mkdir(parents=True, exist_ok=True)

    def fetch(temporary: Path) -> None:
        import shutil
        import urllib.request

        with urllib.request.urlopen(url) as response, open(temporary, "wb") as file:
            shutil.copyfileobj(response, file)
            announced = response.headers.get("Content-Length")
            if announced is not None and file.tell() != int(announced):
                raise OSError(
                    f"{url} broke off after {file.tell()} of {announced} bytes: try again"
                )
        _check_digest(temporary, path, url, digest)

    write_whole(path, fetch)
    return path


def _check_digest(file: Path, path: Path, url: str, digest: str | None) -> None:
    if digest is None:
        return
    found = hashlib.sha256()
    with open(file, "rb") as opened:
        while block := opened.read(1 << 20):
            found.update(block)
    if found.hexdigest() != digest.lower():
        where = f"{path}, which was there already: delete it to fetch it from {url}"
        raise OSError(
            f"SHA-256 is {found.hexdigest()} and should be {digest} for "
            f"{where if file == path else url}"
        )


def get_safetensors_metadata(path: Path | str) -> dict[str, str] | None:
    """The metadata of a safetensors file, text by name; None where it has none.

    The tensors are not read.
    """
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.metadata()


class CSVLogger:
    """Appends lines of comma-separated values to a file; each is on disk when `write` returns.

    Args:
        filename: gets a line of column names where it is missing or empty, else is continued.
        columns: their names.

    A context manager too; `close` is optional, for the file is closed with its last reference.
    """

    def __init__(self, filename: Path | str, columns: Iterable[Any]) -> None:
        self.filename = Path(filename)
        self.columns = columns
        self.file: io.TextIOWrapper = open(self.filename, "a")  # noqa: SIM115  (stays open)
        if self.file.tell() == 0:
            self.write(*self.columns)

    def write(self, *args: Any) -> None:
        """Append one line.

        Raises:
            ValueError: the logger has been closed.
        """
        if self.file.closed:
            raise ValueError(f"the log {self.filename} is closed: make another CSVLogger for it")
        print(*args, sep=",", file=self.file, flush=True)

    def close(self) -> None:
        """Close the file; once is enough, twice does no harm."""
        self.file.close()

    def __enter__(self) -> CSVLogger:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        file = self.__dict__.get("file")  # missing where it could not be opened
        if file is not None:
            file.close()
