"""Calls that are spared: how many, and what the result is off by."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from mixture import NULL, Mixture, given
from torch import Tensor

from k_diffusion.denoiser import Call, mark_call
from k_diffusion.guidance import Cached, cfg
from k_diffusion.sampling import KSampler
from k_diffusion.utils.levels import VE, Level


def run(cached: Any, steps: int = 40, solver: str = "dpmpp_2m") -> Tensor:
    x, _, label = given(VE)
    return KSampler(cached, "karras", solver).sample(x, steps, label)


def test_a_threshold_of_zero_spares_nothing() -> None:
    model = Mixture()
    cached = Cached(model, 0.0)
    assert torch.equal(run(cached), run(Mixture()))
    assert (cached.made, cached.spared) == (40, 0)


@pytest.mark.parametrize(("threshold", "least", "off"), [(0.003, 6, 0.003), (0.02, 12, 0.02)])
def test_spared_calls_cost_about_the_threshold(threshold: float, least: int, off: float) -> None:
    model = Mixture()
    cached = Cached(model, threshold)
    exact = run(Mixture())
    result = run(cached)
    assert cached.made == len(model.rows)
    assert cached.made + cached.spared == 40
    assert cached.spared >= least
    assert float((result - exact).norm() / exact.norm()) < off


def test_a_line_is_carried_on_exactly() -> None:
    calls = []

    def linear(x: Tensor, sigma: Tensor) -> Tensor:
        calls.append(1)
        return torch.ones_like(x) * (2 - sigma.log())[:, None]  # a line in log(alpha / sigma)

    cached = Cached(linear, 1e-6, most=100)
    seen: list[tuple[float, float]] = []
    KSampler(cached, "karras", "euler").sample(
        torch.randn(2, 3, dtype=torch.float64), 20,
        callback=lambda k, x, sigma, d: seen.append((float(sigma[0]), float(d[0, 0]))),
    )  # fmt: skip
    assert len(calls) == 3
    assert max(abs(d - (2 - math.log(s))) for s, d in seen) < 1e-9


def test_most_and_until() -> None:
    cached = Cached(Mixture(), 1e9, most=2)
    run(cached)
    assert (cached.made, cached.spared) == (3 + 37 // 3, 25)  # 3, then one of three
    cached = Cached(Mixture(), 1e9, most=100, until=1.0)
    levels = KSampler(Mixture(), "karras").levels(40)
    run(cached)
    assert cached.made == 3 + sum(level.sigma < 1 for level in levels[:-1])


def test_within_guidance_each_condition_is_remembered_by_itself() -> None:
    for batched in (True, False):
        exact = run(cfg(Mixture(), 2.0, null=NULL, batched=batched))
        cached = Cached(Mixture(), 0.005)
        result = run(cfg(cached, 2.0, null=NULL, batched=batched))
        assert cached.spared >= 3
        assert float((result - exact).norm() / exact.norm()) < 0.01


def test_every_run_begins_anew() -> None:
    cached = Cached(Mixture(), 0.01)
    first = run(cached)
    counts = (cached.made, cached.spared)
    assert torch.equal(first, run(cached))
    assert (cached.made, cached.spared) == counts


def test_nothing_is_spared_where_the_host_knows_no_level() -> None:
    model = Mixture()
    x, _, label = given(VE)
    KSampler(Cached(model, 1e9), "karras", "dormand_prince").sample(x, 10, label)
    plain = Mixture()
    KSampler(plain, "karras", "dormand_prince").sample(x, 10, label)
    assert len(model.rows) == len(plain.rows)


def test_wrong_input_is_refused_by_name() -> None:
    for options in ({"threshold": -1.0}, {"threshold": math.nan}, {"until": -0.5}):
        with pytest.raises(ValueError, match="must be a number of 0 or more"):
            Cached(Mixture(), **options)
    with pytest.raises(ValueError, match="most must be a whole number"):
        Cached(Mixture(), most=0)
    pair = Cached(cfg(Mixture(), 2.0, null=NULL, pair=True))
    x, sigma, label = given(VE)
    with pytest.raises(TypeError, match="a denoiser of one estimate, got tuple"):
        pair(x, mark_call(sigma, Call(0, Level(1.0, 0.7))), class_label=label)
