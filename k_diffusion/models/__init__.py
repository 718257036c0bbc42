"""Networks to train and sample with, and the registry that makes them from configs by name."""

from k_diffusion.models.dit import DiT, DiTConfig
from k_diffusion.models.mp_unet import MPUNet, MPUNetConfig
from k_diffusion.models.registry import MODELS, make_model, model_config, register_model
from k_diffusion.models.unet import UNet, UNetConfig

__all__ = [
    "MODELS",
    "DiT",
    "DiTConfig",
    "MPUNet",
    "MPUNetConfig",
    "UNet",
    "UNetConfig",
    "make_model",
    "model_config",
    "register_model",
]
