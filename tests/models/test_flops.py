"""What a network computes, counted as by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import k_diffusion as K
from k_diffusion.models.flops import flop_counter


def test_products_convolutions_and_attention() -> None:
    linear, convolution = nn.Linear(6, 5), nn.Conv2d(3, 4, 3, padding=1)
    q = torch.randn(2, 3, 7, 8, requires_grad=True)
    with flop_counter() as counted:
        linear(torch.randn(10, 6)).tanh()
        assert counted.flops == 2 * 10 * 6 * 5
        convolution(torch.randn(2, 3, 8, 8))
        assert counted.flops == (so_far := 600 + 2 * 2 * 64 * 4 * 3 * 9)
        mixed = F.scaled_dot_product_attention(q, q, q)
        attention = 2 * 2 * 2 * 3 * 7 * 7 * 8
        assert counted.flops == so_far + attention
        mixed.sum().backward()
    assert counted.flops == so_far + 3 * attention
    linear(torch.randn(10, 6))
    assert counted.flops == so_far + 3 * attention


def test_nothing_is_counted_when_switched_off() -> None:
    with flop_counter(enable=False) as counted:
        nn.Linear(6, 5)(torch.randn(10, 6))
    assert counted.flops == 0


@pytest.mark.parametrize("batch", [1, 3])
def test_as_established_programs_call_it(batch: int) -> None:
    config = K.config.load_config(
        {"model": {"type": "image_transformer_v2", "input_channels": 3, "input_size": [16, 16],
                   "patch_size": [2, 2], "depths": [1, 1], "widths": [64, 128],
                   "self_attns": [{"type": "neighborhood", "d_head": 32, "kernel_size": 3},
                                  {"type": "global", "d_head": 32}]}}
    )  # fmt: skip
    network = K.config.make_model(config)
    with torch.no_grad(), K.models.flops.flop_counter() as fc:
        network(torch.zeros(batch, 3, 16, 16), torch.ones(batch))
    weights = sum(
        p.numel() * (64 if "down_levels" in name or "up_levels" in name else 16)
        for name, p in network.named_parameters()
        if "proj.weight" in name and "level" in name
    )
    # Beside these: patches, merges, the mapping, and attention itself.
    assert 2 * weights < fc.flops / batch < 3 * weights
