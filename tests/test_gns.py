"""The established module `gns`: its numbers, and its hook in two processes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import k_diffusion
from k_diffusion.gns import DDPGradientStatsHook, GradientNoiseScale

# What k-diffusion 0.1.1.post1 gives for `STATS` with beta = 0.9, after each update.
STATS = [(3.0, 1.0, 4, 32), (2.5, 1.25, 4, 32), (1.0, 1.5, 8, 32), (4.0, 0.5, 1, 32)]
EXPECTED = [
    [12.799999999999999, 0.7142857142857143, 9.142857142857142],
    [8.133333333333333, 0.9022556390977443, 7.338345864661655],
    [2.2480712166172103, 1.1843261289755755, 2.6624494816376734],
    [3.085360569483132, 0.9525060199956318, 2.938824516289834],
]


def test_established_numbers() -> None:
    gns = k_diffusion.gns.GradientNoiseScale(beta=0.9)
    assert gns.beta == 0.9
    assert gns.eps == 1e-8
    assert GradientNoiseScale().beta == 0.9998
    assert math.isnan(gns.get_gns())
    for stats, expected in zip(STATS, EXPECTED, strict=True):
        value = gns.update(*stats)
        assert value == gns.get_gns() == gns.gradient_noise_scale
        assert [value, *gns.get_stats()] == pytest.approx(expected, rel=1e-12)
        assert isinstance(value, float)


def test_state_goes_on() -> None:
    one, other = GradientNoiseScale(0.9), GradientNoiseScale(0.5, eps=1.0)
    for stats in STATS[:2]:
        one.update(*stats)
    assert set(one.state_dict()) == {
        *("beta", "eps", "ema_sq_norm", "ema_var", "beta_cumprod", "gradient_noise_scale")
    }
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert other.update(*STATS[2]) == one.update(*STATS[2])
    assert other.get_stats() == one.get_stats()


def test_sizes_that_do_not_grow_are_refused() -> None:
    with pytest.raises(ValueError, match="batches of 8 and 8 images do not tell"):
        GradientNoiseScale().update(1.0, 1.0, 8, 8)


def test_only_modules_in_ddp() -> None:
    with pytest.raises(ValueError, match="wrap it in torch.nn.parallel.DistributedDataParallel"):
        DDPGradientStatsHook(nn.Linear(1, 1))


def hooked(folder: Path) -> None:
    rank = torch.distributed.get_rank()
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    x = torch.randn(2, 3, 8, 3)  # processes, steps, batch, values
    own = [
        [torch.autograd.grad(network(x[r, s]).square().mean(), list(network.parameters()))
         for r in (0, 1)]
        for s in range(3)
    ]  # fmt: skip
    wrapped = nn.parallel.DistributedDataParallel(network, bucket_cap_mb=1e-5)
    hook = DDPGradientStatsHook(wrapped)
    for s in range(3):
        network.zero_grad()
        wrapped(x[rank, s]).square().mean().backward()
        small, large = hook.get_stats()
        squares = [sum(float(g.square().sum()) for g in own[s][r]) for r in (0, 1)]
        mean = [(a + b) / 2 for a, b in zip(*own[s], strict=True)]
        assert small == pytest.approx(sum(squares) / 2, rel=1e-5)
        assert large == pytest.approx(sum(float(g.square().sum()) for g in mean), rel=1e-5)
        for parameter, gradient in zip(network.parameters(), mean, strict=True):
            assert parameter.grad is not None
            assert (parameter.grad - gradient).abs().max() < 1e-6


def test_hook_in_two_processes(launch: Callable[..., list[str]]) -> None:
    launch(__file__, "hooked")
