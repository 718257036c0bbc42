"""Images as tensors, as PNG files that carry text, and as labelled grids.

A float image holds values in [-1, 1], a uint8 image 0 to 255; both have shape (channels, height,
width) with 1 (grey), 2 (grey, alpha), 3 (RGB) or 4 (RGB, alpha) channels. Pillow is imported when
a function that needs it is called.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from k_diffusion.utils.files import write_whole

if TYPE_CHECKING:
    from PIL.Image import Image

_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
_PAPER, _INK = 255, 0  # background and text of a grid


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Round float images to the nearest of 256 values; what lies outside [-1, 1] is clipped.

    Args:
        images: floating point, any shape; a uint8 tensor is given back as it is.

    Raises:
        ValueError: a value is not finite (there is no honest pixel for it).
        TypeError: neither floating point nor uint8.
    """
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        raise TypeError(f"an image has dtype {images.dtype}; give floats in [-1, 1] or uint8")
    bad = int((~torch.isfinite(images)).sum())
    if bad:
        raise ValueError(
            f"images hold {bad} of {images.numel()} values that are not finite (nan or inf); "
            "look at the model or the sampler that made them"
        )
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def to_float(images: torch.Tensor) -> torch.Tensor:
    """Map 0..255 to [-1, 1], float32: the inverse of `to_uint8` on what it gives."""
    return images.float() / 127.5 - 1


def clear_unfinished(folder: Path, names: Collection[str]) -> None:
    """Remove what killed processes left of files of these names that they were writing."""
    for name in [entry.name for entry in os.scandir(folder)]:  # one listing, for many names
        if name.endswith(".tmp") and name[1:-4].rpartition(".")[0] in names:
            (folder / name).unlink(missing_ok=True)


def save_png(path: Path | str, image: torch.Tensor, text: Mapping[str, object] = {}) -> None:
    """Write one image, lossless, with `text` in the file; never leaves half a file.

    Args:
        path: the file to write; an existing one is replaced in one go. Its folder must exist.
        image: float in [-1, 1] or uint8, shape (channels, height, width).
        text: keyword -> value, written as PNG text (keywords of 1 to 79 characters).
    """
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, value in text.items():
        if not 1 <= len(key) <= 79:
            raise ValueError(f"PNG text keyword {key!r} has {len(key)} characters; 1 to 79 fit")
        info.add_text(key, str(value))
    picture = _picture(to_uint8(image))
    write_whole(Path(path), lambda name: picture.save(name, format="PNG", pnginfo=info))


def load_png(path: Path | str) -> tuple[torch.Tensor, dict[str, str]]:
    """Read what `save_png` wrote: the uint8 image (channels, height, width) and its text."""
    from PIL import Image

    with Image.open(path) as picture:
        picture.load()
        if picture.mode not in _MODES.values():
            raise ValueError(f"{path} has pixel mode {picture.mode}; one of L, LA, RGB, RGBA fits")
        text = {
            str(key): str(value) for key, value in picture.info.items() if isinstance(value, str)
        }
        return _tensor(picture), text


def image_grid(
    images: torch.Tensor,
    columns: int = 0,
    *,
    rows_named: Sequence[object] = (),
    columns_named: Sequence[object] = (),
    title: str = "",
    gap: int = 2,
    scale: int = 1,
) -> torch.Tensor:
    """Lay images out in reading order on white paper, with names beside rows and over columns.

    Args:
        images: float in [-1, 1] or uint8, shape (count, channels, height, width).
        columns: images a row; 0 takes as many as there are column names, or a square.
        rows_named: one name a row, or none.
        columns_named: one name a column, or none.
        title: a line above all; none where it is empty.
        gap: pixels around each image.
        scale: each pixel becomes a square of this many pixels.

    Returns:
        A uint8 image (channels, height, width); grey images with names stay grey.
    """
    if images.ndim != 4 or not len(images):
        raise ValueError(
            f"images have shape {tuple(images.shape)}; a grid takes (count, channels, height, "
            "width) with at least one image"
        )
    count = len(images)
    columns = columns or len(columns_named) or _ceil_root(count)
    rows = -(-count // columns)
    for name, names, wanted in (
        ("rows_named", rows_named, rows),
        ("columns_named", columns_named, columns),
    ):
        if names and len(names) != wanted:
            raise ValueError(f"{name} has {len(names)} names; the grid has {wanted}")
    pixels = to_uint8(images).cpu()
    pixels = pixels.repeat_interleave(scale, -2).repeat_interleave(scale, -1)
    channels, height, width = pixels.shape[1:]
    left = [_word(str(name)) for name in rows_named]
    top = [_word(str(name)) for name in columns_named]
    over = [_word(title)] if title else []
    # Cells widen for the widest column name, and grow no lower than a row name.
    cell_h = max([height, *(word.shape[0] for word in left)]) + gap
    cell_w = max([width, *(word.shape[1] for word in top)]) + gap
    x0 = max((word.shape[1] + 2 * gap for word in left), default=0)
    head = sum(word.shape[0] + gap for word in over)
    y0 = head + max((word.shape[0] + gap for word in top), default=0)
    wide = max([x0 + columns * cell_w, *(word.shape[1] + gap for word in over)]) + gap
    paper = torch.full((channels, y0 + rows * cell_h + gap, wide), _PAPER)
    paper = paper.to(torch.uint8)
    for index in range(count):
        y = y0 + index // columns * cell_h + gap + (cell_h - gap - height) // 2
        x = x0 + index % columns * cell_w + gap + (cell_w - gap - width) // 2
        paper[:, y : y + height, x : x + width] = pixels[index]
    colours = slice(0, channels - 1) if channels in (2, 4) else slice(0, channels)
    for row, word in enumerate(left):
        y = y0 + row * cell_h + gap + (cell_h - gap - word.shape[0]) // 2
        paper[colours, y : y + word.shape[0], gap : gap + word.shape[1]] = word
    for column, word in enumerate(top):
        x = x0 + column * cell_w + gap + (cell_w - gap - word.shape[1]) // 2
        paper[colours, head + gap : head + gap + word.shape[0], x : x + word.shape[1]] = word
    for word in over:
        paper[colours, gap : gap + word.shape[0], gap : gap + word.shape[1]] = word
    return paper


def _ceil_root(count: int) -> int:
    side = 1
    while side * side < count:
        side += 1
    return side


def _picture(image: torch.Tensor) -> Image:
    from PIL import Image

    if image.ndim != 3 or image.shape[0] not in _MODES:
        raise ValueError(
            f"an image has shape {tuple(image.shape)}; a PNG takes (channels, height, width) with "
            "1 to 4 channels"
        )
    channels = image.shape[0]
    array = image.detach().permute(1, 2, 0).contiguous().cpu().numpy()
    return Image.fromarray(array[..., 0] if channels == 1 else array)


def _tensor(picture: Image) -> torch.Tensor:
    raw = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return raw.view(picture.height, picture.width, len(picture.getbands())).permute(2, 0, 1).clone()


def _word(text: str) -> torch.Tensor:
    """Dark letters on white paper: uint8 of shape (height, width)."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default()
    left, top, right, bottom = (round(edge) for edge in font.getbbox(text or " "))
    picture = Image.new("L", (max(1, right - left + 1), max(1, bottom - top + 1)), _PAPER)
    ImageDraw.Draw(picture).text((-left, -top), text, fill=_INK, font=font)
    return _tensor(picture)[0]
