"""Hashes that seal a checkpoint, and what sees that its bytes are on the disk."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from k_diffusion.training.tensor_file import tensor_bytes


def canonical_json(value: Any) -> str:
    """JSON data as the one text that stands for it: equal data have equal bytes, and hashes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def tensor_hash(dtype: torch.dtype, shape: tuple[int, ...]) -> Any:
    """SHA-256 of a tensor, of which the bytes are still to come."""
    return hashlib.sha256(f"{dtype} {shape} ".encode())


def digest_of(tensor: Tensor) -> str:
    """SHA-256 of a CPU tensor's dtype, shape and bytes."""
    digest = tensor_hash(tensor.dtype, tuple(tensor.shape))
    digest.update(tensor_bytes(tensor))
    return str(digest.hexdigest())


def seal_of(metadata: Mapping[str, Any]) -> str:
    """SHA-256 of a checkpoint's metadata, in which the seal itself counts as empty."""
    return hashlib.sha256(canonical_json({**metadata, "sha256": ""}).encode()).hexdigest()


def forget(handle: int) -> None:
    """Let the system drop its copy of a flushed file, so that reading it asks the disk."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)


def flush_folder(path: Path) -> None:
    """Make the system write a folder's entries to the disk."""
    if os.name == "nt":
        return  # Windows has no handle on a folder
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
