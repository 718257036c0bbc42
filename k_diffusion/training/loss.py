"""The denoising loss and its kin, for any Denoiser.

What they are built of stands beside: `weightings` (how much an error counts at each level),
`densities` (how often each level comes) and `extra_losses` (what is learned beside). What a run's
config makes of them is the `objective`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from k_diffusion.training.densities import (
    DENSITIES,
    Density,
    draw_half_log_snr,
    make_density,
    register_density,
)
from k_diffusion.training.extra_losses import LOSSES, Outcome, register_loss
from k_diffusion.training.named import Table
from k_diffusion.training.weightings import (
    WEIGHTINGS,
    Weighting,
    make_weighting,
    register_weighting,
)
from k_diffusion.utils.cosine_transform import dct_of_space, freq_weight_nd

__all__ = [
    "DENSITIES",
    "LOSSES",
    "WEIGHTINGS",
    "Density",
    "Outcome",
    "Weighting",
    "check_options",
    "denoising_loss",
    "draw_half_log_snr",
    "make_density",
    "make_weighting",
    "mean_square",
    "noisy",
    "per_sample",
    "register_density",
    "register_loss",
    "register_weighting",
    "uncertainty_loss",
    "variance_loss",
]


def check_options(kind: str, name: str, options: Mapping[str, Any]) -> Any:
    """The function called `name` among the "weighting"s, "density"s or "loss"es, once its options
    are seen to fit.

    Raises:
        ValueError: unknown name or option; the nearest one is offered.
    """
    tables: dict[str, Table] = {"weighting": WEIGHTINGS, "density": DENSITIES, "loss": LOSSES}
    return tables[kind].find(name, options)


def per_sample(factor: Tensor, like: Tensor) -> Tensor:
    """A number a sample, shape (B,), made to multiply (B, ...), in the other's dtype."""
    return factor.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def noisy(denoiser: Any, x0: Tensor, sigma: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """alpha x0 + sigma noise in a denoiser's coordinates, and log(alpha / sigma) of shape (B,)."""
    alpha = denoiser.alpha(sigma)
    x = per_sample(alpha, x0) * x0 + per_sample(sigma, x0) * noise
    return x, alpha.log() - sigma.log()


def mean_square(error: Tensor, scales: float = 1.0) -> Tensor:
    """The mean square over all but the batch, float32 or better, shape (B,).

    Args:
        error: shape (B, ...).
        scales: 1: all spatial frequencies count alike. Else those of an image's DCT count the more
            the lower they are, by their octave: that many octaves have weights of their own, and
            all below the weight of the last; below 1: all octaves there are (see `freq_weight_1d`;
            the frequency-weighted loss of the established training programs).

    Raises:
        ValueError: scales is not 1, and the error has no dimensions of space, or more than three.
    """
    error = error.to(torch.promote_types(error.dtype, torch.float32))
    if scales == 1:
        return error.square().flatten(1).mean(1)
    square = dct_of_space(error).square()
    weights = freq_weight_nd(square.shape[2:], scales, square.dtype, square.device)
    return (square * weights).flatten(1).mean(1)


def denoising_loss(
    denoiser: Any,
    x0: Tensor,
    sigma: Tensor,
    noise: Tensor,
    weighting: Callable[[Tensor], Tensor] | str,
    scales: float = 1.0,
    **condition: Any,
) -> Tensor:
    """weight · |D(alpha x0 + sigma noise, sigma) - x0|², the mean over all but the batch.

    Args:
        denoiser: any Denoiser; x is made in its coordinates.
        x0: clean data, shape (B, ...).
        sigma: noise standard deviations in the denoiser's coordinates, shape (B,). Float64 where
            the device has it: near 1 on a variance-preserving path a float32 sigma has no alpha.
        noise: unit Gaussian, of x0's shape.
        weighting: log(alpha / sigma) -> weight, from `make_weighting`, or a name.
        scales: of a frequency-weighted loss, see `mean_square`; 1 is the plain one.
        condition: keyword arguments for the denoiser.

    Returns:
        The loss of each sample, float32 or better, shape (B,).
    """
    if isinstance(weighting, str):
        weighting = make_weighting(weighting, getattr(denoiser, "sigma_data", 1.0))
    x, half_log_snr = noisy(denoiser, x0, sigma, noise)
    square = mean_square(denoiser(x, sigma, **condition) - x0, scales)
    return weighting(half_log_snr).to(square.dtype) * square


def uncertainty_loss(loss: Tensor, log_variance: Tensor) -> Tensor:
    """loss / exp(u) + u: least where u is the log of the expected loss, which then counts as 1.

    So a network that learns u, the log variance of its error at each level, gives every level the
    same say, however far it has come (Karras et al. 2024, arXiv:2312.02696, eqs. 14 to 16 and 21,
    after Kendall et al. 2018, arXiv:1705.07115).

    Args:
        loss: weighted, of each sample, such as `denoising_loss` gives, shape (B,).
        log_variance: u at each sample's level, shape (B,), such as `MPUNet.uncertainty` gives.

    Returns:
        Shape (B,), in the loss's dtype.
    """
    u = log_variance.to(loss.dtype)
    return loss * torch.exp(-u) + u


def variance_loss(square: Tensor, log_variance: Tensor) -> Tensor:
    """(square / exp(s) + s) / 2: the negative log-likelihood of a Gaussian of variance exp(s), less
    its constant (Kendall and Gal 2017, arXiv:1703.04977, eq. 8).

    Unlike that of `uncertainty_loss`, s is the network's own for each sample: what it sees decides.

    Args:
        square: mean squared error of what the network predicts, shape (B,).
        log_variance: s, shape (B,).

    Returns:
        Shape (B,), in square's dtype.
    """
    s = log_variance.to(square.dtype)
    return (square * torch.exp(-s) + s) / 2
