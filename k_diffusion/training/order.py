"""Which bucket of sizes a step's batch is of: a function of the seed and the step."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from k_diffusion.utils.maths import fold_seed

_FINE = 64
"""Steps of a cycle for each bucket, at least: the more, the nearer to the shares of images."""


def bucket_step(counts: tuple[int, ...], batch_size: int, seed: int, step: int) -> tuple[int, int]:
    """The bucket of a step, and how many steps before it were of the same.

    Steps go in cycles of at least an epoch. In each, every bucket has as many as its share of the
    images, rounded, but one at least if it has any image; their order is drawn anew.

    Args:
        counts: images of each bucket.
        batch_size: images a step.
        seed: decides the order.
        step: counted from 0.
    """
    shares = _shares(counts, batch_size)
    cycle, place = divmod(step, sum(shares))
    order = _cycle(shares, seed, cycle)
    bucket = int(order[place])
    return bucket, cycle * shares[bucket] + int((order[:place] == bucket).sum())


@functools.lru_cache(maxsize=8)
def _shares(counts: tuple[int, ...], batch_size: int) -> tuple[int, ...]:
    """Steps of each bucket in a cycle."""
    images = sum(counts)
    steps = max(-(-images // batch_size), _FINE * len(counts))
    return tuple(max(1, round(steps * count / images)) if count else 0 for count in counts)


@functools.lru_cache(maxsize=4)
def _cycle(shares: tuple[int, ...], seed: int, cycle: int) -> Tensor:
    buckets = torch.arange(len(shares)).repeat_interleave(torch.tensor(shares))
    generator = torch.Generator().manual_seed(fold_seed(seed, cycle))
    return buckets[torch.randperm(len(buckets), generator=generator)]
