"""What an adapter has to be, the stopwatch that it is measured by, and the images on disk."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

SIZE, CHANNELS = 32, 3  # of an image
INSIDE = ("forward", "backward")
PARTS = ("data", "clip", "optimizer", "ema")
"""Of a step outside forward and backward; what is none of these is called "other"."""


@dataclass(frozen=True)
class Setting:
    """What both libraries are to do.

    Attributes:
        images: folder with PNG files.
        batch: images a step.
        workers: processes that load.
        network: options of the peer's Unet, which both train.
    """

    images: str
    batch: int
    workers: int
    network: dict[str, Any]


class Training(Protocol):
    """A library's training, ready to go on."""

    name: str
    version: str
    parameters: int

    def run(self, steps: int, ema_every: int, watch: Stopwatch) -> None:
        """Some more steps; `watch.lap` is called as each begins, and `watch.stop` after the last.

        Args:
            steps: how many.
            ema_every: steps between updates of the average.
            watch: has been made to time the parts.
        """
        ...

    def load(self, number: int) -> Any:
        """The batch of a number, made in this process."""
        ...

    def close(self) -> None:
        """No more will be asked."""
        ...


@dataclass
class Stopwatch:
    """Seconds of each step and of its parts, by the wall clock.

    Attributes:
        steps: one dict a step: "total", and each part that took time.
    """

    steps: list[dict[str, float]] = field(default_factory=list)
    _begun: float | None = None

    def lap(self) -> None:
        """A step begins, and the one before has ended."""
        self.stop()
        self.steps.append({})
        self._begun = time.perf_counter()

    def stop(self) -> None:
        """The last step has ended."""
        if self._begun is not None:
            self.steps[-1]["total"] = time.perf_counter() - self._begun
            self._begun = None

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose time counts as that part of the step in which it is called."""

        def call(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                if self._begun is not None:
                    step = self.steps[-1]
                    step[part] = step.get(part, 0.0) + time.perf_counter() - start

        return call

    def watch_calculation(self, network: nn.Module) -> None:
        """Time forward of this network, and backward of all in this process."""
        network.forward = self.timed("forward", network.forward)  # type: ignore[method-assign]
        torch.autograd.backward = self.timed("backward", torch.autograd.backward)


class Laps:
    """Batches, each of which begins a step; waiting for it is the step's part "data"."""

    def __init__(self, batches: Iterator[Any], watch: Stopwatch) -> None:
        self._watch = watch
        self._next = watch.timed("data", lambda: next(batches))

    def __iter__(self) -> Laps:
        return self

    def __next__(self) -> Any:
        self._watch.lap()
        return self._next()


def make_images(folder: Path, count: int, size: int = SIZE) -> None:
    """PNG files of 3 x size x size in a folder: smooth patterns, as photographs are."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    for i in range(count):
        coarse = torch.rand(1, CHANNELS, 8, 8, generator=generator)
        fine = nn.functional.interpolate(coarse, size=(size, size), mode="bicubic")[0]
        fine = (fine + 0.05 * torch.randn(fine.shape, generator=generator)).clamp(0, 1)
        image = np.ascontiguousarray((fine * 255).byte().permute(1, 2, 0).numpy())
        Image.fromarray(image).save(folder / f"{i:06d}.png")
