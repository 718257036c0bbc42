"""The discrete cosine transform, by which errors are told apart by their spatial frequency."""

from __future__ import annotations

import math

import torch
from torch import Tensor


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
