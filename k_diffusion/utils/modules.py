"""Modules: how many weights they have, their mode, and the first that gives no finite value."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)


def n_params(module: nn.Module) -> int:
    """How many numbers a module's parameters hold, those that take no gradient included."""
    return sum(p.numel() for p in module.parameters())


@contextmanager
def train_mode(model: nn.Module, mode: bool = True) -> Iterator[nn.Module]:
    """Within the block the model is in training mode; afterwards every part is as it was.

    Args:
        model: given back by `with ... as`.
        mode: False for evaluation mode.
    """
    before = [(module, module.training) for module in model.modules()]
    try:
        yield model.train(mode)
    finally:
        for module, training in before:
            module.training = training


def eval_mode(model: nn.Module) -> AbstractContextManager[nn.Module]:
    """Within the block the model is in evaluation mode; afterwards every part is as it was."""
    return train_mode(model, False)


@contextmanager
def first_bad_module(network: nn.Module | None = None) -> Iterator[list[str]]:
    """Notes name and kind of the first module whose output is not finite, of all that are called.

    Within the block every output of a module called by this thread is read, for which the host
    waits; a module without parts comes before the one that holds it. What is given back by
    `with ... as` stays empty where all outputs are finite.

    Args:
        network: whose parts alone are watched, and named as they are in it; None: all modules,
            named as they are in the outermost that is called.
    """
    found: list[str] = []
    called: list[nn.Module] = []
    thread = threading.get_ident()
    parts = None if network is None else {id(part): n for n, part in network.named_modules()}

    def enter(module: nn.Module, args: Any) -> None:
        if threading.get_ident() == thread:
            called.append(module)

    def look(module: nn.Module, args: Any, output: Any) -> None:
        if threading.get_ident() != thread:
            return
        while called and called.pop() is not module:  # one that was left by an exception
            pass
        if found or (parts is not None and id(module) not in parts) or is_finite(output):
            return
        kind = type(module).__name__
        if parts is not None:
            found.append(f"{parts[id(module)] or 'the network'} ({kind})")
            return
        root = called[0] if called else module
        name = next((name for name, part in root.named_modules() if part is module), "")
        found.append(f"{name} ({kind})" if name else kind)

    hooks = (register_module_forward_pre_hook(enter), register_module_forward_hook(look))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def is_finite(output: Any) -> bool:
    """Whether all floating-point tensors in a module's output are finite; the host waits."""
    if isinstance(output, Tensor):
        return not output.is_floating_point() or bool(output.isfinite().all())
    if isinstance(output, (tuple, list)):
        return all(map(is_finite, output))
    if isinstance(output, Mapping):
        return all(map(is_finite, output.values()))
    return True
