"""Networks to train and sample with, and the registry that makes them from configs by name."""

from k_diffusion.models import flops
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
from k_diffusion.models.dit import DiT, DiTConfig
from k_diffusion.models.flags import checkpointing, get_checkpointing
from k_diffusion.models.hourglass import Hourglass, HourglassConfig
from k_diffusion.models.image_conditioners import KnownPart, LowResolution
from k_diffusion.models.image_transformer_v1 import ImageTransformerDenoiserModelV1
from k_diffusion.models.image_transformer_v2 import ImageTransformerDenoiserModelV2
from k_diffusion.models.image_v1 import ImageDenoiserModelV1, ImageV1, ImageV1Config
from k_diffusion.models.mp_unet import MPUNet, MPUNetConfig
from k_diffusion.models.registry import (
    MODELS,
    PRESETS,
    make_model,
    model_config,
    register_model,
    register_preset,
)
from k_diffusion.models.unet import UNet, UNetConfig

__all__ = [
    "AUTOENCODERS",
    "CONDITIONERS",
    "MODELS",
    "PRESETS",
    "AudioChannels",
    "AudioTokens",
    "Autoencoder",
    "ClassConditioner",
    "CompositeConditioner",
    "Conditioner",
    "DiT",
    "DiTConfig",
    "Hourglass",
    "HourglassConfig",
    "ImageDenoiserModelV1",
    "ImageTransformerDenoiserModelV1",
    "ImageTransformerDenoiserModelV2",
    "ImageV1",
    "ImageV1Config",
    "KnownPart",
    "LowResolution",
    "MPUNet",
    "MPUNetConfig",
    "SmallAutoencoder",
    "UNet",
    "UNetConfig",
    "autoencoder_config",
    "checkpointing",
    "conditioner_config",
    "flops",
    "get_checkpointing",
    "make_autoencoder",
    "make_conditioner",
    "make_model",
    "model_config",
    "register_autoencoder",
    "register_conditioner",
    "register_model",
    "register_preset",
]
