"""Layers that the transformers share: norms, attention with axial RoPE, feed-forward, tokens.

Tokens keep their place in the image: shape (B, H, W, C), so that any attention of two dimensions
can mix them. What conditions a sample reaches every layer as one vector (B, M), through the scales
of its norms. No linear layer of the tokens has a bias, as in the source.

Source: Crowson et al. 2024, arXiv:2401.11605, section 4 and figure 3.

Letters in shapes: B samples, H and W tokens, C their width, N heads, D channels of a head, M the
width of the mapping.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from k_diffusion.models.attention import MixesPositions, weighted
from k_diffusion.models.layers import zeroed
from k_diffusion.models.recompute import recomputed

EPSILON = 1e-6
"""Added to mean squares, and to the squared lengths of queries and keys."""

Mix = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Attention of q, k and v, each (B, H, W, N, D), at scale 1."""


class RMSNorm(nn.Module):
    """Divides by the root mean square, times a learned scale (Zhang and Sennrich 2019,
    arXiv:1910.07467).

    Args:
        width: C.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Shape (..., C) in and out."""
        return F.rms_norm(x, self.scale.shape, self.scale.to(x.dtype), EPSILON)


class AdaRMSNorm(nn.Module):
    """RMS norm whose scale comes from the mapping; at first it is 1.

    Args:
        width: C.
        mapping_width: M.
    """

    def __init__(self, width: int, mapping_width: int) -> None:
        super().__init__()
        self.linear = zeroed(nn.Linear(mapping_width, width, bias=False))

    def forward(self, x: Tensor, mapping: Tensor) -> Tensor:
        """x normalised, shape (B, H, W, C), for a mapping (B, M)."""
        scale = 1 + self.linear(mapping)[:, None, None]
        return F.rms_norm(x, x.shape[-1:], eps=EPSILON) * scale.to(x.dtype)


def geglu(x: Tensor) -> Tensor:
    """Half of x times the GELU of the rest, 2F channels to F (Shazeer 2020, arXiv:2002.05202)."""
    value, gate = x.chunk(2, -1)
    return value * F.gelu(gate)


class FeedForward(nn.Module):
    """Norm, then two linear layers with a GEGLU between them; at first it adds nothing.

    Args:
        width: C.
        hidden: F, the width between the layers.
        mapping_width: M.
        dropout: share of the hidden activations dropped, in training.
    """

    def __init__(self, width: int, hidden: int, mapping_width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = AdaRMSNorm(width, mapping_width)
        self.up_proj = nn.Linear(width, 2 * hidden, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.down_proj = zeroed(nn.Linear(hidden, width, bias=False))

    def forward(self, x: Tensor, mapping: Tensor) -> Tensor:
        """Shape (B, H, W, C) in and out, for a mapping (B, M)."""
        hidden = recomputed(lambda x, mapping: self.up_proj(self.norm(x, mapping)), x, mapping)
        if self.dropout.p:
            return x + self.down_proj(self.dropout(recomputed(geglu, hidden)))
        return x + recomputed(lambda hidden: self.down_proj(geglu(hidden)), hidden)


# ---------------------------------------------------------------- positions


def axial_positions(x: Tensor, aspect: float = 1.0) -> Tensor:
    """Centres of the tokens of an image whose longer side runs from -1 to 1.

    Both axes have one unit, so that the shape of what is seen does not depend on the image's.

    Args:
        x: the tokens, shape (B, H, W, C).
        aspect: height of a token over its width.

    Returns:
        Row and column, shape (H, W, 2), float32 or better.
    """
    height, width = x.shape[1:3]
    longer = max(height * aspect, width)
    # Angles reach 30: below float32 they would be rough, whatever the network computes in.
    dtype = torch.promote_types(x.dtype, torch.float32)
    rows, columns = (
        (2 * torch.arange(n, device=x.device, dtype=dtype) + 1 - n) * (side / longer)
        for n, side in ((height, aspect), (width, 1.0))
    )
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1)


class AxialRoPE(nn.Module):
    """Rotary positions of two axes: half of a head's channels turn, half stay as they are.

    A quarter turns with the row, a quarter with the column, in pairs of channels, by frequencies
    from π to 10π (radians over half the image), each head by others. So attention sees where two
    tokens lie to each other, and not where they lie.

    Source: Su et al. 2021, arXiv:2104.09864; Crowson et al. 2024, section 4.2.

    Args:
        heads: N.
        head_channels: D, a multiple of 8.
    """

    def __init__(self, heads: int, head_channels: int) -> None:
        super().__init__()
        count = heads * head_channels // 8
        exponents = torch.linspace(math.log(math.pi), math.log(10 * math.pi), count + 1)[:-1]
        self.freqs: Tensor
        self.register_buffer(
            "freqs", exponents.exp().view(head_channels // 8, heads).T.contiguous()
        )

    def forward(self, positions: Tensor) -> Tensor:
        """Angles, shape (H, W, N, D / 4), at least float32, of positions (H, W, 2)."""
        frequencies = self.freqs.to(positions.dtype)
        row, column = positions[:, :, None, None].unbind(-1)
        return torch.cat([row * frequencies, column * frequencies], -1)


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    """x with its first channels turned: channel i of the first 2A with channel i + A.

    Args:
        x: shape (..., D).
        angles: shape (..., A), 2A at most D, broadcast against x.
    """
    turning = angles.shape[-1]
    a, b, rest = x.split([turning, turning, x.shape[-1] - 2 * turning], -1)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


# ---------------------------------------------------------------- attention


def global_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of every position to every other, shape (B, H, W, N, D), at scale 1."""
    height, width = q.shape[1:3]
    q, k, v = (x.flatten(1, 2).transpose(1, 2) for x in (q, k, v))
    out = weighted(q, k, v, scale=1.0)
    return out.transpose(1, 2).unflatten(1, (height, width))


class SelfAttention(MixesPositions):
    """Attention by the cosine of queries and keys; at first it adds nothing.

    q·k = s cos(q, k), s learned for each head, does not grow with the weights.

    Source: cosine similarity: Liu et al. 2022, arXiv:2111.09883, section 3.2.

    Args:
        width: C.
        head_channels: D; divides C.
        mapping_width: M.
        mix: which positions see which.
        dropout: share of the attention's output dropped, in training.
    """

    def __init__(
        self, width: int, head_channels: int, mapping_width: int, mix: Mix, dropout: float = 0.0
    ) -> None:
        super().__init__()
        heads = width // head_channels
        self.head_channels, self.mix = head_channels, mix
        self.norm = AdaRMSNorm(width, mapping_width)
        self.qkv_proj = nn.Linear(width, 3 * width, bias=False)
        self.scale = nn.Parameter(torch.full((heads,), 10.0))
        self.pos_emb = AxialRoPE(heads, head_channels)
        self.dropout = nn.Dropout(dropout)
        self.out_proj = zeroed(nn.Linear(width, width, bias=False))

    def forward(self, x: Tensor, mapping: Tensor, positions: Tensor) -> Tensor:
        """Shape (B, H, W, C) in and out, for a mapping (B, M) and positions (H, W, 2)."""
        qkv = recomputed(lambda x, mapping: self.qkv_proj(self.norm(x, mapping)), x, mapping)
        qk, v = qkv.unflatten(-1, (3, -1, self.head_channels)).split([2, 1], 3)
        q, k = recomputed(self._cosine, qk, self.scale, self.pos_emb(positions)).unbind(3)
        v = v.squeeze(3)
        mixed = v if self.identity else self.mix(q, k, v)
        return x + self.out_proj(self.dropout(mixed.flatten(3)))

    def _cosine(self, qk: Tensor, scale: Tensor, angles: Tensor) -> Tensor:
        """Queries and keys, (B, H, W, 2, N, D), of length √s and turned."""
        channels = self.head_channels
        # |x|² + ε = D (mean x² + ε / D)
        unit = F.rms_norm(qk, (channels,), eps=EPSILON / channels)
        return rotated(unit * (scale / channels).sqrt().to(qk.dtype)[:, None], angles[:, :, None])


class TransformerBlock(nn.Module):
    """Attention, then feed-forward.

    Args:
        self_attn: None: none.
        ff: the feed-forward.
    """

    def __init__(self, self_attn: SelfAttention | None, ff: FeedForward) -> None:
        super().__init__()
        self.self_attn = self_attn
        self.ff = ff

    def forward(self, x: Tensor, mapping: Tensor, positions: Tensor) -> Tensor:
        """Shape (B, H, W, C) in and out, for a mapping (B, M) and positions (H, W, 2)."""
        if self.self_attn is not None:
            x = self.self_attn(x, mapping, positions)
        return self.ff(x, mapping)


# ---------------------------------------------------------------- mapping


class MappingBlock(nn.Module):
    """A feed-forward of the mapping, whose norm has a scale of its own.

    Args:
        width: M.
        hidden: width between the layers.
        dropout: share of the hidden activations dropped, in training.
    """

    def __init__(self, width: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = RMSNorm(width)
        self.up_proj = nn.Linear(width, 2 * hidden, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.down_proj = zeroed(nn.Linear(hidden, width, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """Shape (B, M) in and out."""
        return x + self.down_proj(self.dropout(geglu(self.up_proj(self.norm(x)))))


class Mapping(nn.Module):
    """From the sum of what is known of a sample to the vector that conditions every layer.

    Args:
        depth: blocks.
        width: M.
        hidden: width between the layers of a block.
        dropout: share of the hidden activations dropped, in training.
    """

    def __init__(self, depth: int, width: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.in_norm = RMSNorm(width)
        self.blocks = nn.ModuleList(MappingBlock(width, hidden, dropout) for _ in range(depth))
        self.out_norm = RMSNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """Shape (B, M) in and out."""
        x = self.in_norm(x)
        for block in self.blocks:
            x = block(x)
        return self.out_norm(x)


# ---------------------------------------------------------------- patches, merge and split


class TokenMerge(nn.Module):
    """Every patch of tokens becomes one.

    Args:
        in_width: C of the input.
        out_width: C of the output.
        patch: height and width of a patch.
    """

    def __init__(self, in_width: int, out_width: int, patch: tuple[int, int] = (2, 2)) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Linear(in_width * math.prod(patch), out_width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """From (B, H, W, in_width) to (B, H / patch, W / patch, out_width)."""
        return self.proj(_gather(x, self.patch))


def _gather(x: Tensor, patch: tuple[int, int]) -> Tensor:
    """(B, H, W, C) -> (B, H / patch, W / patch, row of the patch · column of the patch · C)."""
    high, wide = patch
    x = x.unflatten(2, (-1, wide)).unflatten(1, (-1, high))
    return x.permute(0, 1, 3, 2, 4, 5).flatten(3)


class TokenSplit(nn.Module):
    """Every token becomes a patch of them.

    Args:
        in_width: C of the input.
        out_width: C of the output.
        patch: height and width of a patch.
    """

    def __init__(self, in_width: int, out_width: int, patch: tuple[int, int] = (2, 2)) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Linear(in_width, out_width * math.prod(patch), bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """From (B, H, W, in_width) to (B, H · patch, W · patch, out_width)."""
        return _spread(self.proj(x), self.patch)


class TokenSplitOnto(nn.Module):
    """A split in two, laid between what comes up and what went down: skip + f (split - skip).

    f is learned, and begins at one half.

    Source: Crowson et al. 2024, section 4.3.

    Args:
        in_width: C of the input.
        out_width: C of the output.
    """

    def __init__(self, in_width: int, out_width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(in_width, 4 * out_width, bias=False)
        self.fac = nn.Parameter(torch.full((1,), 0.5))

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """From (B, H, W, in_width) to the shape of the skip, (B, 2H, 2W, out_width)."""
        return skip + self.fac.to(x.dtype) * (_spread(self.proj(x), (2, 2)) - skip)


def _spread(x: Tensor, patch: tuple[int, int]) -> Tensor:
    """The inverse of `_gather`."""
    x = x.unflatten(3, (*patch, -1))
    return x.permute(0, 1, 3, 2, 4, 5).flatten(3, 4).flatten(1, 2)
