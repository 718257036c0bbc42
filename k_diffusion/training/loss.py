"""The denoising loss, its weightings, and the densities from which noise levels are drawn.

Everything is said in log(alpha / sigma), so that it means the same in the coordinates of every
denoiser; r = sigma / alpha is the noise standard deviation once the signal is scaled to 1, and
snr = 1 / r². To add a weighting or a density, write a function here, or call `register_weighting`
or `register_density` on one of your own: its keyword-only arguments become its options.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from k_diffusion.utils.maths import unknown
from k_diffusion.utils.scheduler import Scheduler
from k_diffusion.utils.sigma_sampling import log_normal_quantile, log_uniform_quantile


class Weighting(Protocol):
    """(log(alpha / sigma) of shape (B,), sigma_data, **options) -> weight of |D - x0|², (B,)."""

    def __call__(self, half_log_snr: Tensor, sigma_data: float, /, **options: Any) -> Tensor: ...


class Density(Protocol):
    """A quantile function: (uniform numbers in (0, 1), process, **options) -> log(alpha / sigma).

    Both tensors are float64 of shape (B,).
    """

    def __call__(self, u: Tensor, process: Scheduler | None, /, **options: Any) -> Tensor: ...


WEIGHTINGS: dict[str, Weighting] = {}
DENSITIES: dict[str, Density] = {}


def register_weighting(name: str) -> Callable[[Any], Any]:
    """A decorator that makes a weighting known by name, to configs too."""

    def register(function: Any) -> Any:
        WEIGHTINGS[name] = function
        return function

    return register


def register_density(name: str) -> Callable[[Any], Any]:
    """A decorator that makes a density of noise levels known by name, to configs too."""

    def register(function: Any) -> Any:
        DENSITIES[name] = function
        return function

    return register


# ---------------------------------------------------------------- weightings of |D - x0|²


@register_weighting("edm")
def edm(half_log_snr: Tensor, sigma_data: float) -> Tensor:
    """1 / c_out²: the initial loss of an EDM network is 1 at every level (Karras et al. 2022,
    arXiv:2206.00364, table 1)."""
    return torch.exp(2 * half_log_snr) + sigma_data**-2


@register_weighting("snr")
def snr(half_log_snr: Tensor, sigma_data: float) -> Tensor:
    """alpha² / sigma² (Salimans and Ho 2022, arXiv:2202.00512, section 4)."""
    return torch.exp(2 * half_log_snr)


@register_weighting("eps")
def eps(half_log_snr: Tensor, sigma_data: float) -> Tensor:
    """Uniform in the noise, |eps_hat - eps|², which is the SNR's (Ho et al. 2020,
    arXiv:2006.11239, eq. 14)."""
    return torch.exp(2 * half_log_snr)


@register_weighting("v")
def v(half_log_snr: Tensor, sigma_data: float) -> Tensor:
    """Uniform in v = alpha eps - sigma x0: snr + 1 (Salimans and Ho 2022, section 4)."""
    return torch.exp(2 * half_log_snr) + 1


@register_weighting("x0")
def x0(half_log_snr: Tensor, sigma_data: float) -> Tensor:
    """Uniform in the clean data: 1 (Salimans and Ho 2022, section 4)."""
    return torch.ones_like(half_log_snr)


@register_weighting("flow")
def flow(half_log_snr: Tensor, sigma_data: float) -> Tensor:
    """Uniform in the velocity eps - x0 of the straight path: (1 + alpha / sigma)² (Lipman et al.
    2022, arXiv:2210.02747, eq. 9; Esser et al. 2024, arXiv:2403.03206, section 2)."""
    return (1 + torch.exp(half_log_snr)) ** 2


@register_weighting("min_snr")
def min_snr(half_log_snr: Tensor, sigma_data: float, *, gamma: float = 5.0) -> Tensor:
    """min(snr, gamma) (Hang et al. 2023, arXiv:2303.09556)."""
    return torch.exp(2 * half_log_snr).clamp(max=gamma)


@register_weighting("soft_min_snr")
def soft_min_snr(half_log_snr: Tensor, sigma_data: float, *, gamma: float | None = None) -> Tensor:
    """snr · gamma / (snr + gamma), gamma = 1 / sigma_data² unless given (Crowson et al. 2024,
    arXiv:2401.11605)."""
    limit = sigma_data**2 if gamma is None else 1 / gamma
    return 1 / (torch.exp(-2 * half_log_snr) + limit)


# ---------------------------------------------------------------- densities of noise levels


@register_density("lognormal")
def lognormal(
    u: Tensor, process: Scheduler | None, *, mean: float = -1.2, std: float = 1.2
) -> Tensor:
    """log r is Gaussian (Karras et al. 2022, table 1: P_mean, P_std)."""
    return -log_normal_quantile(u, mean, std)


@register_density("loguniform")
def loguniform(
    u: Tensor, process: Scheduler | None, *, min: float = 0.002, max: float = 80.0
) -> Tensor:
    """log r is uniform between two values of r (EDM's range of levels, Karras et al. 2022)."""
    return -log_uniform_quantile(u, math.log(min), math.log(max))


@register_density("uniform_time")
def uniform_time(u: Tensor, process: Scheduler | None) -> Tensor:
    """The process's time is uniform (Ho et al. 2020, algorithm 1; Lipman et al. 2022, eq. 9)."""
    return _at_time(u, process)


@register_density("logit_normal")
def logit_normal(
    u: Tensor, process: Scheduler | None, *, mean: float = 0.0, std: float = 1.0
) -> Tensor:
    """The logit of the process's time is Gaussian (Esser et al. 2024, eq. 19)."""
    return _at_time(torch.sigmoid(mean + std * torch.special.ndtri(u)), process)


def _at_time(share: Tensor, process: Scheduler | None) -> Tensor:
    if process is None:
        raise ValueError("this density is one of the process's time: give a process")
    low, high = process.time_min, process.time_max
    return process.half_log_snr(low + (high - low) * share)


# ---------------------------------------------------------------- by name


def check_options(kind: str, name: str, options: Mapping[str, Any]) -> Any:
    """The function called `name` among the "weighting"s or "density"s, once its options are known.

    Raises:
        ValueError: unknown name or option; the nearest one is offered.
    """
    tables: dict[str, Mapping[str, Any]] = {"weighting": WEIGHTINGS, "density": DENSITIES}
    table = tables[kind]
    if name not in table:
        raise ValueError(unknown(kind, name, table))
    parameters = inspect.signature(table[name]).parameters.values()
    known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    for option in options:
        if option not in known:
            raise ValueError(unknown(f"option of {kind} {name!r},", option, known))
    return table[name]


def make_weighting(
    name: str, sigma_data: float = 1.0, **options: Any
) -> Callable[[Tensor], Tensor]:
    """log(alpha / sigma) -> weight, from a name in `WEIGHTINGS`.

    Args:
        name: of the weighting.
        sigma_data: standard deviation of the clean data.
        options: the weighting's own.

    Raises:
        ValueError: unknown name or option.
    """
    function = check_options("weighting", name, options)
    return lambda half_log_snr: function(half_log_snr, sigma_data, **options)


def make_density(
    name: str, process: Scheduler | None = None, **options: Any
) -> Callable[[Tensor], Tensor]:
    """Uniform numbers -> log(alpha / sigma), from a name in `DENSITIES`.

    Raises:
        ValueError: unknown name or option, or a density of time without a process.
    """
    function = check_options("density", name, options)
    density = functools.partial(_apply, function, process, options)
    density(torch.tensor([0.5], dtype=torch.float64))
    return density


def _apply(
    function: Density, process: Scheduler | None, options: Mapping[str, Any], u: Tensor
) -> Tensor:
    return function(u, process, **options)


def draw_half_log_snr(
    density: Callable[[Tensor], Tensor],
    batch: int,
    generator: torch.Generator,
    *,
    stratified: bool = False,
) -> Tensor:
    """log(alpha / sigma) for a batch, float64 on the CPU, shape (batch,).

    Args:
        density: from `make_density`.
        batch: number of samples B.
        generator: a CPU generator.
        stratified: one level from each of B parts of equal probability, in random order: the same
            density for each sample, a smaller variance of the batch's mean.
    """
    u = torch.rand(batch, generator=generator, dtype=torch.float64)
    if stratified:
        u = (torch.randperm(batch, generator=generator) + u) / batch
    return density(u.clamp(2.0**-53, 1 - 2.0**-53))  # both ends are infinitely far away


# ---------------------------------------------------------------- the loss


def per_sample(factor: Tensor, like: Tensor) -> Tensor:
    """A number a sample, shape (B,), made to multiply (B, ...), in the other's dtype."""
    return factor.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def denoising_loss(
    denoiser: Any,
    x0: Tensor,
    sigma: Tensor,
    noise: Tensor,
    weighting: Callable[[Tensor], Tensor] | str,
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
        condition: keyword arguments for the denoiser.

    Returns:
        The loss of each sample, float32 or better, shape (B,).
    """
    if isinstance(weighting, str):
        weighting = make_weighting(weighting, getattr(denoiser, "sigma_data", 1.0))
    alpha = denoiser.alpha(sigma)
    x = per_sample(alpha, x0) * x0 + per_sample(sigma, x0) * noise
    error = (denoiser(x, sigma, **condition) - x0).flatten(1)
    weight = weighting(alpha.log() - sigma.log()).to(error.dtype)
    return weight * error.square().mean(1)


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
