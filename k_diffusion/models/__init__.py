"""Networks to train and sample with, and the registry that makes them from configs by name."""

from k_diffusion.models.hourglass import Hourglass, HourglassConfig
from k_diffusion.models.registry import MODELS, make_model, model_config, register_model
from k_diffusion.models.unet import UNet, UNetConfig

__all__ = [
    "MODELS",
    "Hourglass",
    "HourglassConfig",
    "UNet",
    "UNetConfig",
    "make_model",
    "model_config",
    "register_model",
]
