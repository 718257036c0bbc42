"""Attention within windows against its definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from k_diffusion.models.windows import window_attention


def heads(height: int, width: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (2, height, width, 2, 8)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for _ in range(3)
    ]


def defined(q: Tensor, k: Tensor, v: Tensor, window: int, shift: int, scale: float) -> Tensor:
    """By a mask of all pairs: two positions see each other where no cut lies between them."""
    height, width = q.shape[1:3]

    def piece(n: int) -> Tensor:
        """Cuts lie at shift, shift + window, ...: also the borders' pieces are pieces."""
        return (torch.arange(n) - shift).div(window, rounding_mode="floor")

    row, column = piece(height), piece(width)
    token = torch.stack(torch.meshgrid(row, column, indexing="ij"), -1).flatten(0, 1)
    mask = (token[:, None] == token[None]).all(-1)
    flat = [x.flatten(1, 2) for x in (q, k, v)]
    scores = scale * torch.einsum("bqnd,bknd->bnqk", flat[0], flat[1])
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return torch.einsum("bnqk,bknd->bqnd", weights, flat[2]).unflatten(1, (height, width))


@pytest.mark.parametrize(
    ("window", "shift", "height", "width"),
    [(4, 0, 8, 12), (4, 2, 8, 12), (4, 1, 12, 4), (3, 1, 9, 6), (6, 3, 6, 6), (2, 1, 4, 8)],
)
def test_the_definition(window: int, shift: int, height: int, width: int) -> None:
    q, k, v = heads(height, width)
    got = window_attention(q, k, v, window, shift, scale=0.7)
    wanted = defined(q, k, v, window, shift, 0.7)
    assert (got - wanted).abs().max() < 1e-12
    weight = torch.randn(v.shape, dtype=torch.float64)
    for mine, true in zip(
        torch.autograd.grad((got * weight).sum(), (q, k, v)),
        torch.autograd.grad((wanted * weight).sum(), (q, k, v)),
        strict=True,
    ):
        assert (mine - true).abs().max() < 1e-12


def test_the_usual_scale() -> None:
    q, k, v = heads(4, 8)
    got = window_attention(q, k, v, 4, 2)
    assert (got - defined(q, k, v, 4, 2, 1 / math.sqrt(8))).abs().max() < 1e-12


def test_it_moves_with_the_image_by_whole_windows() -> None:
    q, k, v = (x.detach() for x in heads(8, 16))
    whole = window_attention(q, k, v, 4)
    part = window_attention(*(x[:, :, 4:12] for x in (q, k, v)), 4)
    assert (part - whole[:, :, 4:12]).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("window", "text"),
    [
        (3, "window_size = 3 does not divide the height, 8 tokens: give 2, or an image of another"),
        (8, "window_size = 8 does not divide the width, 12 tokens: give 6"),
        (0, "window_size = 0 does not divide the height, 8 tokens: give 1"),
        (9, "window_size = 9 does not divide the height, 8 tokens: give 8"),
    ],
)
def test_refusals(window: int, text: str) -> None:
    q, k, v = heads(8, 12)
    with pytest.raises(ValueError, match=text):
        window_attention(q, k, v, window)
