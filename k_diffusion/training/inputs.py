"""What a step learns from: each part a function of (seed, step) and of a sample's place in it.

Everything random is drawn for the whole batch and then cut to what a process has of it, so that a
step is the same on any number of processes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from k_diffusion.training.dataset import Purpose
from k_diffusion.utils.maths import fold_seed


@dataclass(frozen=True)
class Inputs:
    """One process's share of a step, or a part of that.

    Attributes:
        x0: clean data, shape (B, ...).
        sigma: noise standard deviations in the denoiser's coordinates, shape (B,).
        noise: unit Gaussian, of x0's shape.
        condition: keyword arguments of the denoiser, B first in each.
        indices: the images' numbers in the source, int64 on the CPU, shape (B,).
        step: of which they are, counted from 0.
        first: the place of the first sample in the whole step's batch.
        raws: raw inputs that an extra loss asked for, B first in each.
    """

    x0: Tensor
    sigma: Tensor
    noise: Tensor
    condition: Mapping[str, Tensor] = field(default_factory=dict)
    indices: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    step: int = 0
    first: int = 0
    raws: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def keywords(self) -> dict[str, Any]:
        """What the objective takes beside x0, sigma and noise."""
        return {**self.condition, **({"raws": self.raws} if self.raws else {})}

    def __len__(self) -> int:
        return len(self.x0)

    def part(self, start: int, stop: int) -> Inputs:
        """The samples from start until stop: views, not copies."""
        cut = slice(start, stop)
        return Inputs(
            x0=self.x0[cut],
            sigma=self.sigma[cut],
            noise=self.noise[cut],
            condition={name: value[cut] for name, value in self.condition.items()},
            indices=self.indices[cut],
            step=self.step,
            first=self.first + start,
            raws={name: value[cut] for name, value in self.raws.items()},
        )


def draw_noise(seed: int, step: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Unit Gaussian for a whole batch, shape (B, ...): decided by seed, step and kind of device."""
    generator = torch.Generator(device).manual_seed(fold_seed(seed, Purpose.NOISE, step))
    return torch.randn(shape, generator=generator, device=device)


def draw_hidden(seed: int, step: int, batch: int, share: float) -> Tensor:
    """Which samples of a whole batch go without their condition, bool on the CPU, shape (B,)."""
    generator = torch.Generator().manual_seed(fold_seed(seed, Purpose.LABELS, step))
    return torch.rand(batch, generator=generator) < share
