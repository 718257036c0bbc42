"""Latents that `k-diffusion encode` wrote: mean and log-variance of each image's, in shards.

The folder holds `latents-<number>.safetensors` and, once all shards are there, `latents.json`: what
they are of, and statistics of all of them. A shard has, of n images, "mean" and "logvar" (if the
autoencoder tells it) of shape (n, C, h, w), raw as the encoder gives them; "labels" and "indices"
(their numbers among the images that were encoded), int64 of shape (n,); as texts, "captions" and
"bad", both JSON.
"""

from __future__ import annotations

import bisect
import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from k_diffusion.training.dataset import Batch, DataError, Source
from k_diffusion.training.tensor_file import Entry, FormatError, read_header, read_tensor
from k_diffusion.utils.augmentation import normals

INDEX = "latents.json"
FORMAT = "k_diffusion latents, 1"


def shard_name(number: int) -> str:
    return f"latents-{number:06}.safetensors"


class Shard(NamedTuple):
    """One file of latents.

    Attributes:
        path: of the file.
        texts: its metadata.
        entries: name -> where a tensor lies in it.
    """

    path: Path
    texts: dict[str, str]
    entries: dict[str, Entry]

    def __len__(self) -> int:
        return self.entries["mean"].shape[0]

    def tensor(self, name: str) -> Tensor:
        """All of one tensor."""
        with open(self.path, "rb") as file:
            return read_tensor(file, self.entries[name], lambda piece: None)


def open_shard(path: Path) -> Shard:
    """A shard that is whole, as far as its header and its size can tell.

    Raises:
        DataError: it is missing, damaged or none.
    """
    try:
        with open(path, "rb") as file:
            texts, entries = read_header(file)
    except OSError as error:
        raise DataError(f"latents {path} cannot be read: {error.strerror}") from None
    except FormatError as error:
        raise DataError(f"latents {path} are damaged: {error}") from None
    named = {entry.name: entry for entry in entries}
    counts = {named[name].shape[:1] for name in ("mean", "labels", "indices") if name in named}
    if texts.get("format") != FORMAT or len(counts) != 1 or not {"mean", "labels"} <= set(named):
        raise DataError(f"latents {path} are not as k-diffusion encode writes them")
    return Shard(path, texts, named)


class LatentShards(Source):
    """Latents in a folder of shards, scaled as their autoencoder scales them.

    Where they have a variance, each step draws a latent anew by its seed; without seeds it is the
    mean. Captions that were encoded with them are the raw input "text".

    Args:
        path: the folder that `k-diffusion encode` wrote.
        draw: "auto": draw where there is a variance; "yes"; "no": take the means.

    Raises:
        DataError: no such folder, it is not finished, or something in it is missing or damaged.
    """

    def __init__(self, path: str | Path, draw: str = "auto") -> None:
        super().__init__()
        self.path = Path(path)
        self.index = read_index(self.path)
        shards = [open_shard(self.path / name) for name in self.index["shards"]]
        self._shards = [shard for shard in shards if len(shard)]
        if not self._shards:
            raise DataError(f"latents {path}: there are none; encode images that are not broken")
        self.shape = tuple(self.index["shape"])
        for shard in self._shards:
            entry = shard.entries["mean"]
            if entry.shape[1:] != self.shape or entry.dtype not in _DTYPES:
                raise DataError(
                    f"latents {shard.path} are {entry.dtype} of shape {entry.shape[1:]}, but those "
                    f"of the folder have {self.shape}: encode them anew"
                )
        self._starts = list(itertools.accumulate(map(len, self._shards), initial=0))
        has_variance = all("logvar" in shard.entries for shard in self._shards)
        if draw == "yes" and not has_variance:
            raise DataError(f"latents {path} have no variance to draw by: set draw to 'auto'")
        self.augments = draw != "no" and has_variance
        self.class_names = tuple(self.index["class_names"])
        self._labels = torch.cat([shard.tensor("labels") for shard in self._shards])
        self._shift, self._scale = (
            torch.tensor(self.index[name], dtype=torch.float32).reshape(-1, *[1] * self._spatial)
            for name in ("shift", "scale")
        )
        self._texts: list[str] = []
        if self.index["captions"]:
            parts = [json.loads(shard.texts["captions"]) for shard in self._shards]
            self._texts = [text for part in parts for text in part]
        self._files: dict[int, int] = {}

    @property
    def _spatial(self) -> int:
        return len(self.shape) - 1

    def __len__(self) -> int:
        return self._starts[-1]

    def name(self, index: int) -> str:
        shard = bisect.bisect_right(self._starts, index) - 1
        return f"latent {index - self._starts[shard]} of {self._shards[shard].path}"

    def batch(self, indices: Tensor, seeds: Sequence[int] | None = None) -> Batch:
        numbers = indices.tolist()
        latents = self._read("mean", numbers)
        if self.augments and seeds is not None:
            deviation = (0.5 * self._read("logvar", numbers)).exp_()
            latents += deviation * normals(seeds, latents.shape)
        latents = (latents - self._shift) * self._scale
        texts = {"text": [self._texts[i] for i in numbers]} if self._texts else {}
        return Batch(latents, self._labels[indices], indices, raws=texts)

    def _read(self, name: str, numbers: Sequence[int]) -> Tensor:
        """These rows of a tensor as float32; what a file has lost is an error, not an end."""
        rows = []
        for number in numbers:
            place = bisect.bisect_right(self._starts, number) - 1
            shard, row = self._shards[place], number - self._starts[place]
            entry = shard.entries[name]
            size = (entry.stop - entry.start) // len(shard)
            content = os.pread(self._open(place), size, entry.start + row * size)
            if len(content) != size:
                raise DataError(f"latents {shard.path} have been cut since the run began")
            rows.append(torch.frombuffer(bytearray(content), dtype=entry.dtype))
        return torch.stack(rows).reshape(len(rows), *self.shape).float()

    def _open(self, place: int) -> int:
        if place not in self._files:
            self._files[place] = os.open(self._shards[place].path, os.O_RDONLY)
        return self._files[place]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}  # another process opens its own

    def __del__(self) -> None:
        for file in self.__dict__.pop("_files", {}).values():
            os.close(file)

    @property
    def moments(self) -> tuple[float, float]:
        """Mean and standard deviation of all values as training sees them, over all latents."""
        squares = [s**2 + m**2 for m, s in zip(self.index["mean"], self.index["std"], strict=True)]
        mean = sum(self.index["mean"]) / len(squares)
        return mean, max(0.0, sum(squares) / len(squares) - mean**2) ** 0.5

    def facts(self) -> dict[str, Any]:
        """Those of every source, of the latents; and which autoencoder they are of."""
        return super().facts() | {"autoencoder": self.index["autoencoder"]}


_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def read_index(folder: Path) -> dict[str, Any]:
    """What `latents.json` says.

    Raises:
        DataError: it is missing or damaged.
    """
    path = folder / INDEX
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        begun = folder.is_dir() and any(folder.glob("latents-*.safetensors"))
        way = (
            "has been begun but not finished: the same k-diffusion encode goes on"
            if begun
            else "holds no latents: give one that k-diffusion encode wrote"
        )
        raise DataError(f"folder {folder} {way}") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise DataError(f"{path} is not as k-diffusion encode writes it")
    missing = _KEYS - set(found)
    names = found.get("shards", ())
    if missing or not all(isinstance(n, str) and Path(n).name == n for n in names):
        raise DataError(f"{path} is not as k-diffusion encode writes it")
    return found


_KEYS = {
    "shape", "shards", "class_names", "mean", "std", "shift", "scale", "autoencoder", "captions",
}  # fmt: skip
