"""Weightings against closed forms and against the errors they stand for; densities by quantiles."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from k_diffusion.denoiser import (
    EDMDenoiser,
    EpsDenoiser,
    FlowDenoiser,
    FunctionDenoiser,
    VDenoiser,
    X0Denoiser,
)
from k_diffusion.training import loss
from k_diffusion.utils.levels import FLOW, VE, VP
from k_diffusion.utils.scheduler import CosineScheduler, FlowScheduler, LinearScheduler

LEVELS = torch.linspace(-4, 4, 17, dtype=torch.float64)
B = len(LEVELS)


class Network(nn.Module):
    """Any smooth function of x and time; remembers what it said."""

    prediction = "eps"

    def __init__(self, time_convention: str) -> None:
        super().__init__()
        self.time_convention = time_convention

    def forward(self, x: Tensor, t: Tensor, shift: float = 0.0) -> Tensor:
        self.said = torch.sin(3 * x) + torch.cos(t).to(x).reshape(-1, 1, 1, 1) + shift
        return self.said


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (B, 2, 3, 3)
    return (
        torch.randn(shape, generator=generator, dtype=torch.float64) * 0.7,
        torch.randn(shape, generator=generator, dtype=torch.float64),
    )


def target(name: str, alpha: Tensor, sigma: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
    alpha, sigma = (a.reshape(-1, 1, 1, 1) for a in (alpha, sigma))
    x = alpha * x0 + sigma * noise
    if name == "edm":
        total = sigma**2 + 0.49
        return (x0 - 0.49 / total * x) / (sigma * 0.7 / total.sqrt())
    return {
        "eps": noise,
        "v": alpha * noise - sigma * x0,
        "x0": x0,
        "flow": noise - x0,
    }[name]


@pytest.mark.parametrize(
    ("name", "path"), [("edm", VE), ("eps", VP), ("v", VP), ("x0", VP), ("flow", FLOW)]
)
def test_weighting_is_the_networks_own_squared_error(name: str, path: Any) -> None:
    network = Network("log_sigma")
    denoiser = {
        "edm": lambda: EDMDenoiser(network, 0.7),
        "eps": lambda: EpsDenoiser(network),
        "v": lambda: VDenoiser(network),
        "x0": lambda: X0Denoiser(network),
        "flow": lambda: FlowDenoiser(network),
    }[name]()
    x0, noise = data()
    sigma = path.sigma(LEVELS)
    got = loss.denoising_loss(denoiser, x0, sigma, noise, name, shift=0.25)
    wanted = target(name, path.alpha(sigma), sigma, x0, noise)
    expected = (network.said - wanted).square().flatten(1).mean(1)
    assert got.shape == (B,)
    assert ((got - expected) / expected).abs().max() < 1e-9


def test_condition_reaches_the_network() -> None:
    x0, noise = data()
    denoiser = FlowDenoiser(Network("unit"))
    sigma = FLOW.sigma(LEVELS)
    with_shift = loss.denoising_loss(denoiser, x0, sigma, noise, "flow", shift=1.0)
    without = loss.denoising_loss(denoiser, x0, sigma, noise, "flow")
    assert (with_shift - without).abs().min() > 1e-3


def test_weightings_are_their_closed_forms() -> None:
    r = torch.exp(-LEVELS)
    data_std = 0.6
    closed = {
        "edm": (r**2 + data_std**2) / (r * data_std) ** 2,
        "snr": r**-2,
        "eps": r**-2,
        "v": r**-2 + 1,
        "x0": r**0,
        "flow": (1 + 1 / r) ** 2,
        "min_snr": torch.minimum(r**-2, torch.tensor(5.0)),
        # snr·gamma / (snr + gamma) with gamma = 1 / sigma_data²
        "soft_min_snr": r**-2 / data_std**2 / (r**-2 + data_std**-2),
    }
    assert set(closed) == set(loss.WEIGHTINGS)
    for name, expected in closed.items():
        got = loss.make_weighting(name, data_std)(LEVELS)
        assert ((got - expected) / expected).abs().max() < 1e-12, name
    four = loss.make_weighting("soft_min_snr", 9.0, gamma=4.0)(LEVELS)
    assert (four - loss.make_weighting("soft_min_snr", 0.5)(LEVELS)).abs().max() < 1e-12
    assert loss.make_weighting("min_snr", gamma=2.0)(LEVELS).max() == 2


def test_perfect_denoiser_has_no_loss_and_a_constant_error_its_weight() -> None:
    x0, noise = data()
    for path in (VE, VP, FLOW):
        sigma = path.sigma(LEVELS)
        perfect = FunctionDenoiser(lambda x, s: x0, path)
        assert loss.denoising_loss(perfect, x0, sigma, noise, "eps").abs().max() == 0
        off = FunctionDenoiser(lambda x, s: x0 + 0.5, path)
        got = loss.denoising_loss(off, x0, sigma, noise, "snr")
        assert (got / (0.25 * torch.exp(2 * LEVELS)) - 1).abs().max() < 1e-6


def test_noisy_data_has_the_level() -> None:
    x0, noise = data()
    for path in (VE, VP, FLOW):
        sigma = path.sigma(LEVELS)
        seen = {}

        def look(x: Tensor, s: Tensor, seen: dict[str, Tensor] = seen) -> Tensor:
            seen["x"] = x
            return x

        loss.denoising_loss(FunctionDenoiser(look, path), x0, sigma, noise, "x0")
        for i, h in enumerate(LEVELS.tolist()):
            level = path.at(h)
            assert (seen["x"][i] - level.alpha * x0[i] - level.sigma * noise[i]).abs().max() < 1e-12


@pytest.mark.parametrize("half_log_snr", [-5.0, -9.0])
def test_little_signal_keeps_its_alpha(half_log_snr: float) -> None:
    """In float32, sigma = 1 - 2e-5 would be off by 0.2% of 1 - sigma, 1 - 8e-9 would be 1."""
    h = torch.full((B,), half_log_snr, dtype=torch.float64)
    x0 = torch.ones(B, 1)
    seen = {}

    def look(x: Tensor, s: Tensor) -> Tensor:
        seen["x"] = x
        return x0 + 1

    got = loss.denoising_loss(
        FunctionDenoiser(look, VP), x0, VP.sigma(h), torch.zeros_like(x0), "snr"
    )
    assert (seen["x"] / VP.at(half_log_snr).alpha - 1).abs().max() < 1e-6
    assert (got / math.exp(2 * half_log_snr) - 1).abs().max() < 1e-6


# ---------------------------------------------------------------- densities


def draw(name: str, process: Any = None, n: int = 20000, **options: Any) -> Tensor:
    density = loss.make_density(name, process, **options)
    return loss.draw_half_log_snr(density, n, torch.Generator().manual_seed(0))


def distance(sample: Tensor, cdf: Any) -> float:
    """Kolmogorov-Smirnov distance times sqrt(n): exceeds 1.95 once in a thousand."""
    return stats.kstest(sample.numpy(), cdf).statistic * len(sample) ** 0.5


def test_densities_have_their_distributions() -> None:
    for sample, cdf in (
        (draw("lognormal"), stats.norm(1.2, 1.2).cdf),
        (draw("lognormal", mean=-0.4, std=1.0), stats.norm(0.4, 1.0).cdf),
        (
            draw("loguniform"),
            stats.uniform(-math.log(80), math.log(80 / 0.002)).cdf,
        ),
        (draw("loguniform", min=0.5, max=2.0), stats.uniform(-math.log(2), math.log(4)).cdf),
    ):
        assert sample.dtype == torch.float64
        assert distance(sample, cdf) < 1.95


@pytest.mark.parametrize("process", [FlowScheduler(), LinearScheduler(), CosineScheduler()])
def test_densities_of_time(process: Any) -> None:
    time = process.time(draw("uniform_time", process))
    span = (process.time_min, process.time_max - process.time_min)
    assert distance(time, stats.uniform(*span).cdf) < 1.95
    time = process.time(draw("logit_normal", process, mean=0.5, std=0.8))
    share = (time - span[0]) / span[1]
    assert distance(torch.logit(share), stats.norm(0.5, 0.8).cdf) < 1.95


def test_lognormal_moments() -> None:
    sample = draw("lognormal", n=200000)
    assert abs(sample.mean() - 1.2) < 3.3 * 1.2 / 200000**0.5
    assert abs(sample.std() - 1.2) < 3.3 * 1.2 / 400000**0.5


def test_stratified_has_one_level_in_each_part_in_random_order() -> None:
    density = loss.make_density("lognormal", mean=0.0, std=1.0)
    generator = torch.Generator().manual_seed(1)
    first = []
    for _ in range(50):
        h = loss.draw_half_log_snr(density, 64, generator, stratified=True)
        parts = (torch.special.ndtr(-h) * 64).long()
        assert torch.equal(parts.sort().values, torch.arange(64))
        first.append(int(parts[0]))
    assert len(set(first)) > 25  # the first sample's level is as random as any


def test_extreme_uniforms_stay_finite() -> None:
    class Ends(torch.Generator):
        pass

    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    original = torch.rand
    try:
        torch.rand = lambda *a, **k: ends  # type: ignore[assignment]
        for name in loss.DENSITIES:
            density = loss.make_density(name, FlowScheduler())
            assert loss.draw_half_log_snr(density, 2, Ends()).isfinite().all(), name
    finally:
        torch.rand = original


def test_unknown_names_and_options_offer_the_nearest() -> None:
    with pytest.raises(ValueError, match="unknown weighting 'min_snrr'; did you mean 'min_snr'"):
        loss.make_weighting("min_snrr")
    with pytest.raises(ValueError, match=r"option of weighting 'min_snr', 'gama'.*'gamma'"):
        loss.make_weighting("min_snr", gama=3)
    with pytest.raises(ValueError, match="unknown density 'log_normal'; did you mean 'lognormal'"):
        loss.make_density("log_normal")
    with pytest.raises(ValueError, match="option of density 'lognormal', 'menn'"):
        loss.make_density("lognormal", menn=3)
    with pytest.raises(ValueError, match="give a process"):
        loss.make_density("uniform_time")


def test_registered_functions_are_known_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "WEIGHTINGS", dict(loss.WEIGHTINGS))
    monkeypatch.setattr(loss, "DENSITIES", dict(loss.DENSITIES))

    @loss.register_weighting("twice")
    def twice(half_log_snr: Tensor, sigma_data: float, *, times: float = 2.0) -> Tensor:
        return times * torch.ones_like(half_log_snr)

    @loss.register_density("one")
    def one(u: Tensor, process: Any) -> Tensor:
        return torch.zeros_like(u)

    assert (loss.make_weighting("twice", times=3.0)(LEVELS) == 3).all()
    assert (draw("one", n=3) == 0).all()


def test_the_best_log_variance_makes_every_loss_one() -> None:
    error = torch.tensor([1e-3, 1.0, 40.0], dtype=torch.float64)
    best = error.log().requires_grad_()
    at_best = loss.uncertainty_loss(error, best)
    assert (at_best - (1 + best)).abs().max() < 1e-12
    (gradient,) = torch.autograd.grad(at_best.sum(), best)
    assert gradient.abs().max() < 1e-12
    for shift in (-0.5, 0.5):
        assert (loss.uncertainty_loss(error, best + shift) > at_best).all()
    # What the network learns from is each error over its usual size.
    scaled = error.clone().requires_grad_()
    (share,) = torch.autograd.grad(loss.uncertainty_loss(scaled, best.detach()).sum(), scaled)
    assert (share * error - 1).abs().max() < 1e-12
    assert loss.uncertainty_loss(error.float(), best).dtype == torch.float32
