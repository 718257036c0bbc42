"""Which weights a pipeline has, in a few characters."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

READ = 4096
"""Of each weight, this many numbers at most are read: weights that differ, differ everywhere."""


def fingerprint(pipeline: Any) -> str:
    """32 hexadecimal digits of a pipeline's modules: their names and weights.

    Of a weight, up to `READ` numbers at even distances count, as they are on the device.
    """
    found = hashlib.sha256()
    for name, module in sorted(pipeline.components.items()):
        if not isinstance(module, nn.Module):
            continue
        found.update(f"{name} {type(module).__name__}".encode())
        for key, value in module.state_dict().items():
            found.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
            found.update(_some(value))
    return found.hexdigest()[:32]


def _some(weight: Tensor) -> bytes:
    flat = weight.detach().flatten()
    flat = flat[:: max(1, -(-flat.numel() // READ))].cpu().contiguous()
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
