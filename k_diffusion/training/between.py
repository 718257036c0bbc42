"""Batches on their way from the processes that load to the one that trains."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from k_diffusion.training.dataset import Batch


def as_is(batch: Batch) -> Batch:
    return batch


PACKED = 2**16
"""Bytes of the largest tensor that goes through the pipe itself."""

_TENSORS = ("images", "labels", "indices")


def packed(batch: Batch) -> Batch:
    """A batch with its small tensors as numpy arrays, which go through the pipe to the main process
    as they are; a tensor is a file in shared memory, made, handed over and mapped, which costs the
    step more than a copy of a few kilobytes."""
    tensors = {name: getattr(batch, name) for name in _TENSORS}
    return batch._replace(**{n: t.numpy() for n, t in tensors.items() if _is_small(t)})


def _is_small(tensor: Tensor) -> bool:
    """Whether an array may take its place: none is of bfloat16, or keeps the strides."""
    plain = tensor.new_empty(tensor.shape).stride() == tensor.stride()
    return plain and tensor.dtype != torch.bfloat16 and tensor.nbytes <= PACKED


def unpacked(batch: Batch) -> Batch:
    """The batch that `packed` was given, bit for bit and stride for stride."""
    values = {name: getattr(batch, name) for name in _TENSORS}
    tensors: dict[str, Any] = {
        name: torch.from_numpy(value)
        for name, value in values.items()
        if not isinstance(value, Tensor)
    }
    return batch._replace(**tensors)


def leave_signals(worker: int) -> None:
    """Ctrl-C goes to the whole group of processes; ending it orderly is the first one's affair."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
