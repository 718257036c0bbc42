"""An average of a network's weights along training, kept in float32."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from k_diffusion.training.checkpoint import copy_tensors, named_tensors
from k_diffusion.utils.averages import warmup_decay


class Ema:
    """Exponential moving average with a warm-up; parameters are averaged, buffers copied.

    Args:
        network: whose weights are averaged, in place on its device; the average begins as a copy.
        power: exponent of the warm-up, see `warmup_decay`.
        inv_gamma: updates after which the warm-up has run through its first factor of 2^power.
        max_decay: the decay's upper limit.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        power: float = 0.75,
        inv_gamma: float = 1.0,
        max_decay: float = 0.9999,
    ) -> None:
        self.power, self.inv_gamma, self.max_decay = power, inv_gamma, max_decay
        self.updates = 0
        averaged = {name for name, p in network.named_parameters() if p.is_floating_point()}
        self._average: dict[str, Tensor] = {}
        self._copied: dict[str, Tensor] = {}
        self._live = named_tensors(network)  # walking the modules anew would cost more than a lerp
        for name, tensor in self._live.items():
            if name in averaged:
                self._average[name] = tensor.detach().to(torch.float32, copy=True)
            else:
                self._copied[name] = tensor.detach().clone()

    @property
    def decay(self) -> float:
        """What the next update will keep of the average."""
        return warmup_decay(
            self.updates, inv_gamma=self.inv_gamma, power=self.power, max_decay=self.max_decay
        )

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the network's present weights, in one multi-tensor call."""
        live = [self._live[name] for name in self._average]
        new = [tensor if tensor.dtype is torch.float32 else tensor.float() for tensor in live]
        if new:
            torch._foreach_lerp_(list(self._average.values()), new, 1 - self.decay)
        for name, tensor in self._copied.items():
            tensor.copy_(self._live[name])
        self.updates += 1

    def state_dict(self) -> dict[str, Tensor]:
        """The average (float32) and the copied buffers, by the network's own names; not copies."""
        return {**self._average, **self._copied}

    def load_state_dict(self, state: Mapping[str, Tensor], updates: int) -> None:
        """Take over what `state_dict` gave, and the number of updates that had been made.

        Raises:
            KeyError, ValueError: names or shapes differ from the network's.
        """
        copy_tensors(state, self.state_dict())
        self.updates = updates

    def copy_to(self, network: nn.Module) -> None:
        """Write the average into a network of the same shapes, in the network's own dtype."""
        copy_tensors(self.state_dict(), named_tensors(network))

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Within the block the network has the average as its weights; afterwards its own again."""
        own = {name: tensor.detach().clone() for name, tensor in self._live.items()}
        copy_tensors(self.state_dict(), self._live)
        try:
            yield
        finally:
            copy_tensors(own, self._live)
