"""Gradient checkpointing: which blocks keep only their inputs and are computed twice.

Source: Chen et al. 2016, arXiv:1604.06174.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from k_diffusion.models.flags import get_checkpointing

Policy = bool | int | tuple[int, ...]
"""False: no block; True: every block; a number n: every n-th; several: all blocks of these levels,
the finest being 0."""


def check_policy(policy: Policy, levels: int) -> None:
    """Refuse a policy that means nothing.

    Args:
        policy: of a model's config.
        levels: of the model; 1 where it has none.

    Raises:
        ValueError: names the policy and the way out.
    """
    if isinstance(policy, tuple):
        for level in policy:
            if not 0 <= level < levels:
                raise ValueError(
                    f"checkpointing = {policy} names level {level}, but the model has levels 0 to "
                    f"{levels - 1}; give some of them, or true for every block"
                )
    elif not isinstance(policy, bool) and policy < 1:
        raise ValueError(
            f"checkpointing = {policy} is too small; give n for every n-th block, true or false"
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
        if torch.is_grad_enabled() and (get_checkpointing() or self.chooses(index, level)):
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)


def recomputed(function: Callable[..., Tensor], *args: Tensor) -> Tensor:
    """A function's output, of which only the inputs are kept for the backward pass.

    For what is cheap to compute and large to keep: norms, gates, rotations; a linear layer at the
    end costs nothing more, because the second pass stops as soon as the last of its inputs is there.

    Args:
        function: of tensors; draws nothing at random.
        args: its inputs.
    """
    # A compiler decides for itself what to keep, and does it better.
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return function(*args)
    return checkpoint(
        function, *args, use_reentrant=False, preserve_rng_state=False, determinism_check="none"
    )
