"""Samples in numpy's .npy and .npz files: images, sounds, videos. Read where they lie on disk."""

from __future__ import annotations

import math
import os
import struct
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from k_diffusion.training.dataset import Batch, DataError, Source
from k_diffusion.utils.augmentation import random_flip
from k_diffusion.utils.maths import unknown
from k_diffusion.utils.words import reason_of

SUFFIXES = (".npy", ".npz")
HOLDS = {"images": 2, "sounds": 1, "videos": 3}
"""What an array holds -> its axes beside those of samples and channels."""
LAYOUTS = ("auto", "channels_first", "channels_last")
MOST_CHANNELS = 4
"""Of a layout that is told by the shape alone."""
_WHOLE = {"uint8": (0, 255), "uint16": (0, 65_535), "int16": (-32_768, 32_767)}
_LOCAL = struct.Struct("<4s5H3I2H")


class Arrays(Source):
    """Samples in a .npy or .npz file, memory-mapped unless the .npz is compressed.

    Bytes stay bytes. uint16 and int16 are spread over [-1, 1], floats are taken as they are or as
    `value_range` says. A sample with a value that is not finite counts as broken: it is replaced by
    the next good one, and named.

    Args:
        path: a .npy file of the samples alone, or a .npz with arrays of several names.
        holds: "images": (N, H, W, C), (N, C, H, W) or grey (N, H, W); "sounds": (N, L, C),
            (N, C, L) or (N, L); "videos": (N, D, H, W, C), (N, C, D, H, W) or grey (N, D, H, W).
        layout: "channels_last", "channels_first", or "auto": whichever of the two axes has at most
            4 entries; where both have, or none, it must be said.
        key: of a .npz: the samples' name.
        label_key: of a .npz: the name of class indices, shape (N,), or of one-hot rows; "": there
            are no classes. "auto": "labels", where there is one.
        class_names: one name a class; none: their numbers.
        value_range: what floats or whole numbers have as black and white, such as (0, 1); None:
            floats are in [-1, 1], or of no such range (latents, say).
        flip: mirror half of the samples left to right.

    Raises:
        DataError: no such file or array, or one that cannot be used.
    """

    def __init__(
        self,
        path: str | Path,
        holds: str = "images",
        layout: str = "auto",
        key: str = "images",
        label_key: str = "auto",
        class_names: Sequence[str] = (),
        value_range: tuple[float, float] | None = None,
        flip: bool = False,
    ) -> None:
        import numpy as np

        super().__init__()
        for name, value, known in (("holds", holds, HOLDS), ("layout", layout, LAYOUTS)):
            if value not in known:
                raise DataError(unknown(name, value, known))
        if value_range is not None and not value_range[0] < value_range[1]:
            raise DataError(f"value_range = {list(value_range)} does not rise: give [low, high]")
        if flip and holds == "sounds":
            raise DataError("flip mirrors left to right, which a sound has not: leave it out")
        self.path, self.augments, self.value_range = Path(path), flip, value_range
        file = _File(self.path)
        called, self._values = file.pick(key)
        self._channels = _channels(self._values.shape, HOLDS[holds], layout, called)
        self._rows = np.asarray(self._values)  # still mapped, but quicker to cut
        kind = self._values.dtype
        if kind.name not in _WHOLE and kind.kind != "f":
            raise DataError(
                f"{called} is of {kind.name}: give uint8, uint16, int16 or floating-point numbers"
            )
        self.called = called
        self.labels, count = _labels(file, label_key, len(self._values))
        names = tuple(class_names) or tuple(map(str, range(count)))
        if len(names) < count or (names and self.labels is None):
            raise DataError(f"{path} has {count} classes, but {len(names)} class_names: give each")
        self.class_names = names
        self.shape = tuple(self._take([0]).shape[1:])

    def __len__(self) -> int:
        return len(self._values)

    def name(self, index: int) -> str:
        return f"sample {index} of {self.called}"

    def report(self, bad: Sequence[tuple[int, str]]) -> None:
        for index, reason in bad:
            self.bad_files.setdefault(self.name(index), reason)

    def batch(self, indices: Tensor, seeds: Sequence[int] | None = None) -> Batch:
        used, bad = indices.tolist(), dict[int, str]()
        samples = self._take(used)
        if samples.is_floating_point():
            for place in (~samples.flatten(1).isfinite().all(1)).nonzero()[:, 0].tolist():
                first = used[place]
                for index in ((first + i) % len(self) for i in range(len(self))):
                    sample = self._take([index])
                    if bool(sample.isfinite().all()):
                        samples[place], used[place] = sample[0], index
                        break
                    bad[index] = "it holds values that are not finite"
                else:
                    raise DataError(f"{self.called}: no sample has finite values alone")
        if seeds is not None and self.augments:
            samples = random_flip(samples, seeds)
        taken = torch.tensor(used)
        labels = torch.zeros_like(taken) if self.labels is None else self.labels[taken]
        return Batch(samples, labels, taken, tuple(bad.items()))

    def _in_order(self, index: int) -> Any:
        """One sample as it is stored, seen with its channels first."""
        sample = self._rows[index]
        if self._channels == "last":
            axis = sample.ndim - 1
            return sample.transpose(axis, *range(axis))
        return sample if self._channels == "first" else sample[None]

    def _take(self, indices: Sequence[int]) -> Tensor:
        """Samples of these numbers, channels first: uint8, or float32."""
        import numpy as np

        # Into place one by one: each is brought into order while it is in the cache.
        first = self._in_order(0)
        values = np.empty((len(indices), *first.shape), first.dtype)
        for place, index in enumerate(indices):
            values[place] = self._in_order(index)
        bounds = self.value_range
        if values.dtype == np.uint8 and bounds is None:
            return torch.from_numpy(values)
        bounds = bounds or _WHOLE.get(values.dtype.name)
        values = values.astype(np.float32, copy=False)
        if bounds is not None:
            low, high = bounds
            values = (values - low) * np.float32(2 / (high - low)) - 1
        return torch.from_numpy(values)


def _channels(shape: tuple[int, ...], axes: int, layout: str, called: str) -> str | None:
    """Where the channels are, "first" or "last"; None: there is no axis for them.

    Raises:
        DataError: the shape does not fit, or does not tell.
    """
    if len(shape) not in (axes + 1, axes + 2) or 0 in shape:
        raise DataError(
            f"{called} has shape {shape}; {axes + 2} axes are needed (or {axes + 1}, of one "
            "channel), none of them 0: say what it holds"
        )
    if len(shape) == axes + 1:
        return None
    if layout != "auto":
        return layout.removeprefix("channels_")
    first, last = shape[1] <= MOST_CHANNELS, shape[-1] <= MOST_CHANNELS
    if first == last:
        both = "both of which may be" if first else "neither of which is"
        raise DataError(
            f"{called} has shape {shape}: axes 1 and {len(shape) - 1} have {shape[1]} and "
            f"{shape[-1]} entries, {both} that of the channels: set layout to 'channels_first' or "
            "'channels_last'"
        )
    return "first" if first else "last"


def _labels(file: _File, label_key: str, count: int) -> tuple[Tensor | None, int]:
    """Class indices, int64 (N,), and how many classes there are; None and 0: there are none."""
    if label_key == "auto":
        label_key = "labels" if "labels" in file.names else ""
    if not label_key:
        return None, 0
    import numpy as np

    labels = np.asarray(file.read(label_key))
    called = f"{label_key!r} of {file.path}"
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim == 2:
        if not bool(((labels == 1).sum(1) == 1).all() & ((labels == 0) | (labels == 1)).all()):
            raise DataError(f"{called} has two axes, but its rows are not one-hot")
        classes, labels = labels.shape[1], labels.argmax(1)
    else:
        classes = int(labels.max()) + 1 if labels.size else 0
    if labels.shape != (count,) or labels.dtype.kind not in "iu" or int(labels.min()) < 0:
        raise DataError(
            f"{called} is of {labels.dtype} and shape {labels.shape}; {count} samples need as many "
            "whole numbers from 0 on"
        )
    return torch.from_numpy(labels.astype(np.int64)), classes


# ---------------------------------------------------------------- files


def _memory() -> float:
    """Bytes that this machine has; infinite where it does not say."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):
        return math.inf


class _File:
    """The arrays in a file: names, and `read`, which maps what lies on disk as it is.

    Raises:
        DataError: it is missing or damaged, or holds Python objects, which could run code.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise DataError(f"array {path} is " + ("a folder" if path.is_dir() else "missing"))
        if path.suffix not in SUFFIXES:
            raise DataError(f"{path} is no array: give a file that ends in .npy or .npz")
        self._entries: dict[str, zipfile.ZipInfo] = {}
        if path.suffix == ".npz":
            try:
                with zipfile.ZipFile(path) as archive:
                    self._entries = {
                        info.filename.removesuffix(".npy"): info for info in archive.infolist()
                    }
            except (zipfile.BadZipFile, OSError, ValueError) as error:
                raise DataError(f"array {path} is damaged or no .npz: {error}") from None
        self.names = tuple(self._entries)

    def pick(self, key: str) -> tuple[str, Any]:
        """The samples, and what to call them."""
        if self.path.suffix == ".npy":
            return str(self.path), self._guarded(lambda: self._map(0))
        if len(self.names) == 1:
            key = self.names[0]
        return f"{key!r} of {self.path}", self.read(key)

    def read(self, key: str) -> Any:
        """The array of this name."""
        if key not in self._entries:
            there = ", ".join(map(repr, self.names)) or "nothing"
            raise DataError(f"{self.path} has no array {key!r}, but {there}: give its name as key")
        return self._guarded(lambda: self._member(self._entries[key]))

    def _member(self, info: zipfile.ZipInfo) -> Any:
        import numpy as np

        if info.compress_type == zipfile.ZIP_STORED and not info.flag_bits & 1:
            with open(self.path, "rb") as file:
                file.seek(info.header_offset)
                *_, name, extra = _LOCAL.unpack(file.read(_LOCAL.size))
            return self._map(info.header_offset + _LOCAL.size + name + extra)
        if info.file_size > _memory():
            raise MemoryError
        with np.load(self.path, allow_pickle=False) as arrays:
            found = arrays[info.filename.removesuffix(".npy")]
        if not isinstance(found, np.ndarray):  # but the bytes of a file of another kind
            raise ValueError(f"{info.filename} in it is no .npy")
        return found

    def _map(self, offset: int) -> Any:
        """The array whose .npy begins there."""
        import numpy as np
        from numpy.lib import format as npy

        with open(self.path, "rb") as file:
            file.seek(offset)
            version = npy.read_magic(file)
            read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            shape, by_column, dtype = read(file)
            start = file.tell()
        if dtype.hasobject:
            raise ValueError("it holds Python objects, which are not read")
        order: Any = "F" if by_column else "C"
        return np.memmap(self.path, dtype, "r", start, shape, order)

    def _guarded(self, read: Any) -> Any:
        try:
            return read()
        except MemoryError:
            raise DataError(
                f"array {self.path} says to hold more than there is memory for: save it by "
                "numpy.savez, uncompressed, to be read where it lies"
            ) from None
        except Exception as error:  # numpy's reader, zlib and zipfile raise anything
            reason = reason_of(error)
            raise DataError(f"array {self.path} is damaged or no array: {reason}") from None
