"""Sampling: `KSampler`, the parts it is made of, and the established functions `sample_*`.

Programs replace some of these names while they run; `compat_tools.face` tells which are looked up
here at every use.
"""

import importlib
import math
from typing import Any

import torch
from torch import nn

from k_diffusion import utils
from k_diffusion.sampling import solvers  # noqa: F401  (registers them)
from k_diffusion.sampling.adaptive import (
    ADAPTIVE,
    AdaptiveInfo,
    AdaptiveSolver,
    find_solver,
    sample_adaptive,
)
from k_diffusion.sampling.advice import SamplingAdvice
from k_diffusion.sampling.auto_steps import AutoSteps
from k_diffusion.sampling.brownian import PathNoise
from k_diffusion.sampling.brownian_tree import BatchedBrownianTree, BrownianTreeNoiseSampler
from k_diffusion.sampling.compat import (
    make_function,
    missing_functions,
    sample_dpm_2,
    sample_dpm_2_ancestral,
    sample_dpmpp_2m,
    sample_dpmpp_2m_sde,
    sample_dpmpp_2s_ancestral,
    sample_dpmpp_3m_sde,
    sample_dpmpp_sde,
    sample_euler,
    sample_euler_ancestral,
    sample_heun,
    sample_lms,
)
from k_diffusion.sampling.compat_dpm import log_likelihood, sample_dpm_adaptive
from k_diffusion.sampling.compat_fast import sample_dpm_fast
from k_diffusion.sampling.compat_tools import (
    append_zero,
    default_noise_sampler,
    get_ancestral_step,
    get_sigmas_exponential,
    get_sigmas_karras,
    get_sigmas_polyexponential,
    get_sigmas_vp,
    linear_multistep_coeff,
    to_d,
    trange,
)
from k_diffusion.sampling.dpm_solver import DPMSolver
from k_diffusion.sampling.engine import Run
from k_diffusion.sampling.enhance import Enhance
from k_diffusion.sampling.ksampler import NOISES, KSampler
from k_diffusion.sampling.likelihood import (
    ExactTrace,
    HutchinsonTrace,
    Likelihood,
    bits_per_dimension,
    dequantise,
    invert,
    log_density,
)
from k_diffusion.sampling.many import Many
from k_diffusion.sampling.masks import Resample
from k_diffusion.sampling.noise import CallerNoise, NoiseSource, SampleNoise, unit_noise
from k_diffusion.sampling.pairs import PAIRS, Pair
from k_diffusion.sampling.plan import Churn, Plan, make_plan
from k_diffusion.sampling.preview import Preview
from k_diffusion.sampling.solvers import SOLVERS, Solver, get_solver, solver
from k_diffusion.sampling.stepping import PIDStepSizeController, StepControl
from k_diffusion.sampling.watch import Cancelled, Result
from k_diffusion.utils.levels import FLOW, VE, VP, Level, Levels

__all__ = [
    "ADAPTIVE",
    "FLOW",
    "NOISES",
    "PAIRS",
    "SOLVERS",
    "VE",
    "VP",
    "AdaptiveInfo",
    "AdaptiveSolver",
    "AutoSteps",
    "BatchedBrownianTree",
    "BrownianTreeNoiseSampler",
    "CallerNoise",
    "Cancelled",
    "Churn",
    "DPMSolver",
    "Enhance",
    "ExactTrace",
    "HutchinsonTrace",
    "KSampler",
    "Level",
    "Levels",
    "Likelihood",
    "Many",
    "NoiseSource",
    "PIDStepSizeController",
    "Pair",
    "PathNoise",
    "Plan",
    "Preview",
    "Resample",
    "Result",
    "Run",
    "SampleNoise",
    "SamplingAdvice",
    "Solver",
    "StepControl",
    "append_zero",
    "bits_per_dimension",
    "default_noise_sampler",
    "dequantise",
    "find_solver",
    "get_ancestral_step",
    "get_sigmas_exponential",
    "get_sigmas_karras",
    "get_sigmas_polyexponential",
    "get_sigmas_vp",
    "get_solver",
    "invert",
    "linear_multistep_coeff",
    "log_density",
    "log_likelihood",
    "make_plan",
    "math",
    "nn",
    "sample_adaptive",
    "sample_dpm_2",
    "sample_dpm_2_ancestral",
    "sample_dpm_adaptive",
    "sample_dpm_fast",
    "sample_dpmpp_2m",
    "sample_dpmpp_2m_sde",
    "sample_dpmpp_2s_ancestral",
    "sample_dpmpp_3m_sde",
    "sample_dpmpp_sde",
    "sample_euler",
    "sample_euler_ancestral",
    "sample_heun",
    "sample_lms",
    "solver",
    "to_d",
    "torch",
    "trange",
    "unit_noise",
    "utils",
]

_missing = missing_functions(globals())
globals().update(_missing)
__all__ += sorted(_missing)


def __getattr__(name: str) -> Any:
    if name == "tqdm":
        return importlib.import_module("tqdm.auto").tqdm
    if name == "torchsde":
        return importlib.import_module(name)
    chosen = SOLVERS.get(name.removeprefix("sample_"))
    if chosen is not None and name.startswith("sample_"):  # registered since the import
        return globals().setdefault(name, make_function(chosen))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
