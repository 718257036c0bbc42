"""The established preconditioned denoisers and their losses; the cosine transform under them."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from scipy import fft
from torch import Tensor

import k_diffusion
from k_diffusion import layers
from k_diffusion.denoiser import Denoiser
from k_diffusion.sampling import KSampler
from k_diffusion.training import denoising_loss
from k_diffusion.utils import cosine_transform
from k_diffusion.utils.levels import VE

F64 = torch.float64
SIGMA_DATA = 0.7
SIGMA = torch.tensor([0.02, 0.3, 1.0, 20.0], dtype=F64)


def network(x: Tensor, sigma: Tensor, shift: float = 0.0, return_variance: bool = False) -> Any:
    output = torch.sin(3 * x) + sigma.to(x).log().reshape(-1, *[1] * (x.ndim - 1)) * x + shift
    return (output, (2 * sigma).log()) if return_variance else output


def data(dims: int = 4, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shape = (4, 2, 5, 6, 3)[:dims]
    x0 = torch.randn(shape, generator=generator, dtype=F64)
    return x0.to(dtype), torch.randn(shape, generator=generator, dtype=F64).to(dtype)


def wide(values: Tensor, dims: int = 4) -> Tensor:
    return values.reshape(-1, *[1] * (dims - 1))


def raw_error(dims: int = 4) -> Tensor:
    """The network's output less what it should be, by table 1 of Karras et al. 2022."""
    x0, noise = data(dims)
    sigma = wide(SIGMA, dims)
    total = sigma**2 + SIGMA_DATA**2
    x = x0 + sigma * noise
    output = network(x / total.sqrt(), SIGMA)
    return output - (x0 - SIGMA_DATA**2 / total * x) / (sigma * SIGMA_DATA / total.sqrt())


def test_estimate() -> None:
    x, _ = data()
    denoiser = layers.Denoiser(network, SIGMA_DATA)
    total = wide(SIGMA**2 + SIGMA_DATA**2)
    output = network(x / total.sqrt(), SIGMA, shift=0.5)
    expected = SIGMA_DATA**2 / total * x + wide(SIGMA) * SIGMA_DATA / total.sqrt() * output
    assert (denoiser(x, SIGMA, shift=0.5) - expected).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("weighting", "of_x0"), [("karras", "edm"), ("soft-min-snr", "soft_min_snr"), ("snr", "snr")]
)
def test_weightings_are_those_of_the_training_room(weighting: str, of_x0: str) -> None:
    """There they weigh the error of x0, here that of the network's own output."""
    x0, noise = data()
    denoiser = layers.Denoiser(network, SIGMA_DATA, weighting)
    got = denoiser.loss(x0, noise, SIGMA, shift=0.5)
    expected = denoising_loss(denoiser, x0, SIGMA, noise, of_x0, shift=0.5)
    assert got.shape == (4,)
    assert (got / expected - 1).abs().max() < 1e-9


def test_karras_is_the_plain_mean_square() -> None:
    got = layers.Denoiser(network, SIGMA_DATA).loss(*data(), SIGMA)
    assert (got / raw_error().square().mean((1, 2, 3)) - 1).abs().max() < 1e-9


def test_callable_weighting() -> None:
    denoiser = layers.Denoiser(network, SIGMA_DATA, lambda sigma: 2 + sigma)
    plain = layers.Denoiser(network, SIGMA_DATA).loss(*data(), SIGMA)
    assert (denoiser.loss(*data(), SIGMA) / ((2 + SIGMA) * plain) - 1).abs().max() < 1e-12
    with pytest.raises(ValueError, match="unknown weighting 'karas'; did you mean 'karras'"):
        layers.Denoiser(network, weighting="karas")


def brute_weights(shape: tuple[int, ...], scales: float) -> Tensor:
    """Of each frequency, by the frequency of highest index: log2(2 n / (k + 1)), cut at scales."""
    weights = torch.empty(shape, dtype=F64)
    for place in torch.cartesian_prod(*[torch.arange(n) for n in shape]).reshape(-1, len(shape)):
        each = [math.log2(2 * n / (k + 1)) for n, k in zip(shape, place.tolist(), strict=True)]
        weights[tuple(place)] = min(min(e, scales) if scales >= 1 else e for e in each)
    return weights


@pytest.mark.parametrize("dims", [3, 4, 5])
@pytest.mark.parametrize("scales", [0, 1, 2, 2.5, 9])
def test_frequency_weighted_loss(dims: int, scales: float) -> None:
    x0, noise = data(dims)
    denoiser = layers.Denoiser(network, SIGMA_DATA, "snr", scales)
    got = denoiser.loss(x0, noise, SIGMA)
    error = raw_error(dims)
    spectrum = torch.from_numpy(
        fft.dctn(error.numpy(), axes=tuple(range(2, dims)), norm="ortho")
    ).square()
    weight = SIGMA_DATA**2 / (SIGMA**2 + SIGMA_DATA**2)
    expected = weight * (spectrum * brute_weights(tuple(error.shape[2:]), scales)).flatten(1).mean(
        1
    )
    assert (got / expected - 1).abs().max() < 1e-9


def test_weights_made_in_inference_mode_do_not_spoil_training() -> None:
    with torch.inference_mode():
        layers.Denoiser(network, scales=3).loss(*data(), SIGMA)
    x0, noise = data()
    shift = torch.zeros((), dtype=F64, requires_grad=True)
    layers.Denoiser(network, scales=3).loss(x0, noise, SIGMA, shift=shift).sum().backward()
    assert shift.grad is not None
    assert shift.grad.abs() > 0


def test_frequency_weights_need_space() -> None:
    x = torch.ones(4, 2, dtype=F64)
    with pytest.raises(ValueError, match=r"x has shape \(4, 2\); .* or give scales=1"):
        layers.Denoiser(network, scales=2).loss(x, x, SIGMA)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("shape", [(2, 8, 7, 5), (2, 1, 2, 16), (3, 3, 1, 1)])
def test_cosine_transform(shape: tuple[int, ...], dims: int) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=F64)
    expected = fft.dctn(x.numpy(), axes=tuple(range(-dims, 0)), norm="ortho")
    got = cosine_transform.dct(x, dims)
    assert (got - torch.from_numpy(expected)).abs().max() < 1e-13
    assert (cosine_transform.dct(x.float(), dims) - got).abs().max() < 1e-5
    assert got.shape == x.shape


def test_loss_with_variance() -> None:
    """The negative log-likelihood of a Gaussian of the variance that the network tells: 2 sigma."""
    x0, noise = data()
    denoiser = layers.DenoiserWithVariance(
        lambda x, sigma, shift, **kwargs: network(x, sigma, **kwargs), SIGMA_DATA
    )
    got = denoiser.loss(x0, noise, SIGMA, shift=0.5)
    variance = wide(2 * SIGMA)
    likelihood = torch.distributions.Normal(torch.zeros(()).double(), variance.sqrt())
    terms = -likelihood.log_prob(raw_error()) - 0.5 * math.log(2 * math.pi)
    assert (got - terms.mean((1, 2, 3))).abs().max() < 1e-9


def test_loss_of_the_noise() -> None:
    x0, noise = data()
    denoiser = layers.SimpleLossDenoiser(network, SIGMA_DATA)
    x = x0 + wide(SIGMA) * noise
    eps = (x - denoiser(x, SIGMA, shift=0.5)) / wide(SIGMA)
    got = denoiser.loss(x0, noise, SIGMA, shift=0.5)
    assert (got / (eps - noise).square().mean((1, 2, 3)) - 1).abs().max() < 1e-9


@pytest.mark.parametrize(
    "kind", [layers.Denoiser, layers.SimpleLossDenoiser, layers.DenoiserWithVariance]
)
def test_low_precision_losses_are_float32(kind: Any) -> None:
    x0, noise = data(dtype=torch.bfloat16)
    for scales in (1, 2):
        denoiser = kind(network, SIGMA_DATA, "soft-min-snr", scales)
        assert denoiser(x0, SIGMA.bfloat16()).dtype == torch.bfloat16
        loss = denoiser.loss(x0, noise, SIGMA.bfloat16())
        assert loss.dtype == torch.float32
        assert loss.isfinite().all()


@pytest.mark.parametrize(
    "kind", [layers.Denoiser, layers.SimpleLossDenoiser, layers.DenoiserWithVariance]
)
def test_precision_of_x_and_of_the_network(kind: Any) -> None:
    """x keeps its dtype beside a finer sigma; the network's own stays inside."""
    seen: list[torch.dtype] = []

    class Float32(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor, sigma: Tensor, **kwargs: Any) -> Any:
            seen.append(x.dtype)
            return network(x * self.weight, sigma, **kwargs)

    weighted: list[torch.dtype] = []

    def weighting(sigma: Tensor) -> Tensor:
        weighted.append(sigma.dtype)
        return torch.ones_like(sigma)

    denoiser = kind(Float32(), SIGMA_DATA, weighting)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        x0, noise = data(dtype=dtype)
        assert denoiser(x0, SIGMA.bfloat16()).dtype == dtype
        denoiser.loss(x0, noise, SIGMA.bfloat16())
    assert set(seen) == {torch.float32}
    assert set(weighted) <= {torch.float32}
    seen.clear()
    x0, noise = data(dtype=torch.float32)
    plain = kind(lambda x, s, **k: (seen.append(x.dtype), network(x, s, **k))[1])
    plain.loss(x0, noise, SIGMA)
    assert set(seen) == {torch.float32}


def test_sigma_follows_x() -> None:
    """The device "meta" computes nothing, but refuses to be mixed with another."""
    x = torch.empty(4, 2, 5, 6, device="meta")
    for kind in (layers.Denoiser, layers.SimpleLossDenoiser, layers.DenoiserWithVariance):
        denoiser = kind(network, scales=2)
        assert denoiser(x, SIGMA).device.type == "meta"
        assert denoiser.loss(x, x, SIGMA).device.type == "meta"


def test_it_is_a_denoiser_of_ours() -> None:
    denoiser = layers.Denoiser(network, SIGMA_DATA)
    assert isinstance(denoiser, Denoiser)
    assert denoiser.path is VE
    noise = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    exact = KSampler(lambda x, sigma: denoiser(x, sigma), "karras", "heun").sample(noise, 5)
    assert torch.equal(KSampler(denoiser, "karras", "heun").sample(noise, 5), exact)


def test_names() -> None:
    assert k_diffusion.Denoiser is layers.Denoiser
    assert k_diffusion.layers is layers
    assert "Denoiser" in dir(k_diffusion)
    assert "layers" in dir(k_diffusion)
    assert list(inspect.signature(layers.Denoiser).parameters) == [
        "inner_model", "sigma_data", "weighting", "scales",
    ]  # fmt: skip
    for name in layers.__all__:
        assert getattr(layers, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'AdaGM'"):
        _ = layers.AdaGM
