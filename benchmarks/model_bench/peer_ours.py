"""Ours: each registered backbone, in a size that can be compared, and one for a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import k_diffusion
from k_diffusion import models
from model_bench.library import CHANNELS, SIZE, Library, Network

PRESETS: Mapping[str, Any] = getattr(models, "PRESETS", {})

UNET = {"channels": 96, "channel_mults": [1, 1, 2], "blocks": 2}
SMALL: dict[str, dict[str, Any]] = {
    "unet": {"type": "unet_small"} if "unet_small" in PRESETS else {"type": "unet", **UNET},
    "mp_unet": {
        "type": "mp_unet",
        "channels": 64,
        "channel_mults": [1, 2, 2],
        "attention": [False, False, True],
    },
    "hourglass": {
        "type": "hourglass",
        "patch_size": 2,
        "widths": [256, 320],
        "depths": [2, 2],
    },
    "dit": {"type": "dit", "patch_size": 2, "width": 256, "depth": 7},
}
"""Backbone -> a config with 6 to 10 million parameters and 2 to 4 GFLOP an image."""

LARGE = {"unet_base": 64}
"""Preset -> height and width of its images, on a GPU."""


def network(name: str, config: Mapping[str, Any], size: int = SIZE, large: bool = False) -> Network:
    """A registered model as a network to measure."""
    config = {**config, "in_channels": CHANNELS}
    return Network(
        name,
        make=lambda: models.make_model(config),
        options=", ".join(f"{k}={v}" for k, v in config.items()),
        checkpointed=lambda: models.make_model({**config, "checkpointing": True}),
        size=size,
        large=large,
    )


def library(folder: Path) -> Library:
    found = Library("k_diffusion (ours)", k_diffusion.__version__, [])
    for name, config in SMALL.items():
        if name in models.MODELS:
            found.networks.append(network(name, config))
        else:
            found.missing.append(f"{name}: not registered, not measured")
    for name, size in LARGE.items():
        if name in PRESETS:
            found.networks.append(network(name, {"type": name}, size, large=True))
        else:
            found.missing.append(f"{name}: no such preset, not measured")
    return found
