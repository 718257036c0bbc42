"""Runs' metrics made by hand."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

CONFIG: dict[str, Any] = {
    "batch_size": 32,
    "total_images": 320_000,
    "grad_clip": 1.0,
    "precision": "no",
    "model": {"type": "unet", "prediction": "edm", "sigma_data": 0.5},
    "optimizer": {"lr": 1e-3},
    "ema": {"max_decay": 0.999, "profiles": []},
    "spikes": {"roll_back": False},
}
DATA = {"shape": [1, 8, 8], "images": 1000, "mean": 0.05, "std": 0.5}
EDGES = [0.1, 0.2, 0.3, 0.5, 0.8, 1.2, 2.0]


def start(config: Mapping[str, Any] = {}, **facts: Any) -> dict[str, Any]:
    made = {**CONFIG, **{k: {**CONFIG.get(k, {}), **v} if isinstance(v, dict) else v
                         for k, v in config.items()}}  # fmt: skip
    return {"event": "start", "config": made, "data": DATA, "band_edges": EDGES, **facts}


def line(step: int, **facts: Any) -> dict[str, Any]:
    """A train line of a run in which all is well."""
    share = 0.3 + 0.7 * math.exp(-step / 100)
    noise = 1 + 0.02 * random.Random(step).uniform(-1, 1)
    usual = {
        "step": step,
        "images_seen": 32 * step,
        "loss": share * noise,
        "grad_norm": 0.5,
        "lr": 1e-3,
        "ema_decay": 0.98,
        "skipped_steps": 0,
        "images_per_second": 100.0,
        "bands": [share * noise] * 8,
    }
    return {"event": "train", **usual, **facts}


def course(count: int = 60, every: int = 10) -> list[dict[str, Any]]:
    """The first line and so many train lines of a run in which all is well."""
    return [start(), *(line(every * k) for k in range(1, count + 1))]


def write(folder: Path, facts: Iterable[Mapping[str, Any] | str]) -> Path:
    """The folder of a run with these lines; a text is written as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [fact if isinstance(fact, str) else json.dumps(fact) for fact in facts]
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return folder
