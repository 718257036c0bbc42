"""Functions and layers keep magnitudes, by number; weights have directions alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from magnitudes import SMALL, gaussian, rms
from torch import Tensor, nn

from k_diffusion.models import MPUNet
from k_diffusion.models.mp_layers import (
    MPConv,
    MPEmbedding,
    MPFourier,
    MPLinear,
    UnitRows,
    mp_cat,
    mp_silu,
    mp_sum,
    unit_magnitude,
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# ---------------------------------------------------------------- functions


def test_silu_has_unit_mean_square_on_gaussian_input() -> None:
    x = torch.linspace(-12, 12, 20_001, dtype=torch.float64)
    density = torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi) * (x[1] - x[0])
    # The paper gives the divisor with three digits.
    assert abs(float((mp_silu(x).square() * density).sum()) - 1) < 2e-3
    assert abs(float(mp_silu(x[-1]) * 0.596 - 12)) < 1e-3


@pytest.mark.parametrize("balance", [0.0, 0.1, 0.3, 0.5, 0.8, 1.0])
def test_a_sum_keeps_magnitude(balance: float) -> None:
    a, b = gaussian(1_000_000), gaussian(1_000_000)
    total = mp_sum(a, b, balance)
    assert abs(float(rms(total)) - 1) < 3e-3
    share = float((total * b).mean() / (total * a).mean()) if balance < 1 else math.inf
    wanted = balance / (1 - balance) if balance < 1 else math.inf
    assert share == pytest.approx(wanted, rel=0.02, abs=0.003)


@pytest.mark.parametrize(("channels", "balance"), [((3, 9), 0.5), ((8, 2), 0.3), ((4, 4), 0.5)])
def test_a_junction_keeps_magnitude_and_shares(channels: Any, balance: float) -> None:
    a, b = (gaussian(100, n, 60, 60) for n in channels)
    joined = mp_cat(a, b, balance)
    assert abs(float(rms(joined)) - 1) < 3e-3
    parts = joined.square().mean((0, 2, 3)).split(channels)
    # Both parts' sums of squares, which are what a convolution reads.
    ratio = float(parts[1].sum() / parts[0].sum())
    assert ratio == pytest.approx((balance / (1 - balance)) ** 2, rel=5e-3)
    assert torch.allclose(joined[:, : channels[0]] / a, joined[0, 0, 0, 0] / a[0, 0, 0, 0])


def test_unit_magnitude() -> None:
    x = gaussian(3, 5, 4, 4) * torch.tensor([1e-3, 1.0, 1e3]).reshape(3, 1, 1, 1)
    normed = unit_magnitude(x, 1)
    assert (rms(normed, 1) - 1).abs().max() < 1e-12
    assert (normed / x).std(1).max() < 1e-9
    assert (rms(unit_magnitude(x, (1, 2, 3)), (1, 2, 3)) - 1).abs().max() < 1e-12


def test_unit_magnitude_of_nothing_is_nothing_with_a_finite_gradient() -> None:
    x = torch.zeros(2, 3, requires_grad=True)
    normed = unit_magnitude(x, 1)
    normed.sum().backward()
    assert x.grad is not None
    assert normed.abs().max() == 0
    assert x.grad.isfinite().all()


def test_unit_magnitude_measures_in_float32() -> None:
    x = torch.full((1, 4096), 3e3, dtype=torch.float16)  # 64 · 3e3 is out of float16's range
    assert (unit_magnitude(x, 1) - 1).abs().max() < 2e-3


def test_fourier_features_have_unit_mean_square() -> None:
    features = MPFourier(400_000)
    x = torch.tensor([-1.7, 0.0, 0.4], dtype=torch.float64)
    y = features(x)
    assert y.dtype == torch.float64
    assert (rms(y, 1) - 1).abs().max() < 3e-3
    # E cos(2π(f a + φ)) cos(2π(f b + φ)) over a Gaussian f of variance 1.
    near = float((features(x + 0.1) * y).mean())
    assert near == pytest.approx(math.exp(-((2 * math.pi * 0.1) ** 2) / 2), abs=5e-3)
    assert features(x.bfloat16()).dtype == torch.float32


# ---------------------------------------------------------------- weights


def rows(layer: UnitRows) -> Tensor:
    return rms(layer.weight.flatten(1), 1)


LAYERS = {
    "linear": (lambda: MPLinear(48, 64), (512, 48)),
    "convolution": (lambda: MPConv(16, 64, 3), (8, 16, 12, 12)),
    "pointwise": (lambda: MPConv(48, 64, 1), (8, 48, 12, 12)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_layers_keep_magnitude(kind: str) -> None:
    make, shape = LAYERS[kind]
    layer, x = make().double(), gaussian(*shape)
    y = layer(x)
    inner = y if y.ndim == 2 else y[:, :, 1:-1, 1:-1]  # borders see zeros beside them
    assert abs(float(rms(inner)) - 1) < 0.02
    channels = [0] if y.ndim == 2 else [0, 2, 3]
    assert (rms(inner, channels) - 1).abs().max() < 0.25


@pytest.mark.parametrize("kind", LAYERS)
def test_only_the_direction_of_weights_counts(kind: str) -> None:
    make, shape = LAYERS[kind]
    layer, x = make().double(), gaussian(*shape)
    before = layer(x)
    lengths = torch.logspace(-2, 3, 64, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.mul_(lengths.reshape(-1, *[1] * (layer.weight.ndim - 1)))
    assert (layer(x) - before).abs().max() < 1e-12
    layer.force()
    assert (rows(layer) - 1).abs().max() < 1e-12
    assert (layer(x) - before).abs().max() < 1e-12


@pytest.mark.parametrize("kind", LAYERS)
def test_gradients_are_orthogonal_to_weights(kind: str) -> None:
    make, shape = LAYERS[kind]
    layer, x = make().double(), gaussian(*shape)
    layer(x).pow(3).sum().backward()
    assert layer.weight.grad is not None
    w, g = layer.weight.detach().flatten(1), layer.weight.grad.flatten(1)
    assert (g.norm(dim=1) > 0.1).all()
    assert ((w * g).sum(1) / (w.norm(dim=1) * g.norm(dim=1))).abs().max() < 1e-12


def test_an_embedding_is_the_linear_map_of_a_one_hot_vector() -> None:
    layer = MPEmbedding(7, 40).double()
    index = torch.tensor([6, 0, 3])
    one_hot = F.one_hot(index, 7).double()
    linear = MPLinear(7, 40).double()
    linear.load_state_dict(layer.state_dict())
    assert (layer(index) - linear(unit_magnitude(one_hot, 1))).abs().max() < 1e-12
    assert abs(float(rms(layer(torch.arange(7)))) - 1) < 1e-12


def test_all_weights_begin_with_unit_mean_square() -> None:
    model = MPUNet(num_classes=3, embedding_dim=2, has_uncertainty=True, **SMALL)
    layers = [m for m in model.modules() if isinstance(m, UnitRows)]
    assert all((rows(layer) - 1).abs().max() < 1e-6 for layer in layers)
    # All that is learned are such weights, and gains.
    weights = {id(layer.weight) for layer in layers}
    assert all(id(p) in weights or p.ndim == 0 for p in model.parameters())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_lengthens_weights_and_after_step_takes_that_back(checkpointing: bool) -> None:
    model = MPUNet(checkpointing=checkpointing, num_classes=3, **SMALL)
    nn.init.ones_(model.gain_out)
    layers = [m for m in model.modules() if isinstance(m, UnitRows)]
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    x, t = torch.randn(4, 2, 8, 8), torch.randn(4)
    for _ in range(2):
        optimizer.zero_grad()
        model(x, t).square().sum().backward()
        optimizer.step()
        longer = [float(rows(layer).max()) for layer in layers]
        before = model(x, t)
        model.after_step()
        assert max(longer) > 1 + 1e-3
        assert all((rows(layer) - 1).abs().max() < 1e-6 for layer in layers)
        assert (model(x, t) - before).abs().max() < 1e-4
    once = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.after_step()
    assert all((once[n] - v).abs().max() < 1e-6 for n, v in model.state_dict().items())
