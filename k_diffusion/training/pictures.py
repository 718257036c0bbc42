"""Pictures in files, decoded when they are asked for; broken ones are named and passed over."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from k_diffusion.training.dataset import Batch, DataError, Source
from k_diffusion.utils.augmentation import crop_start, uniforms
from k_diffusion.utils.maths import unknown

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


class Pictures(Source):
    """Picture files, wherever they lie; abstract. To add a place: give `_content`, and call
    `_settle` with the files' paths.

    A class is a folder directly inside the place; its index is its place among their sorted names.
    A file that the scan finds broken is left out; one that only its decoding finds broken is
    replaced, wherever it stands in the stream, by the next good one. Both are named in `bad_files`.

    Args:
        where: the place, for messages.
        size: height and width in pixels (one number: a square). The image is scaled until it
            covers them, then cropped.
        channels: 1 (grey), 3 (RGB; transparent parts become white) or 4 (RGB and alpha).
        crop: "center" or "random".
        flip: mirror half of the images left to right.
        classes: "auto" (class folders where there are folders with images), "folders" or "none".
        max_pixels: larger files count as broken, unread: they may be made to fill the memory.

    Raises:
        DataError: an argument out of its range.
    """

    def __init__(
        self,
        where: str,
        size: int | tuple[int, int],
        channels: int = 3,
        crop: str = "center",
        flip: bool = False,
        classes: str = "auto",
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        super().__init__()
        self.where = where
        self.size = (size, size) if isinstance(size, int) else size
        for name, value, known in (
            ("channels", channels, tuple(MODES)),
            ("crop", crop, ("center", "random")),
            ("classes", classes, ("auto", "folders", "none")),
        ):
            if value not in known:
                raise DataError(unknown(name, value, map(str, known)))
        self.channels, self.crop, self.flip, self.max_pixels = channels, crop, flip, max_pixels
        self.classes = classes
        self.shape = (channels, *self.size)
        self.augments = flip or crop == "random"
        self.files: list[PurePath] = []
        self._found: Sequence[PurePath] = ()  # with the broken ones
        self._kept: list[int] = []  # which of them are in `files`
        self.labels: list[int] = []

    def _settle(self, files: Sequence[PurePath], paths: Sequence[tuple[str, ...]]) -> None:
        """Takes the files that can be read, and their classes.

        Args:
            files: what to call each.
            paths: of each inside the place, by its parts.

        Raises:
            DataError: no good image, or no way to tell the classes.
        """
        self._found = files
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            wrong = list(pool.map(self._quick_look, range(len(files))))
        self.bad_files = {str(f): reason for f, reason in zip(files, wrong, strict=True) if reason}
        self._kept = [i for i, reason in enumerate(wrong) if not reason]
        self.files = [files[i] for i in self._kept]
        if not self.files:
            what = f"only broken images ({_first(self.bad_files)})" if files else "no images"
            raise DataError(f"{self.where} holds {what}; give one with {', '.join(SUFFIXES)} files")
        self.class_names = _class_names(self.where, paths, self.classes)
        index = {name: i for i, name in enumerate(self.class_names)}
        self.labels = [index.get(paths[i][0], 0) for i in self._kept]

    def __len__(self) -> int:
        return len(self.files)

    def batch(self, indices: Tensor, seeds: Sequence[int] | None = None) -> Batch:
        import numpy as np

        # All into one array, in Pillow's order of axes: a tensor an image would cost as much as to
        # decode a small one.
        images = np.empty((len(indices), *self.size, self.channels), np.uint8)
        draws = None if seeds is None else uniforms(seeds, len(seeds), 3).tolist()
        labels, used, bad = [], [], dict[int, str]()
        for place, first in enumerate(indices.tolist()):
            for index in self._from(first):
                try:
                    images[place] = self._image(index, None if draws is None else draws[place])
                except Exception as error:  # a decoder may raise anything on a broken file
                    bad[index] = _reason(error)
                    continue
                labels.append(self.labels[index])
                used.append(index)
                break
            else:
                raise DataError(
                    f"{self.where}: none of its {len(self)} images can be decoded "
                    f"({self.name(0)}: {bad[0]})"
                )
        return Batch(
            torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(),
            torch.tensor(labels),
            torch.tensor(used),
            tuple(bad.items()),
        )

    def name(self, index: int) -> str:
        """The file's path."""
        return str(self.files[index])

    def report(self, bad: Sequence[tuple[int, str]]) -> None:
        for index, reason in bad:
            self.bad_files.setdefault(self.name(index), reason)

    def _content(self, file: int) -> Path | io.BytesIO:
        """What Pillow opens for a file, by its number among those found; abstract."""
        raise NotImplementedError

    def _from(self, first: int) -> Iterator[int]:
        return ((first + i) % len(self) for i in range(len(self)))

    def _quick_look(self, file: int) -> str:
        """What the header or, for PNG, the checksums say is wrong; "" where nothing is."""
        try:
            with _open(self._content(file), self.max_pixels) as picture:
                picture.verify()
        except Exception as error:
            return _reason(error)
        return ""

    def _image(self, index: int, draws: Sequence[float] | None) -> Any:
        """One image, an array of uint8 (H, W, C) that is not to be written to; `draws` are numbers
        in [0, 1) for top, left and flip."""
        top, left, mirror = draws if draws is not None else (None, None, 1.0)
        if self.crop == "center":
            top = left = None
        file = self._content(self._kept[index])
        image = read_image(file, self.size, self.channels, (top, left), self.max_pixels)
        return image[:, ::-1] if self.flip and mirror < 0.5 else image


def read_image(
    file: Path | io.BytesIO,
    size: tuple[int, int],
    channels: int,
    place: tuple[float | None, float | None] = (None, None),
    max_pixels: int = MAX_PIXELS,
) -> Any:
    """One image file, scaled until it covers a size, then cropped.

    Args:
        file: of one of `FORMATS`, or its content.
        size: height and width.
        channels: 1 (grey), 3 (RGB; transparent parts become white) or 4 (RGB and alpha).
        place: where the crop begins, top and left, from 0 to 1; None: in the middle.
        max_pixels: larger files are refused, unread.

    Returns:
        An array of uint8, shape (height, width, channels), that is not to be written to.
    """
    import numpy as np
    from PIL import Image, ImageOps

    # Pillow copies in each step that has nothing to do: these are passed over.
    with _open(file, max_pixels) as opened:
        ImageOps.exif_transpose(opened, in_place=True)
        picture = _in_mode(opened, channels)
    height, width = size
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
    return np.asarray(picture).reshape(height, width, channels)


def _open(file: Path | io.BytesIO, max_pixels: int) -> Image:
    from PIL import Image

    # Only these decoders: Pillow has others, which start programs or follow links.
    picture = Image.open(file, formats=FORMATS)
    if picture.width * picture.height > max_pixels:
        picture.close()
        raise DataError(
            f"{picture.width} x {picture.height} pixels are more than max_pixels {max_pixels}"
        )
    return picture


def _start(slack: int, draw: float | None) -> int:
    return slack // 2 if draw is None else crop_start(slack, draw)


def _class_names(where: str, paths: Sequence[tuple[str, ...]], classes: str) -> tuple[str, ...]:
    if classes == "none":
        return ()
    names = tuple(sorted({parts[0] for parts in paths if len(parts) > 1}))
    loose = [parts[0] for parts in paths if len(parts) == 1]
    if classes == "folders" and not names:
        raise DataError(f"{where} holds no class folders: put each class into one")
    if names and loose:
        raise DataError(
            f"{where} holds class folders ({names[0]}...) and loose images "
            f"({loose[0]}...): move these, or set classes to 'none' to take all as one class"
        )
    return names


def _in_mode(picture: Image, channels: int) -> Image:
    """The picture in 1, 3 or 4 channels of 8 bits; what is transparent becomes white."""
    from PIL import Image

    if picture.mode in ("I", "I;16", "I;16B", "I;16L", "I;16N"):  # 16-bit grey
        picture = picture.convert("I").point(lambda value: value * (1 / 257)).convert("L")
    if picture.has_transparency_data or picture.mode == "P":
        picture = picture.convert("RGBA")
        if channels != 4:
            paper = Image.new("RGBA", picture.size, (255, 255, 255, 255))
            picture = Image.alpha_composite(paper, picture)
    return picture if picture.mode == MODES[channels] else picture.convert(MODES[channels])


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _first(bad_files: dict[str, str]) -> str:
    file, reason = next(iter(bad_files.items()))
    return f"{file}: {reason}"
