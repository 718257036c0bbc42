"""The autoencoders of diffusers, `AutoencoderKL`, in the role that models here know."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from k_diffusion.external.text import not_there
from k_diffusion.models.autoencoder import Autoencoder, register_autoencoder
from k_diffusion.models.registry import check_types, known_fields
from k_diffusion.utils.words import reason_of


@dataclass(frozen=True, kw_only=True)
class AutoencoderKLConfig:
    """Where it lies.

    Args:
        path: a folder that holds config.json and the weights in safetensors, or the id of a
            repository on the Hugging Face hub.
        subfolder: of it, such as "vae"; "": itself.
        revision: a branch, tag or commit on the hub; "": its main one.
        local: never ask the hub, only its cache on this machine.
    """

    path: str
    subfolder: str = ""
    revision: str = ""
    local: bool = False

    def __post_init__(self) -> None:
        check_types(self)


@register_autoencoder("diffusers_kl")
class PretrainedAutoencoder(Autoencoder):
    """An `AutoencoderKL`; its latents are the means, shifted and scaled as its config says.

    Args:
        config: which to load; None: from the options.
        module: an `AutoencoderKL` that is there already.
        options: fields of the config.

    Raises:
        ValueError: it cannot be loaded.
        ImportError: diffusers is not installed.
    """

    Config = AutoencoderKLConfig

    def __init__(
        self,
        config: AutoencoderKLConfig | None = None,
        /,
        *,
        module: Any = None,
        **options: Any,
    ) -> None:
        if config is None and module is None:
            given = known_fields(AutoencoderKLConfig, options, "autoencoder")
            config = AutoencoderKLConfig(**given)
        module = _load(config) if config is not None and module is None else module
        known = module.config
        super().__init__(
            known.in_channels, known.latent_channels, 2 ** (len(known.block_out_channels) - 1)
        )
        self._config = config
        self.module = module.float().eval().requires_grad_(False)
        # z = (raw - shift) · scaling; with statistics of each channel, divided by its deviation.
        shift, scale = _statistics(known)
        self.shift.copy_(shift)
        self.scale.copy_(scale)

    @property
    def config(self) -> AutoencoderKLConfig:
        """Where it lies; refused for one that was made of a module in memory."""
        if self._config is None:
            raise ValueError(
                "this autoencoder was made of a module in memory, so no config can tell where it "
                "lies: save it with save_pretrained, and load it with from_pretrained"
            )
        return self._config

    @classmethod
    def from_pretrained(cls, path: str | Path, **options: Any) -> PretrainedAutoencoder:
        """The one in a folder or on the hub; see `AutoencoderKLConfig` for the options."""
        return cls(path=str(path), **options)

    @classmethod
    def from_module(cls, module: Any) -> PretrainedAutoencoder:
        """Of an `AutoencoderKL` that is in memory."""
        return cls(module=module)

    def train(self, mode: bool = True) -> PretrainedAutoencoder:
        """Stays in evaluation mode: it is frozen."""
        return super().train(False)

    def encode_raw(self, x: Tensor) -> Tensor:
        return self.module.encode(x.to(self.module.dtype)).latent_dist.mean

    def decode_raw(self, z: Tensor) -> Tensor:
        return self.module.decode(z.to(self.module.dtype)).sample


def _statistics(known: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Shift and scale of each channel, from the config of an AutoencoderKL."""
    channels = known["latent_channels"]
    mean, std = known.get("latents_mean"), known.get("latents_std")
    scaling = float(known.get("scaling_factor") or 1.0)
    if mean is not None and std is not None:
        shift = torch.tensor(mean, dtype=torch.float64).flatten()
        deviation = torch.tensor(std, dtype=torch.float64).flatten()
        return shift.expand(channels), (scaling / deviation).expand(channels)
    shift_factor = float(known.get("shift_factor") or 0.0)
    return torch.full((channels,), shift_factor), torch.full((channels,), scaling)


def _load(config: AutoencoderKLConfig) -> Any:
    from diffusers import AutoencoderKL

    if not_there(config.path):
        raise ValueError(
            f"autoencoder {config.path} does not exist: give a folder with config.json and "
            "diffusion_pytorch_model.safetensors"
        )
    options: dict[str, Any] = {"subfolder": config.subfolder} if config.subfolder else {}
    if config.revision:
        options["revision"] = config.revision
    try:
        return AutoencoderKL.from_pretrained(
            config.path, use_safetensors=True, local_files_only=config.local, **options
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = reason_of(error)
        raise ValueError(
            f"autoencoder {config.path!r} cannot be loaded ({reason[:250]}): give a folder with "
            "config.json and diffusion_pytorch_model.safetensors, or the id of a repository on the "
            "Hugging Face hub that can be reached"
        ) from None
