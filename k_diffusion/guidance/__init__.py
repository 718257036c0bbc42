"""Guidance: Denoiser -> Denoiser. Each kind wraps any denoiser, another kind included.

from k_diffusion.guidance import cfg
KSampler(cfg(denoiser, scale=4.0, interval=(0.3, 5.0))).sample(x, condition=labels)
"""

from .base import Interval, Scale, Wrapper
from .contrast import Contrast, Null, Second, Unconditional, Weaker, null_condition
from .kinds import autoguidance, cfg
from .rules import Linear, Rescaled, Rule

__all__ = [
    "Contrast",
    "Interval",
    "Linear",
    "Null",
    "Rescaled",
    "Rule",
    "Scale",
    "Second",
    "Unconditional",
    "Weaker",
    "Wrapper",
    "autoguidance",
    "cfg",
    "null_condition",
]
