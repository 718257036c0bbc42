"""Features of real images: measured once for each data set and extractor, then kept in a file."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from k_diffusion.evaluation.extractors import FeatureExtractor
from k_diffusion.evaluation.gathering import (
    joined_moments,
    joined_rows,
    look_last,
    on_first,
    place,
)
from k_diffusion.evaluation.moments import Moments
from k_diffusion.evaluation.reading import (
    BATCH,
    Data,
    Reading,
    ahead,
    as_seen,
    bar,
    data_sha256,
    read,
    spread,
)
from k_diffusion.utils.images import write_whole
from k_diffusion.utils.words import reason_of

__all__ = [
    "MOST",
    "Data",
    "Statistics",
    "as_seen",
    "data_sha256",
    "measure_data",
    "read",
    "spread",
    "statistics_name",
]

MOST = 50_000
"""Images that a data set is measured by, unless more are asked for; and features that are kept."""
LAYOUT = 1
"""Of the files; another number, and they are measured anew."""


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
    reading: Reading | None = None,
    look: Callable[[], None] = lambda: None,
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
        reading: of these images, which may hold some of them.
        look: called by all processes after each of their batches; it may raise to end this.
    """
    extractor_facts = on_first(extractor.facts)
    asked = {
        "layout": LAYOUT,
        "extractor": extractor_facts,
        "data sha256": sha256,
        "images": min(len(data), most),
    }
    path = None if cache is None else cache / statistics_name(asked)

    def kept() -> Statistics | None:
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

    found = on_first(kept)
    if found is None:
        reading = reading or Reading(data, spread(len(data), most))
        found = _measured(reading, extractor, asked, device, progress, look)
        if path is not None:
            on_first(lambda: found.save(path))
    return found


def statistics_name(asked: dict[str, Any]) -> str:
    """The file's name: the extractor's, and a hash of all that decides what is in it."""
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", asked["extractor"]["name"])
    return f"statistics-{name}-{digest[:16]}.safetensors"


def _measured(
    reading: Reading,
    extractor: FeatureExtractor,
    asked: dict[str, Any],
    device: torch.device | str,
    progress: bool,
    look: Callable[[], None],
) -> Statistics:
    rank, world = place()
    count = sum(map(len, reading.parts))
    kept = torch.zeros(count, dtype=torch.bool)
    kept[spread(count, MOST)] = True
    # The same batches whatever the number of processes, so that features are the same bits.
    parts = list(zip(reading.parts, kept.split(BATCH), strict=True))[rank::world]
    moments: Moments | None = None
    features, own, classes = [], [], dict[int, int]()
    batches = ahead(range(len(reading.parts))[rank::world], reading.part)
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
        look()
    look_last(len(reading.parts), look)
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
