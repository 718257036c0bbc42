"""How a run draws samples of itself, as the sections `preview` and `evaluate` of its config say."""

from __future__ import annotations

from typing import Any

from k_diffusion.sampling import KSampler
from k_diffusion.training.config import ConfigError
from k_diffusion.training.sections import EvaluateConfig, PreviewConfig
from k_diffusion.utils.scheduler import make_scheduler


def sampler_of(denoiser: Any, options: PreviewConfig | EvaluateConfig, section: str) -> KSampler:
    """The sampler that a section asks for, whose levels are seen to suit the denoiser.

    Args:
        denoiser: draws.
        options: of the section.
        section: its name.

    Raises:
        ConfigError: such levels cannot be laid for it.
    """
    sampler = KSampler(denoiser, make_scheduler(options.scheduler), options.sampler)
    try:
        sampler.levels(options.steps)
    except ValueError as error:
        raise ConfigError(
            f"{section}.scheduler = {options.scheduler!r} with {section}.steps = {options.steps} "
            f"does not suit this model: {error}"
        ) from None
    return sampler
