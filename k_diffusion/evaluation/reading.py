"""Real images as they are measured: which of a data set, decoded once where memory allows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from k_diffusion.evaluation.gathering import place
from k_diffusion.utils.files import write_text
from k_diffusion.utils.images import to_float, to_uint8

BATCH = 64
"""Images at a time."""
LAYOUT = 2
"""Of the files that keep a data set's hash; another number, and it is made anew."""
HELD = 512 << 20
"""Bytes of decoded images that are kept for the next pass over them."""
LARGEST = 32
"""Pixels a side, at most, of what a small extractor is shown."""

T = TypeVar("T")


class Data(Protocol):
    """Real images: what `k_diffusion.training` calls a source, for one.

    It may have a method `fingerprint() -> str | None`: what tells, with nothing decoded, that its
    images are those of another time.
    """

    def __len__(self) -> int:
        """How many there are."""
        ...

    def batch(self, indices: Tensor) -> Any:
        """An object with `images` (B, C, H, W), floats in [-1, 1] or uint8, `labels`, int64 (B,),
        and `bad`, for `report`."""
        ...

    def report(self, bad: Any) -> None:
        """Take note of images that turned out broken."""
        ...


class Part(NamedTuple):
    """Some images: as bytes where pictures are (see `as_seen`), and their classes."""

    images: Tensor
    labels: Tensor


class Reading:
    """The images by which a data set is measured, in parts of `BATCH`.

    What is decoded is held, up to `HELD` bytes in all, so that a later pass finds it there.

    Args:
        data: real images.
        numbers: which of them, int64.
        small: whether a small extractor may be trained on some: of parts that are not held these
            are kept as small as it is shown them.
    """

    def __init__(self, data: Data, numbers: Tensor, small: Tensor | None = None) -> None:
        self._data, self.parts = data, numbers.split(BATCH)
        self._small = small
        self._room = HELD
        self._held: dict[int, Part] = {}
        self._shown: dict[int, Part] = {}
        self._bad: list[tuple[int, str]] = []

    def part(self, k: int) -> Part:
        """The images of a part, read unless they are held."""
        if k in self._held:
            return self._held[k]
        batch = read(self._data, self.parts[k])
        self._bad += batch.bad
        images = to_uint8(batch.images) if _is_picture(batch.images) else batch.images.float()
        found = Part(images, batch.labels)
        if (size := images.numel() * images.element_size()) <= self._room:
            self._room -= size
            self._held[k] = found
        elif self._small is not None:
            chosen = torch.isin(self.parts[k], self._small)
            self._shown[k] = Part(smaller(as_seen(images[chosen])), batch.labels[chosen])
        return found

    def shown(self, k: int) -> Part:
        """Those of a part that a small extractor is trained on, as floats, at its size."""
        if k in self._shown:
            return self._shown[k]
        assert self._small is not None
        images, labels = self.part(k)
        chosen = torch.isin(self.parts[k], self._small)
        return Part(smaller(as_seen(images[chosen])), labels[chosen])

    def sha256(self, progress: bool = False, look: Callable[[], None] = lambda: None) -> str:
        """A hash of images and classes as they are measured, whatever files they lie in.

        Args:
            progress: show a bar.
            look: called after each part; it may raise to end this.
        """
        found, count = hashlib.sha256(), len(self.parts)
        for images, labels in bar(ahead(range(count), self.part), count, "reading", progress):
            if images.ndim == 4:
                images = to_uint8(images)
            found.update(f"{images.dtype} {tuple(images.shape)}\n".encode())
            found.update(images.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            found.update(labels.long().contiguous().numpy().data)
            look()
        return found.hexdigest()

    def known_sha256(
        self,
        cache: Path | None,
        *,
        progress: bool = False,
        look: Callable[[], None] = lambda: None,
    ) -> str:
        """`sha256`; nothing is read where the cache has it beside the data's fingerprint; what was
        found broken then is reported again.

        Args:
            cache: a folder in which it is found, or kept; None: nowhere.
            progress, look: see `sha256`.
        """
        fingerprint = getattr(self._data, "fingerprint", lambda: None)()
        if cache is None or fingerprint is None:
            return self.sha256(progress, look)
        numbers = hashlib.sha256(torch.cat(self.parts).numpy().tobytes()).hexdigest()
        asked = {"layout": LAYOUT, "fingerprint": fingerprint, "numbers": numbers}
        digest = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
        path = cache / f"data-{digest[:16]}.json"
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            bad = [(int(number), str(reason)) for number, reason in kept["bad"]]
            if {key: kept[key] for key in asked} == asked and len(kept["sha256"]) == 64:
                self._data.report(bad)
                return str(kept["sha256"])
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            pass  # there is none, or it is damaged: it is made anew
        self._bad = []
        found = self.sha256(progress, look)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps({**asked, "sha256": found, "bad": self._bad}, indent=1) + "\n")
        return found


def data_sha256(data: Data, numbers: Tensor, *, progress: bool = False) -> str:
    """`Reading.sha256` of these images."""
    return Reading(data, numbers).sha256(progress)


def spread(length: int, count: int) -> Tensor:
    """At most `count` of the numbers 0, 1... below `length`, evenly spread, int64."""
    count = min(length, count)
    return torch.arange(count) * length // max(1, count)


def as_seen(images: Tensor) -> Tensor:
    """Values in [-1, 1] as float32; of pictures as files of 8 bits hold them, so that samples and
    data, files and tensors, are measured alike.

    Raises:
        ValueError: a value is not finite.
    """
    return to_float(to_uint8(images)) if _is_picture(images) else images.float()


def _is_picture(images: Tensor) -> bool:
    return images.dtype == torch.uint8 or (images.ndim == 4 and images.shape[1] <= 4)


def smaller(images: Tensor) -> Tensor:
    """Images of at most `LARGEST` pixels a side, their shape kept."""
    longest = max(images.shape[-2:])
    if longest <= LARGEST or not len(images):
        return images
    size = [max(1, round(side * LARGEST / longest)) for side in images.shape[-2:]]
    return torch.nn.functional.interpolate(
        images, size, mode="bilinear", align_corners=False, antialias=True
    )


def read(data: Data, numbers: Tensor) -> Any:
    """A batch of the data, broken images reported."""
    batch = data.batch(numbers)
    data.report(batch.bad)
    return batch


def ahead(items: Sequence[Any], work: Callable[[Any], T]) -> Iterator[T]:
    """What the work makes of each item, the next one made while one is in use."""
    with ThreadPoolExecutor(1) as pool:
        waiting = [pool.submit(work, item) for item in items[:1]]
        for item in items[1:]:
            done = waiting.pop()
            result = done.result()
            waiting.append(pool.submit(work, item))
            yield result
        for done in waiting:
            yield done.result()


def bar(items: Iterator[T], total: int, name: str, shown: bool) -> Iterator[T]:
    """The items, with a bar on the first process while they come, where somebody looks on."""
    from tqdm import tqdm

    # None: where nobody looks on.
    hidden = None if shown and place()[0] == 0 else True
    return iter(tqdm(items, total=total, desc=name, unit="batch", disable=hidden, leave=False))
