"""Modules: how many weights they have, and the mode they are in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from torch import nn


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
