"""Made data for the tests of evaluation."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from k_diffusion.evaluation import FeatureExtractor


class Batch(NamedTuple):
    images: Tensor
    labels: Tensor
    bad: tuple[Any, ...] = ()


class Pictures:
    """Images in memory, which count how often they are read."""

    def __init__(self, images: Tensor, labels: Tensor | None = None) -> None:
        self.images = images
        self.labels = torch.zeros(len(images), dtype=torch.int64) if labels is None else labels
        self.read = 0

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Tensor) -> Batch:
        self.read += len(indices)
        return Batch(self.images[indices], self.labels[indices])

    def report(self, bad: Any) -> None:
        assert not bad


class Project(FeatureExtractor):
    """A fixed linear map to a few features."""

    name = "project"
    input = "as they are"

    def __init__(self, values: int, size: int = 6, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.map = nn.Parameter(torch.randn(values, size, generator=generator))
        self.frozen("cpu")
        self.seen = 0

    def forward(self, images: Tensor) -> Tensor:
        self.seen += len(images)
        return images.flatten(1) @ self.map


def bars(count: int, seed: int = 0, noise: float = 0.2) -> tuple[Tensor, Tensor]:
    """Noisy pictures of a bar, upright (class 0) or lying (class 1), as bytes; and the classes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (count,), generator=generator)
    size = 8
    places = torch.randint(size, (count,), generator=generator)
    images = noise * torch.randn(count, 1, size, size, generator=generator) - 0.6
    for image, label, place in zip(images, labels, places, strict=True):
        (image[0] if label else image[0].T)[place] += 1.3
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8), labels
