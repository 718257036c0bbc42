"""Stratified uniform numbers: one from each of many parts of equal probability.

The average of a function over them varies less than over independent ones, in training the loss
over the noise levels of a batch. The parts can be shared out among groups: processes, or the
microbatches of one step.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

stratified_settings = threading.local()
"""This thread's `disable`, `group` and `groups`, within an `enable_stratified` block."""

_NAMES = ("disable", "group", "groups")


def stratified_uniform(
    shape: Sequence[int],
    group: int = 0,
    groups: int = 1,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Numbers in [0, 1), each row of the last dimension one from each of its parts, in order.

    Args:
        shape: of the result; its last dimension has n numbers, so that there are n · groups parts.
        group: whose parts: group, group + groups, group + 2 groups...
        groups: how many share the parts out.

    Raises:
        ValueError: groups below 1, or a group that is not one of them.
    """
    if groups <= 0:
        raise ValueError(f"groups must be at least 1, got {groups}")
    if not 0 <= group < groups:
        raise ValueError(f"group must be one of 0 to {groups - 1}, got {group}")
    parts = shape[-1] * groups
    first = torch.arange(group, parts, groups, dtype=dtype, device=device)
    numbers = (first + torch.rand(shape, dtype=dtype, device=device)) / parts
    # In the last part the sum may round up to 1, which is infinitely far for most densities.
    return numbers.clamp(max=1 - torch.finfo(numbers.dtype).eps / 2)


@contextmanager
def enable_stratified(group: int = 0, groups: int = 1, disable: bool = False) -> Iterator[None]:
    """Within the block the established `rand_*` draw this thread's noise levels stratified.

    Args:
        group, groups: see `stratified_uniform`.
        disable: draw independent numbers after all.
    """
    before = {n: vars(stratified_settings)[n] for n in _NAMES if n in vars(stratified_settings)}
    vars(stratified_settings).update(disable=disable, group=group, groups=groups)
    try:
        yield
    finally:
        for name in _NAMES:
            vars(stratified_settings).pop(name, None)
        vars(stratified_settings).update(before)  # those of a block around this one


@contextmanager
def enable_stratified_accelerate(accelerator: Any, disable: bool = False) -> Iterator[None]:
    """`enable_stratified` with a group for each process and each step of gradient accumulation.

    Args:
        accelerator: an `accelerate.Accelerator`.
        disable: draw independent numbers after all.
    """
    steps = accelerator.gradient_state.num_steps
    group = accelerator.process_index * steps + accelerator.step % steps
    with enable_stratified(group, accelerator.num_processes * steps, disable=disable):
        yield


def stratified_with_settings(
    shape: Sequence[int],
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Numbers in [0, 1): stratified within an `enable_stratified` block, else independent."""
    if getattr(stratified_settings, "disable", True):
        return torch.rand(shape, dtype=dtype, device=device)
    group, groups = stratified_settings.group, stratified_settings.groups
    return stratified_uniform(shape, group, groups, dtype=dtype, device=device)
