"""Guidance: Denoiser -> Denoiser. Each kind wraps any denoiser, another kind included.

from k_diffusion.guidance import cfg
KSampler(cfg(denoiser, scale=4.0, interval=(0.3, 5.0))).sample(x, condition=labels)
"""

from .base import Interval, Scale, Wrapper
from .cache import Cached
from .composed import Composed, Part
from .contrast import Contrast, Null, Second, Unconditional, Weaker, null_condition
from .gradient import Guided, Score
from .kinds import apg, autoguidance, cfg, cfg_zero_star
from .measured import Operator, posterior_sampling, pseudo_inverse
from .on_path import OnPath
from .perturbed import Perturbed, perturbed_attention
from .rules import Linear, Pair, Projected, Rescaled, Rule, ZeroStar
from .switch import SwitchAt
from .threshold import Clamp, DynamicThreshold, dynamic_threshold

__all__ = [
    "Cached", "Clamp", "Composed", "Contrast", "DynamicThreshold", "Guided", "Interval", "Linear",
    "Null", "OnPath", "Operator", "Pair", "Part", "Perturbed", "Projected", "Rescaled", "Rule",
    "Scale", "Score", "Second", "SwitchAt", "Unconditional", "Weaker", "Wrapper", "ZeroStar", "apg",
    "autoguidance", "cfg", "cfg_zero_star", "dynamic_threshold", "null_condition",
    "perturbed_attention", "posterior_sampling", "pseudo_inverse",
]  # fmt: skip
