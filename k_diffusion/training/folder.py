"""Images in a folder, decoded when they are asked for; broken files are named and passed over."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
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


class Folder(Source):
    """The images of a folder, or of one folder a class, decoded when they are asked for.

    A class is a folder directly inside `path`; its index is its place among their sorted names.
    Files are taken in the sorted order of their names, whatever the file system says. A file that
    the scan finds broken is left out; one that only its decoding finds broken is replaced, wherever
    it stands in the stream, by the next good one. Both are named in `bad_files`.

    Args:
        path: the folder; subfolders are searched too, names with a leading dot are not.
        size: height and width in pixels (one number: a square). The image is scaled until it
            covers them, then cropped.
        channels: 1 (grey), 3 (RGB; transparent parts become white) or 4 (RGB and alpha).
        crop: "center" or "random".
        flip: mirror half of the images left to right.
        classes: "auto" (class folders where there are folders with images), "folders" or "none".
        max_pixels: larger files count as broken, unread: they may be made to fill the memory.

    Raises:
        DataError: no such folder, no good image in it, or no way to tell the classes.
    """

    def __init__(
        self,
        path: str | Path,
        size: int | tuple[int, int],
        channels: int = 3,
        crop: str = "center",
        flip: bool = False,
        classes: str = "auto",
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        super().__init__()
        self.root = Path(path)
        self.size = (size, size) if isinstance(size, int) else size
        for name, value, known in (
            ("channels", channels, tuple(MODES)),
            ("crop", crop, ("center", "random")),
            ("classes", classes, ("auto", "folders", "none")),
        ):
            if value not in known:
                raise DataError(unknown(name, value, map(str, known)))
        self.channels, self.crop, self.flip, self.max_pixels = channels, crop, flip, max_pixels
        self.shape = (channels, *self.size)
        self.augments = flip or crop == "random"
        found = _image_files(self.root)
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            wrong = list(pool.map(self._quick_look, found))
        self.bad_files = {str(f): reason for f, reason in zip(found, wrong, strict=True) if reason}
        self.files = [f for f, reason in zip(found, wrong, strict=True) if not reason]
        if not self.files:
            what = f"only broken images ({_first(self.bad_files)})" if found else "no images"
            raise DataError(
                f"data folder {self.root} holds {what}; give one with {', '.join(SUFFIXES)} files"
            )
        self.class_names = _class_names(self.root, found, classes)
        index = {name: i for i, name in enumerate(self.class_names)}
        self.labels = [index.get(f.relative_to(self.root).parts[0], 0) for f in self.files]

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
                    images[place] = self._image(
                        self.files[index], None if draws is None else draws[place]
                    )
                except Exception as error:  # a decoder may raise anything on a broken file
                    bad[index] = _reason(error)
                    continue
                labels.append(self.labels[index])
                used.append(index)
                break
            else:
                raise DataError(
                    f"data folder {self.root}: none of its {len(self.files)} images can be decoded "
                    f"({self.files[0]}: {bad[0]})"
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
            self.bad_files.setdefault(str(self.files[index]), reason)

    def _from(self, first: int) -> Iterator[int]:
        return ((first + i) % len(self.files) for i in range(len(self.files)))

    def _quick_look(self, file: Path) -> str:
        """What the header or, for PNG, the checksums say is wrong; "" where nothing is."""
        try:
            with _open(file, self.max_pixels) as picture:
                picture.verify()
        except Exception as error:
            return _reason(error)
        return ""

    def _image(self, file: Path, draws: Sequence[float] | None) -> Any:
        """One image, an array of uint8 (H, W, C) that is not to be written to; `draws` are numbers
        in [0, 1) for top, left and flip."""
        top, left, mirror = draws if draws is not None else (None, None, 1.0)
        if self.crop == "center":
            top = left = None
        image = read_image(file, self.size, self.channels, (top, left), self.max_pixels)
        return image[:, ::-1] if self.flip and mirror < 0.5 else image


def read_image(
    file: Path,
    size: tuple[int, int],
    channels: int,
    place: tuple[float | None, float | None] = (None, None),
    max_pixels: int = MAX_PIXELS,
) -> Any:
    """One image file, scaled until it covers a size, then cropped.

    Args:
        file: of one of `FORMATS`.
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


def _open(file: Path, max_pixels: int) -> Image:
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


def _image_files(root: Path) -> list[Path]:
    if not root.is_dir():
        raise DataError(f"data folder {root} " + ("is a file" if root.exists() else "is missing"))
    found, visited = [], set()
    for folder, below, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in visited:  # a link to a folder above
            below.clear()
            continue
        visited.add(real)
        below[:] = sorted(name for name in below if not name.startswith("."))
        found += [
            Path(folder, name)
            for name in names
            if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES
        ]
    return sorted(found, key=lambda file: file.relative_to(root).parts)


def _class_names(root: Path, files: Sequence[Path], classes: str) -> tuple[str, ...]:
    if classes == "none":
        return ()
    parts = [file.relative_to(root).parts for file in files]
    names = tuple(sorted({part[0] for part in parts if len(part) > 1}))
    loose = [part[0] for part in parts if len(part) == 1]
    if classes == "folders" and not names:
        raise DataError(f"data folder {root} holds no class folders: put each class into one")
    if names and loose:
        raise DataError(
            f"data folder {root} holds class folders ({names[0]}...) and loose images "
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
