"""Sampling: `KSampler`, and the parts it is made of."""

from k_diffusion.sampling import solvers  # noqa: F401  (registers them)
from k_diffusion.sampling.adaptive import (
    ADAPTIVE,
    AdaptiveInfo,
    AdaptiveSolver,
    sample_adaptive,
)
from k_diffusion.sampling.brownian import PathNoise
from k_diffusion.sampling.compat_dpm import log_likelihood, sample_dpm_adaptive
from k_diffusion.sampling.dpm_solver import DPMSolver
from k_diffusion.sampling.engine import Run
from k_diffusion.sampling.ksampler import NOISES, KSampler
from k_diffusion.sampling.likelihood import (
    ExactTrace,
    HutchinsonTrace,
    Likelihood,
    bits_per_dimension,
    invert,
    log_density,
)
from k_diffusion.sampling.noise import CallerNoise, NoiseSource, SampleNoise, unit_noise
from k_diffusion.sampling.pairs import PAIRS, Pair
from k_diffusion.sampling.plan import Churn, Plan, make_plan
from k_diffusion.sampling.solvers import SOLVERS, Solver, get_solver, solver
from k_diffusion.sampling.stepping import PIDStepSizeController, StepControl
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
    "CallerNoise",
    "Churn",
    "DPMSolver",
    "ExactTrace",
    "HutchinsonTrace",
    "KSampler",
    "Level",
    "Levels",
    "Likelihood",
    "NoiseSource",
    "PIDStepSizeController",
    "Pair",
    "PathNoise",
    "Plan",
    "Run",
    "SampleNoise",
    "Solver",
    "StepControl",
    "bits_per_dimension",
    "get_solver",
    "invert",
    "log_density",
    "log_likelihood",
    "make_plan",
    "sample_adaptive",
    "sample_dpm_adaptive",
    "solver",
    "unit_noise",
]
