"""What comes from elsewhere: the established wrappers, text encoders, autoencoders.

Names are resolved when they are asked for, so that importing this brings in nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from k_diffusion.external.autoencoder import PretrainedAutoencoder
    from k_diffusion.external.established import (
        CompVisDenoiser,
        CompVisVDenoiser,
        DiscreteEpsDDPMDenoiser,
        DiscreteSchedule,
        DiscreteVDDPMDenoiser,
        OpenAIDenoiser,
        VDenoiser,
    )
    from k_diffusion.external.text import TextEncoder

_HOMES = {
    "autoencoder": ("PretrainedAutoencoder",),
    "established": (
        "CompVisDenoiser",
        "CompVisVDenoiser",
        "DiscreteEpsDDPMDenoiser",
        "DiscreteSchedule",
        "DiscreteVDDPMDenoiser",
        "OpenAIDenoiser",
        "VDenoiser",
    ),
    "text": ("TextEncoder",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "CompVisDenoiser",
    "CompVisVDenoiser",
    "DiscreteEpsDDPMDenoiser",
    "DiscreteSchedule",
    "DiscreteVDDPMDenoiser",
    "OpenAIDenoiser",
    "PretrainedAutoencoder",
    "TextEncoder",
    "VDenoiser",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
