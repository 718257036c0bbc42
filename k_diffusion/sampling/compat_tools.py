"""The established helper functions beside `sample_*`: noise levels, slopes, noise, progress bars.

Those that make tensors form them by the established operations in the established order: one last
bit of a noise level decides which noise a Brownian tree gives for it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from k_diffusion.utils.maths import lagrange_integrals

NoiseSampler = Callable[[Any, Any], Tensor]


def face() -> Any:
    """The module `k_diffusion.sampling` as it is now.

    Programs replace names in it while it runs (`torch`, `trange`, `default_noise_sampler`,
    `BrownianTreeNoiseSampler`), so those are looked up there whenever they are used.
    """
    return sys.modules["k_diffusion.sampling"]


def number(value: Any) -> Any:
    """A tensor's or numpy's number as Python's; anything else as it is."""
    return value.item() if callable(getattr(value, "item", None)) else value


def as_time(value: Any) -> Tensor:
    """A number as a tensor on the CPU, whatever torch's default device; a tensor as it is."""
    return value if isinstance(value, Tensor) else torch.as_tensor(value, device="cpu")


def _check_sigmas(function: str, zero: bool, **sigmas: Any) -> None:
    for name, sigma in sigmas.items():
        if not (sigma > 0 or (zero and sigma == 0)):
            wanted = "0 or more" if zero else "above 0"
            raise ValueError(f"{name} of {function} must be {wanted}, got {float(sigma)}")


def trange(*args: Any, disable: bool | None = None, **kwargs: Any) -> Any:
    """range() with a progress bar; see tqdm, which is imported here."""
    if disable and not kwargs:
        return range(*args)
    from tqdm.auto import trange as bar

    return bar(*args, disable=disable, **kwargs)


def append_zero(x: Tensor) -> Tensor:
    """x, shape (n,), with a zero after it: shape (n + 1,)."""
    return torch.cat([x, x.new_zeros(1)])


def get_sigmas_karras(
    n: int, sigma_min: float, sigma_max: float, rho: float = 7.0, device: Any = "cpu"
) -> Tensor:
    """n sigmas from sigma_max to sigma_min, evenly spaced in sigma^(1 / rho), and a zero.

    Source: Karras et al. 2022, arXiv:2206.00364, eq. 5.
    """
    _check_sigmas("get_sigmas_karras", True, sigma_min=sigma_min, sigma_max=sigma_max)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    ramp = torch.linspace(0, 1, n, device="cpu")  # so that all devices get the same levels
    return face().append_zero((high + ramp * (low - high)) ** rho).to(device)


def get_sigmas_exponential(
    n: int, sigma_min: float, sigma_max: float, device: Any = "cpu"
) -> Tensor:
    """n sigmas from sigma_max to sigma_min, evenly spaced in log sigma, and a zero."""
    _check_sigmas("get_sigmas_exponential", False, sigma_min=sigma_min, sigma_max=sigma_max)
    logs = torch.linspace(math.log(sigma_max), math.log(sigma_min), n, device=device)
    return face().append_zero(logs.exp())


def get_sigmas_polyexponential(
    n: int, sigma_min: float, sigma_max: float, rho: float = 1.0, device: Any = "cpu"
) -> Tensor:
    """n sigmas from sigma_max to sigma_min, log sigma a line to the power rho, and a zero."""
    _check_sigmas("get_sigmas_polyexponential", False, sigma_min=sigma_min, sigma_max=sigma_max)
    low, high = math.log(sigma_min), math.log(sigma_max)
    ramp = torch.linspace(1, 0, n, device=device) ** rho
    return face().append_zero(torch.exp(ramp * (high - low) + low))


def get_sigmas_vp(
    n: int,
    beta_d: float = 19.9,
    beta_min: float = 0.1,
    eps_s: float = 1e-3,
    device: Any = "cpu",
) -> Tensor:
    """n sigmas of the variance-preserving process at even times from 1 to eps_s, and a zero.

    Source: Song et al. 2021, arXiv:2011.13456, as in Karras et al. 2022, arXiv:2206.00364, table 1.
    """
    t = torch.linspace(1, eps_s, n, device=device)
    return face().append_zero(torch.sqrt(torch.exp(beta_d * t**2 / 2 + beta_min * t) - 1))


def to_d(x: Tensor, sigma: Tensor, denoised: Tensor) -> Tensor:
    """The slope dx / dsigma = (x - denoised) / sigma of the probability-flow ODE.

    Args:
        x, denoised: shape (B, ...).
        sigma: noise standard deviation in data units, shape () or (B,).

    Returns:
        Shape (B, ...), in x's dtype.

    Raises:
        ValueError: sigma has more dimensions than x.

    Source: Karras et al. 2022, arXiv:2206.00364, eq. 1.
    """
    if sigma.ndim > x.ndim:
        raise ValueError(
            f"sigma of to_d must have shape () or (B,) for x of shape {tuple(x.shape)}, got "
            f"{tuple(sigma.shape)}"
        )
    slope = (x - denoised) / sigma[(..., *[None] * (x.ndim - sigma.ndim))]
    return slope.to(x.dtype)


def get_ancestral_step(sigma_from: Any, sigma_to: Any, eta: float = 1.0) -> tuple[Any, Any]:
    """Where to step down to, and how much noise leads up again to sigma_to.

    Args:
        sigma_from, sigma_to: noise standard deviations, floats or tensors of shape ().
        eta: scale of the noise.

    Returns:
        (sigma_down, sigma_up), with sigma_down² + sigma_up² = sigma_to².

    Source: Song et al. 2021, arXiv:2010.02502, eq. 16, with alpha = 1.
    """
    if not eta:
        return sigma_to, 0.0
    posterior = sigma_to**2 * (sigma_from**2 - sigma_to**2) / sigma_from**2
    sigma_up = min(sigma_to, eta * posterior**0.5)
    return (sigma_to**2 - sigma_up**2) ** 0.5, sigma_up


def default_noise_sampler(x: Tensor) -> NoiseSampler:
    """Independent unit noise of x's shape, dtype and device, from torch's global generator."""
    return lambda sigma, sigma_next: face().torch.randn_like(x)


def linear_multistep_coeff(order: int, t: Sequence[Any], i: int, j: int) -> float:
    """The weight of the j-th last slope in an Adams-Bashforth step from t[i] to t[i + 1].

    It is the integral of the Lagrange polynomial through t[i], ..., t[i - order + 1], here exact.

    Raises:
        ValueError: order too high for step i, or equal nodes.
    """
    if order - 1 > i:
        raise ValueError(
            f"order {order} is too high for step {i}: at most {i + 1} slopes are there"
        )
    nodes = [float(t[i - k]) for k in range(order)]
    if len(set(nodes)) < order:
        raise ValueError(f"t holds equal nodes before index {i + 1}: {nodes}")
    end = float(t[i + 1])
    return lagrange_integrals(nodes, nodes[0], end, end - nodes[0])[j]
