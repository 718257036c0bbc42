"""`k-diffusion info`: what is in a checkpoint."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from .plugins import Plugins, load_plugins
from .values import newest_in

if TYPE_CHECKING:
    from k_diffusion.training.checkpoint import CheckpointInfo


@dataclass
class Info:
    """Say what is in a checkpoint, after verifying every bit of it; print its model card."""

    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """A .safetensors file that `k-diffusion train` or `export` wrote, or a run's folder: the newest
    in it."""
    json: bool = False
    """Print JSON."""
    plugin: Plugins = ()
    """A Python file or module of your own, which registers models; again for more."""

    def run(self) -> None:
        from k_diffusion.training.checkpoint import read_info

        load_plugins(self.plugin)
        facts = checkpoint_facts(read_info(newest_in(self.checkpoint)))
        if self.json:
            print(json.dumps(facts, indent=2))
            return
        card = facts.pop("card", "")
        if card:
            print(card)
        for name, value in facts.items():
            if isinstance(value, dict):
                print(f"{name}:")
                lines = list(_flattened(value))
                width = max((len(key) for key, _ in lines), default=0)
                for key, shown in lines:
                    print(f"  {key:<{width}}  {shown}")
            else:
                print(f"{name + ':':<16}{_shown(value)}")


def checkpoint_facts(info: CheckpointInfo) -> dict[str, Any]:
    """What `info` tells, as JSON data."""
    from k_diffusion.models.registry import MODELS, PRESETS, model_trait

    model = info.config.get("model", {})
    known = model.get("type") in {*MODELS, *MODELS.homes, *PRESETS}
    return {
        "checkpoint": str(info.path),
        "sha256": info.sha256,
        "bytes": info.bytes,
        "images seen": info.images_seen,
        "steps": info.step,
        "model": model.get("type", "?"),
        "known here": known,  # else --plugin FILE.py makes it known
        "prediction": model_trait(model, "prediction", "eps") if known else "?",
        "parameters": info.parameters,
        "weights": info.weights,
        "parts": sorted({name.partition("/")[0] for name in info.tensors}),
        "data": info.data,
        "config": info.config,
    } | ({"card": info.card} if info.card else {})


def _flattened(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    found = []
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            found += _flattened(value, f"{prefix}{key}.")
        else:
            found.append((prefix + key, _shown(value)))
    return found


def _shown(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, (list, tuple)):
        return ", ".join(str(item) for item in value)
    return str(value)
