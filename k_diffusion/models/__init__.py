"""Networks to train and sample with, and the registry that makes them from configs by name."""

from k_diffusion.models.audio_conditioners import AudioChannels, AudioTokens
from k_diffusion.models.autoencoder import (
    AUTOENCODERS,
    Autoencoder,
    SmallAutoencoder,
    autoencoder_config,
    make_autoencoder,
    register_autoencoder,
)
from k_diffusion.models.conditioners import (
    CONDITIONERS,
    ClassConditioner,
    CompositeConditioner,
    Conditioner,
    conditioner_config,
    make_conditioner,
    register_conditioner,
)
from k_diffusion.models.image_conditioners import KnownPart, LowResolution
from k_diffusion.models.registry import MODELS, make_model, model_config, register_model
from k_diffusion.models.unet import UNet, UNetConfig

__all__ = [
    "AUTOENCODERS",
    "CONDITIONERS",
    "MODELS",
    "AudioChannels",
    "AudioTokens",
    "Autoencoder",
    "ClassConditioner",
    "CompositeConditioner",
    "Conditioner",
    "KnownPart",
    "LowResolution",
    "SmallAutoencoder",
    "UNet",
    "UNetConfig",
    "autoencoder_config",
    "conditioner_config",
    "make_autoencoder",
    "make_conditioner",
    "make_model",
    "model_config",
    "register_autoencoder",
    "register_conditioner",
    "register_model",
]
