"""The transformers' layers against their formulas, and what rotations promise."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from k_diffusion.models import recompute
from k_diffusion.models.transformer import (
    AdaRMSNorm,
    AxialRoPE,
    FeedForward,
    Mapping,
    RMSNorm,
    SelfAttention,
    TokenMerge,
    TokenSplit,
    TokenSplitOnto,
    axial_positions,
    global_attention,
    rotated,
)


def awake(module: Any) -> Any:
    torch.manual_seed(0)
    for name, parameter in module.named_parameters():
        nn.init.normal_(parameter, std=0.5)
        if name == "scale":  # of cosines: positive
            parameter.data.abs_().add_(2)
    return module.double()


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def rms(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


# ---------------------------------------------------------------- norms and feed-forward


def test_rms_norms() -> None:
    x, mapping = 1e-3 * numbers(2, 3, 4, 8), numbers(2, 6)  # so small that epsilon counts
    norm = awake(RMSNorm(8))
    assert (norm(x) - rms(x) * norm.scale).abs().max() < 1e-12
    adaptive = awake(AdaRMSNorm(8, 6))
    scale = 1 + mapping @ adaptive.linear.weight.T
    assert (adaptive(x, mapping) - rms(x) * scale[:, None, None]).abs().max() < 1e-12
    fresh = AdaRMSNorm(8, 6).double()
    assert (fresh(x, mapping) - rms(x)).abs().max() < 1e-12


def test_feed_forward() -> None:
    ff = awake(FeedForward(8, 10, 6))
    x, mapping = numbers(2, 3, 4, 8), numbers(2, 6)
    value, gate = (ff.norm(x, mapping) @ ff.up_proj.weight.T).split(10, -1)
    hidden = value * gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2)))
    assert (ff(x, mapping) - x - hidden @ ff.down_proj.weight.T).abs().max() < 1e-12


def test_mapping() -> None:
    mapping = awake(Mapping(2, 8, 10))
    x = numbers(3, 8)
    h = rms(x) * mapping.in_norm.scale
    for block in mapping.blocks:
        value, gate = (rms(h) * block.norm.scale @ block.up_proj.weight.T).split(10, -1)
        h = h + value * nn.functional.gelu(gate) @ block.down_proj.weight.T
    assert (mapping(x) - rms(h) * mapping.out_norm.scale).abs().max() < 1e-12


# ---------------------------------------------------------------- positions


def test_positions_have_one_unit_and_the_longer_side_is_two_long() -> None:
    wide = axial_positions(torch.zeros(1, 2, 4, 1))
    assert wide[:, :, 1].tolist() == [[-0.75, -0.25, 0.25, 0.75]] * 2
    assert wide[:, :, 0].tolist() == [[-0.25] * 4, [0.25] * 4]
    assert torch.equal(axial_positions(torch.zeros(1, 4, 2, 1)), wide.transpose(0, 1).flip(2))
    # Tokens twice as high as wide: four of their rows are as long as eight columns.
    tall = axial_positions(torch.zeros(1, 4, 2, 1), aspect=2.0)
    assert tall[:, 0, 0].tolist() == [-0.75, -0.25, 0.25, 0.75]
    assert tall[0, :, 1].tolist() == [-0.125, 0.125]
    assert axial_positions(torch.zeros(1, 2, 2, 1, dtype=torch.float64)).dtype == torch.float64
    assert axial_positions(torch.zeros(1, 2, 2, 1, dtype=torch.bfloat16)).dtype == torch.float32


def test_a_coarser_level_has_the_means_of_the_finer_one() -> None:
    fine = axial_positions(torch.zeros(1, 8, 12, 1)).unflatten(1, (6, 2)).unflatten(0, (4, 2))
    assert (fine.mean((1, 3)) - axial_positions(torch.zeros(1, 4, 6, 1))).abs().max() < 1e-6


def test_frequencies_run_from_pi_to_ten_pi_over_all_heads() -> None:
    frequencies = AxialRoPE(3, 32).freqs
    assert frequencies.shape == (3, 4)
    ordered = frequencies.flatten().sort().values / math.pi
    assert (ordered - 10 ** (torch.arange(12) / 12)).abs().max() < 1e-5
    assert torch.equal(ordered, frequencies.T.flatten() / math.pi)  # neighbours in other heads


def test_attention_sees_where_tokens_lie_to_each_other_and_not_where() -> None:
    rope = AxialRoPE(2, 16).double()
    q, k = numbers(5, 7, 2, 16), numbers(5, 7, 2, 16).flip(0)
    positions = axial_positions(torch.zeros(1, 5, 7, 1, dtype=torch.float64))

    def products(moved: Tensor) -> Tensor:
        a, b = rotated(q, rope(positions + moved)), rotated(k, rope(positions + moved))
        return torch.einsum("ijnd,klnd->nijkl", a, b)

    here = products(torch.zeros(2, dtype=torch.float64))
    there = products(torch.tensor([0.3, -1.7], dtype=torch.float64))
    assert (here - there).abs().max() < 1e-12
    still = torch.einsum("ijnd,klnd->nijkl", q, k)
    assert (here - still).abs().max() > 0.1
    # Lengths stay, and the second half of the channels does not turn at all.
    assert (rotated(q, rope(positions)).norm(dim=-1) - q.norm(dim=-1)).abs().max() < 1e-12
    assert torch.equal(rotated(q, rope(positions))[..., 8:], q[..., 8:])


def test_rows_and_columns_turn_other_channels_by_the_same_frequencies() -> None:
    rope = AxialRoPE(2, 16).double()
    positions = axial_positions(torch.zeros(1, 4, 6, 1, dtype=torch.float64))
    angles = rope(positions)
    swapped = rope(positions.transpose(0, 1).flip(2)).transpose(0, 1)
    assert torch.equal(angles, torch.cat([swapped[..., 2:], swapped[..., :2]], -1))
    assert (angles[:, :1, :, :2] == angles[:, :, :, :2]).all()


# ---------------------------------------------------------------- attention


def test_self_attention() -> None:
    attention = awake(SelfAttention(16, 8, 6, global_attention))
    attention.scale.data = torch.tensor([3.0, 12.0], dtype=torch.float64)
    x, mapping = numbers(2, 3, 4, 16), numbers(2, 6)
    positions = axial_positions(x)
    angles = attention.pos_emb(positions)
    qkv = attention.norm(x, mapping) @ attention.qkv_proj.weight.T
    q, k, v = (part.unflatten(-1, (2, 8)) for part in qkv.split(16, -1))
    q, k = (rotated(part / part.norm(dim=-1, keepdim=True), angles) for part in (q, k))
    cosines = torch.einsum("bijnd,bklnd->bnijkl", q, k)
    assert cosines.abs().max() <= 1 + 1e-9
    scores = cosines * attention.scale[:, None, None, None, None]
    weights = scores.flatten(4).softmax(-1).unflatten(-1, (3, 4))
    mixed = torch.einsum("bnijkl,bklnd->bijnd", weights, v).flatten(3)
    wanted = x + mixed @ attention.out_proj.weight.T
    assert (attention(x, mapping, positions) - wanted).abs().max() < 1e-5


def test_the_smallest_queries_are_lengthened_less() -> None:
    attention = awake(SelfAttention(16, 8, 6, global_attention))
    lengths = torch.tensor([1e-4, 1e-3, 1e-2, 1.0], dtype=torch.float64)
    qk = numbers(1, 1, 4, 2, 2, 8)
    qk = qk / qk.norm(dim=-1, keepdim=True) * lengths[:, None, None, None]
    unit = attention._cosine(qk, torch.ones_like(attention.scale), numbers(1, 4, 2, 2))
    wanted = lengths / (lengths.square() + 1e-6).sqrt()
    assert (unit.norm(dim=-1) - wanted[:, None, None]).abs().max() < 1e-12


def test_a_query_of_nothing_attends_to_all_alike() -> None:
    attention = awake(SelfAttention(16, 8, 6, global_attention))
    attention.qkv_proj.weight.data[:32] = 0
    x, mapping = numbers(1, 2, 2, 16), numbers(1, 6)
    out = attention(x, mapping, axial_positions(x)) - x
    assert out.isfinite().all()
    assert (out - out[:, :1, :1]).abs().max() < 1e-12


def test_attention_without_positions_does_not_care_for_the_order() -> None:
    attention = awake(SelfAttention(16, 8, 6, global_attention))
    x, mapping = numbers(2, 3, 4, 16), numbers(2, 6)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(2))

    def shuffled(x: Tensor) -> Tensor:
        return x.flatten(1, 2)[:, order].unflatten(1, (3, 4))

    nowhere = torch.zeros(3, 4, 2, dtype=torch.float64)
    out = attention(x, mapping, nowhere)
    assert (attention(shuffled(x), mapping, nowhere) - shuffled(out)).abs().max() < 1e-12
    somewhere = axial_positions(x)
    out = attention(x, mapping, somewhere)
    assert (attention(shuffled(x), mapping, somewhere) - shuffled(out)).abs().max() > 1e-3


# ---------------------------------------------------------------- tokens


@pytest.mark.parametrize("patch", [(2, 2), (3, 1), (1, 4)])
def test_merge_and_split(patch: tuple[int, int]) -> None:
    high, wide = patch
    x = numbers(2, 6, 8, 3)
    merge = TokenMerge(3, 3 * high * wide, patch).double()
    merge.proj.weight.data = torch.eye(3 * high * wide, dtype=torch.float64)
    merged = merge(x)
    assert merged.shape == (2, 6 // high, 8 // wide, 3 * high * wide)
    assert torch.equal(merged[:, 1, 1], x[:, high : 2 * high, wide : 2 * wide].flatten(1))
    split = TokenSplit(3 * high * wide, 3, patch).double()
    split.proj.weight.data = torch.eye(3 * high * wide, dtype=torch.float64)
    assert torch.equal(split(merged), x)


def test_split_onto_lies_between() -> None:
    split = awake(TokenSplitOnto(6, 3))
    plain = TokenSplit(6, 3).double()
    plain.proj.weight.data = split.proj.weight.data
    x, skip = numbers(2, 3, 4, 6), numbers(2, 6, 8, 3)
    for share in (0.0, 0.25, 1.0):
        split.fac.data.fill_(share)
        wanted = (1 - share) * skip + share * plain(x)
        assert (split(x, skip) - wanted).abs().max() < 1e-12
    assert TokenSplitOnto(6, 3).fac.tolist() == [0.5]


def test_recomputation_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = awake(SelfAttention(16, 8, 6, global_attention))
    ff = awake(FeedForward(16, 24, 6))
    x, mapping = numbers(2, 3, 4, 16).requires_grad_(), numbers(2, 6).requires_grad_()
    leaves = [x, mapping, *layer.parameters(), *ff.parameters()]

    def gradients(small: int) -> tuple[int, list[Tensor]]:
        monkeypatch.setattr(recompute, "SMALL", small)
        sizes = {}

        def pack(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = ff(layer(x, mapping, axial_positions(x)), mapping)
        kept = sum(sizes.values())
        return kept, list(torch.autograd.grad(out.sin().sum(), leaves))

    most, plain = gradients(10**9)
    least, again = gradients(0)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert least < 0.7 * most
