"""The established layers against their formulas, and against what was wrong with them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from k_diffusion import layers
from k_diffusion.layers import (
    AdaGN,
    ConditionedModule,
    ConditionedResidualBlock,
    ConditionedSequential,
    CrossAttention2d,
    Downsample2d,
    FourierFeatures,
    ResidualBlock,
    SelfAttention2d,
    UnconditionedModule,
    UNet,
    Upsample2d,
)

F64 = torch.float64


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def awake(module: nn.Module) -> Any:
    """In float64, with all its parameters random."""
    for i, parameter in enumerate(module.double().parameters()):
        parameter.data = 0.3 * drawn(*parameter.shape, seed=i)
    return module


class Plus(ConditionedModule):
    def forward(self, input: Tensor, cond: Any) -> Tensor:
        return input + cond["cond"]


def test_blocks_of_either_kind() -> None:
    x, cond = drawn(2, 3), {"cond": drawn(2, 3, seed=1)}
    double = nn.Linear(3, 3, dtype=F64)
    shifted = x + cond["cond"]
    assert torch.equal(ConditionedSequential(Plus(), double)(x, cond), double(shifted))
    assert torch.equal(UnconditionedModule(double)(x), double(x))
    assert torch.equal(UnconditionedModule(double)(x, cond), double(x))
    assert torch.equal(ResidualBlock(double)(x), double(x) + x)
    assert torch.equal(ResidualBlock(double, skip=nn.Tanh())(x), double(x) + x.tanh())
    assert torch.equal(ConditionedResidualBlock(Plus(), double)(x, cond), double(shifted) + x)
    block = ConditionedResidualBlock(nn.Tanh(), skip=Plus())
    assert torch.equal(block(x, cond), x.tanh() + shifted)
    assert list(ConditionedResidualBlock(double, skip=double).state_dict()) == [
        "main.0.weight", "main.0.bias", "skip.weight", "skip.bias",
    ]  # fmt: skip


def test_ada_gn() -> None:
    norm = AdaGN(4, 6, 2, eps=0.1, cond_key="other").double()
    x, cond = drawn(3, 6, 5, 7), {"other": drawn(3, 4, seed=1)}
    assert (norm(x, cond) - F.group_norm(x, 2, eps=0.1)).abs().max() < 1e-12  # at first
    awake(norm)
    scale, shift = (cond["other"] @ norm.mapper.weight.T + norm.mapper.bias).split(6, 1)
    groups = x.reshape(3, 2, -1)
    variance, mean = torch.var_mean(groups, 2, correction=0, keepdim=True)
    unit = ((groups - mean) / (variance + 0.1).sqrt()).reshape(x.shape)
    expected = unit * (1 + scale)[:, :, None, None] + shift[:, :, None, None]
    assert (norm(x, cond) - expected).abs().max() < 1e-12
    with pytest.raises(ValueError, match="num_groups = 4 does not divide the 6 channels"):
        AdaGN(4, 6, 4)


# ---------------------------------------------------------------- attention


def norm(channels: int) -> AdaGN:
    return AdaGN(4, channels, 1)


def heads_of(x: Tensor, heads: int) -> Tensor:
    """(B, C, H, W) to (B, heads, H * W, C / heads), by loops."""
    batch, channels, height, width = x.shape
    each = channels // heads
    out = x.new_empty(batch, heads, height * width, each)
    for h in range(heads):
        for place in range(height * width):
            out[:, h, place] = x[:, h * each : (h + 1) * each, place // width, place % width]
    return out


def mixed(q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None = None) -> Tensor:
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[3])
    if keep is not None:
        scores = scores.masked_fill(~keep[:, None, None], -math.inf)
    return scores.softmax(3) @ v


def back(heads: Tensor, like: Tensor) -> Tensor:
    return heads.transpose(2, 3).reshape(like.shape)


def test_self_attention() -> None:
    x, cond = drawn(2, 6, 3, 4), {"cond": drawn(2, 4, seed=1)}
    attention = SelfAttention2d(6, 2, norm).double()
    assert torch.equal(attention(x, cond), x)  # at first
    awake(attention)
    qkv = attention.qkv_proj(attention.norm_in(x, cond))
    q, k, v = (heads_of(each, 2) for each in qkv.split(6, 1))
    expected = x + attention.out_proj(back(mixed(q, k, v), x))
    assert (attention(x, cond) - expected).abs().max() < 1e-12
    with pytest.raises(ValueError, match="n_head = 4 does not divide the 6 channels"):
        SelfAttention2d(6, 4, norm)


def cross(dropout: float = 0.0) -> tuple[CrossAttention2d, Tensor, dict[str, Tensor]]:
    attention = awake(CrossAttention2d(6, 5, 3, norm, dropout))
    cond = {
        "cond": drawn(3, 4, seed=1),
        "cross": drawn(3, 4, 5, seed=2),
        "cross_padding": torch.tensor([[0, 0, 0, 0], [0, 1, 1, 1], [0, 0, 1, 1]], dtype=F64),
    }
    return attention, drawn(3, 6, 2, 3), cond


def test_cross_attention() -> None:
    attention, x, cond = cross()
    q = heads_of(attention.q_proj(attention.norm_dec(x, cond)), 3)
    kv = attention.kv_proj(attention.norm_enc(cond["cross"])).unflatten(2, (6, 2)).transpose(1, 2)
    keep = cond["cross_padding"] == 0
    expected = x + attention.out_proj(back(mixed(q, kv[:, :3], kv[:, 3:], keep), x))
    assert (attention(x, cond) - expected).abs().max() < 1e-12
    whole = x + attention.out_proj(back(mixed(q, kv[:, :3], kv[:, 3:]), x))
    assert (attention(x, {**cond, "cross_padding": None}) - whole).abs().max() < 1e-12
    del cond["cross_padding"]
    assert (attention(x, cond) - whole).abs().max() < 1e-12
    assert torch.equal(CrossAttention2d(6, 5, 3, norm).double()(x, cond), x)  # at first


def test_padding_of_any_dtype_is_the_same() -> None:
    attention, x, cond = cross()
    expected = attention(x, cond)
    for dtype in (torch.bool, torch.int64, torch.float32):
        padding = cond["cross_padding"].to(dtype)
        assert torch.equal(attention(x, {**cond, "cross_padding": padding}), expected)


@pytest.mark.parametrize("value", [1e9, math.inf, math.nan])
def test_padded_tokens_are_ignored_exactly(value: float) -> None:
    attention, x, cond = cross()
    expected = attention(x, cond)
    padded = cond["cross_padding"].bool()
    tokens = cond["cross"].masked_fill(padded[:, :, None], value)
    assert torch.equal(attention(x, {**cond, "cross": tokens}), expected)


def test_where_every_token_is_padding_the_attention_is_zero() -> None:
    attention, x, cond = cross()
    cond["cross_padding"] = torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 1, 1]])
    got = attention(x, cond)
    expected = x[1] + attention.out_proj.bias[:, None, None]
    assert (got[1] - expected).abs().max() < 1e-12
    tokens = cond["cross"].clone().requires_grad_()
    attention(x, {**cond, "cross": tokens}).sum().backward()
    assert tokens.grad is not None
    assert tokens.grad.isfinite().all()


def test_nothing_leans_on_a_softmax_over_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch makes of a row that is masked throughout differs between its implementations."""

    def naive(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *_: Any, **__: Any) -> Tensor:
        scores = (q @ k.transpose(2, 3) / math.sqrt(q.shape[3])).masked_fill(~mask, -math.inf)
        return scores.softmax(3) @ v

    attention, x, cond = cross()
    cond["cross_padding"] = torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 1, 1]])
    expected = attention(x, cond)
    monkeypatch.setattr(F, "scaled_dot_product_attention", naive)
    assert (attention(x, cond) - expected).abs().max() < 1e-12


def test_no_token_at_all() -> None:
    attention, x, cond = cross()
    cond["cross"], cond["cross_padding"] = cond["cross"][:, :0], cond["cross_padding"][:, :0]
    expected = x + attention.out_proj.bias[:, None, None]
    assert (attention(x, cond) - expected).abs().max() < 1e-12


@pytest.mark.parametrize("kind", ["self", "cross"])
def test_attention_drops_nothing_in_evaluation(kind: str) -> None:
    attention, x, cond = cross(0.5)
    module = attention if kind == "cross" else awake(SelfAttention2d(6, 2, norm, 0.5))
    module.train()
    assert not torch.equal(module(x, cond), module(x, cond))
    module.eval()
    still = cross()[0] if kind == "cross" else awake(SelfAttention2d(6, 2, norm))
    assert torch.equal(module(x, cond), still(x, cond))


# ---------------------------------------------------------------- resampling

HALF = {
    "linear": [1 / 8, 3 / 8],
    "cubic": [-0.01171875, -0.03515625, 0.11328125, 0.43359375],
    # The function itself is sin(pi x) sin(pi x / 3) / (pi² x² / 3); its values here, divided by
    # their sum.
    "lanczos3": [
        math.sin(math.pi * x) * math.sin(math.pi * x / 3) / (math.pi * x) ** 2 * 3
        for x in (2.75, 2.25, 1.75, 1.25, 0.75, 0.25)
    ],
}
HALF["lanczos3"] = [w / sum(HALF["lanczos3"]) / 2 for w in HALF["lanczos3"]]
resamplers = pytest.mark.parametrize("kind", [Downsample2d, Upsample2d])


def line(name: str, gain: float) -> Tensor:
    half = HALF[name]
    return torch.tensor([*half, *reversed(half)], dtype=F64) * gain


@pytest.mark.parametrize("name", HALF)
def test_filters(name: str) -> None:
    for kind, gain in ((Downsample2d, 1), (Upsample2d, 2)):
        weights = line(name, gain)
        assert (kind(name).kernel - torch.outer(weights, weights)).abs().max() < 1e-7
        assert list(kind(name).state_dict()) == ["kernel"]
    assert torch.equal(Downsample2d("bilinear").kernel, Downsample2d().kernel)
    assert torch.equal(Downsample2d("bicubic").kernel, Downsample2d("cubic").kernel)
    with pytest.raises(ValueError, match="unknown kernel 'lanczos'; did you mean 'lanczos3'"):
        Upsample2d("lanczos")


@pytest.mark.parametrize("name", HALF)
@pytest.mark.parametrize("mode", ["reflect", "replicate"])
def test_downsampling_is_a_strided_sum(name: str, mode: str) -> None:
    module, x = Downsample2d(name, mode), drawn(2, 3, 12, 8)
    weights = line(name, 1)
    pad = len(weights) // 2 - 1
    wide = F.pad(x, (pad,) * 4, mode)
    expected = torch.zeros(2, 3, 6, 4, dtype=F64)
    for i, a in enumerate(weights):
        for j, b in enumerate(weights):
            expected += a * b * wide[:, :, i : i + 12 : 2, j : j + 8 : 2]
    assert (module(x) - expected).abs().max() < 1e-6


@pytest.mark.parametrize("name", HALF)
def test_upsampling_puts_the_filter_where_values_are(name: str) -> None:
    """A single value far from the border becomes the filter; an even picture stays even."""
    weights = line(name, 2)
    reach = len(weights)
    x = torch.zeros(1, 1, 16, 16, dtype=F64)
    x[0, 0, 7, 9] = 1
    expected = torch.zeros(32, 32, dtype=F64)
    begin = reach // 2 - 1  # the value covers the two places 14 and 15 of 32
    expected[14 - begin : 16 + begin, 18 - begin : 20 + begin] = torch.outer(weights, weights)
    assert (Upsample2d(name)(x)[0, 0] - expected).abs().max() < 1e-6
    even = torch.ones(1, 2, 12, 12, dtype=F64)
    assert (Upsample2d(name)(even) - 1).abs().max() < 0.02  # cubic and lanczos ripple a little
    assert (Downsample2d(name)(even) - 1).abs().max() < 1e-6


@resamplers
def test_the_blur_is_no_dense_convolution(kind: type[nn.Module]) -> None:
    """16 products a value, not 16 times the channels."""
    x = torch.randn(2, 24, 8, 8)
    with FlopCounterMode(display=False) as counter:
        y = kind()(x)
    values = y.numel() if kind is Downsample2d else 2 * 24 * 10 * 10  # what comes in, with a border
    assert counter.get_total_flops() == 2 * 16 * values


@resamplers
def test_resampling_follows_dtype_and_layout(kind: type[nn.Module]) -> None:
    x = torch.randn(2, 4, 8, 8)
    assert kind()(x.bfloat16()).dtype == torch.bfloat16
    last = kind()(x.to(memory_format=torch.channels_last))
    assert (last - kind()(x)).abs().max() < 1e-6


# ---------------------------------------------------------------- features and the whole


def test_fourier_features() -> None:
    features = FourierFeatures(3, 8, std=2.0)
    assert features.weight.shape == (4, 3)
    assert 0.5 < features.weight.std() < 4
    x = torch.randn(5, 2, 3)
    angles = 2 * math.pi * x.double() @ features.weight.double().T
    expected = torch.cat([angles.cos(), angles.sin()], -1)
    assert (features(x) - expected).abs().max() < 1e-5
    assert features.half()(x.half()).dtype == torch.float16
    with pytest.raises(ValueError, match="out_features = 7"):
        FourierFeatures(1, 7)


class Stage(ConditionedModule):
    def __init__(self, factor: float, seen: list[Any]) -> None:
        super().__init__()
        self.factor, self.seen = factor, seen

    def forward(self, input: Tensor, cond: Any, *skip: Tensor | None) -> Tensor:
        self.seen.append((self.factor, *skip))
        return input * self.factor


@pytest.mark.parametrize("skip_stages", [0, 1, 2])
def test_unet_pairs_the_stages(skip_stages: int) -> None:
    seen: list[Any] = []
    down = [Stage(f, seen) for f in (2.0, 3.0, 5.0)]
    up = [Stage(f, seen) for f in (7.0, 11.0, 13.0)]
    x = torch.ones(1)
    got = UNet(down, iter(up), skip_stages)(x, {})
    rest = [2.0, 3.0, 5.0][skip_stages:]
    assert got.item() == math.prod(rest) * math.prod([7.0, 11.0, 13.0][: len(rest)])
    skips = [s[1] if s[1] is None else s[1].item() for s in seen[len(rest) :]]
    assert skips == [None, *[math.prod(rest[:n]) for n in range(len(rest) - 1, 0, -1)]]


def test_programs_build_networks_of_their_own() -> None:
    class Block(layers.ConditionedResidualBlock):
        def __init__(self, feats: int, channels: int) -> None:
            super().__init__(
                AdaGN(feats, channels, 1), nn.GELU(), nn.Conv2d(channels, channels, 3, padding=1)
            )

    class Up(layers.ConditionedSequential):
        def forward(self, input: Tensor, cond: Any, skip: Tensor | None = None) -> Tensor:
            return super().forward(input if skip is None else input + skip, cond)

    def attention(channels: int) -> SelfAttention2d:
        return SelfAttention2d(channels, 2, lambda c: AdaGN(3, c, 1), dropout_rate=0.1)

    net = UNet(
        [ConditionedSequential(Block(3, 4)), ConditionedSequential(Downsample2d(), Block(3, 4))],
        [Up(Block(3, 4), attention(4), Upsample2d()), Up(Block(3, 4))],
    )
    x = torch.randn(2, 4, 8, 8)
    assert net(x, {"cond": torch.randn(2, 3)}).shape == x.shape
    assert "u_blocks.0.1.qkv_proj.weight" in net.state_dict()
    assert "d_blocks.1.0.kernel" in net.state_dict()
