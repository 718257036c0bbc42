"""A mixture of Gaussians whose classes are its components: the exact denoiser, guided in tests."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from k_diffusion.utils.levels import VE, Path

MEANS = torch.tensor([[-1.0, 0.5], [0.8, 1.0], [0.3, -1.2]], dtype=torch.float64)
SPREAD = 0.3
CLASSES = len(MEANS)


class Mixture:
    """The exact denoiser of three Gaussians; class_label chooses one, 3 (or none) is all."""

    float64_sigma = True

    def __init__(self, path: Path = VE) -> None:
        self.path = path
        self.rows: list[int] = []

    def alpha(self, sigma: Any) -> Any:
        return self.path.alpha(sigma)

    def __call__(self, x: Tensor, sigma: Tensor, class_label: Tensor | None = None) -> Tensor:
        self.rows.append(len(x))
        alpha = self.alpha(sigma.double())
        variance = (alpha * SPREAD) ** 2 + sigma.double() ** 2
        away = x.double()[:, None] - alpha[:, None, None] * MEANS
        logits = -away.square().sum(2) / (2 * variance[:, None])
        if class_label is not None:
            classes = torch.arange(CLASSES)
            other = (class_label[:, None] != classes) & (class_label[:, None] < CLASSES)
            logits = logits.masked_fill(other, -math.inf)
        gain = alpha * SPREAD**2 / variance
        estimates = MEANS + gain[:, None, None] * away
        return (logits.softmax(1)[..., None] * estimates).sum(1).to(x.dtype)


NULL = {"class_label": torch.tensor([CLASSES] * 4)}


def given(path: Path, at: float = 0.7) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 2, dtype=torch.float64, generator=generator)
    return x, torch.full((4,), at, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
