"""A network small enough to train in a test, known to the registry of models as "tiny"."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from k_diffusion.models import MODELS
from k_diffusion.models.registry import known_fields
from k_diffusion.training.config import TrainConfig
from k_diffusion.training.config_file import make_config


@dataclass(frozen=True)
class TinyConfig:
    in_channels: int = 1
    width: int = 8
    num_classes: int = 0
    dropout: float = 0.0
    prediction: str = "eps"
    time_convention: str = "timestep"
    sigma_data: float = 0.5


class Tiny(nn.Module):
    """Two layers with dropout, class embedding and a buffer."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.config = config = TinyConfig(**options)
        self.num_classes = config.num_classes
        self.prediction = config.prediction
        self.time_convention = config.time_convention
        self.sigma_data = config.sigma_data
        channels, width = config.in_channels, config.width
        self.enter = nn.Conv2d(channels, width, 3, padding=1)
        self.classes = nn.Embedding(config.num_classes + 1, width)
        self.time = nn.Linear(1, width)
        self.dropout = nn.Dropout(config.dropout)
        self.leave = nn.Conv2d(width, channels, 3, padding=1)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Tiny:
        return cls(**known_fields(TinyConfig, config))

    def forward(self, x: Tensor, t: Tensor, class_label: Tensor | None = None) -> Tensor:
        self.calls += 1
        hidden = self.enter(x) + self.time(t[:, None].to(x.dtype))[..., None, None]
        if class_label is not None:
            hidden = hidden + self.classes(class_label)[..., None, None]
        return self.leave(self.dropout(torch.nn.functional.silu(hidden)))


class Blocks(Tiny):
    """Also a list of blocks, a weight that is a single number, and one that has no part in it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        channels = self.config.in_channels
        self.blocks = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.gain = nn.Parameter(torch.zeros(()))
        self.spare = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor, t: Tensor, class_label: Tensor | None = None) -> Tensor:
        x = super().forward(x, t, class_label)
        for block in self.blocks:
            x = x + block(x)
        return x * (1 + self.gain)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> type[Tiny]:
    torch.set_num_threads(1)
    monkeypatch.setitem(MODELS, "tiny", Tiny)
    monkeypatch.setitem(MODELS, "blocks", Blocks)
    return Tiny


@pytest.fixture(autouse=True)
def opening_unsaid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most tests look at the news of a run that has begun; test_opening has the others."""
    monkeypatch.setattr("k_diffusion.training.run.opening_lines", lambda *a, **k: [])


def config_of(**changes: Any) -> TrainConfig:
    data = {
        "model": {
            "type": "tiny",
            "num_classes": 10,
            "dropout": 0.2,
            "prediction": "edm",
            "time_convention": "log_sigma",
            "sigma_data": "auto",
        },
        "data": {"source": "digits"},
        "total_images": 640,
        "batch_size": 32,
        "seed": 3,
        "log_every_images": 96,
    }
    return make_config(data | changes)


@pytest.fixture
def make_run_config(tmp_path: Path) -> Any:
    """Keys of TrainConfig to change -> the config of a run of 20 small steps."""
    return lambda **changes: config_of(**{"out": str(tmp_path / "run"), **changes})
