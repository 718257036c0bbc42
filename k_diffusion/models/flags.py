"""The established switch: gradient checkpointing for all networks, while a block of code runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

# What the open `with` blocks say, in the order in which they were entered; the last one counts.
# Each takes its own entry out again, so that threads that overlap leave nothing switched on.
_entered: list[tuple[object, bool]] = []
# A global, because torch.compile watches globals, but takes a thread's own for a constant.
_on = False


def get_checkpointing() -> bool:
    """Whether every block of every network is to be checkpointed now."""
    return _on


@contextmanager
def checkpointing(enable: bool = True) -> Iterator[None]:
    """Within it every network checkpoints every block, whatever the policy of its config.

    It counts where the forward pass runs, for all threads.

    Args:
        enable: false: networks follow their configs again.
    """
    global _on
    mine = (object(), bool(enable))
    _entered.append(mine)
    _on = mine[1]
    try:
        yield
    finally:
        _entered[:] = [entry for entry in _entered if entry is not mine]
        _on = _entered[-1][1] if _entered else False
