"""Features of real images: measured once for each data set and extractor, then kept in a file."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from k_diffusion.evaluation.extractors import FeatureExtractor
from k_diffusion.evaluation.gathering import joined_moments, joined_rows, on_first, place
from k_diffusion.evaluation.moments import Moments
from k_diffusion.utils.images import to_float, to_uint8, write_whole
from k_diffusion.utils.words import reason_of

MOST = 50_000
"""Images that a data set is measured by, unless more are asked for; and features that are kept."""
BATCH = 64
LAYOUT = 1
"""Of the files; another number, and they are measured anew."""

T = TypeVar("T")


class Data(Protocol):
    """Real images: what `k_diffusion.training` calls a source, for one."""

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


@dataclass(frozen=True)
class Statistics:
    """What is known of a data set's features.

    Attributes:
        moments: of all images that were measured.
        features: of at most `MOST` of them, evenly spread, float32, shape (kept, features).
        numbers: of these in the data, int64, shape (kept,).
        facts: JSON data: "extractor", "data sha256", "images", "classes" (how many of each).
    """

    moments: Moments
    features: Tensor
    numbers: Tensor
    facts: dict[str, Any]

    def evenly(self, count: int) -> Tensor:
        """The features of at most so many images, evenly spread."""
        return self.features[spread(len(self.features), count)]

    def save(self, path: Path) -> None:
        """Write all of it into one safetensors file, whole or not at all; the facts are JSON in its
        header."""
        from safetensors.torch import save_file

        tensors = {
            "mean": self.moments.mean.cpu(),
            "scatter": self.moments.scatter.cpu(),
            "count": torch.tensor(self.moments.count),
            "features": self.features.contiguous(),
            "numbers": self.numbers,
        }
        text = {"statistics": json.dumps(self.facts)}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda file: save_file(tensors, file, metadata=text))

    @classmethod
    def load(cls, path: Path) -> Statistics:
        """What `save` wrote.

        Raises:
            ValueError: it is missing, damaged or something else.
        """
        from safetensors import safe_open

        try:
            with safe_open(path, "pt") as file:
                facts = json.loads((file.metadata() or {})["statistics"])
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            moments = Moments(len(found["mean"]))
            moments.count, moments.mean = int(found["count"]), found["mean"]
            moments.scatter = found["scatter"]
            return cls(moments, found["features"], found["numbers"], facts)
        except Exception as error:  # of a file that may hold anything
            reason = reason_of(error)[:200]
            raise ValueError(f"{path} holds no statistics of features ({reason})") from None


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
    if images.dtype == torch.uint8 or (images.ndim == 4 and images.shape[1] <= 4):
        return to_float(to_uint8(images))
    return images.float()


def data_sha256(data: Data, numbers: Tensor, *, progress: bool = False) -> str:
    """A hash of images and classes as they are measured, whatever files they lie in."""
    found = hashlib.sha256()
    parts = numbers.split(BATCH)
    for batch in bar(ahead(parts, lambda part: read(data, part)), len(parts), "reading", progress):
        images = to_uint8(batch.images) if batch.images.ndim == 4 else batch.images.float()
        found.update(f"{images.dtype} {tuple(images.shape)}\n".encode())
        found.update(images.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        found.update(batch.labels.long().contiguous().numpy().data)
    return found.hexdigest()


def measure_data(
    data: Data,
    extractor: FeatureExtractor,
    *,
    sha256: str,
    most: int = MOST,
    cache: Path | None = None,
    device: torch.device | str = "cpu",
    progress: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Statistics:
    """The features of a data set; all processes share the work, and all have the result.

    Args:
        data: the images.
        extractor: on its device.
        sha256: of `data_sha256`, over the same images.
        most: images at most, evenly spread over the data.
        cache: a folder where the result is kept, and looked for first; None: nowhere.
        device: the extractor's.
        progress: show a bar.
        say: takes a line where a file in the cache cannot be used.
    """
    extractor_facts = on_first(extractor.facts)
    asked = {
        "layout": LAYOUT,
        "extractor": extractor_facts,
        "data sha256": sha256,
        "images": min(len(data), most),
    }
    path = None if cache is None else cache / statistics_name(asked)

    def look() -> Statistics | None:
        if path is None or not path.exists():
            return None
        try:
            found = Statistics.load(path)
            if {key: found.facts.get(key) for key in asked} == asked:
                return found
            say(f"{path} is of something else: it is measured anew")
        except ValueError as error:
            say(f"{error}: they are measured anew")
        return None

    found = on_first(look)
    if found is None:
        found = _measured(data, extractor, asked, most, device, progress)
        if path is not None:
            on_first(lambda: found.save(path))
    return found


def statistics_name(asked: dict[str, Any]) -> str:
    """The file's name: the extractor's, and a hash of all that decides what is in it."""
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", asked["extractor"]["name"])
    return f"statistics-{name}-{digest[:16]}.safetensors"


def _measured(
    data: Data,
    extractor: FeatureExtractor,
    asked: dict[str, Any],
    most: int,
    device: torch.device | str,
    progress: bool,
) -> Statistics:
    rank, world = place()
    numbers = spread(len(data), most)
    kept = torch.zeros(len(numbers), dtype=torch.bool)
    kept[spread(len(numbers), MOST)] = True
    # The same batches whatever the number of processes, so that features are the same bits.
    parts = list(zip(numbers.split(BATCH), kept.split(BATCH), strict=True))[rank::world]
    moments: Moments | None = None
    features, own, classes = [], [], dict[int, int]()
    batches = ahead([part for part, _ in parts], lambda part: read(data, part))
    for batch, (part, keep) in zip(
        bar(batches, len(parts), "measuring data", progress), parts, strict=True
    ):
        found = extractor(as_seen(batch.images).to(device))
        if moments is None:
            moments = Moments(found.shape[1])
        moments.add(found.cpu())
        features.append(found.float().cpu()[keep])
        own.append(part[keep])
        for label in batch.labels.tolist():
            classes[label] = classes.get(label, 0) + 1
    if world > 1:
        # A process that had nothing to do does not know how many features there are.
        sizes: list[Any] = [None] * world
        said = (None if moments is None else len(moments.mean), classes)
        torch.distributed.all_gather_object(sizes, said)
        size = next(size for size, _ in sizes if size is not None)
        moments = moments or Moments(size)
        features, own = features or [torch.empty(0, size)], own or [torch.empty(0).long()]
        classes = {}
        for _, theirs in sizes:
            for label, count in theirs.items():
                classes[label] = classes.get(label, 0) + count
    assert moments is not None
    rows, order = joined_rows(torch.cat(features), torch.cat(own))
    counts = [classes.get(label, 0) for label in range(max(classes) + 1)]
    return Statistics(joined_moments(moments), rows, order, {**asked, "classes": counts})


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
