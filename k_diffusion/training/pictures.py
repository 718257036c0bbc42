"""Pictures in files, decoded when they are asked for; broken ones are named and passed over."""

from __future__ import annotations

import hashlib
import io
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor

from k_diffusion.training import captions as texts
from k_diffusion.training.dataset import Batch, DataError, Source
from k_diffusion.training.decoding import (
    FORMATS,
    MAX_16_BIT,
    MAX_PIXELS,
    MODES,
    SUFFIXES,
    open_picture,
    read_image,
    upright_size,
)
from k_diffusion.utils.augmentation import uniforms
from k_diffusion.utils.maths import unknown
from k_diffusion.utils.words import reason_of

__all__ = ["FORMATS", "MAX_PIXELS", "SUFFIXES", "Pictures", "read_image"]


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
        bits: 8: batches are uint8; 16: they are float32 in [-1, 1] and keep what a file has beyond
            8 bits.
        captions: "none", "files" (x.txt beside x.png) or "metadata" (metadata.jsonl or .csv with
            `file_name` and the caption); batches have them as the raw input "text". A picture
            without its caption counts as broken.
        caption_key: the table's column that is the caption.
        buckets: further sizes, (height, width): an image is taken at the one of these and `size`
            whose shape is nearest to its own. A batch has one size.

    Raises:
        DataError: an argument out of its range.
    """

    def __init__(
        self,
        where: str,
        size: int | Sequence[int],
        channels: int = 3,
        crop: str = "center",
        flip: bool = False,
        classes: str = "auto",
        max_pixels: int = MAX_PIXELS,
        bits: int = 8,
        captions: str = "none",
        caption_key: str = "text",
        buckets: Sequence[tuple[int, int]] = (),
    ) -> None:
        super().__init__()
        self.where = where
        height, width = (size, size) if isinstance(size, int) else size
        self.size = (height, width)
        for name, value, known in (
            ("channels", channels, tuple(MODES)),
            ("crop", crop, ("center", "random")),
            ("classes", classes, ("auto", "folders", "none")),
            ("bits", bits, (8, 16)),
            ("captions", captions, texts.KINDS),
        ):
            if value not in known:
                raise DataError(unknown(name, value, map(str, known)))
        self.channels, self.crop, self.flip, self.max_pixels = channels, crop, flip, max_pixels
        self.classes, self.bits = classes, bits
        self.captions, self.caption_key = captions, caption_key
        self.sizes = tuple(dict.fromkeys([self.size, *((h, w) for h, w in buckets)]))
        self.shape = (channels, *self.size)
        self.augments = flip or crop == "random"
        self.files: list[PurePath] = []
        self._found: Sequence[PurePath] = ()  # with the broken ones
        self._kept: list[int] = []  # which of them are in `files`
        self._paths: Sequence[tuple[str, ...]] = ()
        self._told: dict[tuple[str, ...], str] = {}  # captions of tables
        self.labels: list[int] = []

    def _settle(
        self,
        files: Sequence[PurePath],
        paths: Sequence[tuple[str, ...]],
        classes: tuple[Sequence[str], Sequence[int]] | None = None,
    ) -> None:
        """Takes the files that can be read, and their classes.

        Args:
            files: what to call each.
            paths: of each inside the place, by its parts.
            classes: their names, and the class of each file; None: the folders are the classes.

        Raises:
            DataError: no good image, or no way to tell the classes.
        """
        self._found, self._paths = files, paths
        if self.captions == "metadata":
            self._told = texts.read_tables(self._tables(), self.caption_key)
        with _undisturbed(), ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            looks = list(pool.map(self._quick_look, range(len(files))))
        wrong = [look if isinstance(look, str) else "" for look in looks]
        self.bad_files = {str(f): reason for f, reason in zip(files, wrong, strict=True) if reason}
        self._kept = [i for i, reason in enumerate(wrong) if not reason]
        self.files = [files[i] for i in self._kept]
        if not self.files:
            what = f"only broken images ({_first(self.bad_files)})" if files else "no images"
            raise DataError(f"{self.where} holds {what}; give one with {', '.join(SUFFIXES)} files")
        if classes is None:
            names = _class_names(self.where, paths, self.classes)
            index = {name: i for i, name in enumerate(names)}
            classes = names, [index.get(path[0], 0) for path in paths]
        self.class_names = tuple(classes[0])
        self.labels = [classes[1][i] for i in self._kept]
        if len(self.sizes) > 1:
            sizes = [looks[i] for i in self._kept]
            self.buckets = nearest_shapes(sizes, self.sizes)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self.files)

    @property
    def found(self) -> int:
        return len(self._found)

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        return tuple((self.channels, *size) for size in self.sizes)

    def batch(self, indices: Tensor, seeds: Sequence[int] | None = None) -> Batch:
        """Their images; with buckets, all of the size of the first one's."""
        import numpy as np

        size = self.size
        if self.buckets is not None and len(indices):
            size = self.sizes[int(self.buckets[indices[0]])]
        # All into one array, in Pillow's order of axes: a tensor an image would cost as much as to
        # decode a small one.
        dtype = np.uint8 if self.bits == 8 else np.uint16
        images = np.empty((len(indices), *size, self.channels), dtype)
        draws = None if seeds is None else uniforms(seeds, len(seeds), 3).tolist()
        labels, used, told, bad = [], [], list[str](), dict[int, str]()
        with _undisturbed():
            for place, first in enumerate(indices.tolist()):
                draw = None if draws is None else draws[place]
                for index in self._from(first):
                    try:
                        images[place] = self._image(index, size, draw)
                        if self.captions != "none":
                            told.append(self._caption(self._kept[index]))
                    except Exception as error:  # a decoder may raise anything on a broken file
                        bad[index] = reason_of(error)
                        continue
                    labels.append(self.labels[index])
                    used.append(index)
                    break
                else:
                    raise DataError(
                        f"{self.where}: none of its {len(self)} images can be decoded "
                        f"({self.name(0)}: {bad[0]})"
                    )
        tensor = torch.from_numpy(images if self.bits == 8 else _as_floats(images))
        return Batch(
            tensor.permute(0, 3, 1, 2).contiguous(),
            torch.tensor(labels),
            torch.tensor(used),
            tuple(bad.items()),
            {"text": told} if self.captions != "none" else {},
        )

    def name(self, index: int) -> str:
        """The file's path."""
        return str(self.files[index])

    def report(self, bad: Sequence[tuple[int, str]]) -> None:
        for index, reason in bad:
            self.bad_files.setdefault(self.name(index), reason)

    def fingerprint(self) -> str | None:
        """A hash of where the pictures lie (see `_stamps`), and of all that decides how each is
        read: its class, size, channels, bits, and Pillow's version."""
        try:
            stamps = self._stamps()
        except OSError:  # one is gone by now
            return None
        if stamps is None:
            return None
        from PIL import __version__

        read = [self.sizes, self.channels, self.bits, self.max_pixels, self.captions, __version__]
        facts = [type(self).__name__, read, self.class_names, self.labels, self._kept, stamps]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def _stamps(self) -> list[Any] | None:
        """JSON data that change with the files' content; None: nothing tells that without it."""
        return None

    def _content(self, file: int) -> str | Path | io.BytesIO:
        """What Pillow opens for a file, by its number among those found; abstract."""
        raise NotImplementedError

    def _beside(self, file: int, suffix: str) -> bytes | None:
        """The content of the file of the same name with another ending; None: there is none."""
        raise DataError(f"{self.where} has no files beside its images: set captions to 'none'")

    def _tables(self) -> Sequence[texts.CaptionTable]:
        """The tables of captions in the place."""
        raise DataError(f"{self.where} has no tables of captions: set captions to 'none'")

    def _caption(self, file: int) -> str:
        """The text of a file, by its number among those found.

        Raises:
            DataError: it has none.
        """
        if self.captions == "files":
            content = self._beside(file, texts.SUFFIX)
            if content is None:
                raise DataError(f"no caption beside it: it has no {texts.SUFFIX} file of its name")
            return texts.decoded(content)
        if self._paths[file] not in self._told:
            raise DataError(f"no caption: no {' or '.join(texts.TABLES)} names it")
        return self._told[self._paths[file]]

    def _from(self, first: int) -> Iterator[int]:
        """It, and those that may take its place, in order."""
        yield first
        for i in range(1, len(self)):
            index = (first + i) % len(self)
            if self.buckets is None or self.buckets[index] == self.buckets[first]:
                yield index

    def _quick_look(self, file: int) -> str | tuple[int, int]:
        """What the header or, for PNG, the checksums say is wrong; or height and width."""
        try:
            with open_picture(self._content(file), self.max_pixels) as picture:
                size = upright_size(picture) if len(self.sizes) > 1 else (0, 0)
                picture.verify()
            if self.captions != "none":
                self._caption(file)
        except Exception as error:
            return reason_of(error)
        return size

    def _image(self, index: int, size: tuple[int, int], draws: Sequence[float] | None) -> Any:
        """One image, an array (H, W, C) that is not to be written to; `draws` are numbers in [0, 1)
        for top, left and flip."""
        top, left, mirror = draws if draws is not None else (None, None, 1.0)
        if self.crop == "center":
            top = left = None
        file = self._content(self._kept[index])
        image = read_image(file, size, self.channels, (top, left), self.max_pixels, self.bits)
        return image[:, ::-1] if self.flip and mirror < 0.5 else image


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Pillow warns of oddities in files that it reads all the same; what cannot be read is told."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _as_floats(images: Any) -> Any:
    """0 to 65535 in [-1, 1], float32."""
    return images.astype("float32") / (MAX_16_BIT / 2) - 1


def nearest_shapes(sizes: Sequence[tuple[int, int]], buckets: Sequence[tuple[int, int]]) -> Tensor:
    """For each size the bucket whose shape is nearest to its own, int64.

    Near is in the logarithm of height / width; of equally near ones the first is taken.
    """
    ratios = torch.tensor([h / w for h, w in sizes], dtype=torch.float64).log()
    shapes = torch.tensor([h / w for h, w in buckets], dtype=torch.float64).log()
    return (ratios[:, None] - shapes).abs().argmin(1)


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


def _first(bad_files: dict[str, str]) -> str:
    file, reason = next(iter(bad_files.items()))
    return f"{file}: {reason}"
