"""Which weights decay and at which rates they learn."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from k_diffusion.training.sections import OptimizerConfig
from k_diffusion.training.weight_groups import weight_groups

CONFIG = OptimizerConfig(lr=0.01, weight_decay=0.3)


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fast, self.slow, self.frozen = (nn.Linear(2, 2) for _ in range(3))
        self.frozen.requires_grad_(False)

    def param_groups(self, lr: float) -> list[dict[str, Any]]:
        return [
            {"params": [self.fast.weight, self.frozen.weight]},
            {"params": [*self.slow.parameters()], "lr": lr / 4, "weight_decay": 0.0},
            {"params": [self.frozen.bias], "lr": lr},
            {"params": [self.fast.bias], "lr": lr * 2, "weight_decay": 0.5},
        ]


def test_of_a_network_that_does_not_say() -> None:
    network = nn.Sequential(nn.Linear(3, 2), nn.GroupNorm(1, 2), nn.Linear(2, 1))
    network[2].requires_grad_(False)
    decayed, spared = weight_groups(network, CONFIG)
    assert decayed == {"params": [network[0].weight], "weight_decay": 0.3}
    assert spared["weight_decay"] == 0.0
    assert [id(p) for p in spared["params"]] == [
        id(p) for p in (network[0].bias, network[1].weight, network[1].bias)
    ]
    assert "lr_scale" not in decayed


def test_of_a_network_that_says_it_itself() -> None:
    network = Own()
    groups = weight_groups(network, CONFIG)
    said = [(len(g["params"]), g["lr_scale"], g["weight_decay"]) for g in groups]
    assert said == [(1, 1.0, 0.3), (2, 0.25, 0.0), (1, 2.0, 0.5)]
    assert groups[0]["params"][0] is network.fast.weight
    optimizer = torch.optim.AdamW(groups, lr=CONFIG.lr)
    assert [g["lr_scale"] for g in optimizer.param_groups] == [1.0, 0.25, 2.0]
