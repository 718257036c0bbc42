"""The discrete cosine transform, by which errors are told apart by their spatial frequency."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from k_diffusion.utils.tensors import append_dims


def dct(x: Tensor, dims: int = 1) -> Tensor:
    """The orthonormal DCT-II over the last `dims` dimensions.

    y[k] = c_k · sum over n of x[n] · cos(pi (2 n + 1) k / (2 N)) in each of them, with c_0 = sqrt(1
    / N) and c_k = sqrt(2 / N): sums of squares stay as they are.

    Args:
        x: float32 or float64, real.
        dims: how many dimensions, counted from the last.

    Source: Makhoul 1980, doi:10.1109/TASSP.1980.1163351: one Fourier transform of length N, of
        the even samples followed by the odd ones in reverse.
    """
    for dim in range(-dims, 0):
        x = _dct_of_last(x.movedim(dim, -1)).movedim(-1, dim)
    return x


def _dct_of_last(x: Tensor) -> Tensor:
    n = x.shape[-1]
    spectrum = torch.fft.fft(torch.cat([x[..., ::2], x[..., 1::2].flip(-1)], dim=-1))
    angle = torch.arange(n, device=x.device, dtype=x.dtype) * (math.pi / (2 * n))
    y = (spectrum.real * angle.cos() + spectrum.imag * angle.sin()) * math.sqrt(2 / n)
    return torch.cat([y[..., :1] * math.sqrt(0.5), y[..., 1:]], dim=-1)


def dct_of_space(x: Tensor) -> Tensor:
    """The orthonormal DCT-II over all dimensions of x, shape (B, C, ...), but the first two.

    Raises:
        ValueError: there are none of these, or more than three.
    """
    if not 3 <= x.ndim <= 5:
        raise ValueError(
            f"x has shape {tuple(x.shape)}; a frequency-weighted loss takes (B, C, ...) with one "
            "to three dimensions of space, or give scales=1"
        )
    return dct(x, x.ndim - 2)


def freq_weight_1d(
    n: int,
    scales: float = 0,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """A weight for each of n frequencies of a DCT, shape (n,): -log2 of cycles per sample.

    Args:
        n: from 1/2 cycle over all n samples to 1/2 cycle a sample, which has weight 1.
        scales: octaves with weights of their own; below lies the same weight for all. Below 1:
            all octaves that there are.
    """
    weights = -torch.linspace(0.5 / n, 0.5, n, dtype=dtype, device=device).log2()
    return weights.clamp(max=scales) if scales >= 1 else weights


def freq_weight_nd(
    shape: Sequence[int],
    scales: float = 0,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """A weight for each frequency in several dimensions: that of its highest one, of shape `shape`.

    Args:
        shape: numbers of frequencies.
        scales: see `freq_weight_1d`.
    """
    axes = [freq_weight_1d(n, scales, dtype, device) for n in shape]
    return reduce(torch.minimum, [append_dims(axis, len(axes) - i) for i, axis in enumerate(axes)])
