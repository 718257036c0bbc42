"""A network small enough to train in a test, known to the registry of models as "tiny"."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import k_diffusion.models as models
from k_diffusion.training.config import TrainConfig, make_config


class Tiny(nn.Module):
    """Two layers with dropout, class embedding and a buffer."""

    def __init__(
        self,
        in_channels: int = 1,
        width: int = 8,
        num_classes: int = 0,
        dropout: float = 0.0,
        prediction: str = "eps",
        time_convention: str = "timestep",
        sigma_data: float = 0.5,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.prediction = prediction
        self.time_convention = time_convention
        self.sigma_data = sigma_data
        self.enter = nn.Conv2d(in_channels, width, 3, padding=1)
        self.classes = nn.Embedding(num_classes + 1, width)
        self.time = nn.Linear(1, width)
        self.dropout = nn.Dropout(dropout)
        self.leave = nn.Conv2d(width, in_channels, 3, padding=1)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Tiny:
        return cls(**config)

    def forward(self, x: Tensor, t: Tensor, class_label: Tensor | None = None) -> Tensor:
        self.calls += 1
        hidden = self.enter(x) + self.time(t[:, None].to(x.dtype))[..., None, None]
        if class_label is not None:
            hidden = hidden + self.classes(class_label)[..., None, None]
        return self.leave(self.dropout(torch.nn.functional.silu(hidden)))


def make_tiny(config: dict[str, Any]) -> nn.Module:
    options = dict(config)
    options.pop("type")
    return Tiny(**options)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> type[Tiny]:
    torch.set_num_threads(1)
    if hasattr(models, "MODELS"):
        monkeypatch.setitem(models.MODELS, "tiny", Tiny)
    else:
        monkeypatch.setattr(models, "make_model", make_tiny, raising=False)
    return Tiny


def config_of(out: Path, **changes: Any) -> TrainConfig:
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
        "out": str(out),
    }
    return make_config(data | changes)


@pytest.fixture
def make_run_config(tmp_path: Path) -> Any:
    """Keys of TrainConfig to change -> the config of a run of 20 small steps."""
    return lambda **changes: config_of(tmp_path / "run", **changes)
