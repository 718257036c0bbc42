"""The established switches: gradient checkpointing while a block of code runs, and compilation."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import update_wrapper
from typing import Any

import torch

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


def get_use_compile() -> bool:
    """Whether `compile_wrap` compiles: no, if K_DIFFUSION_USE_COMPILE is set and not 1."""
    return os.environ.get("K_DIFFUSION_USE_COMPILE", "1") == "1"


def get_use_flash_attention_2() -> bool:
    """What the environment's K_DIFFUSION_USE_FLASH_2 says, for programs that ask; 1 if nothing.

    No network here does: torch chooses its attention by itself.
    """
    return os.environ.get("K_DIFFUSION_USE_FLASH_2", "1") == "1"


class compile_wrap:
    """A function that is compiled when it is first called, if `get_use_compile` says so then.

    Args:
        function: any.
        args, kwargs: for torch.compile.
    """

    def __init__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        self.function = function
        self.args, self.kwargs = args, kwargs
        self._compiled: Callable[..., Any] | None = None
        update_wrapper(self, function)

    @property
    def compiled_function(self) -> Callable[..., Any]:
        """The compiled function, or the function itself."""
        if self._compiled is None:
            compiles = get_use_compile()
            self._compiled = (
                torch.compile(self.function, *self.args, **self.kwargs)
                if compiles
                else self.function
            )
        return self._compiled

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.compiled_function(*args, **kwargs)
