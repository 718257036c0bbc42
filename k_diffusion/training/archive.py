"""Files inside a zip or a tar, read where they lie: nothing is ever unpacked to disk.

What an archive says of itself is not believed. Names that lead elsewhere, links and devices are
refused; a file is never read beyond a limit, whatever its header declares, so that 10 GB of zeros
in a few kilobytes cost no memory; what is read is checked against its checksum.
"""

from __future__ import annotations

import io
import os
import re
import stat
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from k_diffusion.training.dataset import DataError
from k_diffusion.utils.words import reason_of

MAX_BYTES = 256 << 20
"""The largest file that is read; larger ones count as broken."""
MAX_HEADER = 1 << 20
"""The most that one header of a tar may take, with a name or a link's aim of any length."""
_LOCAL = struct.Struct("<4s5H3I2H")
_STORED, _DEFLATED = 0, 8


_NO_FILES = (stat.S_IFLNK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK)
_DAMAGE = (
    zipfile.BadZipFile,
    tarfile.TarError,
    OSError,
    ValueError,
    OverflowError,
    NotImplementedError,  # of a zip whose version is to come
    RecursionError,  # of headers that announce headers
    struct.error,
)


class _Headers(io.BufferedReader):
    """A tar's file for reading its headers: a read as long as no header is refused, since that much
    memory would be taken for it first, whatever the file holds."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= MAX_HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes, more than {MAX_HEADER}")
        return super().read(size)


class Member(NamedTuple):
    """Where a file lies in an archive.

    Attributes:
        name: its path there.
        offset: of its local header (zip) or its first byte (tar), in bytes.
        packed: bytes that it takes there.
        size: bytes that it says to have.
        method: of compression, as zip counts them: 0 none, 8 deflate.
        crc: checksum of its content; None: the archive keeps none.
    """

    name: str
    offset: int
    packed: int
    size: int
    method: int = _STORED
    crc: int | None = None


class Archive:
    """The files of an uncompressed tar, or of a zip.

    It is read by position alone, so that threads and forked processes may share it. Of files that
    have one name the last one counts, as it would if all were unpacked.

    Args:
        path: of the archive.
        max_bytes: the largest file that `read` gives.

    Raises:
        DataError: it is no archive, is compressed as a whole, or holds a name, link or device that
            has no place in a data set; by name.
    """

    def __init__(self, path: str | Path, max_bytes: int = MAX_BYTES) -> None:
        self.path, self.max_bytes = Path(path), max_bytes
        try:
            self._file = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise DataError(f"archive {path} cannot be read: {error.strerror}") from None
        try:
            self.zipped = zipfile.is_zipfile(self.path)
            found = self._zip() if self.zipped else self._tar()
        except _DAMAGE as error:
            self._close()
            if isinstance(error, DataError):
                raise
            raise DataError(
                f"archive {path} is damaged or neither a zip nor an uncompressed tar: "
                f"{reason_of(error)}"
            ) from None
        self.members = tuple({member.name: member for member in found}.values())

    def __del__(self) -> None:
        self._close()

    def _close(self) -> None:
        file = self.__dict__.pop("_file", None)  # once: the number may be another file's by then
        if file is not None:
            os.close(file)

    def __len__(self) -> int:
        return len(self.members)

    def stamp(self) -> list[Any]:
        """JSON data that change with the content: each file's name, size and checksum, which `read`
        holds it to. A tar has no checksums: there, the archive's own size and time of change."""
        members = [[m.name, m.size, m.crc] for m in self.members]
        if self.zipped:
            return members
        facts = os.fstat(self._file)
        return [facts.st_size, facts.st_mtime_ns, *members]

    def read(self, index: int) -> bytes:
        """The content of a file.

        Raises:
            DataError: it is larger than `max_bytes`, truncated, encrypted, packed in another way
                than by deflate, or not what its checksum says.
        """
        member = self.members[index]
        if max(member.size, member.packed) > self.max_bytes:
            raise DataError(
                f"{max(member.size, member.packed)} bytes are more than max_bytes {self.max_bytes}"
            )
        content = self._packed(member)
        if member.method == _DEFLATED:
            unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
            try:
                # One byte more than is declared tells a file that lies about its size.
                content = unpacker.decompress(content, member.size + 1)
            except zlib.error as error:
                raise DataError(f"damaged: {error}") from None
        if len(content) != member.size:
            raise DataError(f"damaged: not the {member.size} bytes that the archive declares")
        if member.crc is not None and zlib.crc32(content) != member.crc:
            raise DataError("damaged: its checksum is another one")
        return content

    def _packed(self, member: Member) -> bytes:
        try:
            return self._content(member)
        except (OSError, OverflowError):
            raise DataError(f"damaged: it begins at {member.offset}, where nothing can") from None

    def _content(self, member: Member) -> bytes:
        offset = member.offset
        if self.zipped:
            head = os.pread(self._file, _LOCAL.size, offset)
            if len(head) != _LOCAL.size or head[:4] != b"PK\x03\x04":
                raise DataError("damaged: it does not begin where the archive says")
            *_, name, extra = _LOCAL.unpack(head)
            offset += _LOCAL.size + name + extra
        content = os.pread(self._file, member.packed, offset)
        if len(content) != member.packed:
            raise DataError("truncated")
        return content

    def _zip(self) -> list[Member]:
        members = []
        with zipfile.ZipFile(self.path) as archive:
            for info in archive.infolist():
                self._check(info.orig_filename)
                if stat.S_IFMT(info.external_attr >> 16) in _NO_FILES:
                    self._refuse(info.filename, "is a link or a device")
                if info.is_dir():
                    continue
                if info.flag_bits & 1:
                    self._refuse(info.filename, "is encrypted")
                if info.compress_type not in (_STORED, _DEFLATED):
                    self._refuse(info.filename, "is packed by another method than deflate")
                members.append(
                    Member(
                        info.filename,
                        info.header_offset,
                        info.compress_size,
                        info.file_size,
                        info.compress_type,
                        info.CRC,
                    )
                )
        return members

    def _tar(self) -> list[Member]:
        members = []
        # "r:" takes no compressed tar, which can be read from its beginning only.
        with (
            open(self.path, "rb", buffering=0) as file,
            tarfile.open(fileobj=_Headers(file), mode="r:") as archive,
        ):
            for info in archive:
                self._check(info.name)
                if info.size < 0:  # after which the next one would be this one again, for ever
                    self._refuse(info.name, f"has {info.size} bytes")
                if info.isdir():
                    continue
                if not info.isreg() or info.issparse():
                    self._refuse(info.name, "is a link, a device or sparse")
                members.append(Member(info.name, info.offset_data, info.size, info.size))
        return members

    def _check(self, name: str) -> None:
        parts = PurePosixPath(name).parts
        if not parts or ".." in parts or name.startswith("/") or "\\" in name or "\0" in name:
            self._refuse(name, "leads outside")
        if re.match(r"[A-Za-z]:", name):
            self._refuse(name, "leads outside")

    def _refuse(self, name: str, reason: str) -> None:
        raise DataError(
            f"archive {self.path}: {name[:200]!r} {reason}; nothing of it is used: make the "
            "archive anew of plain files"
        )
