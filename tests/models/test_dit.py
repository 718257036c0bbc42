"""The transformer: its patches, positions, gates, and the tokens that it may not see."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from k_diffusion.models import DiT, make_model
from k_diffusion.models.dit import Attention, CrossAttention, DiTBlock, DiTConfig, grid_positions

SMALL: dict[str, Any] = {"in_channels": 2, "width": 32, "depth": 2, "head_channels": 16}


def tiny(awake: bool = True, **options: Any) -> DiT:
    torch.manual_seed(0)
    model = DiT(**{**SMALL, **options})
    for parameter in model.parameters():
        if awake and not parameter.detach().any():
            nn.init.normal_(parameter, std=0.3)
    return model


def inputs(batch: int = 3, height: int = 8, width: int = 8) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(batch, 2, height, width), torch.linspace(3, 900, batch)


# ---------------------------------------------------------------- shape


@pytest.mark.parametrize(
    ("size", "heads", "millions"), [("s", 6, 33), ("b", 12, 130), ("l", 16, 458), ("xl", 16, 675)]
)
def test_presets_have_the_sizes_of_the_paper(size: str, heads: int, millions: int) -> None:
    options = {"in_channels": 4, "out_channels": 8, "num_classes": 1000}
    with torch.device("meta"):
        model: Any = make_model({"type": f"dit_{size}", **options})
    assert model.config.width // model.config.head_channels == heads
    assert model.config.patch_size == 2
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions


def test_positions() -> None:
    like = torch.zeros((), dtype=torch.float64)
    grid = grid_positions(5, 7, 24, like)
    assert grid.shape == (35, 24)
    assert grid.dtype == torch.float64
    assert (grid.square().mean(1) - 1).abs().max() < 1e-12
    assert (torch.cdist(grid, grid) + torch.eye(35)).min() > 0.1  # no two are alike
    cells = grid.unflatten(0, (5, 7))
    assert torch.equal(cells[:, :, :12], cells[:, :1, :12].expand(5, 7, 12))  # rows
    assert torch.equal(cells[:, :, 12:], cells[:1, :, 12:].expand(5, 7, 12))  # columns
    # A patch has the same position in a larger image.
    assert torch.equal(grid_positions(9, 8, 24, like).unflatten(0, (9, 8))[:5, :7], cells)
    # Below float32 far rows would be one.
    far = grid_positions(900, 1, 24, like)
    assert (grid_positions(900, 1, 24, like.bfloat16()) - far).abs().max() < 0.01


def test_the_order_of_patches_matters() -> None:
    model = tiny()
    x, t = inputs(1)
    for dim in (2, 3):
        moved = model(x.roll(2, dim), t)  # by one patch
        assert (model(x, t).roll(2, dim) - moved).abs().max() > 0.01


@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_a_patch_comes_back_where_it_was(patch_size: int) -> None:
    """Blocks that pass their input leave each patch of the output to that of the input."""
    model = tiny(awake=False, patch_size=patch_size).double()
    nn.init.normal_(model.patch_out.weight)
    x, t = inputs(1, 8, 12)
    x = x.double().requires_grad_()
    model(x, t)[0, :, 5, 6].sum().backward()
    assert x.grad is not None
    seen = x.grad[0].abs().amax(0) > 0
    wanted = torch.zeros(8, 12, dtype=torch.bool)
    top, left = 5 // patch_size * patch_size, 6 // patch_size * patch_size
    wanted[top : top + patch_size, left : left + patch_size] = True
    assert torch.equal(seen, wanted)


def test_patches_keep_the_order_of_their_pixels() -> None:
    model = tiny(awake=False, in_channels=3, width=64, head_channels=64).double()
    # Into the tokens and out of them again by the transpose, norm and position out of the way.
    nn.init.orthogonal_(model.patch_in.weight)
    nn.init.zeros_(model.patch_in.bias)
    model.patch_out.weight.data = model.patch_in.weight.data.T.clone()
    x = torch.randn(1, 3, 4, 6, dtype=torch.float64)
    y = model(1e6 * x, torch.zeros(1))
    cosine = F.cosine_similarity
    for i in range(0, 4, 2):
        for j in range(0, 6, 2):
            one, other = (v[0, :, i : i + 2, j : j + 2].flatten() for v in (x, y))
            assert cosine(one, other, 0) > 0.98


def test_blocks_begin_as_identities_and_end_as_none() -> None:
    torch.manual_seed(0)
    block = DiTBlock(DiTConfig(context_dim=5, **SMALL))
    h, embedding = torch.randn(2, 6, 32), torch.randn(2, 32)
    context, mask = torch.randn(2, 4, 5), torch.ones(2, 4, dtype=torch.bool)
    assert torch.equal(block(h, embedding, context, mask), h)
    nn.init.normal_(block.modulation.weight)
    assert not torch.equal(block(h, embedding, context, mask), h)


def test_a_block_is_adaln_zero() -> None:
    """Figure 3 of the paper, written out."""
    torch.manual_seed(0)
    block = DiTBlock(DiTConfig(**SMALL)).double()
    nn.init.normal_(block.modulation.weight, std=0.3)
    h, embedding = (torch.randn(*s, dtype=torch.float64) for s in ((2, 6, 32), (2, 32)))

    def normed(x: Tensor) -> Tensor:
        x = x - x.mean(2, keepdim=True)
        return x / (x.square().mean(2, keepdim=True) + 1e-6).sqrt()

    a, b, c, d, e, f = (embedding @ block.modulation.weight.T).unflatten(1, (6, 1, 32)).unbind(1)
    wanted = h + c * block.attention(normed(h) * (1 + a) + b)
    wanted = wanted + f * block.mlp(normed(wanted) * (1 + d) + e)
    assert (block(h, embedding) - wanted).abs().max() < 1e-12


def test_linear_layers_begin_as_in_the_paper() -> None:
    model = tiny(awake=False, width=256, head_channels=64, context_dim=7)
    block = model.blocks[0]
    layers = [model.patch_in, block.attention.q, block.attention.kv, block.attention.out]
    for layer in (*layers, block.mlp[0], block.mlp[2], block.cross.attention.kv):
        outputs, inputs = layer.weight.shape
        limit = (6 / (inputs + outputs)) ** 0.5  # Glorot and Bengio 2010, eq. 16
        assert limit * 0.98 < layer.weight.detach().abs().max() <= limit
        assert layer.bias.detach().abs().max() == 0


def test_the_last_norm_begins_without_the_embedding() -> None:
    model = tiny(awake=False)
    nn.init.normal_(model.patch_out.weight)
    x, t = inputs()
    assert model(x, t).std() > 0.1
    assert torch.equal(model(x, t), model(x, t + 50))


@pytest.mark.parametrize("gate", [2, 5])
def test_both_branches_have_dropout(gate: int) -> None:
    block = DiTBlock(DiTConfig(dropout=0.5, **SMALL))
    nn.init.ones_(block.modulation.bias[32 * gate : 32 * (gate + 1)])
    h, embedding = torch.randn(2, 6, 32), torch.randn(2, 32)
    assert not torch.equal(block(h, embedding), block(h, embedding))
    block.eval()
    assert torch.equal(block(h, embedding), block(h, embedding))


@pytest.mark.parametrize("qk_norm", [False, True])
def test_attention(qk_norm: bool) -> None:
    torch.manual_seed(0)
    layer = Attention(12, 4, qk_norm, 5).double()
    x, context = torch.randn(2, 7, 12).double(), torch.randn(2, 6, 5).double()
    mask = torch.tensor([[True] * 6, [True, False, True, False, True, True]])
    q = layer.q(x).unflatten(2, (3, 4)).transpose(1, 2)
    k, v = (y.unflatten(2, (3, 4)).transpose(1, 2) for y in layer.kv(context).chunk(2, 2))
    if qk_norm:
        q, k = (y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
    scores = (q @ k.mT / 2).masked_fill(~mask[:, None, None], -torch.inf)
    wanted = layer.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    assert (layer(x, context, mask) - wanted).abs().max() < 1e-12


def test_qk_norm_holds_what_would_overflow() -> None:
    layer = Attention(12, 4, qk_norm=True).double()
    x = torch.randn(2, 7, 12).double()
    before = layer(x)
    with torch.no_grad():
        for scaled in (layer.q.weight, layer.q.bias, layer.kv.weight[:12], layer.kv.bias[:12]):
            scaled.mul_(1e4)
    assert (layer(x) - before).abs().max() < 1e-4


def test_parameters_that_qk_norm_has() -> None:
    names = {name.split(".")[-2] for name in tiny(qk_norm=True).state_dict()}
    assert {"norm_q", "norm_k"} <= names
    assert not any("norm_q" in name for name in tiny().state_dict())


# ---------------------------------------------------------------- context


def told(**options: Any) -> tuple[DiT, Tensor, Tensor, Tensor, Tensor]:
    model = tiny(context_dim=6, **options)
    x, t = inputs()
    context = torch.randn(3, 5, 6)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 1, 0], [0, 0, 0, 0, 0]]).bool()
    return model, x, t, context, mask


def test_the_order_of_tokens_is_theirs_to_tell() -> None:
    model, x, t, context, mask = told()
    y = model(x, t, context=context, context_mask=mask)
    flipped = model(x, t, context=context.flip(1), context_mask=mask.flip(1))
    assert (y - flipped).abs().max() < 1e-5


def test_cross_attention_begins_as_nothing() -> None:
    torch.manual_seed(0)
    layer = CrossAttention(12, 4, 5, True)
    x = torch.randn(2, 7, 12)
    assert torch.equal(layer(x, torch.randn(2, 6, 5), torch.ones(2, 6, dtype=torch.bool)), x)


def test_a_context_of_another_dtype() -> None:
    model, x, t, context, mask = told()
    model = model.bfloat16()
    y = model(x.bfloat16(), t, context=context, context_mask=mask)
    assert y.dtype == torch.bfloat16
    assert y.isfinite().all()


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        ({"dept": 3}, ["dept = 3 is no option", "did you mean depth?"]),
        ({"depth": -1}, ["depth = -1 is too small", "give at least 1"]),
        ({"patch_size": 0}, ["patch_size = 0 is too small"]),
        ({"width": 30}, ["width = 30 has no room", "such as 32"]),
        (
            {"head_channels": 36},
            ["= 36 does not divide the 384 channels of its width", "= 32 works"],
        ),
        ({"width": 8}, ["= 64 does not divide the 8 channels", "head_channels = 8 works"]),
        ({"mlp_ratio": 0.0}, ["mlp_ratio = 0.0 leaves MLPs no hidden", "such as 4"]),
        ({"mlp_ratio": -1}, ["mlp_ratio = -1"]),
        ({"context_dim": -4}, ["context_dim = -4 is negative", "give 0 for none"]),
        ({"qk_norm": "yes"}, ["qk_norm = 'yes'", "give true or false"]),
        ({"time_features": "fouriers"}, ["'fouriers'", "did you mean 'fourier'?"]),
        ({"dropout": 1.5}, ["dropout = 1.5 is outside [0, 1)"]),
        ({"checkpointing": [1]}, ["names level 1", "levels 0 to 0"]),
        ({"prediction": "vv"}, ["unknown prediction 'vv'"]),
    ],
)
def test_configs(config: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011  (the parts are matched below)
        DiT.from_config(config)
    text = str(error.value)
    assert "\n" not in text
    assert all(part in text for part in parts), text


def test_sizes_that_patches_do_not_fill() -> None:
    model = tiny(patch_size=4)
    for shape, wanted in (
        ((1, 2, 7, 8), "x has height 7, which patches of 4 do not fill; .* works: 4 or 8 "),
        ((1, 2, 0, 8), "x has height 0, .*: give at least 1"),
        ((1, 2, 8, 3), "x has width 3, .* works: 4 .a multiple of 4"),
        ((1, 2, 8), r"x has shape \(1, 2, 8\); this model takes \(batch, 2, height, width"),
    ):
        with pytest.raises(ValueError, match=wanted):
            model(torch.zeros(shape), torch.zeros(1))


def test_context_where_none_is_taken() -> None:
    x, t = inputs()
    with pytest.raises(ValueError, match="context was given, but .* the model with context_dim"):
        tiny()(x, t, context=torch.zeros(3, 2, 6))
