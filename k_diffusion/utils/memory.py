"""Devices without memory left: to know it by its error, and to give back what nobody holds."""

from __future__ import annotations

import gc

import torch

_SAID = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "allocation failed",
    "alloc_failed",  # cuBLAS, cuDNN
    "cudnn_status_not_supported",  # which is what cuDNN says of a batch too large for it
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device, or the host, has no memory left."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    said = str(error).lower()
    return isinstance(error, RuntimeError) and any(word in said for word in _SAID)


def release_memory(device: torch.device | str | None = None) -> None:
    """Give what nobody holds any more back to the device."""
    gc.collect()
    kind = "cpu" if device is None else torch.device(device).type
    if kind == "cuda":
        torch.cuda.empty_cache()
    elif kind == "xpu":
        torch.xpu.empty_cache()
    elif kind == "mps":
        torch.mps.empty_cache()
