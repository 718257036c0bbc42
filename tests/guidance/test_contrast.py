"""Guidance by two estimates, on a mixture of Gaussians whose classes are its components."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from mixture import MEANS, NULL, SPREAD, Mixture, given
from torch import Tensor

from k_diffusion.denoiser import Call, FunctionDenoiser, call_of, mark_call
from k_diffusion.guidance import (
    Composed,
    Guided,
    Interval,
    Part,
    apg,
    autoguidance,
    cfg,
    cfg_zero_star,
)
from k_diffusion.sampling import KSampler, sample_euler
from k_diffusion.utils.levels import FLOW, VE, VP, Level, Path


@pytest.mark.parametrize("path", [VE, VP, FLOW], ids=str)
@pytest.mark.parametrize("batched", [True, False])
def test_limits_of_cfg(path: Path, batched: bool) -> None:
    model = Mixture(path)
    x, sigma, label = given(path)
    d, u = model(x, sigma, class_label=label), model(x, sigma)

    def guided(scale: Any, null: Any = NULL, **more: Any) -> Tensor:
        result: Tensor = cfg(model, scale, null=null, batched=batched, **more)(
            x, sigma, class_label=label
        )
        return result

    assert torch.equal(guided(1.0), d)
    assert torch.allclose(guided(0.0), u, rtol=0, atol=1e-15)
    assert torch.allclose(guided(3.5), u + 3.5 * (d - u), rtol=0, atol=1e-14)
    assert torch.allclose(guided(3.5, null={"class_label": label}), d, rtol=0, atol=1e-14)
    assert torch.equal(guided(3.5, interval=(0.0, math.inf)), guided(3.5))
    assert torch.equal(guided(3.5, interval=(100.0, 200.0)), d)
    scales = torch.tensor([0.0, 1.0, 2.0, 5.0])
    each = torch.stack([guided(float(w))[i] for i, w in enumerate(scales)])
    assert torch.allclose(guided(scales), each, rtol=0, atol=1e-14)
    by_level = guided(lambda ratio: 1 + ratio)
    ratio = 0.7 / float(path.alpha(0.7))
    assert torch.allclose(by_level, guided(1 + ratio), rtol=0, atol=1e-13)


def test_guided_density_is_the_sharpened_one() -> None:
    """The guided score is that of p(x)^(1-w) p(x|c)^w, whose mean and variance are known for
    Gaussians of one width: here two, of which one is asked."""
    two = Mixture()
    x = torch.linspace(-3, 3, 41, dtype=torch.float64)[:, None] * torch.ones(2, dtype=torch.float64)
    label = torch.zeros(41, dtype=torch.int64)
    sigma = torch.full((41,), 0.5, dtype=torch.float64)
    w = 2.5

    def log_density(x: Tensor, label: Tensor | None) -> Tensor:
        away = x[:, None] - MEANS
        logs = -away.square().sum(2) / (2 * (SPREAD**2 + 0.25))
        return logs[:, 0] if label is not None else logs.logsumexp(1)

    probe = x.clone().requires_grad_(True)
    total = (1 - w) * log_density(probe, None) + w * log_density(probe, label)
    (score,) = torch.autograd.grad(total.sum(), probe)
    guided = cfg(two, w)(x, sigma, class_label=label)
    assert float(((guided - x) / 0.25 - score).abs().max()) < 1e-12


def test_calls_that_the_interval_spares() -> None:
    for batched, both in ((True, [8]), (False, [4, 4])):
        model = Mixture()
        guided = cfg(model, 3.0, null=NULL, interval=(0.2, 2.0), batched=batched)
        sampler = KSampler(guided, "karras", "euler")
        levels = sampler.levels(12)
        model.rows.clear()
        sampler.sample(given(VE)[0], 12, given(VE)[2], seed=0)
        expected = []
        for level in levels[:-1]:
            expected += both if 0.2 < level.sigma <= 2.0 else [4]
        assert model.rows == expected
        assert 0 < sum(0.2 < level.sigma <= 2.0 for level in levels[:-1]) < 12


def test_interval_without_a_host_level() -> None:
    model = Mixture()
    x, _, label = given(VE)
    sigma = torch.tensor([0.1, 0.3, 1.9, 2.1], dtype=torch.float64)
    guided = cfg(model, 3.0, null=NULL, interval=(0.2, 2.0))(x, sigma, class_label=label)
    everywhere = cfg(model, 3.0, null=NULL)(x, sigma, class_label=label)
    plain = model(x, sigma, class_label=label)
    for i, inside in enumerate((False, True, True, False)):
        assert torch.equal(guided[i], (everywhere if inside else plain)[i])


def test_batched_is_sequential() -> None:
    x, _, label = given(VE)
    results = [
        KSampler(cfg(Mixture(), 4.0, null=NULL, batched=batched), "karras", "dpmpp_2m").sample(
            x, 20, label, seed=1
        )
        for batched in (True, False)
    ]
    assert float((results[0] - results[1]).abs().max()) < 1e-12


def test_autoguidance_with_itself_is_nothing() -> None:
    model = Mixture()
    x, sigma, label = given(VE)
    guided = autoguidance(model, model, 5.0)(x, sigma, class_label=label)
    assert torch.equal(guided, model(x, sigma, class_label=label))


@pytest.mark.parametrize("solver", ["heun", "dormand_prince"])
@pytest.mark.parametrize("other", [VE, VP, FLOW], ids=str)
@pytest.mark.parametrize("path", [VE, VP, FLOW], ids=str)
def test_a_weaker_model_in_other_coordinates(path: Path, other: Path, solver: str) -> None:
    """It is asked at equal signal-to-noise ratio: the same model in others is nothing; and at pure
    noise, which not all coordinates reach, nothing goes wrong."""
    x, _, label = given(path)
    name = None if path is FLOW else "karras"
    plain = KSampler(Mixture(path), name, solver).sample(x, 8, label)
    guided = KSampler(autoguidance(Mixture(path), Mixture(other), 3.0), name, solver)
    assert float((guided.sample(x, 8, label) - plain).abs().max()) < 1e-9
    sigma = torch.tensor([0.7, 0.3, 0.9, 0.5], dtype=torch.float64)
    other_sigma = other.sigma(path.alpha(sigma).log() - sigma.log())
    inner = x * (other_sigma / sigma)[:, None]

    def lesser(x: Tensor, sigma: Tensor, class_label: Tensor) -> Tensor:
        return 0.9 * Mixture(other)(x, sigma, class_label)

    away = autoguidance(Mixture(path), FunctionDenoiser(lesser, other), 3.0)
    d, u = Mixture(path)(x, sigma, label), lesser(inner, other_sigma, label)
    assert float((away(x, sigma, class_label=label) - (u + 3 * (d - u))).abs().max()) < 1e-12


def test_a_weaker_model_is_asked_nothing_at_pure_noise_that_it_does_not_reach() -> None:
    model, lesser = Mixture(FLOW), Mixture(VE)
    x, _, label = given(FLOW)
    KSampler(autoguidance(model, lesser, 3.0), None, "euler").sample(x, 6, label)
    assert (len(model.rows), len(lesser.rows)) == (6, 5)


def test_what_the_weaker_model_takes_is_checked_too() -> None:
    odd = FunctionDenoiser(lambda x, sigma: x, "sideways")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="weaker is on the path 'sideways', which is none of VE"):
        autoguidance(Mixture(), odd, 2.0)
    with pytest.raises(ValueError, match="model is on the path 'sideways'"):
        autoguidance(odd, Mixture(), 2.0)(*given(VE)[:2])
    asked = []

    class Picky(Mixture):
        float64_sigma = False

        def check_condition(self, batch: int, **condition: Any) -> None:
            asked.append((batch, set(condition)))

    guided = autoguidance(Picky(), cfg(Picky(), "strength", null=NULL), 2.0)
    assert not guided.float64_sigma
    assert autoguidance(Picky(), Mixture(), 2.0).float64_sigma
    x, _, label = given(VE)
    KSampler(guided, "karras", "euler").sample(x, 1, {"class_label": label, "strength": 2.0})
    assert asked == [(4, {"class_label"})] * 2


def test_outside_the_interval_a_pair_is_the_first_estimate_twice() -> None:
    model = Mixture()
    x, sigma, label = given(VE)
    d = model(x, sigma, class_label=label)
    guided = cfg(model, 3.0, null=NULL, interval=(1.0, 2.0), pair=True)
    known = mark_call(sigma.clone(), Call(0, Level(1.0, 0.7)))
    for at in (sigma, known):
        first, second = guided(x, at, class_label=label)
        assert torch.equal(first, d)
        assert torch.equal(second, d)


def test_rescale_restores_the_deviation() -> None:
    x, sigma, label = given(VE)
    model = Mixture()
    d = model(x, sigma, class_label=label)
    full = cfg(model, 6.0, null=NULL, rescale=1.0)(x, sigma, class_label=label)
    assert torch.allclose(full.std(1), d.std(1), rtol=1e-12, atol=0)
    plain = cfg(model, 6.0, null=NULL)(x, sigma, class_label=label)
    half = cfg(model, 6.0, null=NULL, rescale=0.5)(x, sigma, class_label=label)
    assert torch.allclose(half, (full + plain) / 2, rtol=0, atol=1e-12)


def test_pair_for_cfg_pp() -> None:
    model = Mixture()
    x, sigma, label = given(VE)
    d, u = cfg(model, 2.0, null=NULL, pair=True)(x, sigma, class_label=label)
    assert torch.allclose(u, model(x, sigma), rtol=0, atol=1e-15)
    assert torch.allclose(d, 2 * model(x, sigma, class_label=label) - u, rtol=0, atol=1e-13)
    # Equal estimates: CFG++ is the plain method.
    pair = cfg(model, 3.0, null={"class_label": label}, pair=True)
    plus = KSampler(pair, "karras", "euler_cfg_pp").sample(x, 10, label)
    plain = KSampler(model, "karras", "euler").sample(x, 10, label)
    assert float((plus - plain).abs().max()) < 1e-12


def test_calls_are_known_on_the_host_in_every_run() -> None:
    seen = []

    def model(x: Tensor, sigma: Tensor) -> Tensor:
        call = call_of(sigma)
        assert call is not None
        assert float(sigma[0]) == pytest.approx(call.level.sigma, rel=1e-6)
        seen.append(call.k)
        return x / (1 + sigma[0] ** 2)

    KSampler(model, "karras", "heun").sample(torch.randn(2, 1, 2, 2), 5)
    assert seen == list(range(9))
    seen.clear()
    sample_euler(model, torch.randn(2, 1, 2, 2), torch.tensor([2.0, 1.0, 0.5, 0.0]), disable=True)
    assert seen == [0, 1, 2]
    sigma = torch.ones(2)
    assert call_of(sigma) is None
    assert call_of(mark_call(sigma, Call(3, Level(1.0, 1.0)))) == Call(3, Level(1.0, 1.0))


def composed(model: Any, scale: float, **more: Any) -> Any:
    return Composed(model, [Part({}, scale)], **more)


def scored(model: Any, scale: float, **more: Any) -> Any:
    return Guided(model, lambda x0, sigma: x0.sum(1), scale, **more)


def test_wrong_input_is_refused_by_name() -> None:
    model = Mixture()
    for interval in ((2.0, 1.0), (-1.0, 2.0), (1.0, 1.0), (math.nan, 1.0), ("0", 1.0)):
        with pytest.raises(ValueError, match="interval = .* 0 <= low < high"):
            cfg(model, 2.0, interval=interval)
    for make in (cfg, apg, cfg_zero_star, composed, scored):
        for few in (0.5, (1.0, 2.0, 3.0), (1.0,), (), "ab"):
            with pytest.raises(TypeError, match=r"interval must be two bounds .* got .*: no bound"):
                make(model, 2.0, interval=few)
    with pytest.raises(ValueError, match="scale must be finite, got nan"):
        cfg(model, math.nan)
    with pytest.raises(TypeError, match="scale must be a number, .* got str"):
        cfg(model, "3")
    x, sigma, label = given(VE)
    with pytest.raises(ValueError, match=r"one a sample, shape \(4,\), got \(3,\)"):
        cfg(model, torch.ones(3), null=NULL)(x, sigma, class_label=label)
    with pytest.raises(ValueError, match=r"rescale must lie in \[0, 1\], got 1.5"):
        cfg(model, 2.0, rescale=1.5)
    assert Interval().everywhere


def test_a_plain_function_and_a_device_denoiser_can_be_guided() -> None:
    guided = cfg(FunctionDenoiser(lambda x, sigma, shift=0.0: x * 0 + shift), 2.0)
    x, sigma, _ = given(VE)
    assert torch.equal(guided(x, sigma, shift=1.5), torch.full_like(x, 3.0))
