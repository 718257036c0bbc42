"""Ours: each registered backbone, in a size that can be compared."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import k_diffusion
from k_diffusion.models import MODELS, make_model
from model_bench.library import CHANNELS, SIZE, Library, Network

SMALL: dict[str, dict[str, Any]] = {
    "unet": {
        "channels": 64,
        "channel_mults": [1, 2, 2],
        "blocks": 3,
        "attention": [False, False, True],
    },
    "hourglass": {},
    "dit": {},
    "mp_unet": {},
}
"""Backbone -> options that give it 6 to 10 million parameters and 2 to 4 GFLOP an image."""


def network(name: str, options: Mapping[str, Any]) -> Network:
    """A registered model as a network to measure."""
    config = {"type": name, "in_channels": CHANNELS, **options}
    return Network(
        name,
        make=lambda: make_model(config),
        options=", ".join(f"{k}={v}" for k, v in options.items()),
        checkpointed=lambda: make_model({**config, "checkpointing": True}),
    )


def library(folder: Path) -> Library:
    found = Library("k_diffusion (ours)", k_diffusion.__version__, [])
    for name, options in SMALL.items():
        if name in MODELS:
            found.networks.append(network(name, options))
        else:
            found.missing.append(f"{name}: not registered, not measured")
    return found
