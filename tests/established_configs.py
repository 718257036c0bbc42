"""Configs of the established trainer, small, and a way to change them."""

from __future__ import annotations

from typing import Any

V1: dict[str, Any] = {
    "type": "image_v1",
    "input_channels": 3,
    "input_size": [16, 8],
    "mapping_out": 16,
    "depths": [1, 1],
    "channels": [8, 16],
    "self_attn_depths": [False, True],
    "sigma_data": 0.5,
    "sigma_min": 0.01,
    "sigma_max": 80,
    "sigma_sample_density": {"type": "lognormal", "mean": -1.2, "std": 1.2},
}
T1: dict[str, Any] = {
    "type": "image_transformer_v1", "input_channels": 3, "patch_size": [4, 4], "width": 64,
    "depth": 1,
}  # fmt: skip
T2: dict[str, Any] = {
    "type": "image_transformer_v2", "input_channels": 3, "patch_size": [4, 4],
    "widths": [64, 128], "depths": [1, 2],
}  # fmt: skip


def config(model: dict[str, Any] = V1, /, dataset: Any = None, **more: Any) -> dict[str, Any]:
    """A config with some of its model's keys changed; those that are None are left out."""
    changed = {key: value for key, value in {**model, **more}.items() if value is not ...}
    return {"model": changed} | ({"dataset": dataset} if dataset else {})
