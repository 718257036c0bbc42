"""Guidance: Denoiser -> Denoiser. Each kind wraps any denoiser, another kind included.

from k_diffusion.guidance import cfg
KSampler(cfg(denoiser, scale=4.0, interval=(0.3, 5.0))).sample(x, condition=labels)
"""

from .base import Interval, Scale, Wrapper
from .contrast import Contrast, Null, Second, Unconditional, Weaker, null_condition
from .kinds import apg, autoguidance, cfg, cfg_zero_star
from .rules import Linear, Pair, Projected, Rescaled, Rule, ZeroStar

__all__ = [
    "Contrast",
    "Interval",
    "Linear",
    "Null",
    "Pair",
    "Projected",
    "Rescaled",
    "Rule",
    "Scale",
    "Second",
    "Unconditional",
    "Weaker",
    "Wrapper",
    "ZeroStar",
    "apg",
    "autoguidance",
    "cfg",
    "cfg_zero_star",
    "null_condition",
]
