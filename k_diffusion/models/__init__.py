"""Networks to train and sample with, and the registry that makes them from configs by name."""

from k_diffusion.models.dit import DiT, DiTConfig
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
    "MODELS",
    "PRESETS",
    "DiT",
    "DiTConfig",
    "MPUNet",
    "MPUNetConfig",
    "UNet",
    "UNetConfig",
    "make_model",
    "model_config",
    "register_model",
    "register_preset",
]
