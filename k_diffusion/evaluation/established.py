"""The established names of `K.evaluation`, with their signatures."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from k_diffusion.evaluation.kernel import polynomial_kernel
from k_diffusion.utils.tensors import tf32_mode


def compute_features(
    accelerator: Any,
    sample_fn: Callable[[int], Tensor],
    extractor_fn: Callable[[Tensor], Tensor],
    n: int,
    batch_size: int,
) -> Tensor:
    """The features of n samples, shape (n, features), the same on every process.

    Args:
        accelerator: accelerate's `Accelerator`, or what has its `num_processes`, `is_main_process`
            and `gather`.
        sample_fn: how many -> images; it may end before n by StopIteration.
        extractor_fn: images -> features, shape (B, features).
        n: samples in all processes together.
        batch_size: samples of a process at a time.

    Raises:
        ValueError: n or batch_size is below 1, or no sample came.
    """
    for name, value in (("n", n), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} is {value}; give a whole number of at least 1")
    from tqdm.auto import trange

    share = math.ceil(n / accelerator.num_processes)
    found = []
    for done in trange(0, share, batch_size, disable=not accelerator.is_main_process):
        count = min(share - done, batch_size)
        try:
            samples = sample_fn(count)
        except StopIteration:
            break
        found.append(accelerator.gather(extractor_fn(samples[:count])))
    if not found:
        raise ValueError("sample_fn gave no sample: it ended at once, by StopIteration")
    return torch.cat(found)[:n]


def squared_mmd(
    x: Tensor, y: Tensor, kernel: Callable[[Tensor, Tensor], Tensor] = polynomial_kernel
) -> Tensor:
    """The unbiased estimate of the squared MMD, shape (...), in x's dtype; with gradients.

    Args:
        x: shape (..., m, d), m at least 2.
        y: shape (..., n, d), n at least 2.
        kernel: of each row of one with each of another.

    Source: Gretton et al. 2012, "A kernel two-sample test", equation 3.
    """
    m, n = x.shape[-2], y.shape[-2]
    if min(m, n) < 2:
        raise ValueError(f"sets of {m} and {n} rows have no pairs; give at least 2 each")
    within = [
        (k.sum((-1, -2)) - k.diagonal(dim1=-2, dim2=-1).sum(-1)) / (count * (count - 1))
        for k, count in ((kernel(x, x), m), (kernel(y, y), n))
    ]
    return within[0] + within[1] - 2 * kernel(x, y).mean((-1, -2))


def kid(x: Tensor, y: Tensor, max_size: int = 5000) -> Tensor:
    """The mean of `squared_mmd` over parts of at most max_size rows, a tensor of no dimension.

    For a figure to report, `kernel_distance` takes all pairs, in float64, and tells the error.

    Args:
        x: features, shape (m, d).
        y: features, shape (n, d).
        max_size: rows of a part; as many parts are made of both sets.
    """
    parts = max(1, math.ceil(max(len(x), len(y)) / max_size))
    ends = [[round(i * len(rows) / parts) for i in range(parts + 1)] for rows in (x, y)]
    with tf32_mode(matmul=False):
        found = [
            squared_mmd(x[ends[0][i] : ends[0][i + 1]], y[ends[1][i] : ends[1][i + 1]])
            for i in range(parts)
        ]
    return torch.stack(found).mean()


class _SquareRoot(torch.autograd.Function):
    """The derivative of S = sqrt(A) solves S dS + dS S = dA, whose eigenvectors are A's."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(a)
        roots = values.abs().sqrt()
        ctx.save_for_backward(roots, vectors)
        return (vectors * roots[..., None, :]) @ vectors.mT

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        roots, vectors = ctx.saved_tensors
        inner = vectors.mT @ grads[0] @ vectors
        return vectors @ (inner / (roots[..., :, None] + roots[..., None, :])) @ vectors.mT


def sqrtm_eig(a: Tensor) -> Tensor:
    """The square root of symmetric matrices, shape (..., d, d), by eigenvalues; with gradients.

    Of an eigenvalue that came out below 0, as rounding makes it, the root is that of its size.

    Raises:
        RuntimeError: no square matrices.
    """
    if a.ndim < 2 or a.shape[-1] != a.shape[-2]:
        raise RuntimeError(f"a has shape {tuple(a.shape)}; square matrices (..., d, d) have roots")
    root: Tensor = _SquareRoot.apply(a)
    return root


def fid(x: Tensor, y: Tensor, eps: float = 1e-8) -> Tensor:
    """The squared Frechet distance of Gaussians fitted to two feature sets; with gradients.

    For a figure to report, `frechet_distance` works in float64 and without eps.

    Args:
        x: features, shape (m, d).
        y: features, shape (n, d).
        eps: added to the covariances' diagonals, so that roots have gradients.
    """
    with tf32_mode(matmul=False):
        apart = (x.mean(0) - y.mean(0)).square().sum()
        ridge = eps * torch.eye(x.shape[1], device=x.device, dtype=x.dtype)
        cov_x, cov_y = torch.cov(x.mT) + ridge, torch.cov(y.mT) + ridge
        root = sqrtm_eig(cov_x)
        shared = sqrtm_eig(root @ cov_y @ root)
        return apart + cov_x.trace() + cov_y.trace() - 2 * shared.trace()
