"""How often each noise level comes: densities, as quantile functions of log(alpha / sigma).

r = sigma / alpha is the noise standard deviation once the signal is scaled to 1. A quantile
function turns uniform numbers into levels, so any density can be stratified over a batch.

To add one, write a function here, or call `register_density` on one of your own: its keyword-only
arguments become its options. docs/losses.md has them in a table.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from k_diffusion.training.named import Table
from k_diffusion.utils.scheduler import Scheduler
from k_diffusion.utils.sigma_sampling import (
    cosine_interpolated_quantile,
    log_logistic_quantile,
    log_normal_quantile,
    log_uniform_quantile,
    split_log_normal_quantile,
    v_diffusion_quantile,
)


class Density(Protocol):
    """A quantile function: (uniform numbers in (0, 1), process, **options) -> log(alpha / sigma).

    Both tensors are float64 of shape (B,).
    """

    def __call__(self, u: Tensor, process: Scheduler | None, /, **options: Any) -> Tensor: ...


DENSITIES = Table("density")


def register_density(name: str) -> Callable[[Any], Any]:
    """A decorator that makes a density of noise levels known by name, to configs too.

    An option `sigma_data` is the denoiser's where a config leaves it out.
    """
    return DENSITIES.register(name)


def make_density(
    name: str, process: Scheduler | None = None, **options: Any
) -> Callable[[Tensor], Tensor]:
    """Uniform numbers -> log(alpha / sigma), from a name in `DENSITIES`.

    Raises:
        ValueError: unknown name or option, a density of time without a process, or options that
            give no level.
    """
    function = DENSITIES.find(name, options)
    density = functools.partial(_apply, function, process, options)
    middle = density(torch.tensor([0.5], dtype=torch.float64))
    if not bool(middle.isfinite().all()):
        raise ValueError(f"density {name!r} with options {options} has no levels: change them")
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


# ------------------------------------------------- of r


def _check_ends(low: float, high: float, least: str = "0 < min") -> None:
    if not (low < high and (low > 0 or (least == "0 <= min" and low == 0))):
        raise ValueError(f"min = {low} and max = {high} bound no levels; give {least} < max")


@register_density("lognormal")
def lognormal(
    u: Tensor, process: Scheduler | None, *, mean: float = -1.2, std: float = 1.2
) -> Tensor:
    """log r is Gaussian (Karras et al. 2022, arXiv:2206.00364, table 1: P_mean, P_std).

    Args:
        mean, std: of log r.
    """
    return -log_normal_quantile(u, mean, std)


@register_density("split_lognormal")
def split_lognormal(
    u: Tensor, process: Scheduler | None, *, mode: float, std_below: float, std_above: float
) -> Tensor:
    """log r has a Gaussian's shape, of one standard deviation below its mode and another above
    (the two-piece normal distribution, Fechner 1897).

    Args:
        mode: of log r.
        std_below, std_above: standard deviation on either side of it.
    """
    return -split_log_normal_quantile(u, mode, std_below, std_above)


@register_density("loglogistic")
def loglogistic(
    u: Tensor,
    process: Scheduler | None,
    *,
    loc: float | None = None,
    scale: float = 0.5,
    min: float = 0.0,
    max: float = math.inf,
    sigma_data: float = 1.0,
) -> Tensor:
    """log r is logistic, which has longer tails than a Gaussian (Crowson et al. 2024,
    arXiv:2401.11605).

    Args:
        loc: the middle of log r; None: log sigma_data.
        scale: of log r, 0.55 of its standard deviation.
        min, max: r between which the density is cut off.
        sigma_data: standard deviation of the clean data.
    """
    _check_ends(min, max, "0 <= min")
    loc = math.log(sigma_data) if loc is None else loc
    return -log_logistic_quantile(u, loc, scale, min, max)


@register_density("loguniform")
def loguniform(
    u: Tensor, process: Scheduler | None, *, min: float = 0.002, max: float = 80.0
) -> Tensor:
    """log r is uniform between two values of r (EDM's range of levels, Karras et al. 2022).

    Args:
        min, max: r between which it lies.
    """
    _check_ends(min, max)
    return -log_uniform_quantile(u, math.log(min), math.log(max))


@register_density("v_diffusion")
def v_diffusion(
    u: Tensor,
    process: Scheduler | None,
    *,
    min: float = 1e-3,
    max: float = 1e3,
    sigma_data: float = 1.0,
) -> Tensor:
    """The angle arctan(r / sigma_data) is uniform: the time of the cosine schedule (Salimans and Ho
    2022, arXiv:2202.00512).

    Args:
        min, max: r between which the density is cut off.
        sigma_data: standard deviation of the clean data.
    """
    _check_ends(min, max)
    return -v_diffusion_quantile(u, min / sigma_data, max / sigma_data) - math.log(sigma_data)


@register_density("cosine_interpolated")
def cosine_interpolated(
    u: Tensor,
    process: Scheduler | None,
    *,
    image_d: float,
    noise_d_low: float = 32.0,
    noise_d_high: float | None = None,
    min: float = 1e-3,
    max: float = 1e3,
    sigma_data: float = 1.0,
) -> Tensor:
    """Between two cosine schedules, each shifted for a resolution, log r is interpolated by their
    common time, which is uniform (Hoogeboom et al. 2023, arXiv:2301.11093, section 2.1).

    Args:
        image_d: height and width of the images.
        noise_d_low: resolution that the schedule is made for where there is most noise.
        noise_d_high: the same where there is least; None: image_d.
        min, max: smallest and largest r.
        sigma_data: standard deviation of the clean data.
    """
    _check_ends(min, max)
    high = image_d if noise_d_high is None else noise_d_high
    ends = min / sigma_data, max / sigma_data
    # The quantile's share goes from most noise to least.
    log_r = cosine_interpolated_quantile(1 - u, image_d, noise_d_low, high, *ends)
    return -log_r - math.log(sigma_data)


# ------------------------------------------------- of time


@register_density("uniform_time")
def uniform_time(u: Tensor, process: Scheduler | None) -> Tensor:
    """The process's time is uniform (Ho et al. 2020, arXiv:2006.11239, algorithm 1; Lipman et al.
    2022, arXiv:2210.02747, eq. 9)."""
    return _at_time(u, process)


@register_density("logit_normal")
def logit_normal(
    u: Tensor, process: Scheduler | None, *, mean: float = 0.0, std: float = 1.0
) -> Tensor:
    """The logit of the process's time is Gaussian (Esser et al. 2024, arXiv:2403.03206, eq. 19).

    Args:
        mean, std: of the logit.
    """
    return _at_time(torch.sigmoid(mean + std * torch.special.ndtri(u)), process)


def _at_time(share: Tensor, process: Scheduler | None) -> Tensor:
    if process is None:
        raise ValueError("this density is one of the process's time: give a process")
    low, high = process.time_min, process.time_max
    return process.half_log_snr(low + (high - low) * share)
