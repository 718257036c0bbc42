"""The established module that counts what a network computes.

    with flop_counter() as counted:
        network(x, sigma)
    print(counted.flops / 1e9)

torch counts (`torch.utils.flop_counter`): matrix products, convolutions and attention, a
multiplication and an addition as two; no norm, activation or other elementwise work.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

__all__ = ["CPU_ATTENTION", "FlopCounter", "flop_counter"]


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Of two products, from shapes."""
    return int(sdpa_flop_count(query, key, value))


def _attention_backward(
    output_gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any
) -> int:
    """Of the four products that the gradients ask for.

    The kernel makes a fifth, to have the scores again that it did not keep. That is the price of
    its memory, as with checkpointing, and a network that keeps its scores would seem to do less.
    """
    return 2 * _attention(query, key, value)


CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
"""The CPU's fused attention, which torch counts as nothing: operator -> its FLOP from shapes."""


class FlopCounter(FlopCounterMode):
    """What was computed while it was entered."""

    def __init__(self) -> None:
        super().__init__(display=False, custom_mapping=CPU_ATTENTION)

    @property
    def flops(self) -> int:
        """So far, of all entries together."""
        return int(self.get_total_flops())


@contextmanager
def flop_counter(enable: bool = True) -> Iterator[FlopCounter]:
    """Counts what is computed within it.

    Args:
        enable: false: nothing is counted, and `flops` stays 0.
    """
    counter = FlopCounter()
    with counter if enable else nullcontext():
        yield counter
