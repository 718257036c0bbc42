"""Sixty unusual pictures, made in code, for test_unusual and test_sixteen_bits.

`READ` has what the picture shows at some of its pixels, as a folder of 3
channels gives them; `SKIPPED` a word of the reason.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageOps

SIDE = 8
RED, WHITE, BLACK = (255, 0, 0), (255, 255, 255), (0, 0, 0)
Pixels = Any

READ: dict[str, Callable[[], tuple[bytes, Pixels]]] = {}
SKIPPED: dict[str, tuple[Callable[[], bytes], str]] = {}


def stripes() -> np.ndarray:
    """(H, W, 3): another colour in every pixel; no flip or turn of it is like it."""
    y, x = np.mgrid[:SIDE, :SIDE]
    return np.stack([30 * y, 30 * x, 255 - 15 * (x + y)], -1).astype(np.uint8)


def grey() -> np.ndarray:
    return stripes()[..., 2]


def encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def picture(mode: str = "RGB") -> Image.Image:
    return Image.fromarray(stripes()).convert(mode)


def three(values: np.ndarray) -> np.ndarray:
    return np.stack([values] * 3, -1)


def chunk(kind: bytes, data: bytes) -> bytes:
    body = kind + data
    return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))


def png(
    values: np.ndarray, width: int = 0, height: int = 0, extra: bytes = b"", rows_kept: int = 0
) -> bytes:
    """(H, W, C) of 8 or 16 bits, each row filtered by its differences to the left; of which the
    first few are kept, under checksums that hold."""
    rows = values.astype(values.dtype.newbyteorder(">"))
    step = rows.itemsize * rows.shape[2]
    lines = []
    for row in rows:
        plain = np.frombuffer(row.tobytes(), np.uint8).astype(int)
        left = np.concatenate([np.zeros(step, int), plain[:-step]])
        lines.append(b"\1" + ((plain - left) % 256).astype(np.uint8).tobytes())
    lines = lines[: rows_kept or None]
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[rows.shape[2]]
    size = width or rows.shape[1], height or rows.shape[0]
    header = struct.pack(">IIBBBBB", *size, 8 * rows.itemsize, kind, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + extra
        + chunk(b"IDAT", zlib.compress(b"".join(lines)))
        + chunk(b"IEND", b"")
    )


def tiff16(values: np.ndarray, order: str = "<", compressed: bool = False) -> bytes:
    """(H, W, C) of 16 bits as TIFF, in one strip."""
    height, width, channels = values.shape
    pixels = values.astype(f"{order}u2").tobytes()
    pixels = zlib.compress(pixels) if compressed else pixels
    bits_at = 8 + 2 + 12 * 9 + 4
    data_at = bits_at + 2 * channels
    bits = struct.pack(f"{order}{channels}H", *[16] * channels)
    entries = [
        (256, 4, 1, width), (257, 4, 1, height),
        (258, 3, channels, bits_at if channels > 2 else 16), (259, 3, 1, 8 if compressed else 1),
        (262, 3, 1, 2 if channels > 2 else 1), (273, 4, 1, data_at), (277, 3, 1, channels),
        (278, 4, 1, height), (279, 4, 1, len(pixels)),
    ]  # fmt: skip
    fields = b""
    for tag, kind, count, value in entries:
        packed = struct.pack(f"{order}H2x" if kind == 3 and count == 1 else f"{order}I", value)
        fields += struct.pack(f"{order}HHI", tag, kind, count) + packed
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8)
    return head + struct.pack(f"{order}H", len(entries)) + fields + b"\0" * 4 + bits + pixels


def deep(channels: int) -> np.ndarray:
    """16 bits whose low bytes are not their high ones."""
    return np.random.default_rng(channels).integers(0, 65536, (SIDE, SIDE, channels), np.uint16)


def read(name: str) -> Callable[[Any], Any]:
    return lambda function: READ.setdefault(name, function)


# ------------------------------------------------------------ colours and depths

for _mode, _wanted in {
    "RGB": stripes(),
    "L": three(grey()),
    "1": three(np.where(grey() > 127, 255, 0)),
}.items():
    _image = Image.fromarray(_wanted.astype(np.uint8)).convert(_mode, dither=None)
    for _suffix, _kind in {"png": "PNG", "bmp": "BMP", "tif": "TIFF"}.items():
        READ[f"mode-{_mode}.{_suffix}"] = lambda i=_image, k=_kind, w=_wanted: (encoded(i, k), w)
READ["lossless.webp"] = lambda: (encoded(picture(), "WEBP", lossless=True), stripes())
READ["colour.ppm"] = lambda: (encoded(picture(), "PPM"), stripes())
READ["grey.pgm"] = lambda: (encoded(Image.fromarray(grey()), "PPM"), three(grey()))
READ["16-bit-grey.png"] = lambda: (png(deep(1)), three(np.round(deep(1)[..., 0] / 257)))
READ["16-bit-grey.tif"] = lambda: (tiff16(deep(1)), three(np.round(deep(1)[..., 0] / 257)))
READ["16-bit-grey.pgm"] = lambda: (
    b"P5 8 8 65535\n" + deep(1).astype(">u2").tobytes(),
    three(np.round(deep(1)[..., 0] / 257)),
)
READ["16-bit-colour.png"] = lambda: (png(deep(3)), deep(3) // 256)
READ["16-bit-colour.tif"] = lambda: (tiff16(deep(3)), deep(3) // 256)
READ["16-bit-motorola.tif"] = lambda: (tiff16(deep(3), ">"), deep(3) // 256)


@read("palette.png")
def _() -> tuple[bytes, Pixels]:
    image = picture().quantize(16)
    return encoded(image, "PNG"), np.asarray(image.convert("RGB"))


@read("palette-with-transparency.png")
def _() -> tuple[bytes, Pixels]:
    image = Image.new("P", (SIDE, SIDE), 1)
    image.putpalette([255, 0, 0, 10, 20, 30])
    image.putpixel((0, 0), 0)
    wanted = np.full((SIDE, SIDE, 3), (10, 20, 30))
    wanted[0, 0] = WHITE
    return encoded(image, "PNG", transparency=0), wanted


@read("grey-with-a-transparent-value.png")
def _() -> tuple[bytes, Pixels]:
    image = Image.new("L", (SIDE, SIDE), 90)
    image.putpixel((3, 0), 50)
    wanted = np.full((SIDE, SIDE, 3), 90)
    wanted[0, 3] = WHITE
    return encoded(image, "PNG", transparency=50), wanted


@read("colour-with-a-transparent-one.png")
def _() -> tuple[bytes, Pixels]:
    image = Image.new("RGB", (SIDE, SIDE), (90, 5, 6))
    image.putpixel((3, 0), (50, 60, 70))
    wanted = np.full((SIDE, SIDE, 3), (90, 5, 6))
    wanted[0, 3] = WHITE
    return encoded(image, "PNG", transparency=(50, 60, 70)), wanted


@read("half-transparent.png")
def _() -> tuple[bytes, Pixels]:
    image = Image.new("RGBA", (SIDE, SIDE), (255, 0, 0, 51))
    return encoded(image, "PNG"), np.full((SIDE, SIDE, 3), (255, 204, 204))


@read("grey-and-alpha.png")
def _() -> tuple[bytes, Pixels]:
    return encoded(Image.new("LA", (SIDE, SIDE), (7, 0)), "PNG"), np.full((SIDE, SIDE, 3), 255)


@read("half-transparent.webp")
def _() -> tuple[bytes, Pixels]:
    image = Image.new("RGBA", (SIDE, SIDE), (255, 0, 0, 51))
    return encoded(image, "WEBP", lossless=True), np.full((SIDE, SIDE, 3), (255, 204, 204))


def _flat(mode: str, colour: Any, wanted: Sequence[int], kind: str, name: str) -> None:
    content = encoded(Image.new(mode, (SIDE, SIDE), colour), kind)
    READ[name] = lambda: (content, np.full((SIDE, SIDE, 3), wanted))


# Ink is the absence of light; JPEG of one colour is exact to 2.
_flat("CMYK", (0, 255, 255, 0), RED, "JPEG", "cmyk.jpg")
_flat("CMYK", (0, 255, 255, 0), RED, "TIFF", "cmyk.tif")
_flat("CMYK", (0, 0, 0, 255), BLACK, "TIFF", "black-ink.tif")
_flat("RGB", (200, 40, 90), (200, 40, 90), "JPEG", "plain.jpg")
_flat("L", 77, (77, 77, 77), "JPEG", "grey.jpg")
_flat("YCbCr", (76, 85, 255), (254, 0, 0), "TIFF", "ycbcr.tif")
READ["progressive.jpg"] = lambda: (
    encoded(Image.new("RGB", (64, 64), RED), "JPEG", progressive=True, subsampling=0),
    np.full((SIDE, SIDE, 3), (254, 0, 0)),
)

# ------------------------------------------------------------ orientation

_UPRIGHT = {2: 2, 3: 3, 4: 4, 5: 5, 6: 8, 7: 7, 8: 6}  # the turn that undoes each
for _orientation, _undo in _UPRIGHT.items():

    def _turned(orientation: int = _orientation, undo: int = _undo) -> tuple[bytes, Pixels]:
        image, exif = picture(), Image.Exif()
        exif[0x0112] = undo
        image.info["exif"] = exif.tobytes()
        stored = ImageOps.exif_transpose(image)
        stored.info.clear()
        exif[0x0112] = orientation
        return encoded(stored, "PNG", exif=exif), stripes()

    READ[f"exif-{_orientation}.png"] = _turned


@read("exif-6.jpg")
def _() -> tuple[bytes, Pixels]:
    image, exif = Image.new("RGB", (32, 32), BLACK), Image.Exif()
    image.paste(WHITE, (0, 0, 16, 32))  # left half white, which upright is above
    exif[0x0112] = 6
    wanted = np.zeros((SIDE, SIDE, 3))
    wanted[: SIDE // 2] = 255
    return encoded(image, "JPEG", exif=exif, quality=100), wanted


@read("exif-6.tif")
def _() -> tuple[bytes, Pixels]:
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = picture().transpose(Image.Transpose.ROTATE_90)
    return encoded(stored, "TIFF", exif=exif), stripes()


# ------------------------------------------------------------ animations and sizes


def _frames() -> list[Image.Image]:
    return [picture(), Image.new("RGB", (SIDE, SIDE), RED), Image.new("RGB", (SIDE, SIDE), WHITE)]


@read("animated.png")
def _() -> tuple[bytes, Pixels]:
    first, *rest = _frames()
    return encoded(first, "PNG", save_all=True, append_images=rest), stripes()


@read("animated.webp")
def _() -> tuple[bytes, Pixels]:
    first, *rest = _frames()
    return encoded(first, "WEBP", save_all=True, append_images=rest, lossless=True), stripes()


@read("animated.gif")
def _() -> tuple[bytes, Pixels]:
    first, *rest = (Image.new("RGB", (SIDE, SIDE), c) for c in ((10, 200, 30), RED, WHITE))
    content = encoded(first, "GIF", save_all=True, append_images=rest)
    return content, np.full((SIDE, SIDE, 3), (10, 200, 30))


@read("pages.tif")
def _() -> tuple[bytes, Pixels]:
    first, *rest = _frames()
    return encoded(first, "TIFF", save_all=True, append_images=rest), stripes()


@read("1x1.png")
def _() -> tuple[bytes, Pixels]:
    return encoded(Image.new("RGB", (1, 1), (1, 2, 3)), "PNG"), np.full((SIDE, SIDE, 3), (1, 2, 3))


@read("1x500.png")
def _() -> tuple[bytes, Pixels]:
    image = Image.new("RGB", (1, 500), (9, 8, 7))
    return encoded(image, "PNG"), np.full((SIDE, SIDE, 3), (9, 8, 7))


@read("a-jpeg-called.png")
def _() -> tuple[bytes, Pixels]:
    image = Image.new("RGB", (SIDE, SIDE), (100, 100, 100))
    return encoded(image, "JPEG"), np.full((SIDE, SIDE, 3), 100)


READ["junk-behind-it.png"] = lambda: (encoded(picture(), "PNG") + b"junk" * 100, stripes())
READ["UPPER.PNG"] = lambda: (encoded(picture(), "PNG"), stripes())
READ["ünï cödé 图.png"] = lambda: (encoded(picture(), "PNG"), stripes())

# ------------------------------------------------------------ what cannot be read


def noise_jpeg() -> bytes:
    noise = np.random.default_rng(0).integers(0, 255, (96, 96, 3), dtype=np.uint8)
    return encoded(Image.fromarray(noise), "JPEG")


def flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 255]) + content[at + 1 :]


def skip(name: str, reason: str, make: Callable[[], bytes]) -> None:
    SKIPPED[name] = (make, reason)


skip("empty.png", "cannot identify", lambda: b"")
skip("empty.jpg", "cannot identify", lambda: b"")
skip("text.png", "cannot identify", lambda: b"This is no picture, whatever its name says.\n")
skip("page.jpg", "cannot identify", lambda: b"<!doctype html><title>404</title>" * 9)
skip("zeros.png", "cannot identify", lambda: b"\0" * 4096)
skip("header-alone.png", "", lambda: encoded(picture(), "PNG")[:33])
skip("rows-missing.png", "its pixels end early", lambda: png(stripes(), rows_kept=SIDE // 2))
skip("rows-missing-16.png", "its pixels end early", lambda: png(deep(2), rows_kept=SIDE // 2))
skip("row-missing-16.png", "its pixels end early", lambda: png(deep(3), rows_kept=SIDE - 2))
skip("half.png", "", lambda: png(deep(3))[:200])
skip("without-its-end.jpg", "truncated", lambda: noise_jpeg()[: len(noise_jpeg()) // 2])
skip("header-alone.jpg", "", lambda: noise_jpeg()[:300])
skip("half.webp", "", lambda: encoded(Image.open(io.BytesIO(noise_jpeg())), "WEBP")[:900])
skip("half.tif", "", lambda: tiff16(deep(3))[:300])
skip("half.gif", "", lambda: encoded(picture(), "GIF")[:60])
skip("half.bmp", "truncated", lambda: encoded(picture(), "BMP")[:120])
skip("half.ppm", "", lambda: encoded(picture(), "PPM")[:100])
skip("flipped-in-the-header.png", "", lambda: flipped(encoded(picture(), "PNG"), 25))
skip("flipped-in-the-pixels.png", "", lambda: flipped(encoded(picture(), "PNG"), 50))
skip("flipped-signature.png", "cannot identify", lambda: flipped(encoded(picture(), "PNG"), 1))
skip("float.tif", "floating-point", lambda: encoded(picture("L").convert("F"), "TIFF"))
skip("32-bit.tif", "no known white", lambda: encoded(picture("L").convert("I").point(
    lambda value: value * 1000), "TIFF"))  # fmt: skip
skip("lab.tif", "in LAB", lambda: encoded(Image.new("LAB", (SIDE, SIDE)), "TIFF"))
skip("vector.png", "cannot identify", lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
skip("100-megapixels.png", "10000 x 10000 pixels are more than max_pixels", lambda: png(
    np.zeros((1, 1, 3), np.uint8), 10_000, 10_000))  # fmt: skip
skip("60000x60000.png", "exceeds limit", lambda: png(
    np.zeros((1, 1, 3), np.uint8), 60_000, 60_000))  # fmt: skip
