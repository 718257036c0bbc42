"""The layers of the established networks, under their established names and signatures.

Programs build networks of their own from them, and checkpoints know their parameters' names. What
is known of a sample travels beside its features as a dictionary: "cond", the embedding (B, E), and
for cross-attention "cross", a sequence (B, L, D), and "cross_padding", (B, L), which is not 0 where
a token does not count.

Letters in shapes: B samples, C channels, H height, W width, E the width of the embedding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from k_diffusion.models import mapping
from k_diffusion.models.attention import MixesPositions, as_tokens, attend, hide_masked
from k_diffusion.models.layers import zeroed
from k_diffusion.utils.maths import unknown
from k_diffusion.utils.tensors import append_dims

Cond = Mapping[str, Any]
Norm = Callable[[int], nn.Module]


# ---------------------------------------------------------------- blocks


class ResidualBlock(nn.Module):
    """Modules in a row, beside a skip.

    Args:
        main: the modules.
        skip: None: the input itself.
    """

    def __init__(self, *main: nn.Module, skip: nn.Module | None = None) -> None:
        super().__init__()
        self.main = nn.Sequential(*main)
        self.skip = skip if skip is not None else nn.Identity()

    def forward(self, input: Tensor) -> Tensor:
        """The sum of both."""
        return self.main(input) + self.skip(input)


class ConditionedModule(nn.Module):
    """A module that is called with the condition too, `module(input, cond)`; abstract."""


def run(module: Any, input: Tensor, cond: Cond) -> Tensor:
    """A module's output, called with the condition if it takes one."""
    return module(input, cond) if isinstance(module, ConditionedModule) else module(input)


class UnconditionedModule(ConditionedModule):
    """A module that takes no condition, where one that does is called for."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, input: Tensor, cond: Cond | None = None) -> Tensor:
        """The module's output."""
        return self.module(input)


class ConditionedSequential(nn.Sequential, ConditionedModule):
    """Modules in a row, of either kind."""

    def forward(self, input: Tensor, cond: Cond) -> Tensor:  # type: ignore[override]
        """The last one's output."""
        for module in self:
            input = run(module, input, cond)
        return input


class ConditionedResidualBlock(ConditionedModule):
    """Modules of either kind in a row, beside a skip; see `ResidualBlock`."""

    def __init__(self, *main: nn.Module, skip: nn.Module | None = None) -> None:
        super().__init__()
        self.main = ConditionedSequential(*main)
        self.skip = skip if skip is not None else nn.Identity()

    def forward(self, input: Tensor, cond: Cond) -> Tensor:
        """The sum of both."""
        return self.main(input, cond) + run(self.skip, input, cond)


class AdaGN(ConditionedModule):
    """Group norm whose scale and shift come from the embedding; at first they do nothing.

    Source: Dhariwal and Nichol 2021, arXiv:2105.05233, section 3.1.

    Args:
        feats_in: E.
        c_out: C.
        num_groups: divides C.
        eps: added to the variance.
        cond_key: where the embedding is in the condition.
    """

    def __init__(
        self, feats_in: int, c_out: int, num_groups: int, eps: float = 1e-5, cond_key: str = "cond"
    ) -> None:
        super().__init__()
        if num_groups < 1 or c_out % num_groups:
            raise ValueError(
                f"num_groups = {num_groups} does not divide the {c_out} channels: give a divisor"
            )
        self.num_groups = num_groups
        self.eps = eps
        self.cond_key = cond_key
        self.mapper = zeroed(nn.Linear(feats_in, c_out * 2))

    def forward(self, input: Tensor, cond: Cond) -> Tensor:
        """Shape (B, C, ...) in and out."""
        scale, shift = append_dims(self.mapper(cond[self.cond_key]), input.ndim).chunk(2, 1)
        return F.group_norm(input, self.num_groups, eps=self.eps) * (1 + scale) + shift


# ---------------------------------------------------------------- attention


class SelfAttention2d(ConditionedModule, MixesPositions):
    """Attention of every position to every other, added to its input; at first it adds nothing.

    Args:
        c_in: C.
        n_head: heads; divides C.
        norm: makes the norm of C channels, which takes the condition.
        dropout_rate: share of the attention weights dropped, in training.
    """

    def __init__(self, c_in: int, n_head: int, norm: Norm, dropout_rate: float = 0.0) -> None:
        super().__init__()
        _check_heads(n_head, c_in)
        self.norm_in = norm(c_in)
        self.n_head = n_head
        self.qkv_proj = nn.Conv2d(c_in, c_in * 3, 1)
        self.out_proj = zeroed(nn.Conv2d(c_in, c_in, 1))
        self.dropout = nn.Dropout(dropout_rate)

    def forward(self, input: Tensor, cond: Cond) -> Tensor:
        """Shape (B, C, H, W) in and out."""
        qkv = as_tokens(self.qkv_proj(self.norm_in(input, cond)))
        q, k, v = qkv.chunk(3, 2)
        mixed = v
        if not self.identity:
            mixed = attend(q, k, v, q.shape[2] // self.n_head, None, _share(self.dropout))
        return input + self.out_proj(_as_image(mixed, input))


class CrossAttention2d(ConditionedModule):
    """Attention of every position to a sequence, added to its input; at first it adds nothing.

    A token that does not count has no part in the result, whatever it holds; where none counts,
    the attention is zero.

    Args:
        c_dec: C.
        c_enc: D, the width of a token.
        n_head: heads; divides C.
        norm_dec: makes the norm of C channels, which takes the condition.
        dropout_rate: share of the attention weights dropped, in training.
        cond_key: where the sequence, (B, L, D), is in the condition.
        cond_key_padding: where (B, L) is, not 0 for the tokens that do not count; there may be
            none, or None: all count.
    """

    def __init__(
        self,
        c_dec: int,
        c_enc: int,
        n_head: int,
        norm_dec: Norm,
        dropout_rate: float = 0.0,
        cond_key: str = "cross",
        cond_key_padding: str = "cross_padding",
    ) -> None:
        super().__init__()
        _check_heads(n_head, c_dec)
        self.cond_key = cond_key
        self.cond_key_padding = cond_key_padding
        self.norm_enc = nn.LayerNorm(c_enc)
        self.norm_dec = norm_dec(c_dec)
        self.n_head = n_head
        self.q_proj = nn.Conv2d(c_dec, c_dec, 1)
        self.kv_proj = nn.Linear(c_enc, c_dec * 2)
        self.out_proj = zeroed(nn.Conv2d(c_dec, c_dec, 1))
        self.dropout = nn.Dropout(dropout_rate)

    def forward(self, input: Tensor, cond: Cond) -> Tensor:
        """Shape (B, C, H, W) in and out."""
        q = as_tokens(self.q_proj(self.norm_dec(input, cond)))
        padding = cond.get(self.cond_key_padding)
        mask = None if padding is None else padding == 0
        tokens = hide_masked(cond[self.cond_key], mask, input.dtype)
        if tokens is None:
            return input + self.out_proj(torch.zeros_like(input))
        k, v = self.kv_proj(self.norm_enc(tokens)).chunk(2, 2)
        mixed = attend(q, k, v, q.shape[2] // self.n_head, mask, _share(self.dropout))
        return input + self.out_proj(_as_image(mixed, input))


def _check_heads(n_head: int, channels: int) -> None:
    if n_head < 1 or channels % n_head:
        raise ValueError(
            f"n_head = {n_head} does not divide the {channels} channels: give a divisor"
        )


def _share(dropout: nn.Dropout) -> float:
    return dropout.p if dropout.training else 0.0


def _as_image(tokens: Tensor, like: Tensor) -> Tensor:
    """From (B, H * W, C) to the shape of an image (B, C, H, W)."""
    return tokens.transpose(1, 2).reshape(like.shape)


# ---------------------------------------------------------------- resampling


def _linear(x: float) -> float:
    return max(0.0, 1 - abs(x))


def _cubic(x: float) -> float:
    """Keys 1981, doi:10.1109/TASSP.1981.1163711, with a = -1/2."""
    x = abs(x)
    if x < 1:
        return (1.5 * x - 2.5) * x * x + 1
    return ((-0.5 * x + 2.5) * x - 4) * x + 2 if x < 2 else 0.0


def _lanczos3(x: float) -> float:
    """Duchon 1979, doi:10.1175/1520-0450(1979)018<1016:LFIOAT>2.0.CO;2."""
    x *= math.pi
    return math.sin(x) / x * math.sin(x / 3) / (x / 3) if abs(x) < 3 * math.pi else 0.0


_INTERPOLATIONS = {
    "linear": (_linear, 1),
    "bilinear": (_linear, 1),
    "cubic": (_cubic, 2),
    "bicubic": (_cubic, 2),
    "lanczos3": (_lanczos3, 3),
}
"""Name -> the interpolating function, and where it ends."""


def _filter(name: str) -> Tensor:
    """What halving a row of values weighs them with: an interpolation at twice its width."""
    if name not in _INTERPOLATIONS:
        raise ValueError(unknown("kernel", name, _INTERPOLATIONS))
    interpolation, reach = _INTERPOLATIONS[name]
    places = [(2 * i + 1) / 4 - reach for i in range(4 * reach)]
    weights = torch.tensor([interpolation(place) for place in places], dtype=torch.float64)
    return weights / weights.sum()


class _Resample2d(nn.Module):
    """What both ways share: each channel by itself, with one kernel for all."""

    kernel: Tensor

    def __init__(self, kernel: str, pad_mode: str, gain: float) -> None:
        super().__init__()
        self.pad_mode = pad_mode
        weights = _filter(kernel) * gain
        self.pad = len(weights) // 2 - 1
        self.register_buffer("kernel", torch.outer(weights, weights).float())

    def _weight(self, x: Tensor) -> Tensor:
        return self.kernel.to(x.dtype).expand(x.shape[1], 1, -1, -1)


class Downsample2d(_Resample2d):
    """Half the height and width, blurred first.

    Source: Zhang 2019, arXiv:1904.11486.

    Args:
        kernel: "linear", "cubic" or "lanczos3".
        pad_mode: what stands beyond the border, see `torch.nn.functional.pad`.
    """

    def __init__(self, kernel: str = "linear", pad_mode: str = "reflect") -> None:
        super().__init__(kernel, pad_mode, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        """From (B, C, H, W) to (B, C, H/2, W/2)."""
        x = F.pad(x, (self.pad,) * 4, self.pad_mode)
        return F.conv2d(x, self._weight(x), stride=2, groups=x.shape[1])


class Upsample2d(_Resample2d):
    """Twice the height and width, interpolated; see `Downsample2d`."""

    def __init__(self, kernel: str = "linear", pad_mode: str = "reflect") -> None:
        super().__init__(kernel, pad_mode, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        """From (B, C, H, W) to (B, C, 2H, 2W)."""
        x = F.pad(x, ((self.pad + 1) // 2,) * 4, self.pad_mode)
        return F.conv_transpose2d(
            x, self._weight(x), stride=2, padding=2 * self.pad + 1, groups=x.shape[1]
        )


# ---------------------------------------------------------------- features and the whole


class FourierFeatures(mapping.FourierFeatures):
    """Cosines and sines of random projections, of mean square 1/2.

    Args:
        in_features: numbers a sample.
        out_features: cosines and sines together; even.
        std: of the frequencies, in cycles per unit of the input.
    """

    def __init__(self, in_features: int, out_features: int, std: float = 1.0) -> None:
        if out_features < 2 or out_features % 2:
            raise ValueError(
                f"out_features = {out_features} is no number of cosines and sines: give an even one"
            )
        super().__init__(in_features, out_features // 2, std)

    def forward(self, input: Tensor) -> Tensor:
        """Shape (..., out_features), of the input's dtype, for an input (..., in_features)."""
        features = super().forward(input.flatten(0, -2)) * math.sqrt(0.5)
        return features.to(input.dtype).unflatten(0, input.shape[:-1])


class UNet(ConditionedModule):
    """Stages down and up again; every stage but the first going up reads its mirror image's output.

    Args:
        d_blocks: the stages going down, `block(input, cond)`.
        u_blocks: those going up, the deepest first, `block(input, cond, skip)`; skip is None for
            the first.
        skip_stages: how many of the first stages, and of their mirror images, are left out.
    """

    def __init__(
        self, d_blocks: Iterable[nn.Module], u_blocks: Iterable[nn.Module], skip_stages: int = 0
    ) -> None:
        super().__init__()
        self.d_blocks = nn.ModuleList(d_blocks)
        self.u_blocks = nn.ModuleList(u_blocks)
        self.skip_stages = skip_stages

    def forward(self, input: Tensor, cond: Cond) -> Tensor:
        """The last stage's output."""
        skips: list[Tensor] = []
        for block in self.d_blocks[self.skip_stages :]:
            input = block(input, cond)
            skips.append(input)
        for i, block in enumerate(self.u_blocks[: len(skips)]):
            skip = skips.pop()
            input = block(input, cond, skip if i > 0 else None)
        return input
