"""Group counts and time features: what the layers promise, by number."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from k_diffusion.models.attention import CrossAttention, SelfAttention
from k_diffusion.models.layers import AdaptiveGroupNorm, Pointwise, channels_last, norm_groups
from k_diffusion.models.mapping import (
    FourierFeatures,
    MappingNetwork,
    TimeFeatures,
    sinusoids,
)
from k_diffusion.models.network import TIME_SCALES
from k_diffusion.models.resampling import Blur, SmoothDownsample, SmoothUpsample


def test_norm_groups() -> None:
    for channels in range(1, 600):
        groups = norm_groups(channels)
        assert channels % groups == 0
        assert groups <= 32
        assert groups == 1 or channels // groups >= 4
        # The largest of that kind.
        assert not any(
            channels % more == 0 and channels // more >= 4 for more in range(groups + 1, 33)
        )
    assert [norm_groups(c) for c in (3, 37, 64, 96, 128, 320)] == [1, 1, 16, 24, 32, 32]


def test_sinusoids() -> None:
    t = torch.tensor([0.0, 1.0, 999.0], dtype=torch.float64)
    features = sinusoids(t, 4)
    assert features.shape == (3, 8)
    for k, frequency in enumerate((1, 1e-1, 1e-2, 1e-3)):
        assert (features[:, k] - 2**0.5 * (t * frequency).cos()).abs().max() < 1e-12
        assert (features[:, 4 + k] - 2**0.5 * (t * frequency).sin()).abs().max() < 1e-12
    assert (features.square().mean(1) - 1).abs().max() < 1e-12
    assert sinusoids(torch.ones(2, dtype=torch.bfloat16), 4).dtype == torch.float32


def test_timestep_and_unit_time_see_the_same_angles() -> None:
    steps = torch.tensor([0.0, 1.0, 250.5, 999.0])
    unit = steps / 1000
    scaled = [t * TIME_SCALES[name] for t, name in ((steps, "timestep"), (unit, "unit"))]
    assert (sinusoids(scaled[0], 32) - sinusoids(scaled[1], 32)).abs().max() < 1e-3


@pytest.mark.parametrize(
    ("convention", "low", "high"),
    [("timestep", 0.0, 1000.0), ("unit", 0.0, 1.0), ("log_sigma", -2.0, 2.0)],
)
def test_time_features_tell_levels_apart(convention: str, low: float, high: float) -> None:
    """A thousandth of the range is seen, and no two times of the range look the same."""
    times = torch.linspace(low, high, 1001, dtype=torch.float64) * TIME_SCALES[convention]
    features = sinusoids(times, 32)
    distance = torch.cdist(features, features) / 8  # root mean square of the 64 features
    distance.fill_diagonal_(torch.inf)
    assert distance.min() > 0.2


def mapping(count: int, width: int, convention: str = "timestep", **options: Any) -> MappingNetwork:
    torch.manual_seed(0)
    return MappingNetwork(TimeFeatures("sinusoidal", count, convention), width, **options)


def test_the_mapping_scales_the_time() -> None:
    t = torch.tensor([0.25, 0.5])
    plain = mapping(16, 8)(t)
    assert torch.equal(mapping(16, 8, "unit")(t / 1000), plain)
    assert (mapping(16, 8, "log_sigma")(t / 250) - plain).abs().max() < 1e-5


def test_the_mapping_against_the_formula() -> None:
    network = mapping(16, 8, "unit", num_classes=3, vectors={"embedding": 5, "augmentation": 2})
    state = {name: p.detach() for name, p in network.named_parameters()}
    t, label = torch.tensor([0.3, 0.7]), torch.tensor([1, 3])
    vectors = {"embedding": torch.randn(2, 5), "augmentation": torch.randn(2, 2)}
    hidden = sinusoids(1000 * t, 16) @ state["time.weight"].T + state["time.bias"]
    hidden = hidden + state["classes.weight"][label]
    for name, vector in vectors.items():
        hidden = hidden + vector @ state[f"vectors.{name}.weight"].T
    mapped = (hidden * hidden.sigmoid()) @ state["mapping.weight"].T + state["mapping.bias"]
    expected = mapped * mapped.sigmoid()
    assert (network(t, label, **vectors) - expected).abs().max() < 1e-5


def test_time_and_class_begin_at_like_sizes() -> None:
    network = mapping(32, 256, num_classes=100)
    time = network.time(sinusoids(torch.linspace(0, 1000, 100), 32)).std()
    assert 0.5 < network.classes.weight.std() / time < 2


def test_fourier_features() -> None:
    torch.manual_seed(0)
    features = FourierFeatures(2, 500, std=3.0)
    assert features.weight.std().item() == pytest.approx(3, rel=0.1)
    assert "weight" in features.state_dict()
    assert not list(features.parameters())
    x = torch.randn(4, 2)
    angles = 2 * torch.pi * (x.double() @ features.weight.double().T)
    expected = torch.cat([angles.cos(), angles.sin()], 1) * 2**0.5
    assert (features(x) - expected).abs().max() < 1e-4
    assert (features(x).square().mean(1) - 1).abs().max() < 1e-5
    with torch.autocast("cpu", torch.bfloat16):
        assert (
            torch.equal(features(x), features(x.double()).float())
            or (features(x) - expected).abs().max() < 1e-4
        )


@pytest.mark.parametrize("convention", ["timestep", "unit", "log_sigma"])
def test_fourier_times_span_four(convention: str) -> None:
    torch.manual_seed(0)
    features = TimeFeatures("fourier", 8, convention)
    span = 1000 / TIME_SCALES[convention]
    assert features.fourier is not None
    expected = features.fourier(torch.tensor([[0.0], [1.0], [4.0]]))
    assert (features(torch.tensor([0, span / 4, span])) - expected).abs().max() < 1e-5


def test_adaptive_group_norm() -> None:
    torch.manual_seed(0)
    norm = AdaptiveGroupNorm(8, 5)
    x, embedding = torch.randn(3, 8, 4, 6) * 3 + 1, torch.randn(3, 5)
    scale, shift = norm.modulation(embedding).chunk(2, 1)
    grouped = x.reshape(3, 2, -1)
    mean, variance = grouped.mean(2, keepdim=True), grouped.var(2, keepdim=True, correction=0)
    plain = ((grouped - mean) / (variance + 1e-5).sqrt()).reshape(x.shape)
    expected = plain * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    assert (norm(x, embedding) - expected).abs().max() < 1e-5


def test_self_attention_against_the_formula() -> None:
    torch.manual_seed(0)
    attention = SelfAttention(12, 6)
    nn.init.normal_(attention.out.weight)
    x = torch.randn(2, 12, 3, 5)
    tokens = attention.norm(x).reshape(2, 12, 15).transpose(1, 2)
    heads = []
    q, k, v = attention.qkv(tokens).split(12, 2)
    for head in (slice(0, 6), slice(6, 12)):
        weights = (q[..., head] @ k[..., head].transpose(1, 2) / 6**0.5).softmax(2)
        heads.append(weights @ v[..., head])
    added = attention.out(torch.cat(heads, 2)).transpose(1, 2).reshape(x.shape)
    assert (attention(x) - x - added).abs().max() < 1e-5
    assert added.std() > 0.1
    # It knows no positions: moved input, moved output.
    moved = x.roll((1, 2), (2, 3))
    assert (attention(moved) - attention(x).roll((1, 2), (2, 3))).abs().max() < 1e-5


def test_cross_attention_against_the_formula() -> None:
    torch.manual_seed(0)
    attention = CrossAttention(12, 6, 5)
    nn.init.normal_(attention.out.weight)
    x, context = torch.randn(3, 12, 4, 5), torch.randn(3, 7, 5)
    mask = torch.arange(7) < torch.tensor([[7], [3], [0]])
    found = attention(x, context, mask)
    q = attention.query(attention.norm(x).flatten(2).transpose(1, 2))
    normed = (context - context.mean(2, keepdim=True)) / (
        context.var(2, keepdim=True, correction=0) + 1e-5
    ).sqrt()
    k, v = attention.key_value(normed).split(12, 2)
    for i, length in enumerate((7, 3)):
        heads = []
        for head in (slice(0, 6), slice(6, 12)):
            weights = (q[i, :, head] @ k[i, :length, head].T / 6**0.5).softmax(1)
            heads.append(weights @ v[i, :length, head])
        added = attention.out(torch.cat(heads, 1)).T.reshape(x[i].shape)
        assert (found[i] - x[i] - added).abs().max() < 1e-5
        assert added.std() > 0.1
    assert torch.equal(found[2], x[2])
    found.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in attention.parameters())
    assert (attention(x, context) - attention(x, context, mask | True)).abs().max() < 1e-5


def test_no_softmax_is_over_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which some kernels, not all, answer with NaN."""
    masks = []

    def look(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *_: Any, **__: Any) -> Tensor:
        masks.append(mask)
        return v[:, :, :1].expand_as(q)

    monkeypatch.setattr(F, "scaled_dot_product_attention", look)
    mask = torch.tensor([[True, True], [False, True], [False, False]])
    CrossAttention(4, 4, 3)(torch.randn(3, 4, 5), torch.randn(3, 2, 3), mask)
    assert masks[0].shape == (3, 1, 1, 2)
    assert masks[0][:2, 0, 0].equal(mask[:2])
    assert masks[0].any(-1).all()


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_pointwise_is_a_convolution_of_size_1(dims: int) -> None:
    torch.manual_seed(0)
    layer = Pointwise(6, 4)
    x = channels_last(torch.randn(2, 6, *range(3, 3 + dims)))
    convolve = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    expected = convolve(x, layer.weight.reshape(4, 6, *[1] * dims), layer.bias)
    assert (layer(x) - expected).abs().max() < 1e-5
    assert layer(x).stride()[1] == 1


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_blur_against_the_formula(dims: int) -> None:
    torch.manual_seed(0)
    blur = Blur(dims)
    x = torch.randn(2, 5, *[8, 6, 4][:dims])
    expected = x
    for dim in range(2, 2 + dims):
        n = x.shape[dim]
        taps = [
            expected.index_select(dim, (torch.arange(0, n, 2) + k).clamp(0, n - 1))
            for k in (-1, 0, 1, 2)
        ]
        expected = (taps[0] + 3 * taps[1] + 3 * taps[2] + taps[3]) / 8
    assert (blur(x) - expected).abs().max() < 1e-6
    # What is the same everywhere remains so, borders included.
    assert (blur(torch.ones_like(x)) - 1).abs().max() < 1e-6
    assert blur(x.bfloat16()).dtype == torch.bfloat16
    # Away from borders it is the transpose of linear interpolation.
    mode = ("linear", "bilinear", "trilinear")[dims - 1]
    small = torch.zeros(1, 1, *[8] * dims, requires_grad=True)
    large = torch.randn(1, 1, *[16] * dims)
    (F.interpolate(small, scale_factor=2.0, mode=mode) * large).sum().backward()
    inner = (..., *[slice(1, -1)] * dims)
    assert small.grad is not None
    assert (small.grad - 2**dims * blur(large))[inner].abs().max() < 1e-5


@pytest.mark.parametrize(("dims", "size"), [(1, (8,)), (2, (8, 6)), (3, (4, 6, 4))])
def test_a_blur_is_never_a_dense_convolution(dims: int, size: tuple[int, ...]) -> None:
    channels = 64
    x = torch.randn(2, channels, *size)
    with FlopCounterMode(display=False) as counter:
        y = Blur(dims)(x)
    # A multiplication and an addition for each of 4 values along each dimension.
    assert counter.get_total_flops() == 2 * 4**dims * y.numel()


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_smooth_resampling_follows_a_small_movement(dims: int) -> None:
    """Down and up again, of noise: what moves by one comes out moved by one, nearly."""
    torch.manual_seed(0)
    down, up = SmoothDownsample(dims, 8, 8), SmoothUpsample(dims, 8, 8)
    for layer in (down, up):
        nn.init.dirac_(layer.conv.weight)
        nn.init.zeros_(layer.conv.bias)
    x = torch.randn(2, 8, *[33, 32, 32][:dims])
    here, there = (up(down(x.narrow(2, start, 32))) for start in (0, 1))
    error = here.narrow(2, 5, 24) - there.narrow(2, 4, 24)
    # 0.23 was measured; it would be 1.4 for values taken and repeated.
    assert error.square().mean().sqrt() < 0.3 * there.std()
