"""The gradient of a step, in as many parts as memory asks for.

A step's batch is cut into micro-batches; their gradients add up to that of the whole. Where the
device runs out of memory the micro-batch is halved and the same step is computed again: nothing
of the step is lost, and its gradient stays the same to rounding.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from k_diffusion.training.devices import backward
from k_diffusion.training.inputs import Inputs
from k_diffusion.training.noise_scale import PartNorms

if TYPE_CHECKING:
    from k_diffusion.training.joining import Joining


class OutOfMemory(RuntimeError):
    """A step does not fit into the device's memory, and nothing can be made smaller."""


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
    way: Joining,
    inputs: Inputs,
    micro_batch: int,
    *,
    seed_part: Callable[[Inputs], None],
    norms: PartNorms | None = None,
) -> Tensor:
    """Forward and backward in micro-batches; gradients are added to those of the weights.

    Args:
        way: how the processes' gradients are joined; its module gives each sample's loss.
        inputs: of this process.
        micro_batch: the largest number of samples at a time.
        seed_part: seeds the network's own randomness for a micro-batch.
        norms: takes the norm of each micro-batch's gradient.

    Returns:
        The loss of each sample, detached, shape (B,). The gradient is that of their mean, once
        `way.finish` has been called.
    """
    losses = []
    parts = even_parts(len(inputs), micro_batch)
    for start, stop in parts:
        part = inputs.part(start, stop) if len(parts) > 1 else inputs
        seed_part(part)
        last = stop == len(inputs)
        with way.joining(last):
            loss = way.module(part.x0, part.sigma, part.noise, **part.keywords)
            backward(way.accelerator, loss.sum() / len(inputs))
        losses.append(loss.detach())
        if norms is not None:
            norms.take(len(part))
    if norms is not None:
        norms.give_back()
    return torch.cat(losses) if len(losses) > 1 else losses[0]
