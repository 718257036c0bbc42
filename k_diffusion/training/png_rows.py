"""Whether a PNG holds all its rows: Pillow takes a stream that ends early for a whole picture."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from k_diffusion.training.dataset import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""A PNG's colour type -> numbers a pixel."""
_ADAM7 = (
    (0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2),
    (0, 1, 1, 2),
)  # fmt: skip
"""First pixel across and down, and steps across and down, of each pass of an interlaced one."""


def check_rows(picture: Image, file: str | Path | io.BytesIO) -> None:
    """Refuse a PNG whose pixels end before its last row.

    Those that are missing are 0 in memory. So only where the last two rows are (two, for interlaced
    ones) is the stream looked at, which takes about as long as decoding it.

    Args:
        picture: decoded, not yet turned.
        file: that it was read from.

    Raises:
        DataError: how much of it there is.

    Source: PNG specification, third edition, sections 8 (interlacing) and 9 (filtered rows).
    """
    if picture.format != "PNG":
        return
    width, height = picture.size
    above = max(0, height - 2)
    if all(map(_lit, (picture.getpixel((width - 1, y)) for y in (above, height - 1)))):
        return
    if picture.crop((0, above, width, height)).tobytes().strip(b"\0"):
        return
    if isinstance(file, io.BytesIO):
        found, wanted = _pixel_bytes(io.BytesIO(file.getvalue()))
    else:
        with open(file, "rb") as opened:
            found, wanted = _pixel_bytes(opened)
    if found < wanted:
        raise DataError(f"its pixels end early, after {found} of {wanted} bytes")


def _lit(pixel: Any) -> bool:
    return any(pixel) if isinstance(pixel, tuple) else bool(pixel)


def _pixel_bytes(file: BinaryIO) -> tuple[int, int]:
    """How many bytes of filtered rows a PNG has, counted no further than it should, and that."""
    file.seek(8)
    stream, found, wanted = zlib.decompressobj(), 0, 0
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if kind == b"IHDR":
            wanted = _wanted(*struct.unpack(">IIBBxxB", file.read(13)))
            length -= 13
        elif kind == b"IDAT":
            data = file.read(length)
            length = 0
            while data and found < wanted and not stream.eof:
                found += len(stream.decompress(data, min(wanted - found, 1 << 20)))
                data = stream.unconsumed_tail
        if found >= wanted > 0 or kind == b"IEND":
            break
        file.seek(length + 4, io.SEEK_CUR)
    return found, wanted


def _wanted(width: int, height: int, depth: int, colour: int, interlaced: int) -> int:
    """Bytes of all rows, each with the byte that names its filter."""
    total = 0
    for x, y, across, down in _ADAM7 if interlaced else ((0, 0, 1, 1),):
        columns, rows = -(-(width - x) // across), -(-(height - y) // down)
        if columns > 0 and rows > 0:
            total += rows * (1 + -(-columns * _CHANNELS[colour] * depth // 8))
    return total
