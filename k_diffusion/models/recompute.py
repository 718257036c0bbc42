"""Gradient checkpointing: which blocks keep only their inputs and are computed twice.

Source: Chen et al. 2016, arXiv:1604.06174.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from k_diffusion.models import flags
from k_diffusion.models.layers import transforming

Policy = bool | int | tuple[int, ...]
"""False: no block; True: every block; a number n: every n-th; several: all blocks of these levels,
the finest being 0."""


def check_policy(policy: Policy, levels: int, blocks: int) -> None:
    """Refuse a policy that means nothing, or chooses nothing without saying so.

    Args:
        policy: of a model's config.
        levels: of the model; 1 where it has none.
        blocks: of the model, all of them.

    Raises:
        ValueError: names the policy and the way out.
    """
    if isinstance(policy, tuple):
        if not policy:
            raise ValueError(
                "checkpointing = () names no level; give some of 0 to "
                f"{levels - 1}, or false for no block"
            )
        for level in policy:
            if not 0 <= level < levels:
                raise ValueError(
                    f"checkpointing = {policy} names level {level}, but the model has levels 0 to "
                    f"{levels - 1}; give some of them, or true for every block"
                )
    elif not isinstance(policy, bool):
        if policy < 1:
            raise ValueError(
                f"checkpointing = {policy} is too small; give n for every n-th block, true or false"
            )
        if policy > blocks:
            raise ValueError(
                f"checkpointing = {policy} chooses none of the model's {blocks} blocks; give true, "
                f"false, or n for every n-th block, at most {blocks}"
            )


class Checkpointing:
    """Runs a model's blocks as a policy says.

    Args:
        policy: see `Policy`.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    def chooses(self, index: int, level: int = 0) -> bool:
        """Whether the block is one that keeps only its inputs.

        Args:
            index: its place among all blocks, in the order in which they run, from 0.
            level: its level, the finest being 0.
        """
        if isinstance(self.policy, tuple):
            return level in self.policy
        if isinstance(self.policy, bool):
            return self.policy
        return index % self.policy == self.policy - 1

    def run(self, block: Callable[..., Any], *args: Any, index: int, level: int = 0) -> Any:
        """The block's output; its gradients are the same either way.

        Args:
            block: called with args; it draws nothing at random but from torch's own generators.
            args: tensors, or what holds them, or None.
            index, level: see `chooses`.
        """
        # Without gradients nothing is kept anyhow, and the random state would be read for nothing.
        if torch.is_grad_enabled() and (flags.get_checkpointing() or self.chooses(index, level)):
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)


SMALL = 2**17
"""Numbers below which `recomputed` keeps all: its bookkeeping, some 100 µs, would take longer than
to fill the memory that it spares."""


def spares(x: Tensor) -> bool:
    """Whether to keep less of what is made of x is possible now, and worth it."""
    # Compiled, the compiler decides what to keep; transforms such as torch.func.grad take no hooks
    # on what is saved. Asked before the size, or a compiled graph would hold for some sizes only.
    if torch.compiler.is_compiling() or transforming():
        return False
    return torch.is_grad_enabled() and x.numel() >= SMALL


def recomputed(
    function: Callable[..., Tensor], x: Tensor, *args: Tensor, random: bool = False
) -> Tensor:
    """function(x, *args); its backward pass keeps x and args, and nothing between them and the end.

    For what is cheap before something dear: of norm, activation and convolution, the backward
    pass computes norm and activation again, and stops at the convolution, whose result nobody
    needs.

    Args:
        function: nothing in it but its end is costly. What it reads beside its arguments are
            parameters.
        x, args: tensors.
        random: whether it draws from torch's own generators, whose state is kept then.
    """
    if not spares(x):
        return function(x, *args)
    return checkpoint(function, x, *args, use_reentrant=False, preserve_rng_state=random)
