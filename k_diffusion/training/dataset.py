"""Where images come from, and in which order training sees them.

A `Source` is a list of labelled images. A `Stream` is the endless sequence of batches made from
it: which image stands at a place, and how it is flipped and cropped there, is a pure function of
(seed, place). So a run can begin at any step, with any number of workers and processes.
"""

from __future__ import annotations

import enum
import functools
import importlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from k_diffusion.training.between import loaded
from k_diffusion.training.order import bucket_step
from k_diffusion.utils.augmentation import random_flip
from k_diffusion.utils.images import to_float
from k_diffusion.utils.maths import fold_seed, unknown


class DataError(ValueError):
    """Training data that cannot be used; its message is one line."""


class Purpose(enum.IntEnum):
    """What a random stream is for: the key that keeps it apart from others of the same seed.

    The numbers are part of what a seed means: add new ones, never change one.
    """

    INIT = 1
    ORDER = 2
    AUGMENT = 3
    LEVELS = 4
    NOISE = 5
    LABELS = 6
    NETWORK = 7
    SPLIT = 8
    CONDITION = 9
    CONDITIONER = 10
    CHANGES = 11


class Batch(NamedTuple):
    """Images of one step.

    Attributes:
        images: uint8, or floats in [-1, 1], shape (B, C, H, W), or (B, C, L), (B, C, D, H, W).
        labels: class indices, int64, shape (B,); 0 where the source has no classes.
        indices: the images' numbers in the source, int64, shape (B,).
        bad: (number in the source, reason) of images that turned out broken; each was replaced by
            the next good one.
        raws: name -> raw inputs of the samples, for a conditioner: a list or a tensor of B each.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    bad: tuple[tuple[int, str], ...] = ()
    raws: Mapping[str, Any] = {}


class Source:
    """A list of labelled images; abstract.

    Attributes:
        shape: of one image, (C, H, W); of a sound (C, L), of a video or volume (C, D, H, W).
        class_names: one name a class; empty where the images have no classes.
        bad_files: file -> what is wrong with it; these are skipped.
        augments: whether `batch` looks at its seeds.
        buckets: which of `shapes` each image is taken at, int64 of shape (N,); None: all have one.
    """

    shape: tuple[int, ...]
    class_names: tuple[str, ...] = ()
    augments: bool = False
    buckets: Tensor | None = None

    def __init__(self) -> None:
        self.bad_files: dict[str, str] = {}

    def __len__(self) -> int:
        raise NotImplementedError

    def batch(self, indices: Tensor, seeds: Sequence[int] | None = None) -> Batch:
        """The images of these numbers, int64 of shape (B,); seeds decide the augmentation of each.

        Without seeds nothing is left to chance: no flip, and the crop from the centre.
        """
        raise NotImplementedError

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """One image (C, H, W), not augmented, and its class."""
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        batch = self.batch(torch.tensor([index]))
        self.report(batch.bad)
        return batch.images[0], int(batch.labels[0])

    def name(self, index: int) -> str:
        """What to call an image in a report."""
        return f"image {index}"

    def report(self, bad: Sequence[tuple[int, str]]) -> None:
        """Take note of images that turned out broken when they were decoded."""

    def fingerprint(self) -> str | None:
        """What tells, with nothing decoded, that the images and classes that `batch` gives without
        seeds are those of another time; None: there is no such sign of them."""
        return None

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def found(self) -> int:
        """How many images there are with the broken ones that were left out."""
        return len(self)

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """All that a batch's images may have."""
        return (self.shape,)

    @functools.cached_property
    def moments(self) -> tuple[float, float]:
        """Mean and standard deviation of all finite values of (at most 512, evenly spread) images;
        0 and 0 where there are none."""
        count = min(len(self), 512)
        batch = self.batch(torch.arange(count) * len(self) // count)
        self.report(batch.bad)
        if batch.images.dtype == torch.uint8:
            return _moments_of_bytes(batch.images)
        values = as_float(batch.images).double()
        values = values[values.isfinite()]
        if not len(values):
            return 0.0, 0.0
        return float(values.mean()), float(values.std(correction=0))

    @property
    def mean(self) -> float:
        return self.moments[0]

    @property
    def std(self) -> float:
        """Standard deviation of the values, in [-1, 1] units: what EDM calls sigma_data."""
        return self.moments[1]

    def facts(self) -> dict[str, Any]:
        """What a checkpoint keeps of the data, as JSON data."""
        return {
            "shape": list(self.shape),
            "num_classes": self.num_classes,
            "class_names": list(self.class_names),
            "images": len(self),
            "mean": self.mean,
            "std": self.std,
        }


def _moments_of_bytes(images: Tensor) -> tuple[float, float]:
    """Mean and standard deviation by how often each byte is there.

    So they are the same on any number of threads, among which a sum of floats would be cut.
    """
    often = torch.bincount(images.flatten(), minlength=256).tolist()
    values = as_float(torch.arange(256, dtype=torch.uint8)).double().tolist()
    count = max(1, sum(often))
    mean = math.fsum(n * x for n, x in zip(often, values, strict=True)) / count
    square = math.fsum(n * (x - mean) ** 2 for n, x in zip(often, values, strict=True)) / count
    return mean, math.sqrt(square)


def as_float(images: Tensor) -> Tensor:
    """Values in [-1, 1] as float32: bytes are mapped there, floats left as they are."""
    return to_float(images) if images.dtype == torch.uint8 else images.float()


class ArraySource(Source):
    """Images that are in memory already.

    Args:
        images: floats in [-1, 1] or uint8, shape (N, C, H, W), or (N, C, L), (N, C, D, H, W).
        labels: class indices, shape (N,); None: no classes.
        class_names: one name a class.
        flip: mirror half of the images left to right.
        raws: name -> raw inputs for a conditioner (texts, sounds...): a list or tensor of N each.

    Raises:
        DataError: no images, another shape, a label without a name, or not one raw input an image.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor | None = None,
        class_names: Sequence[str] = (),
        flip: bool = False,
        raws: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if images.ndim not in (3, 4, 5) or not len(images):
            raise DataError(
                f"images have shape {tuple(images.shape)}; training takes (N, C, H, W) with N > 0"
            )
        self.images = images
        self.labels = torch.zeros(len(images), dtype=torch.int64) if labels is None else labels
        self.class_names = tuple(class_names)
        self.shape = tuple(images.shape[1:])
        self.raws = dict(raws or {})
        for name, raw in self.raws.items():
            if len(raw) != len(images):
                raise DataError(
                    f"raws[{name!r}] has {len(raw)} raw inputs for {len(images)} images: give one "
                    "an image"
                )
        self.augments = flip
        low, high = int(self.labels.min()), int(self.labels.max())
        if self.labels.shape != images.shape[:1] or low < 0 or high >= max(1, self.num_classes):
            raise DataError(
                f"labels of shape {tuple(self.labels.shape)} from {low} to {high} do not fit "
                f"{len(images)} images of {self.num_classes} named classes"
            )

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Tensor, seeds: Sequence[int] | None = None) -> Batch:
        images = self.images[indices]
        if seeds is not None and self.augments:
            images = random_flip(images, seeds)
        raws = {
            name: raw[indices] if isinstance(raw, Tensor) else [raw[i] for i in indices.tolist()]
            for name, raw in self.raws.items()
        }
        return Batch(images, self.labels[indices], indices, raws=raws)


SPLITS = ("train", "test", "all")


class Digits(ArraySource):
    """The 1,797 handwritten digits that come with scikit-learn: 1 x 8 x 8, values in [-1, 1].

    Source: Alpaydin and Kaynak 1998, Optical Recognition of Handwritten Digits (UCI, test part).

    Args:
        split: "train" (four fifths of each class), "test" (the other fifth) or "all".
        split_seed: decides which are held out.

    Raises:
        DataError: an unknown split, or scikit-learn is not installed.
    """

    def __init__(self, split: str = "train", split_seed: int = 0) -> None:
        if split not in SPLITS:
            raise DataError(unknown("split", split, SPLITS))
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise DataError(
                f"the digits come with scikit-learn, which cannot be imported ({error}): "
                "pip install 'k-diffusion[train]'"
            ) from None
        raw = _once(load_digits)
        images = torch.from_numpy(raw.images).float().unsqueeze(1) / 8 - 1
        labels = torch.from_numpy(raw.target).long()
        if split != "all":
            held_out = _held_out(labels, 0.2, split_seed)
            chosen = held_out if split == "test" else ~held_out
            images, labels = images[chosen], labels[chosen]
        super().__init__(images, labels, [str(digit) for digit in range(10)])


@functools.cache
def _once(load: Callable[[], Any]) -> Any:
    """What it gives, which is read from text: once in a process's life."""
    return load()


def _held_out(labels: Tensor, share: float, seed: int) -> Tensor:
    """Boolean (N,): the same share of each class, at random."""
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique().tolist():
        members = (labels == label).nonzero()[:, 0]
        generator = torch.Generator().manual_seed(fold_seed(seed, Purpose.SPLIT, label))
        order = torch.randperm(len(members), generator=generator)
        held_out[members[order[: round(share * len(members))]]] = True
    return held_out


def _lazily(module: str, name: str) -> Callable[..., Source]:
    """What makes a source whose module is imported when it is asked for."""

    def make(**options: Any) -> Source:
        found = importlib.import_module(f"k_diffusion.training.{module}")
        made: Source = getattr(found, name)(**options)
        return made

    return make


SOURCES: dict[str, Callable[..., Source]] = {
    "archive": _lazily("archived", "Archived"),
    "arrays": _lazily("arrays", "Arrays"),
    "digits": Digits,
    "folder": _lazily("folder", "Folder"),
    "huggingface": _lazily("huggingface", "HuggingFace"),
    "latents": _lazily("latent_shards", "LatentShards"),
    "webdataset": _lazily("webdataset", "WebShards"),
}


def make_source(source: str, **options: Any) -> Source:
    """A source by its name in `SOURCES`.

    Raises:
        DataError: unknown name, or data that cannot be used.
    """
    if source not in SOURCES:
        raise DataError(unknown("source", source, SOURCES))
    return SOURCES[source](**options)


class Stream:
    """The endless sequence of batches: `stream[step]` is a pure function of (seed, step).

    All images in one random order, then all in another, and so on; batches follow each other
    without a gap, so that none is smaller at the end of an epoch. Where the source has buckets,
    each of them is such a sequence, and a batch is of one of them; see `order.bucket_step`.

    Args:
        source: the images.
        batch_size: images a step, of all processes together.
        seed: decides order and augmentation.
        rank: this process's number; it gets its consecutive share of each batch.
        world: number of processes.
    """

    def __init__(
        self, source: Source, batch_size: int, seed: int, rank: int = 0, world: int = 1
    ) -> None:
        if batch_size < 1 or batch_size % world:
            raise DataError(
                f"batch_size {batch_size} cannot be shared by {world} processes: "
                "give a multiple of their number"
            )
        self.source, self.batch_size, self.seed = source, batch_size, seed
        self.rank, self.world = rank, world
        self._orders: dict[tuple[int, int], Tensor] = {}
        buckets = source.buckets
        self._members = (
            [torch.arange(len(source))]
            if buckets is None
            else [(buckets == b).nonzero()[:, 0] for b in range(len(source.shapes))]
        )
        """The images' numbers, by bucket."""

    def indices(self, first: int, count: int, bucket: int = 0) -> Tensor:
        """The numbers of the images at places first, first + 1, ... of a bucket's stream, int64."""
        images, parts = len(self._members[bucket]), []
        while count > 0:
            epoch, start = divmod(first, images)
            parts.append(self._order(epoch, bucket)[start : start + count])
            first, count = first + len(parts[-1]), count - len(parts[-1])
        return torch.cat(parts)

    def _order(self, epoch: int, bucket: int) -> Tensor:
        if (epoch, bucket) not in self._orders:
            keys = (Purpose.ORDER, epoch, bucket) if bucket else (Purpose.ORDER, epoch)
            generator = torch.Generator().manual_seed(fold_seed(self.seed, *keys))
            members = self._members[bucket]
            order = members[torch.randperm(len(members), generator=generator)]
            kept = self._orders.items()
            self._orders = {k: o for k, o in kept if k[1] != bucket or k[0] == epoch - 1}
            self._orders[epoch, bucket] = order
        return self._orders[epoch, bucket]

    def __getitem__(self, step: int) -> Batch:
        """This process's part of the batch of step 0, 1, 2..."""
        share = self.batch_size // self.world
        first = step * self.batch_size + self.rank * share
        seeds = None
        if self.source.augments:
            seeds = [fold_seed(self.seed, Purpose.AUGMENT, p) for p in range(first, first + share)]
        if len(self._members) == 1:
            return self.source.batch(self.indices(first, share), seeds)
        counts = tuple(map(len, self._members))
        seed = fold_seed(self.seed, Purpose.ORDER, -1)  # which is no epoch
        bucket, turn = bucket_step(counts, self.batch_size, seed, step)
        first = turn * self.batch_size + self.rank * share
        return self.source.batch(self.indices(first, share, bucket), seeds)

    def batches(
        self, first: int, last: int, workers: int = 0, pin_memory: bool = False
    ) -> Iterator[Batch]:
        """The batches of steps first, ..., last - 1, made ahead by worker processes if there are.

        Broken images met on the way are reported to the source in this process.
        """
        for batch in loaded(self, range(first, last), workers, pin_memory):
            self.source.report(batch.bad)
            yield batch
