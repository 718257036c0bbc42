"""Tensors of which a process holds a part: the rows that FSDP2 has left to it.

A sharded tensor is a `DTensor` cut along its first dimension; anything else is whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def is_cut(tensor: Tensor) -> bool:
    """Whether this process holds only a part of the tensor."""
    return hasattr(tensor, "to_local")


def local(tensor: Any) -> Tensor:
    """What this process holds of a tensor, without a copy."""
    return tensor.to_local() if is_cut(tensor) else tensor


def rows(cut: Any) -> slice:
    """The rows of the whole tensor that this process holds."""
    # As torch.chunk cuts: all but the last few processes have the same number of rows.
    most = -(-cut.shape[0] // cut.device_mesh.size())
    start = min(cut.shape[0], most * cut.device_mesh.get_local_rank())
    return slice(start, start + local(cut).shape[0])


def part_like(whole: Tensor, model: Tensor) -> Tensor:
    """What a process holds of a whole tensor that is cut like another, of the same shape."""
    return whole[rows(model)] if is_cut(model) and not is_cut(whole) else local(whole)


def cut_like(whole: Tensor, model: Any) -> Tensor:
    """A whole tensor as one that is cut like another, of the same shape; as it is if that is."""
    if not is_cut(model) or is_cut(whole):
        return whole
    from torch.distributed.tensor import DTensor

    part = whole[rows(model)].to(local(model).device, copy=True)
    return DTensor.from_local(
        part,
        model.device_mesh,
        model.placements,
        shape=model.shape,
        stride=model.stride(),
        run_check=False,
    )


def gathered(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Whole tensors on the CPU, one after the other; all processes take part, and may keep none."""
    found = {}
    for name, tensor in tensors.items():
        whole: Any = tensor.detach()
        whole = whole.full_tensor() if is_cut(whole) else whole
        if keep:
            found[name] = whole.cpu()
    return found
