"""How much an error counts at each noise level: weights of |D - x0|², the error of the clean data.

Everything is said in log(alpha / sigma), so that it means the same in the coordinates of every
denoiser; snr = alpha² / sigma². Papers mostly weigh the error of what their network predicts. That
is the error of x0 times a factor of the level (`edm`, `eps`, `v`, `x0` and `flow` below, by the
prediction's name), so a weight w of |D - x0|² is w / factor of the network's own squared error:
`min_snr` is min(snr, gamma) / snr for a network that predicts eps, and min(snr, gamma) / (snr + 1)
for one that predicts v.

To add one, write a function here, or call `register_weighting` on one of your own: its keyword-only
arguments become its options. docs/losses.md has them in a table.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from k_diffusion.training.named import Table


class Weighting(Protocol):
    """(log(alpha / sigma) of shape (B,), sigma_data, **options) -> weight of |D - x0|², (B,)."""

    def __call__(self, half_log_snr: Tensor, sigma_data: float, /, **options: Any) -> Tensor: ...


WEIGHTINGS = Table("weighting")


def register_weighting(name: str) -> Callable[[Any], Any]:
    """A decorator that makes a weighting known by name, to configs too."""
    return WEIGHTINGS.register(name)


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
    function = WEIGHTINGS.find(name, options)
    return lambda half_log_snr: function(half_log_snr, sigma_data, **options)


# ------------------------------------------------- uniform in what a network predicts


@register_weighting("edm")
def edm(half_log_snr: Tensor, sigma_data: float) -> Tensor:
    """1 / c_out²: the initial loss of an EDM network is 1 at every level (Karras et al. 2022,
    arXiv:2206.00364, table 1)."""
    return torch.exp(2 * half_log_snr) + sigma_data**-2


@register_weighting("eps")
def eps(half_log_snr: Tensor, sigma_data: float) -> Tensor:
    """Uniform in the noise, |eps_hat - eps|², which is the SNR's (Ho et al. 2020,
    arXiv:2006.11239, eq. 14)."""
    return torch.exp(2 * half_log_snr)


@register_weighting("v")
def v(half_log_snr: Tensor, sigma_data: float) -> Tensor:
    """Uniform in v = alpha eps - sigma x0: snr + 1 (Salimans and Ho 2022, arXiv:2202.00512,
    section 4)."""
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


# ------------------------------------------------- others


@register_weighting("snr")
def snr(half_log_snr: Tensor, sigma_data: float) -> Tensor:
    """alpha² / sigma² (Salimans and Ho 2022, arXiv:2202.00512, section 4)."""
    return torch.exp(2 * half_log_snr)


@register_weighting("min_snr")
def min_snr(half_log_snr: Tensor, sigma_data: float, *, gamma: float = 5.0) -> Tensor:
    """min(snr, gamma) (Hang et al. 2023, arXiv:2303.09556).

    Args:
        gamma: the most that a level counts.
    """
    return torch.exp(2 * half_log_snr).clamp(max=gamma)


@register_weighting("soft_min_snr")
def soft_min_snr(half_log_snr: Tensor, sigma_data: float, *, gamma: float | None = None) -> Tensor:
    """snr · gamma / (snr + gamma) (Crowson et al. 2024, arXiv:2401.11605).

    Args:
        gamma: the most that a level counts; None: 1 / sigma_data².
    """
    limit = sigma_data**2 if gamma is None else 1 / gamma
    return 1 / (torch.exp(-2 * half_log_snr) + limit)


@register_weighting("sigmoid")
def sigmoid(half_log_snr: Tensor, sigma_data: float, *, bias: float = 0.0) -> Tensor:
    """snr · sigmoid(bias - log snr): sigmoid in |eps_hat - eps|² (Kingma and Gao 2023,
    arXiv:2303.00848; Hoogeboom et al. 2024, arXiv:2410.19324).

    It is soft_min_snr with gamma = exp(bias). In the papers levels count as if log snr came evenly:
    so they do with density = "loguniform".

    Args:
        bias: log snr below which a level's weight falls; the greater, the more details count.
    """
    return math.exp(bias) * torch.sigmoid(2 * half_log_snr - bias)


@register_weighting("p2")
def p2(half_log_snr: Tensor, sigma_data: float, *, gamma: float = 1.0, k: float = 1.0) -> Tensor:
    """snr / (k + snr)^gamma (Choi et al. 2022, arXiv:2204.00227).

    Args:
        gamma: how much less the cleanest levels count; 0: eps.
        k: snr about which that begins.
    """
    snr = torch.exp(2 * half_log_snr)
    return snr / (k + snr) ** gamma
