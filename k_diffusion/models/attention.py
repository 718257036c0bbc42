"""Attention of positions to each other, and to a sequence of tokens, in data of any dimension.

Letters in shapes: B samples, C channels, L tokens, D their width; `...` are one to three
dimensions.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from k_diffusion.models.layers import GroupNorm, transforming, zeroed


def as_tokens(x: Tensor) -> Tensor:
    """Shape (B, positions, C) of (B, C, ...): a view, where x is channels_last."""
    return x.flatten(2).transpose(1, 2)


def weighted(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    allowed: Tensor | None = None,
    *,
    dropout: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """Values, weighted by the softmax of q·k, which torch.func can differentiate forward, too.

    Args:
        q: shape (..., N, D).
        k, v: shape (..., L, D).
        allowed: true where a value may be taken, of a shape that (..., N, L) broadcasts with.
        dropout: share of the weights to drop.
        scale: the factor of q·k; None: 1 / sqrt(D).

    Returns:
        Shape (..., N, D).
    """
    # Of torch's implementations this one alone has a forward derivative.
    with sdpa_kernel(SDPBackend.MATH) if transforming() else nullcontext():
        return F.scaled_dot_product_attention(q, k, v, allowed, dropout, scale=scale)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    head_channels: int,
    mask: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """What each of N queries takes from L values, by heads.

    Args:
        q: shape (B, N, C).
        k, v: shape (B, L, C).
        head_channels: divides C.
        mask: true where a value may be taken, shape (B, L); a sample that may take none gets zeros.
            Values that may not be taken are finite, too (see `hide_masked`).
        dropout: share of the weights to drop: 0 in evaluation, of which a function knows nothing.

    Returns:
        Shape (B, N, C).

    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.2.
    """
    q, k, v = (part.unflatten(2, (-1, head_channels)).transpose(1, 2) for part in (q, k, v))
    some = allowed = None
    if mask is not None:
        some = mask.any(1, keepdim=True)
        # A softmax over nothing is no number in some of torch's implementations.
        allowed = (mask | ~some)[:, None, None, :]
    mixed = weighted(q, k, v, allowed, dropout=dropout).transpose(1, 2).flatten(2)
    return mixed if some is None else mixed * some[:, :, None]


class MixesPositions(nn.Module):
    """Self-attention, which can be spoilt: abstract.

    Attributes:
        identity: take from every position its own value alone, as if the attention map were the
            identity: what perturbed-attention guidance compares with (Ahn et al. 2024,
            arXiv:2403.17377, eq. 12).
    """

    identity: bool = False


class SelfAttention(MixesPositions):
    """Attention of every position to every other, added to its input; at first it adds nothing.

    Args:
        channels: C.
        head_channels: channels of one head; divides C.
    """

    def __init__(self, channels: int, head_channels: int) -> None:
        super().__init__()
        self.head_channels = head_channels
        self.norm = GroupNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = zeroed(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """Shape (B, C, ...) in and out."""
        q, k, v = self.qkv(as_tokens(self.norm(x))).chunk(3, 2)
        mixed = v if self.identity else attend(q, k, v, self.head_channels)
        return x + self.out(mixed).transpose(1, 2).reshape(x.shape)


class CrossAttention(nn.Module):
    """Attention of every position to a sequence, added to its input; at first it adds nothing.

    To a sample all of whose tokens are masked it adds nothing ever: so the sample is one without
    context, whatever its neighbours in the batch are told.

    Args:
        channels: C.
        head_channels: channels of one head; divides C.
        context_dim: D.
    """

    def __init__(self, channels: int, head_channels: int, context_dim: int) -> None:
        super().__init__()
        self.head_channels = head_channels
        self.norm = GroupNorm(channels)
        self.norm_context = nn.LayerNorm(context_dim)
        self.query = nn.Linear(channels, channels)
        self.key_value = nn.Linear(context_dim, 2 * channels)
        # Without a bias, which would be added where there is no context, too.
        self.out = zeroed(nn.Linear(channels, channels, bias=False))

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """Shape (B, C, ...) in and out.

        Args:
            x: shape (B, C, ...).
            context: shape (B, L, D), L at least 1; finite, where masked, too (see `hide_masked`).
            mask: true where a token counts, shape (B, L); None: everywhere.
        """
        k, v = self.key_value(self.norm_context(context)).chunk(2, 2)
        mixed = attend(self.query(as_tokens(self.norm(x))), k, v, self.head_channels, mask)
        added = self.out(mixed)
        return x + added.transpose(1, 2).reshape(x.shape)


def hide_masked(context: Tensor | None, mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The context with zeros where it is masked; None if it holds no token.

    A weight of zero alone would not do: zero times a masked infinity is no number.

    Args:
        context: shape (B, L, D), or None.
        mask: true where a token counts, shape (B, L), or None: everywhere.
        dtype: of the result.
    """
    if context is None or context.shape[1] == 0:
        return None
    context = context.to(dtype)
    return context if mask is None else context.masked_fill(~mask[:, :, None], 0.0)
