"""Norm, scale and shift, and SiLU as one function with a gradient of its own.

It is what the UNet does between its convolutions. On a CPU torch's own operations lose to it: the
backward pass of the group norm in channels_last takes several times what its sums need, and that
of a scale and shift a sample passes over all values once more.

Letters in shapes: B samples, C channels, N positions, O channels of the output, E the width of the
embedding; `...` are one to three dimensions.

For one sample, position n and channel c in a group of K channels, with the mean m and the
reciprocal deviation r of its group, the function is

    u = s (v - m) r + b                                  norm (Wu and He 2018, arXiv:1803.08494)
    y = u sigmoid(u)                                     SiLU

and, with g = dL/du, which SiLU's own gradient gives, and dL/ds and dL/db summed over n,

    dL/db = sum_n g,   dL/ds = (sum_n g v - m dL/db) r
    dL/dv = s r g + p v + q
    p = -r^2 sum_c s dL/ds / (N K),   q = -r sum_c s dL/db / (N K) - p m    (sums over the group)

so that beside v only m and r are kept, and u is made again.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from k_diffusion.models.attention import as_tokens
from k_diffusion.models.layers import AdaptiveGroupNorm, GroupNorm
from k_diffusion.models.recompute import recomputed, spares


def normed_convolution(
    norm: GroupNorm | AdaptiveGroupNorm,
    convolution: nn.Module,
    x: Tensor,
    *embedding: Tensor,
    dropout: nn.Dropout | None = None,
) -> Tensor:
    """convolution(dropout(silu(norm(x)))), by whichever way is the best where it runs.

    Its backward pass keeps x, and at most the convolution's input beside it.

    Args:
        norm: of x's channels.
        convolution: of what the norm and SiLU put out.
        x: shape (B, C, ...).
        embedding: shape (B, E), for a norm that asks for it.
        dropout: before the convolution; None: none.

    Returns:
        Shape (B, O, ...).
    """

    def plainly(x: Tensor, *embedding: Tensor) -> Tensor:
        y = F.silu(norm(x, *embedding))
        return convolution(y if dropout is None else dropout(y))

    drops = dropout is not None and dropout.training and dropout.p > 0
    if drops or not fits(x):
        return recomputed(plainly, x, *embedding, random=drops)
    scale, shift = norm.factors(x, *embedding)
    if not x.dtype == scale.dtype == shift.dtype:
        return recomputed(plainly, x, *embedding)
    plain = norm.norm if isinstance(norm, AdaptiveGroupNorm) else norm
    return convolution(NormSiLU.apply(x, scale, shift, plain.num_groups, plain.eps))


def fits(x: Tensor) -> bool:
    """Whether `NormSiLU` does with x what torch's operations would, and faster."""
    # Derivatives of other kinds are torch's own affair, and casts are autocast's.
    if not spares(x) or forward_ad._current_level >= 0 or torch.is_autocast_enabled("cpu"):
        return False
    known = x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)
    return known and as_tokens(x).is_contiguous()


def as_data(v: Tensor, like: Tensor) -> Tensor:
    """Tokens (B, N, C) as (B, C, ...), of the size of like (B, C, ...), in channels_last."""
    return v.transpose(1, 2).view(like.shape)


def broad(numbers: Tensor, v: Tensor) -> Tensor:
    """Numbers of channels, (B, C) or (B, groups, channels or 1), as they meet tokens (B, N, C)."""
    if numbers.ndim == 3 and numbers.shape[2] == 1:
        numbers = numbers.expand(-1, -1, v.shape[2] // numbers.shape[1])
    return numbers.reshape(len(v), 1, -1)


class NormSiLU(torch.autograd.Function):
    """silu(scale * normed(x) + shift), shape (B, C, ...) in channels_last."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, groups: int, eps: float
    ) -> Tensor:
        """Of x (B, C, ...) in channels_last, scale and shift (B, C)."""
        v = as_tokens(x)
        grouped = len(x), groups, -1  # groups beside channels; m and r: (B, groups, 1)
        share = groups / (v.shape[1] * v.shape[2])
        m = v.sum(1).view(grouped).sum(2, keepdim=True).mul_(share)
        # Centred first: beside a large mean, the squares would tell nothing of a small deviation.
        u = v - broad(m, v)
        squares = torch.linalg.vecdot(u, u, dim=1)
        r = squares.view(grouped).sum(2, keepdim=True).mul_(share).add_(eps).rsqrt_()
        ctx.save_for_backward(x, scale, shift, m, r)
        ctx.groups, ctx.eps = groups, eps
        torch.addcmul(broad(shift, v), u, broad(scale.reshape(grouped) * r, v), out=u)
        return as_data(F.silu(u, inplace=True), x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        """The gradients of x, scale and shift; see the head of this file."""
        x, scale, shift, m, r = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient of this gradient will be asked for
            inputs = x, scale, shift
            wanted = [t for t, need in zip(inputs, ctx.needs_input_grad, strict=False) if need]
            s, b = (n.reshape(*n.shape, *[1] * (x.ndim - 2)) for n in (scale, shift))
            y = F.silu(torch.addcmul(b, F.group_norm(x, ctx.groups, eps=ctx.eps), s))
            found = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))
            return tuple(next(found) if need else None for need in ctx.needs_input_grad)
        v = as_tokens(x)
        grouped = len(x), ctx.groups, -1
        share = ctx.groups / (v.shape[1] * v.shape[2])
        scale = scale.reshape(grouped)
        a = scale * r
        u = torch.addcmul(broad(shift.reshape(grouped) - a * m, v), v, broad(a, v))
        # What is done with is written over: memory that is there is nearer than new one.
        g = torch.ops.aten.silu_backward.grad_input(as_tokens(dy), u, grad_input=u)
        work = g * v
        dshift = g.sum(1).view(grouped)
        dscale = (work.sum(1).view(grouped) - m * dshift) * r
        p = (scale * dscale).sum(2, keepdim=True) * r * r * -share
        q = (scale * dshift).sum(2, keepdim=True) * r * -share - p * m
        dv = torch.addcmul(broad(q, v), v, broad(p, v), out=work).addcmul_(g, broad(a, v))
        return as_data(dv, x), dscale.flatten(1), dshift.flatten(1), None, None
