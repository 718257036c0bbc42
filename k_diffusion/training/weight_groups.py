"""Which weights decay, and which learn at a rate of their own."""

from __future__ import annotations

from typing import Any

from torch import nn

from k_diffusion.training.sections import OptimizerConfig


def weight_groups(network: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Groups for an optimiser.

    A network says it itself by a method `param_groups(lr)`, which gives groups with "params" and
    perhaps "lr" and "weight_decay"; of any other, weights with two dimensions or more decay.

    Args:
        network: whose weights are grouped; frozen ones are left out.
        config: lr and weight_decay of the groups that have none of their own.
    """
    weights = [p for p in network.parameters() if p.requires_grad]
    own = getattr(network, "param_groups", None)
    groups: list[dict[str, Any]] = [
        {"params": [p for p in weights if p.ndim >= 2]},
        {"params": [p for p in weights if p.ndim < 2], "weight_decay": 0.0},
    ]
    if callable(own):
        groups = [
            # Each step sets the rates anew, by the course and this share of it.
            {**group, "lr_scale": group.get("lr", config.lr) / config.lr}
            for group in own(config.lr)
        ]
        learning = {id(p) for p in weights}
        for group in groups:
            group["params"] = [p for p in group["params"] if id(p) in learning]
    return [{"weight_decay": config.weight_decay, **group} for group in groups if group["params"]]
