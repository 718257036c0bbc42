"""The denoising loss in every denoiser's coordinates, and what it is divided by."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from k_diffusion import layers
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


# ---------------------------------------------------------------- frequencies


def sigma_network(x: Tensor, sigma: Tensor, return_variance: bool = False) -> Any:
    """In the words of the established denoisers, which hand it sigma."""
    output = torch.sin(3 * x) + sigma.to(x).log().reshape(-1, *[1] * (x.ndim - 1)) * x
    return (output, (2 * sigma).log()) if return_variance else output


@pytest.mark.parametrize("scales", [0, 0.5, 1, 2, 3.5, 9])
@pytest.mark.parametrize("weighting", ["karras", "soft-min-snr", "snr"])
@pytest.mark.parametrize("space", [(7,), (8, 6), (4, 5, 6)])
def test_frequency_weighted_loss_is_the_established_one(
    scales: float, weighting: str, space: tuple[int, ...]
) -> None:
    generator = torch.Generator().manual_seed(1)
    x0, noise = (
        torch.randn(B, 2, *space, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    sigma = VE.sigma(LEVELS)
    established = layers.Denoiser(sigma_network, 0.7, weighting, scales)
    expected = established.loss(x0, noise, sigma)
    ours = {"karras": "edm", "soft-min-snr": "soft_min_snr", "snr": "snr"}[weighting]
    got = loss.denoising_loss(established, x0, sigma, noise, ours, scales)
    assert ((got - expected) / expected).abs().max() < 1e-6
    plain = loss.denoising_loss(established, x0, sigma, noise, ours)
    assert bool(((got - plain).abs() > 1e-9 * plain).all()) == (scales != 1)


def test_frequency_weights_are_the_same_in_every_kind_of_network() -> None:
    """Weighed in x0, the error of which is the network's own times a number at each level."""
    x0, noise = data()
    for denoiser, path, name in (
        (VDenoiser(Network("log_sigma")), VP, "v"),
        (FlowDenoiser(Network("log_sigma")), FLOW, "flow"),
    ):
        sigma = path.sigma(LEVELS)
        got = loss.denoising_loss(denoiser, x0, sigma, noise, name, 2.0)
        error = denoiser.network.said - target(name, path.alpha(sigma), sigma, x0, noise)
        expected = loss.mean_square(error, 2.0)
        assert ((got - expected) / expected).abs().max() < 1e-9


def test_frequencies_need_space() -> None:
    with pytest.raises(ValueError, match=r"x has shape \(3, 2\); .* or give scales=1"):
        loss.mean_square(torch.ones(3, 2), 2.0)


def test_low_precision_is_summed_in_float32() -> None:
    x0 = torch.zeros(2, 4096, dtype=torch.bfloat16)
    denoiser = FunctionDenoiser(lambda x, s: torch.full_like(x, 1 / 3), VE)
    got = loss.denoising_loss(denoiser, x0, torch.ones(2), x0, "x0")
    assert got.dtype == torch.float32
    third = torch.tensor(1 / 3, dtype=torch.bfloat16).double()
    assert (got / third.square() - 1).abs().max() < 1e-6
    assert loss.mean_square(torch.ones(2, 3, dtype=torch.float64)).dtype == torch.float64


# ---------------------------------------------------------------- a variance of the network's own


def test_variance_loss_is_the_gaussian_likelihood() -> None:
    square = torch.tensor([1e-3, 1.0, 40.0], dtype=torch.float64)
    best = square.log().requires_grad_()
    at_best = loss.variance_loss(square, best)
    (gradient,) = torch.autograd.grad(at_best.sum(), best)
    assert gradient.abs().max() < 1e-12
    log_variance = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    normal = torch.distributions.Normal(torch.zeros(()).double(), (log_variance / 2).exp())
    expected = -normal.log_prob(square.sqrt()) - 0.5 * math.log(2 * math.pi)
    assert (loss.variance_loss(square, log_variance) - expected).abs().max() < 1e-12
