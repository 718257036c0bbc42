"""A few steps and what they leave, and a network that remembers what it was shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from k_diffusion.training.checkpoint import read_checkpoint
from k_diffusion.training.config import TrainConfig
from k_diffusion.training.trainer import Trainer

PARTS = ("model", "ema", "optimizer")


def contents(path: Path) -> dict[str, Tensor]:
    _, parts = read_checkpoint(path, PARTS)
    return {f"{part}/{name}": t for part, named in parts.items() for name, t in named.items()}


def assert_bitwise(one: Path, other: Path) -> None:
    """Two checkpoints hold the same tensors."""
    left, right = contents(one), contents(other)
    assert set(left) == set(right)
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


def train(config: TrainConfig, path: Path, steps: int | None = None, **kwargs: Any) -> list[float]:
    """Train some steps (all: None), save, and give the losses."""
    trainer = Trainer(config, **kwargs)
    losses = []
    if steps != 0:
        for state in trainer:
            losses.append(state.loss)
            if steps is not None and len(losses) == steps:
                break
    trainer.save(path)
    return losses


class Spy(nn.Module):
    """Remembers what it was shown; predicts a learned constant."""

    prediction = "flow"
    time_convention = "unit"
    num_classes = 10

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.spare = nn.Parameter(torch.ones(2))  # never used: it has no gradient
        self.seen: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def forward(self, x: Tensor, t: Tensor, class_label: Tensor) -> Tensor:
        self.seen.append((x, t, class_label, torch.rand(3)))
        return self.weight.expand_as(x)


FLOW = {"type": "tiny", "num_classes": 10, "prediction": "flow", "time_convention": "unit"}
