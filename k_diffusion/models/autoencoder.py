"""Autoencoders: data to latents of about unit variance and back, so that a model works on less.

Source: Rombach et al. 2022, arXiv:2112.10752, sections 3.1 and D.1 (the rescaling).
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from k_diffusion.models.layers import norm_groups
from k_diffusion.models.registry import Registry, check_types, known_fields


class Autoencoder(nn.Module, ABC):
    """Data (B, C, H, W) to latents (B, C', H / factor, W / factor) and back; abstract.

    `encode` gives (raw latents - shift) · scale and `decode` takes that back, so that latents have
    about mean 0 and variance 1, whatever the encoder gives. A class of your own implements
    `encode_raw` and `decode_raw`.

    Args:
        in_channels: C.
        latent_channels: C'.
        factor: data's height and width over the latents'.
    """

    in_channels: int
    latent_channels: int
    factor: int

    def __init__(self, in_channels: int, latent_channels: int, factor: int) -> None:
        super().__init__()
        self.in_channels, self.latent_channels, self.factor = in_channels, latent_channels, factor
        self.shift: Tensor
        self.scale: Tensor
        self.register_buffer("shift", torch.zeros(latent_channels))
        self.register_buffer("scale", torch.ones(latent_channels))

    @abstractmethod
    def encode_raw(self, x: Tensor) -> Tensor:
        """Data of shape (B, C, H, W), in [-1, 1], to raw latents."""

    @abstractmethod
    def decode_raw(self, z: Tensor) -> Tensor:
        """Raw latents to data of shape (B, C, H, W)."""

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean and log-variance of the raw latents of x, each of shape (B, C', ...); None: there is
        no variance.

        Args:
            x: data in [-1, 1], shape (B, C, H, W).
        """
        return self.encode_raw(x), None

    def encode(self, x: Tensor) -> Tensor:
        """Latents of mean about 0 and variance about 1, shape (B, C', H / factor, W / factor).

        Args:
            x: data in [-1, 1], shape (B, C, H, W).

        Raises:
            ValueError: the shape does not fit.
        """
        if (
            x.ndim < 3
            or x.shape[1] != self.in_channels
            or any(n % self.factor for n in x.shape[2:])
        ):
            raise ValueError(
                f"x has shape {tuple(x.shape)}; this autoencoder takes (B, {self.in_channels}, "
                f"height, width), both multiples of {self.factor}"
            )
        z = self.encode_raw(x)
        return (z - _along(self.shift, z)) * _along(self.scale, z)

    def decode(self, z: Tensor) -> Tensor:
        """The data of latents, shape (B, C, H, W).

        Args:
            z: as `encode` gives them.

        Raises:
            ValueError: the shape does not fit.
        """
        if z.ndim < 3 or z.shape[1] != self.latent_channels:
            raise ValueError(
                f"z has shape {tuple(z.shape)}; this autoencoder's latents are (B, "
                f"{self.latent_channels}, height, width)"
            )
        return self.decode_raw(z / _along(self.scale, z) + _along(self.shift, z))

    @torch.no_grad()
    def measure(self, batches: Iterable[Tensor]) -> None:
        """Set shift and scale such that these data's latents have mean 0 and variance 1 a channel.

        Args:
            batches: data, each of shape (B, C, H, W).

        Raises:
            ValueError: there are no data, or a channel is the same everywhere or not finite.
        """
        count, total, squares = 0, torch.zeros(()), torch.zeros(())
        for x in batches:
            z = self.encode_raw(x).double().transpose(0, 1).flatten(1)
            count += z.shape[1]
            total, squares = total + z.sum(1).cpu(), squares + z.square().sum(1).cpu()
        if not count:
            raise ValueError("there are no data to measure the latents of: give at least one batch")
        mean = total / count
        variance = squares / count - mean**2
        if not bool(variance.isfinite().all()):
            raise ValueError("the latents of these data are not finite: look for NaN in the data")
        if not bool((variance > 1e-12).all()):
            raise ValueError("a channel of the latents is constant: train the autoencoder first")
        self.shift.copy_(mean)
        self.scale.copy_(variance.rsqrt())


AUTOENCODERS = Registry(
    "autoencoder", Autoencoder, {"diffusers_kl": "k_diffusion.external.autoencoder"}
)
"""Name -> class."""

register_autoencoder = AUTOENCODERS.register
"""`@register_autoencoder("name")` on a class makes it the "type" of configs."""


def make_autoencoder(config: Mapping[str, Any]) -> Autoencoder:
    """An autoencoder, with fresh weights, from plain data.

    Args:
        config: "type", a name in AUTOENCODERS, and the options of that autoencoder.

    Raises:
        ValueError: no type, an unknown type or option (the nearest one is offered), or a value
            that does not fit.
    """
    return AUTOENCODERS.make(config)


def autoencoder_config(autoencoder: Autoencoder) -> dict[str, Any]:
    """The plain data (as JSON has it) from which `make_autoencoder` builds an autoencoder's like.

    Raises:
        ValueError: its class is not registered.
    """
    return AUTOENCODERS.config(autoencoder)


def _along(factor: Tensor, z: Tensor) -> Tensor:
    """A number a channel, made to multiply (B, C', ...)."""
    return factor.to(z.dtype).reshape(-1, *[1] * (z.ndim - 2))


# ---------------------------------------------------------------- a small one


@dataclass(frozen=True, kw_only=True)
class SmallAutoencoderConfig:
    """What a SmallAutoencoder is built from.

    Args:
        in_channels: of the data.
        latent_channels: of the latents.
        channels: of the finest level; each coarser one has twice as many.
        halvings: how often height and width are halved: the factor is 2 to this power.
        kl_weight: of the divergence of the latents from unit Gaussian, beside the squared error:
            small, so that it bounds the latents without blurring the data.
    """

    in_channels: int = 3
    latent_channels: int = 4
    channels: int = 32
    halvings: int = 2
    kl_weight: float = 1e-4

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("in_channels", "latent_channels", "channels"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} = {value} is too small; give at least 1")
        if self.halvings < 0 or self.kl_weight < 0:
            name = "halvings" if self.halvings < 0 else "kl_weight"
            raise ValueError(f"{name} = {getattr(self, name)} is negative; give 0 for none")


@register_autoencoder("small")
class SmallAutoencoder(Autoencoder):
    """A convolutional variational autoencoder; its latents are the means.

    Source: Kingma and Welling 2014, arXiv:1312.6114, eq. 10 and appendix B.
    """

    Config = SmallAutoencoderConfig

    def __init__(self, config: SmallAutoencoderConfig | None = None, /, **options: Any) -> None:
        if config is None:
            given = known_fields(SmallAutoencoderConfig, options, "autoencoder")
            config = SmallAutoencoderConfig(**given)
        super().__init__(config.in_channels, config.latent_channels, 2**config.halvings)
        self.config = config
        widths = [config.channels * 2**level for level in range(config.halvings + 1)]
        down: list[nn.Module] = [nn.Conv2d(config.in_channels, widths[0], 3, padding=1)]
        for fine, coarse in itertools.pairwise(widths):
            down += [_Block(fine), nn.Conv2d(fine, coarse, 2, stride=2)]
        self.encoder = nn.Sequential(
            *down, _Block(widths[-1]), nn.Conv2d(widths[-1], 2 * config.latent_channels, 1)
        )
        up: list[nn.Module] = [nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)]
        for fine, coarse in reversed(list(itertools.pairwise(widths))):
            up += [_Block(coarse), nn.ConvTranspose2d(coarse, fine, 2, stride=2)]
        self.decoder = nn.Sequential(
            *up, _Block(widths[0]), nn.Conv2d(widths[0], config.in_channels, 3, padding=1)
        )

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = self.encoder(x).chunk(2, 1)
        return mean, log_variance.clamp(-20, 10)  # a variance that float32 can hold and invert

    def encode_raw(self, x: Tensor) -> Tensor:
        return self.posterior(x)[0]

    def decode_raw(self, z: Tensor) -> Tensor:
        return self.decoder(z)

    def loss(self, x: Tensor, noise: Tensor) -> Tensor:
        """Squared error of what comes back, and the divergence of its latents from unit Gaussian.

        Args:
            x: data, shape (B, C, H, W).
            noise: unit Gaussian, of the latents' shape.

        Returns:
            Of each sample, shape (B,): the error's mean over all values, and kl_weight times the
            divergence's mean over all latents.
        """
        mean, log_variance = self.posterior(x)
        back = self.decoder(mean + (0.5 * log_variance).exp() * noise)
        error = (back - x).square().flatten(1).mean(1)
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)
        return error + self.config.kl_weight * divergence.flatten(1).mean(1)


class _Block(nn.Module):
    """Two convolutions beside a skip."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        self.groups = norm_groups(channels)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(F.silu(F.group_norm(x, self.groups)))
        return x + self.second(F.silu(F.group_norm(h, self.groups)))
