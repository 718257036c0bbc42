"""The established module `layers`: preconditioned denoisers, and what networks are built of.

The denoisers hold a loss beside the estimate, in the form of the established training programs;
within this library the loss stands alone (`training.denoising_loss`) and takes any Denoiser.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from k_diffusion.external.exploding import VarianceExploding, at_least_float32
from k_diffusion.models.established_layers import (
    AdaGN,
    ConditionedModule,
    ConditionedResidualBlock,
    ConditionedSequential,
    CrossAttention2d,
    Downsample2d,
    FourierFeatures,
    ResidualBlock,
    SelfAttention2d,
    UnconditionedModule,
    UNet,
    Upsample2d,
)
from k_diffusion.utils import cosine_transform
from k_diffusion.utils.cosine_transform import freq_weight_1d, freq_weight_nd
from k_diffusion.utils.maths import unknown
from k_diffusion.utils.tensors import append_dims

__all__ = [
    "AdaGN",
    "ConditionedModule",
    "ConditionedResidualBlock",
    "ConditionedSequential",
    "CrossAttention2d",
    "Denoiser",
    "DenoiserWithVariance",
    "Downsample2d",
    "FourierFeatures",
    "ResidualBlock",
    "SelfAttention2d",
    "SimpleLossDenoiser",
    "UNet",
    "UnconditionedModule",
    "Upsample2d",
    "dct",
    "freq_weight_1d",
    "freq_weight_nd",
]


def dct(x: Tensor) -> Tensor:
    """The orthonormal DCT-II over all dimensions of x, shape (B, C, ...), but the first two.

    Raises:
        ValueError: there are none of these, or more than three.
    """
    return cosine_transform.dct_of_space(x)


class Denoiser(VarianceExploding):
    """EDM preconditioning (Karras et al. 2022, arXiv:2206.00364, eq. 7 and table 1), with a loss.

    Unlike `EDMDenoiser`, it hands the network sigma itself.

    Args:
        inner_model: called as `inner_model(x, sigma, **kwargs)`, sees unit-variance input.
        sigma_data: standard deviation of the clean data.
        weighting: of the squared error of the network's output at each level: "karras" (1),
            "soft-min-snr" or "snr", or a function of sigma of shape (B,).
        scales: of a frequency-weighted loss, see `freq_weight_1d`; 1 is the plain loss.

    Raises:
        ValueError: the weighting is unknown.
    """

    def __init__(
        self,
        inner_model: Any,
        sigma_data: float = 1.0,
        weighting: str | Callable[[Tensor], Tensor] = "karras",
        scales: float = 1,
    ) -> None:
        super().__init__()
        self.inner_model = inner_model
        self.sigma_data = sigma_data
        self.scales = scales
        known: dict[str, Callable[[Tensor], Tensor]] = {
            "karras": torch.ones_like,
            "soft-min-snr": self._weighting_soft_min_snr,
            "snr": self._weighting_snr,
        }
        if not callable(weighting) and weighting not in known:
            raise ValueError(unknown("weighting", weighting, known))
        self.weighting = weighting if callable(weighting) else known[weighting]

    def _weighting_soft_min_snr(self, sigma: Tensor) -> Tensor:
        """1 / (sigma² + sigma_data²) of the error of x0 (Crowson et al. 2024,
        arXiv:2401.11605)."""
        return (sigma * self.sigma_data) ** 2 / (sigma**2 + self.sigma_data**2) ** 2

    def _weighting_snr(self, sigma: Tensor) -> Tensor:
        """1 / sigma² of the error of x0."""
        return self.sigma_data**2 / (sigma**2 + self.sigma_data**2)

    def get_scalings(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """c_skip, c_out and c_in, each of sigma's shape."""
        total = sigma**2 + self.sigma_data**2
        return self.sigma_data**2 / total, sigma * self.sigma_data / total**0.5, 1 / total**0.5

    def check_condition(self, batch: int, **condition: Any) -> None:
        """Refuses by name what the network cannot take, if it can tell; done once before a run.

        Raises:
            ValueError: an unknown keyword, a wrong shape or a value out of range.
        """
        check = getattr(self.inner_model, "check_condition", None)
        if check is not None:
            check(batch, **condition)

    def loss(self, input: Tensor, noise: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
        """The weighted mean squared error of the network's output, float32 or better, shape (B,).

        Args:
            input: clean data, shape (B, ...).
            noise: unit Gaussian, of its shape.
            sigma: noise standard deviations above 0, shape (B,).
            kwargs: for the network.
        """
        sigma = sigma.to(input.device)
        x, c_in, target = self._noised(input, noise, sigma)
        output = self.inner_model(self._for_network(x * c_in), sigma, **kwargs)
        error = at_least_float32(output - target)
        if self.scales != 1:
            error = dct(error)
        square = error**2
        if self.scales != 1:
            square = square * freq_weight_nd(
                square.shape[2:], self.scales, square.dtype, square.device
            )
        return square.flatten(1).mean(1) * self.weighting(at_least_float32(sigma))

    def _noised(self, x0: Tensor, noise: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Noisy data, c_in, and what the network should say of it."""
        c_skip, c_out, c_in = self._scalings(x0, sigma)
        x = x0 + noise * append_dims(sigma.to(x0), x0.ndim)
        return x, c_in, (x0 - c_skip * x) / c_out

    def forward(self, input: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
        """The estimate of x0.

        Args:
            input: noisy data, shape (B, ...).
            sigma: noise standard deviations, shape (B,).
            kwargs: for the network.
        """
        sigma = sigma.to(input.device)
        c_skip, c_out, c_in = self._scalings(input, sigma)
        output = self.inner_model(self._for_network(input * c_in), sigma, **kwargs)
        return (output * c_out + input * c_skip).to(input.dtype)


class DenoiserWithVariance(Denoiser):
    """A network that also tells the log variance of its error, which weighs the levels.

    Called as `inner_model(x, sigma, return_variance=True, **kwargs)` in training, it returns its
    output and that logarithm, shape (B,). `weighting` and `scales` have no part in the loss.
    """

    def loss(self, input: Tensor, noise: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
        """The Gaussian negative log-likelihood less its constant, float32 or better, shape (B,)
        (Kendall and Gal 2017, arXiv:1703.04977, eq. 8)."""
        sigma = sigma.to(input.device)
        x, c_in, target = self._noised(input, noise, sigma)
        output, log_variance = self.inner_model(
            self._for_network(x * c_in), sigma, return_variance=True, **kwargs
        )
        error = at_least_float32(output - target)
        log_variance = append_dims(at_least_float32(log_variance), error.ndim)
        return ((error**2 / log_variance.exp() + log_variance) / 2).flatten(1).mean(1)


class SimpleLossDenoiser(Denoiser):
    """The preconditioned network, with the mean squared error of the noise as its loss (Ho et al.
    2020, arXiv:2006.11239, eq. 14); `weighting` and `scales` have no part in it."""

    def loss(self, input: Tensor, noise: Tensor, sigma: Tensor, **kwargs: Any) -> Tensor:
        """The mean squared error of the noise, float32 or better, shape (B,)."""
        scale = append_dims(sigma.to(input), input.ndim)
        x = input + noise * scale
        error = at_least_float32((x - self(x, sigma, **kwargs)) / scale - noise)
        return error.pow(2).flatten(1).mean(1)
