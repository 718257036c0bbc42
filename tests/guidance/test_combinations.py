"""Every kind of guidance with every kind of solver: shape, dtype, and each sample as if alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from mixture import MEANS, NULL, Mixture
from torch import Tensor
from watch import WAITS, Watch

from k_diffusion.denoiser import FunctionDenoiser
from k_diffusion.guidance import (
    Cached,
    Clamp,
    Composed,
    DynamicThreshold,
    Guided,
    Part,
    SwitchAt,
    apg,
    autoguidance,
    cfg,
    cfg_zero_star,
    perturbed_attention,
    posterior_sampling,
    pseudo_inverse,
)
from k_diffusion.guidance.held import keywords_of
from k_diffusion.models import UNet
from k_diffusion.sampling import KSampler, unit_noise
from k_diffusion.utils.levels import FLOW, VE, Path

NONE = {"class_label": None}
MASK = torch.tensor([1.0, 0.0])
MEASURED = torch.tensor([[0.4, 0.0]])
SEEDS = [5, 6, 7, 8]
LABELS = torch.tensor([0, 1, 2, 1])
STRENGTHS = torch.tensor([0.5, 1.0, 2.0, 3.0])


def towards_first(x0: Tensor, sigma: Tensor) -> Tensor:
    return -(x0 - MEANS[0].to(x0.dtype)).square().sum(1)


def keep_first(x0: Tensor) -> Tensor:
    return x0 * MASK.to(x0.dtype)


def lesser(path: Path) -> FunctionDenoiser:
    model = Mixture(path)

    def estimate(x: Tensor, sigma: Tensor, **condition: Any) -> Tensor:
        return 0.9 * model(x, sigma, **condition)

    return FunctionDenoiser(estimate, path)


def other_path(model: Any) -> Path:
    return FLOW if model.path is VE else VE


def other(condition: Any) -> dict[str, Any]:
    return {"class_label": (condition["class_label"] + 1) % 3}


KINDS: dict[str, Callable[[Any], Any]] = {
    "cfg": lambda m: cfg(m, 2.0, null=NONE),
    "cfg, two calls": lambda m: cfg(m, 2.0, null=NONE, batched=False),
    "cfg, by level": lambda m: cfg(m, lambda r: 2 - 1 / (1 + r), null=NONE),
    "cfg, interval": lambda m: cfg(m, 3.0, null=NONE, interval=(0.1, 2.0)),
    "cfg, rescaled": lambda m: cfg(m, 3.0, null=NONE, rescale=0.7),
    "cfg, negative": lambda m: cfg(m, 2.0, null=other),
    "apg": lambda m: apg(m, 3.0, null=NONE, norm=0.5),
    "cfg zero star": lambda m: cfg_zero_star(m, 2.0, null=NONE),
    "autoguidance": lambda m: autoguidance(m, lesser(m.path), 2.0),
    "composed": lambda m: Composed(m, [Part({}, 2.0, MASK), Part({}, 1.0)], null=NONE),
    "gradient": lambda m: Guided(m, towards_first, 0.5),
    "posterior sampling": lambda m: posterior_sampling(m, keep_first, MEASURED, noise=0.1),
    "pseudo-inverse": lambda m: pseudo_inverse(m, keep_first, MEASURED, noise=0.1),
    "clamp": lambda m: Clamp(m),
    "dynamic threshold": lambda m: DynamicThreshold(m, 0.9),
    "of all three": lambda m: Clamp(apg(Guided(m, towards_first, 0.5), 2.0, null=NONE), -2.0, 2.0),
    "cfg, of each": lambda m: cfg(m, "strength", null=NONE),
    "apg, of each": lambda m: apg(m, "strength", null=NONE, interval=(0.1, 2.0)),
    "gradient, of each": lambda m: Guided(m, towards_first, "strength"),
    "cfg of cfg": lambda m: cfg(cfg(m, 2.0, null=NONE), "strength", null=other),
    "cfg of pseudo-inverse": lambda m: cfg(
        pseudo_inverse(m, keep_first, MEASURED, noise=0.1), 2.0, null=NONE
    ),
    "posterior sampling of cfg": lambda m: posterior_sampling(
        cfg(m, 2.0, null=NONE), keep_first, MEASURED, noise=0.1
    ),
    "composed of autoguidance": lambda m: Composed(
        autoguidance(m, lesser(m.path), 2.0), [Part({}, 2.0, MASK), Part({}, 1.0)], null=NONE
    ),
    "switch": lambda m: SwitchAt(m, lesser(m.path), 0.7),
    "switch to another path": lambda m: SwitchAt(m, Mixture(other_path(m)), 0.7),
    "switch of guidance": lambda m: SwitchAt(cfg(m, 3.0, null=NONE), apg(m, 2.0, null=NONE), 0.7),
    "autoguidance by another path": lambda m: autoguidance(m, lesser(other_path(m)), 2.0),
    "cache in cfg": lambda m: cfg(Cached(m, 0.0), 2.0, null=NONE),
}
SOLVERS = ("euler", "heun", "dpmpp_2m", "dpmpp_2m_sde", "dpm_adaptive")


# A run of each, batch and alone; an adaptive solver's steps need not be fine for it.
LOOSE = {"rtol": 0.3, "atol": 0.1}


def draw(kind: str, solver: str, path: Path, rows: slice = slice(None)) -> Tensor:
    guided = KINDS[kind](Mixture(path))
    seeds = SEEDS[rows]
    condition = {"class_label": LABELS[rows]}
    if "strength" in keywords_of(guided):
        condition["strength"] = STRENGTHS[rows]
    options = LOOSE if solver == "dpm_adaptive" else {}
    sampler = KSampler(guided, "karras" if path is VE else None, solver, **options)
    return sampler.sample(unit_noise((2,), seeds), 6, condition, seed=seeds)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", [VE, FLOW], ids=str)
def test_every_combination(kind: str, solver: str, path: Path) -> None:
    batch = draw(kind, solver, path)
    assert batch.shape == (4, 2)
    assert batch.dtype == torch.float32
    for i in (3,) if solver == "dpm_adaptive" else (0, 3):
        alone = draw(kind, solver, path, slice(i, i + 1))
        assert float((alone - batch[i]).abs().max()) < 1e-4


@pytest.mark.parametrize("solver", ["euler_cfg_pp", "dpmpp_2m_cfg_pp", "euler_ancestral_cfg_pp"])
@pytest.mark.parametrize("path", [VE, FLOW], ids=str)
def test_every_combination_of_a_pair(path: Path, solver: str) -> None:
    def run(rows: slice = slice(None)) -> Tensor:
        guided = Clamp(cfg(Mixture(path), "strength", null=NONE, pair=True), -2.0, 2.0)
        condition = {"class_label": LABELS[rows], "strength": STRENGTHS[rows] / 4}
        seeds = SEEDS[rows]
        sampler = KSampler(guided, "karras" if path is VE else None, solver)
        return sampler.sample(unit_noise((2,), seeds), 6, condition, seed=seeds)

    batch = run()
    assert batch.shape == (4, 2)
    assert batch.dtype == torch.float32
    for i in range(4):
        assert float((run(slice(i, i + 1)) - batch[i]).abs().max()) < 1e-4


@pytest.mark.parametrize("path", [VE, FLOW], ids=str)
def test_a_cache_decides_for_the_batch_and_keeps_its_shape(path: Path) -> None:
    """Samples alike are each as if alone; others are off by what the spared calls are."""

    def run(rows: list[int]) -> tuple[Tensor, int]:
        cached = Cached(Mixture(path), 0.02)
        seeds = [SEEDS[row] for row in rows]
        sampler = KSampler(cached, "karras" if path is VE else None, "dpmpp_2m")
        return sampler.sample(unit_noise((2,), seeds), 30, LABELS[rows], seed=seeds), cached.spared

    exact = KSampler(Mixture(path), "karras" if path is VE else None, "dpmpp_2m").sample(
        unit_noise((2,), SEEDS), 30, LABELS
    )
    batch, spared = run([0, 1, 2, 3])
    assert batch.shape == (4, 2)
    assert batch.dtype == torch.float32
    assert spared > 2
    assert float((batch - exact).abs().max()) < 0.1
    alone, few = run([2])
    alike, many = run([2, 2, 2])
    assert few == many >= spared
    assert float((alike - alone).abs().max()) < 1e-6


@pytest.mark.parametrize(
    ("prediction", "solver"),
    [(p, s) for p in ("edm", "flow") for s in SOLVERS if (p, s) != ("flow", "dpm_adaptive")],
)
def test_every_combination_of_a_network_with_its_attention_spoilt(
    prediction: str, solver: str
) -> None:
    torch.manual_seed(4)
    network = UNet(in_channels=2, num_classes=3, channels=8, channel_mults=(1, 1), blocks=1,
                   attention=(False, True), head_channels=8, prediction=prediction,
                   time_convention="unit" if prediction == "flow" else "log_sigma")  # fmt: skip
    for parameter in network.parameters():  # untrained, an attention adds nothing
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    # Where rounding decides of steps it is not to be seen.
    dtype = torch.float64 if solver == "dpm_adaptive" else torch.float32
    network.to(dtype)
    options = {"rtol": 2.0, "atol": 1.0} if solver == "dpm_adaptive" else {}
    sampler = KSampler(perturbed_attention(network.eval(), 3.0), None, solver, **options)
    labels, seeds = torch.tensor([0, 1, 2, 1]), [5, 6, 7, 8]
    noise = unit_noise((2, 8, 8), seeds).to(dtype)
    batch = sampler.sample(noise, 6, labels, seed=seeds)
    assert batch.shape == noise.shape
    assert batch.dtype == dtype
    plain = KSampler(network, None, solver, **options).sample(noise, 6, labels, seed=seeds)
    assert float((batch - plain).abs().max()) > 0.05
    for i in (0, 3):
        alone = sampler.sample(noise[i : i + 1], 6, labels[i : i + 1], seed=seeds[i : i + 1])
        assert float((alone - batch[i]).abs().max()) < 1e-4


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "cache in cfg"])
@pytest.mark.parametrize("path", [VE, FLOW], ids=str)
def test_nothing_waits_for_the_device(kind: str, path: Path) -> None:
    """No kind reads a value, or copies one over, between the first call and the last; but a cache,
    which looks at each call that is made."""
    guided = KINDS[kind](Mixture(path))
    names: list[list[str]] = []

    class Watched:
        float64_sigma = True
        alpha = staticmethod(guided.alpha)

        def __init__(self) -> None:
            self.path = path

        def __call__(self, x: Tensor, sigma: Tensor, **condition: Any) -> Tensor:
            with Watch(0, "cpu") as watch:
                result: Tensor = guided(x, sigma, **condition)
            names.append(list(watch.names))
            return result

    condition = {"class_label": LABELS[:2]}
    if "strength" in keywords_of(guided):
        condition["strength"] = STRENGTHS[:2]
    KSampler(Watched(), "karras" if path is VE else None, "dpmpp_2m").sample(
        unit_noise((2,), [1, 2]), 6, condition
    )
    plain: list[str] = []
    with Watch(0, "cpu") as watch:
        Mixture(path)(torch.randn(2, 2), torch.full((2,), 0.5), class_label=torch.tensor([0, 2]))
    plain = list(watch.names)
    own = {w for w in WAITS if any(f"aten::{w}" in n for n in plain)}
    for call in names:
        waits = [n for n in call if any(f"aten::{w}" in n for w in set(WAITS) - own)]
        assert waits == []
    assert len(names) == 6


def test_null_of_the_test_is_that_of_none() -> None:
    model = Mixture()
    x, sigma = torch.randn(4, 2), torch.full((4,), 0.5)
    assert torch.equal(model(x, sigma, **NULL), model(x, sigma))


def test_caching_changes_nothing_where_it_spares_nothing() -> None:
    label = torch.tensor([0, 1])
    for path in (VE, FLOW):
        noise = unit_noise((2,), [1, 2])
        name = "karras" if path is VE else None
        plain = KSampler(Mixture(path), name).sample(noise, 8, label)
        cached = KSampler(Cached(Mixture(path), 0.0), name).sample(noise, 8, label)
        assert torch.equal(plain, cached)
