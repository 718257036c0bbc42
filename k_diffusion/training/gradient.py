"""The gradient of a step, in as many parts as memory asks for.

A step's batch is cut into micro-batches; their gradients add up to that of the whole. Where the
device runs out of memory the micro-batch is halved and the same step is computed again: nothing
of the step is lost, and its gradient stays the same to rounding.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from k_diffusion.training.devices import backward
from k_diffusion.training.inputs import Inputs


class OutOfMemory(RuntimeError):
    """Not even one sample at a time fits into the device's memory."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device has no memory left."""
    from accelerate.utils.memory import should_reduce_batch_size

    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, Exception) and should_reduce_batch_size(error)
    )


def release_memory(device: torch.device) -> None:
    """Give what nobody holds any more back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "xpu":
        torch.xpu.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def even_parts(total: int, largest: int) -> list[tuple[int, int]]:
    """(start, stop) of as few parts of at most `largest` as make up `total`, as even as can be."""
    count = -(-total // largest)
    edges = [total * i // count for i in range(count + 1)]
    return list(itertools.pairwise(edges))


def largest_that_fits(fits: Callable[[int], bool], limit: int, slack: float = 0.02) -> int:
    """The largest size that fits, to a share of `slack`; sizes above one that fails fail too.

    Args:
        fits: whether a size does, by trying it.
        limit: the largest that is wanted.

    Raises:
        OutOfMemory: not even 1 does.
    """
    if fits(limit):
        return limit
    good, bad = 0, limit
    while bad - good > max(1, int(slack * good)):
        size = (good + bad) // 2
        good, bad = (size, bad) if fits(size) else (good, size)
    if not good:
        raise OutOfMemory("not even one sample at a time fits into memory")
    return good


def add_gradients(
    module: nn.Module,
    inputs: Inputs,
    micro_batch: int,
    *,
    accelerator: Any,
    seed_part: Callable[[Inputs], None],
) -> Tensor:
    """Forward and backward in micro-batches; gradients are added to those of the weights.

    Args:
        module: from accelerate; inputs -> the loss of each sample.
        inputs: of this process.
        micro_batch: the largest number of samples at a time.
        accelerator: scales the loss for float16, and joins the processes' gradients with the last
            micro-batch's.
        seed_part: seeds the network's own randomness for a micro-batch.

    Returns:
        The loss of each sample, detached, shape (B,). The gradient is that of their mean.
    """
    losses = []
    parts = even_parts(len(inputs), micro_batch)
    for start, stop in parts:
        part = inputs.part(start, stop) if len(parts) > 1 else inputs
        seed_part(part)
        last = stop == len(inputs)
        with nullcontext() if last else accelerator.no_sync(module):
            loss = module(part.x0, part.sigma, part.noise, **part.keywords)
            backward(accelerator, loss.sum() / len(inputs))
        losses.append(loss.detach())
    return torch.cat(losses) if len(losses) > 1 else losses[0]
