"""A module's weights and buffers by name, live, and copying them from one to another."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from k_diffusion.training.shards import local, part_like


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """A module's parameters and persistent buffers by name; a shared one once, by its first."""
    seen: set[int] = set()
    tensors = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor
    return tensors


def own_tensors(conditioner: nn.Module | None) -> dict[str, Tensor]:
    """The frozen weights and persistent buffers that a checkpoint has to hold, by name; live.

    Those of a part that loads its weights from elsewhere (see `Conditioner.loads_weights`) are not
    among them.
    """
    if conditioner is None:
        return {}
    loaded = tuple(
        f"{name}." if name else ""
        for name, part in conditioner.named_modules()
        if getattr(part, "loads_weights", False)
    )
    tensors = named_tensors(conditioner)
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(loaded)}


@torch.no_grad()
def copy_tensors(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    """Copy values into tensors of the same names and shapes, in the target's dtype and place.

    Raises:
        ValueError: names or shapes differ; the first difference is named and nothing is copied.
    """
    lacking = sorted(set(target) - set(source))
    surplus = sorted(set(source) - set(target))
    if lacking:
        raise ValueError(f"{lacking[0]} is missing{_and_more(lacking)}")
    if surplus:
        raise ValueError(f"{surplus[0]} has no place in the network{_and_more(surplus)}")
    for name, tensor in target.items():
        if source[name].shape != tensor.shape:
            raise ValueError(
                f"{name} has shape {tuple(source[name].shape)}, but the network's has "
                f"{tuple(tensor.shape)}"
            )
    for name, tensor in target.items():
        local(tensor).copy_(part_like(source[name], tensor))


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
