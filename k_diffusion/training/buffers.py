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
        found: dict[int, tuple[nn.Module, str, Tensor]] = {}
        for holder in module.modules():
            for name, buffer in holder._buffers.items():
                if buffer is not None:
                    found.setdefault(id(buffer), (holder, name, buffer))
        self._found = list(found.values())
        self._kept: list[Tensor] = []

    def tensors(self) -> list[Tensor]:
        """The buffers, live between steps."""
        return [buffer for *_, buffer in self._found]

    @torch.no_grad()
    def keep(self) -> None:
        """Remember what they hold now."""
        self._kept = [buffer.clone() for buffer in self.tensors()]

    @torch.no_grad()
    def put_back(self) -> None:
        """Have them hold what they held when they were kept."""
        if self._kept:
            for (holder, name, buffer), value in zip(self._found, self._kept, strict=True):
                setattr(holder, name, buffer.copy_(value))

    @torch.no_grad()
    def bring_home(self) -> None:
        """After a step: where a buffer was replaced (DistributedDataParallel does so), put the
        first one into its place, which the averages know, with what the new one holds."""
        for holder, name, buffer in self._found:
            if (now := getattr(holder, name)) is not buffer:
                setattr(holder, name, buffer.copy_(now))
