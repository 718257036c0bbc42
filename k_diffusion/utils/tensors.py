"""Tensors: their dimensions, and the precision of their products."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def append_dims(x: Tensor, target_dims: int) -> Tensor:
    """A view of x with dimensions of size 1 after its own, `target_dims` in all.

    Args:
        x: any shape, (B,) say: one number a sample, which then multiplies (B, C, H, W).
        target_dims: number of dimensions of the result.

    Raises:
        ValueError: x has more already.
    """
    missing = target_dims - x.ndim
    if missing < 0:
        raise ValueError(
            f"x has {x.ndim} dimensions, shape {tuple(x.shape)}, which is more than target_dims "
            f"{target_dims}"
        )
    return x.reshape(*x.shape, *[1] * missing)


@contextmanager
def tf32_mode(cudnn: bool | None = None, matmul: bool | None = None) -> Iterator[None]:
    """Within the block TF32 (10 bits of mantissa on NVIDIA GPUs) is allowed, or is not.

    Args:
        cudnn: for convolutions; None leaves it as it is.
        matmul: for matrix products; None leaves it as it is.
    """
    places: Any = ((torch.backends.cudnn, cudnn), (torch.backends.cuda.matmul, matmul))
    before = [(place, place.allow_tf32) for place, wanted in places if wanted is not None]
    try:
        for place, wanted in places:
            if wanted is not None:
                place.allow_tf32 = wanted
        yield
    finally:
        for place, old in before:
            place.allow_tf32 = old
