"""What a network holds beside its weights, such as running statistics, kept and put back."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Buffers:
    """The buffers of a module as they were before a step, for when the step comes to nothing.

    Args:
        module: whose buffers; they may be replaced by others, but none may come after this.
    """

    def __init__(self, module: nn.Module) -> None:
        # Found once: to walk through a network's modules in every step takes a millisecond.
        self._places: dict[int, tuple[nn.Module, str]] = {}
        for holder in module.modules():
            for name, buffer in holder._buffers.items():
                if buffer is not None:
                    self._places.setdefault(id(buffer), (holder, name))
        self._kept: list[tuple[nn.Module, str, Tensor, Tensor]] = []

    def tensors(self) -> list[Tensor]:
        """The buffers, live."""
        return [getattr(holder, name) for holder, name in self._places.values()]

    @torch.no_grad()
    def keep(self) -> None:
        """Remember what they hold now."""
        places = zip(self._places.values(), self.tensors(), strict=True)
        self._kept = [(*place, buffer, buffer.clone()) for place, buffer in places]

    @torch.no_grad()
    def put_back(self) -> None:
        """Have them hold what they held when they were kept."""
        for holder, name, buffer, value in self._kept:
            setattr(holder, name, buffer.copy_(value))
