"""From a picture file to pixels: colours, depth, orientation, scale and crop."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from k_diffusion.training.dataset import DataError
from k_diffusion.training.png_rows import check_rows
from k_diffusion.utils.augmentation import crop_start

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".webp": "WEBP",
    ".bmp": "BMP",
    ".gif": "GIF",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".ppm": "PPM",
    ".pgm": "PPM",
}
FORMATS = sorted(set(SUFFIXES.values()))
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
MAX_PIXELS = 89_478_485
MAX_16_BIT = 65_535


def read_image(
    file: str | Path | io.BytesIO,
    size: tuple[int, int],
    channels: int,
    place: tuple[float | None, float | None] = (None, None),
    max_pixels: int = MAX_PIXELS,
    bits: int = 8,
) -> Any:
    """One image file, scaled until it covers a size, then cropped; of an animation the first frame.

    Args:
        file: of one of `FORMATS`, or its content.
        size: height and width.
        channels: 1 (grey), 3 (RGB; transparent parts become white) or 4 (RGB and alpha).
        place: where the crop begins, top and left, from 0 to 1; None: in the middle.
        max_pixels: larger files are refused, unread.
        bits: 8, or 16: what a file has beyond 8 bits is kept, others are spread over the 16.

    Returns:
        An array of uint8 or uint16, shape (height, width, channels), not to be written to.

    Raises:
        DataError: it is too large, or its pixels have no known black and white.
        Exception: a decoder may raise anything on a broken file.
    """
    import numpy as np

    if bits == 16:
        planes = [_cut(p, size, place) for p in _planes(file, channels, max_pixels)]
        image = np.stack([np.asarray(plane) for plane in planes], -1)
        return image.round().clip(0, MAX_16_BIT).astype(np.uint16)
    # Pillow copies in each step that has nothing to do: these are passed over.
    with open_picture(file, max_pixels) as opened:
        _turn_upright(opened, file)
        picture = _in_mode(opened, channels)
    return np.asarray(_cut(picture, size, place)).reshape(*size, channels)


def open_picture(file: str | Path | io.BytesIO, max_pixels: int) -> Image:
    """A picture of which only the header is read.

    Raises:
        DataError: it is of none of `FORMATS`, or has more pixels than `max_pixels`.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        # Only these decoders: Pillow has others, which start programs or follow links.
        picture = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:  # whose message has an address in memory, another each time
        raise DataError(f"cannot identify it as any of {', '.join(FORMATS)}") from None
    if picture.width * picture.height > max_pixels:
        picture.close()
        raise DataError(
            f"{picture.width} x {picture.height} pixels are more than max_pixels {max_pixels}"
        )
    return picture


_WIDTH, _HEIGHT, _ORIENTATION = 0x0100, 0x0101, 0x0112
_TELLING = {"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"}
"""Where files may say how to turn them; a TIFF is turned by Pillow itself."""


def _turn_upright(picture: Image, file: str | Path | io.BytesIO) -> None:
    """Decode a picture, and turn it as its EXIF says."""
    picture.load()  # behind a PNG's pixels there may be EXIF, too
    check_rows(picture, file)
    if not _TELLING.isdisjoint(picture.info):
        from PIL import ImageOps

        ImageOps.exif_transpose(picture, in_place=True)


def upright_size(picture: Image) -> tuple[int, int]:
    """Height and width once it is turned as the EXIF before its pixels says."""
    from PIL import Image

    # A PNG's own method decodes the picture, to see whether there is any EXIF behind its pixels.
    turned = Image.Image.getexif(picture).get(_ORIENTATION) in (5, 6, 7, 8)
    width, height = picture.size
    if picture.format == "TIFF":  # of which the size is upright already, in some of its versions
        tags: Any = picture
        width, height = tags.tag_v2[_WIDTH], tags.tag_v2[_HEIGHT]
    return (width, height) if turned else (height, width)


def _cut(picture: Image, size: tuple[int, int], place: tuple[float | None, float | None]) -> Image:
    """Scaled until it covers the size, and cropped to it."""
    from PIL import Image

    height, width = size
    if picture.size == (width, height):
        return picture
    scale = max(height / picture.height, width / picture.width)
    covering = (
        max(width, round(picture.width * scale)),
        max(height, round(picture.height * scale)),
    )
    if covering != picture.size:
        picture = picture.resize(covering, Image.Resampling.BICUBIC)
    y = _start(picture.height - height, place[0])
    x = _start(picture.width - width, place[1])
    if picture.size != (width, height):
        picture = picture.crop((x, y, x + width, y + height))
    return picture


def _start(slack: int, draw: float | None) -> int:
    return slack // 2 if draw is None else crop_start(slack, draw)


# ---------------------------------------------------------------- 8 bits

_DEEP = ("I", "I;16", "I;16B", "I;16L", "I;16N")


def _in_mode(picture: Image, channels: int) -> Image:
    """The picture in 1, 3 or 4 channels of 8 bits; what is transparent becomes white."""
    if picture.mode == MODES[channels] != "RGBA" and "transparency" not in picture.info:
        return picture
    import numpy as np
    from PIL import Image

    if picture.mode in _DEEP:  # which Pillow would clip at 255
        values = _deep_grey(picture)
        picture = Image.fromarray(((values * 255 + 32767) // MAX_16_BIT).astype(np.uint8))
    _refuse_unknown(picture)
    if picture.has_transparency_data or picture.mode == "P":
        picture = picture.convert("RGBA")
        if channels != 4:
            paper = Image.new("RGBA", picture.size, (255, 255, 255, 255))
            picture = Image.alpha_composite(paper, picture)
    return picture if picture.mode == MODES[channels] else picture.convert(MODES[channels])


def _deep_grey(picture: Image) -> Any:
    """Grey of 16 bits as an array of int64 (H, W)."""
    import numpy as np

    values = np.asarray(picture).astype(np.int64)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > MAX_16_BIT:
        raise DataError(f"grey values from {low} to {high} have no known white: give 8 or 16 bits")
    return values


_COLOURS = ("1", "L", "LA", "P", "PA", "RGB", "RGBX", "RGBA", "RGBa", "CMYK", "YCbCr")


def _refuse_unknown(picture: Image) -> None:
    if picture.mode == "F":
        raise DataError(
            "its pixels are floating-point numbers, of which no black and white are known: give 8 "
            "or 16 bits, or an array"
        )
    if picture.mode not in _COLOURS:
        raise DataError(f"its colours are in {picture.mode}: give grey, RGB or CMYK")


# ---------------------------------------------------------------- 16 bits

_GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601, which Pillow's grey is of, too


def _planes(file: str | Path | io.BytesIO, channels: int, max_pixels: int) -> list[Image]:
    """The channels one by one, upright, in Pillow's floats from 0 to 65535."""
    import numpy as np
    from PIL import Image

    values, orientation = _deep(file, max_pixels)
    values = values.astype(np.float32)
    if channels != 4 and values.shape[2] in (2, 4):
        alpha = values[..., -1:] / MAX_16_BIT
        values = values[..., :-1] * alpha + MAX_16_BIT * (1 - alpha)
    if channels == 4 and values.shape[2] in (1, 3):
        opaque = np.full_like(values[..., :1], MAX_16_BIT)
        values = np.concatenate([values, opaque], -1)
    grey = values.shape[2] < 3
    if channels == 1 and not grey:
        values = (values * np.array(_GREY, np.float32)).sum(-1, keepdims=True)
    elif channels > 1 and grey:
        values = np.concatenate([values[..., :1]] * 3 + [values[..., 1:]], -1)
    turn = _TURNS.get(orientation)
    planes = [Image.fromarray(np.ascontiguousarray(values[..., c])) for c in range(channels)]
    return planes if turn is None else [p.transpose(Image.Transpose[turn]) for p in planes]


_TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}


def _deep(file: str | Path | io.BytesIO, max_pixels: int) -> tuple[Any, int]:
    """An array of 16-bit values (H, W, 1, 2, 3 or 4), and what EXIF says of its orientation."""
    import numpy as np

    with open_picture(file, max_pixels) as picture:
        stored = _rawmode(picture)
        if stored == "LA;16B":
            # Pillow has no such mode; these four bytes a pixel are high and low byte of both.
            _set_rawmode(picture, "RGBA")
            picture.load()
            check_rows(picture, file)
            bands = [np.asarray(band) for band in picture.split()]
            both = np.stack([_together(*bands[:2]), _together(*bands[2:])], -1)
            return both, picture.getexif().get(_ORIENTATION, 1)
        picture.load()
        check_rows(picture, file)
        orientation = picture.getexif().get(_ORIENTATION, 1)
        transparent = picture.info.get("transparency")
        if picture.mode in _DEEP:
            return _keyed(_deep_grey(picture)[..., None], transparent), orientation
        other = _LOW.get(stored)
        if other is None:
            values = np.asarray(_shallow(picture)).astype(np.uint16) * 257
            return values.reshape(*values.shape[:2], -1), orientation
        high = np.asarray(picture).astype(np.uint16)
    # Pillow keeps the high byte of each value. Read once more, as if the bytes of each pair stood
    # in the other order, the high byte is the low one.
    with open_picture(file, max_pixels) as picture:
        _set_rawmode(picture, other)
        picture.load()
        return _keyed(_together(high, np.asarray(picture)), transparent), orientation


def _keyed(values: Any, transparent: Any) -> Any:
    """With an alpha channel, where one colour stands for what is transparent."""
    import numpy as np

    if transparent is None or values.shape[2] not in (1, 3):
        return values
    seen = (values != np.array(transparent)).any(-1, keepdims=True)
    return np.concatenate([values, seen.astype(values.dtype) * MAX_16_BIT], -1)


_NATIVE = {"little": "16B", "big": "16L"}[sys.byteorder]
_LOW = {
    f"{mode};{order}": f"{mode};{swapped}"
    for mode in ("RGB", "RGBA")
    for order, swapped in (("16B", "16L"), ("16L", "16B"), ("16N", _NATIVE))
}
"""How pixels of 16 bits are stored -> how they would be in the other order of bytes."""


def _together(high: Any, low: Any) -> Any:
    return high.astype("uint16") * 256 + low


def _shallow(picture: Image) -> Image:
    """Of 8 bits, in one of the modes with 1, 3 or 4 channels."""
    _refuse_unknown(picture)
    if picture.has_transparency_data or picture.mode == "P":
        return picture.convert("RGBA")
    if picture.mode in MODES.values():
        return picture
    return picture.convert("L" if picture.mode == "1" else "RGB")


def _rawmode(picture: Any) -> str:
    """How the file stores its pixels, as Pillow calls it; "" where that is not simple."""
    if len(picture.tile) != 1:
        return ""
    arguments = picture.tile[0][3]
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return first if isinstance(first, str) else ""


def _set_rawmode(picture: Any, rawmode: str) -> None:
    codec, box, offset, arguments = picture.tile[0]
    changed = (rawmode, *arguments[1:]) if isinstance(arguments, tuple) else rawmode
    kind = type(picture.tile[0])
    parts = (codec, box, offset, changed)
    picture.tile = [kind(*parts) if kind is not tuple else parts]
