"""Noise levels drawn at random for training, under their established names.

All are noise standard deviations at alpha = 1, in data units, made from uniform numbers by the
inverse of their distribution function (all but `rand_split_log_normal`): within an
`enable_stratified` block they are stratified. Low-precision levels are drawn in float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from k_diffusion.utils.stratified import stratified_with_settings

Device = torch.device | str


def log_normal_quantile(u: Tensor, loc: Any, scale: Any) -> Tensor:
    """log sigma below which lies the share u of a log-normal density (loc, scale of log sigma)."""
    return loc + scale * math.sqrt(2) * torch.erfinv(2 * u - 1)


def log_uniform_quantile(u: Tensor, low: float, high: float) -> Tensor:
    """log sigma below which lies the share u of a density that is even in log sigma."""
    return u * (high - low) + low


def log_logistic_quantile(
    u: Tensor, loc: float, scale: float, low: float = 0.0, high: float = math.inf
) -> Tensor:
    """log sigma below which lies the share u of a log-logistic density cut off at two sigmas."""

    def share_below(sigma: float) -> Tensor:
        value = torch.as_tensor(sigma, device=u.device, dtype=u.dtype)
        return torch.sigmoid((value.log() - loc) / scale)

    first, last = share_below(low), share_below(high)
    return torch.logit(u * (last - first) + first) * scale + loc


def v_diffusion_angle(u: Tensor, low: float, high: float) -> Tensor:
    """The angle below which lies the share u, of a density that is even between arctan low and
    arctan high."""
    first, last = (math.atan(ratio) * 2 / math.pi for ratio in (low, high))
    return (u * (last - first) + first) * math.pi / 2


def v_diffusion_quantile(u: Tensor, low: float, high: float) -> Tensor:
    """log(sigma / sigma_data) below which lies the share u, where its angle is uniform; low, high:
    sigma / sigma_data at both ends."""
    return torch.log(torch.tan(v_diffusion_angle(u, low, high)))


def cosine_interpolated_quantile(
    share: Tensor,
    image_d: float,
    noise_d_low: float,
    noise_d_high: float,
    low: float,
    high: float,
) -> Tensor:
    """log(sigma / sigma_data) at a share of the way from most noise to least, see
    `rand_cosine_interpolated`; low, high: sigma / sigma_data at both ends."""

    def log_ratio(noise_d: float) -> Tensor:
        """log(sigma / sigma_data) of the cosine schedule moved by log(image_d / noise_d)."""
        shift = noise_d / image_d
        first, last = math.atan(high * shift), math.atan(low * shift)
        return torch.log(torch.tan(first + share * (last - first))) - math.log(shift)

    return torch.lerp(log_ratio(noise_d_low), log_ratio(noise_d_high), share)


def split_log_normal_quantile(u: Tensor, loc: float, scale_1: float, scale_2: float) -> Tensor:
    """log sigma below which lies the share u of a split log-normal density (its mode, and standard
    deviations of log sigma below and above it)."""
    below = scale_1 / (scale_1 + scale_2)
    # Each side is half of a Gaussian, stretched to the side's share of all.
    low = torch.special.ndtri((u / (2 * below)).clamp(max=0.5))
    high = torch.special.ndtri(((1 - u) / (2 * (1 - below))).clamp(max=0.5))
    return loc + torch.where(u < below, scale_1 * low, -scale_2 * high)


def _uniform(shape: Sequence[int], device: Device, dtype: torch.dtype) -> Tensor:
    precise = torch.promote_types(dtype, torch.float32)
    return stratified_with_settings(shape, device=device, dtype=precise)


def rand_log_normal(
    shape: Sequence[int],
    loc: float = 0.0,
    scale: float = 1.0,
    device: Device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """log sigma is Gaussian (Karras et al. 2022, arXiv:2206.00364, table 1: P_mean, P_std).

    Args:
        shape: of the result.
        loc, scale: mean and standard deviation of log sigma.
    """
    u = _uniform(shape, device, dtype) * (1 - 2e-7) + 1e-7  # both ends are infinitely far away
    return log_normal_quantile(u, loc, scale).exp().to(dtype)


def rand_log_logistic(
    shape: Sequence[int],
    loc: float = 0.0,
    scale: float = 1.0,
    min_value: float = 0.0,
    max_value: float = math.inf,
    device: Device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """log sigma is logistic, which has longer tails than a Gaussian (Crowson et al. 2024,
    arXiv:2401.11605).

    Args:
        shape: of the result.
        loc, scale: of log sigma.
        min_value, max_value: sigma between which the density is cut off.
    """
    u = stratified_with_settings(shape, device=device, dtype=torch.float64)
    return log_logistic_quantile(u, loc, scale, min_value, max_value).exp().to(dtype)


def rand_log_uniform(
    shape: Sequence[int],
    min_value: float,
    max_value: float,
    device: Device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """log sigma is uniform.

    Args:
        shape: of the result.
        min_value, max_value: smallest and largest sigma.
    """
    u = _uniform(shape, device, dtype)
    return log_uniform_quantile(u, math.log(min_value), math.log(max_value)).exp().to(dtype)


def rand_v_diffusion(
    shape: Sequence[int],
    sigma_data: float = 1.0,
    min_value: float = 0.0,
    max_value: float = math.inf,
    device: Device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The angle arctan(sigma / sigma_data) is uniform: the time of the cosine schedule (Salimans
    and Ho 2022, arXiv:2202.00512).

    Args:
        shape: of the result.
        sigma_data: standard deviation of the clean data.
        min_value, max_value: sigma between which the density is cut off.
    """
    u = _uniform(shape, device, dtype)
    angle = v_diffusion_angle(u, min_value / sigma_data, max_value / sigma_data)
    return (torch.tan(angle) * sigma_data).to(dtype)


def rand_cosine_interpolated(
    shape: Sequence[int],
    image_d: float,
    noise_d_low: float,
    noise_d_high: float,
    sigma_data: float = 1.0,
    min_value: float = 1e-3,
    max_value: float = 1e3,
    device: Device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Between two cosine schedules, each shifted for a resolution, log sigma is interpolated by
    their common time, which is uniform (Hoogeboom et al. 2023, arXiv:2301.11093, section 2.1).

    Args:
        shape: of the result.
        image_d: height and width of the images.
        noise_d_low: resolution that the schedule is made for where there is most noise.
        noise_d_high: the same where there is least.
        sigma_data: standard deviation of the clean data.
        min_value, max_value: smallest and largest sigma.
    """
    ends = min_value / sigma_data, max_value / sigma_data
    share = _uniform(shape, device, dtype)  # of the way from most noise to least
    log_ratio = cosine_interpolated_quantile(share, image_d, noise_d_low, noise_d_high, *ends)
    return (log_ratio.exp() * sigma_data).to(dtype)


def rand_split_log_normal(
    shape: Sequence[int],
    loc: float,
    scale_1: float,
    scale_2: float,
    device: Device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """log sigma has a Gaussian's shape with one standard deviation below its mode, another above.

    Never stratified.

    Args:
        shape: of the result.
        loc: the mode of log sigma.
        scale_1, scale_2: standard deviation below and above it.
    """
    precise = torch.promote_types(dtype, torch.float32)
    distance = torch.randn(shape, device=device, dtype=precise).abs()
    below = torch.rand(shape, device=device, dtype=precise) < scale_1 / (scale_1 + scale_2)
    return torch.where(below, loc - distance * scale_1, loc + distance * scale_2).exp().to(dtype)
