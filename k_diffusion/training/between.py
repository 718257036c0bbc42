"""Batches on their way from the processes that load to the one that trains."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from k_diffusion.training.dataset import Batch, Stream


def loaded(stream: Stream, steps: range, workers: int, pin_memory: bool) -> Iterator[Batch]:
    """The batches of some steps, in their order.

    Args:
        stream: makes each.
        steps: counted from 0.
        workers: processes that make them ahead; 0: this one makes each when it is asked for.
        pin_memory: copy them to where a GPU reads faster.
    """
    packs = workers > 0 and not pin_memory  # only tensors are pinned
    with warnings.catch_warnings():
        # The run has said it in its own words, see `crowding`.
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        loader: Any = torch.utils.data.DataLoader(
            stream,  # type: ignore[arg-type]
            batch_size=None,
            sampler=steps,
            num_workers=workers,
            collate_fn=packed if packs else as_is,  # type: ignore[arg-type]
            pin_memory=pin_memory,
            worker_init_fn=leave_signals,
            generator=torch.Generator(),  # else it would draw from the global one
        )
        batches = iter(loader)
    yield from map(unpacked, batches) if packs else batches


def crowding(workers: int, processes: int) -> str:
    """What to say of more processes that load than the machine has cores; else nothing.

    Args:
        workers: of each process that trains.
        processes: that train on this machine.
    """
    known = getattr(os, "sched_getaffinity", None)
    cores = len(known(0)) if known else os.cpu_count() or 1
    if workers * processes <= cores:
        return ""
    each = f" for each of {processes} processes" if processes > 1 else ""
    return f"workers = {workers}{each} on {cores} cores: more than cores load no faster"


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
