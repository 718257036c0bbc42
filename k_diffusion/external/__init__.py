"""What comes from elsewhere: the established wrappers, text encoders, autoencoders.

Names are resolved when they are asked for, so that importing this brings in nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from k_diffusion.utils.lazy import lazy

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
    from k_diffusion.external.lays import ForeignScheduler
    from k_diffusion.external.loading import load
    from k_diffusion.external.names import Named, foreign_name, foreign_schedule
    from k_diffusion.external.networks import ForeignNetwork, foreign_denoiser, limited
    from k_diffusion.external.noise import GeneratorNoise
    from k_diffusion.external.others import compvis_denoiser, function_denoiser, openai_denoiser
    from k_diffusion.external.pipelines import PipelineSampler
    from k_diffusion.external.plan_scheduler import PlanScheduler
    from k_diffusion.external.process import Conventions, read_conventions
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
    "lays": ("ForeignScheduler",),
    "loading": ("load",),
    "names": ("Named", "foreign_name", "foreign_schedule"),
    "networks": ("ForeignNetwork", "foreign_denoiser", "limited"),
    "noise": ("GeneratorNoise",),
    "others": ("compvis_denoiser", "function_denoiser", "openai_denoiser"),
    "plan_scheduler": ("PlanScheduler",),
    "pipelines": ("PipelineSampler",),
    "process": ("Conventions", "read_conventions"),
    "text": ("TextEncoder",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "CompVisDenoiser",
    "CompVisVDenoiser",
    "Conventions",
    "DiscreteEpsDDPMDenoiser",
    "DiscreteSchedule",
    "DiscreteVDDPMDenoiser",
    "ForeignNetwork",
    "ForeignScheduler",
    "GeneratorNoise",
    "Named",
    "OpenAIDenoiser",
    "PipelineSampler",
    "PlanScheduler",
    "PretrainedAutoencoder",
    "TextEncoder",
    "VDenoiser",
    "compvis_denoiser",
    "foreign_denoiser",
    "foreign_name",
    "foreign_schedule",
    "function_denoiser",
    "limited",
    "load",
    "openai_denoiser",
    "read_conventions",
]

__getattr__, __dir__ = lazy(__name__, _HOME)
