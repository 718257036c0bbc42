"""Pictures that are black at their end are whole; those whose rows are missing are not."""

from __future__ import annotations

import io
import struct
import zlib
from contextlib import nullcontext

import pytest
from PIL import Image

from k_diffusion.training.dataset import DataError
from k_diffusion.training.png_rows import _pixel_bytes, _wanted, check_rows

from .unusual_pictures import chunk


@pytest.mark.parametrize("size", [(1, 1), (7, 3), (33, 40)])
@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA", "I;16"])
def test_black_pictures_are_whole(mode, size, tmp_path):
    path = tmp_path / "black.png"
    Image.new(mode, size).save(path)
    content = io.BytesIO(path.read_bytes())
    found, wanted = _pixel_bytes(content)
    assert found == wanted > 0
    for file in (path, content):
        with Image.open(file) as picture:
            picture.load()
            check_rows(picture, file)


def test_interlaced_rows_are_counted_pass_by_pass():
    # 8 x 8 grey: passes of 1x1, 1x1, 2x1, 2x2, 4x2, 4x4 and 8x4 pixels, a byte more each row
    assert _wanted(8, 8, 8, 0, 1) == 2 + 2 + 3 + 2 * 3 + 2 * 5 + 4 * 5 + 4 * 9
    assert _wanted(1, 1, 8, 2, 1) == 1 + 3  # the other passes have no pixel
    assert _wanted(9, 2, 1, 3, 0) == 2 * (1 + 2)


@pytest.mark.parametrize("interlaced", [0, 1])
@pytest.mark.parametrize("parts", [1, 3])
def test_the_stream_is_counted_over_its_chunks(interlaced, parts):
    header = struct.pack(">IIBBBBB", 8, 8, 8, 0, 0, 0, interlaced)
    wanted = _wanted(8, 8, 8, 0, interlaced)
    for missing in (0, 1, 9, 27):  # a whole row has 9 bytes in both
        packed = zlib.compress(b"\0" * (wanted - missing))
        size = -(-len(packed) // parts)
        data = b"".join(chunk(b"IDAT", packed[k : k + size]) for k in range(0, len(packed), size))
        file = io.BytesIO(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"tEXt", b"a\0b")
                          + data + chunk(b"IEND", b""))  # fmt: skip
        assert _pixel_bytes(file) == (wanted - missing, wanted)
        # Pillow itself sees parts of rows, and some streams in several chunks; nobody lets one by.
        own = missing and (missing % 9 or parts > 1)
        said = "truncated|end early" if own else f"end early, after {wanted - missing} of {wanted}"
        with Image.open(file) as picture:
            refused = pytest.raises((OSError, DataError), match=said) if missing else nullcontext()
            with refused:
                picture.load()
                check_rows(picture, file)
