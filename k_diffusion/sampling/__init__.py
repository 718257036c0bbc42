"""Sampling: `KSampler`, and the parts it is made of."""

from k_diffusion.sampling import solvers  # noqa: F401  (registers them)
from k_diffusion.sampling.brownian import PathNoise
from k_diffusion.sampling.engine import Run
from k_diffusion.sampling.ksampler import NOISES, KSampler
from k_diffusion.sampling.noise import CallerNoise, NoiseSource, SampleNoise, unit_noise
from k_diffusion.sampling.plan import Churn, Plan, make_plan
from k_diffusion.sampling.solvers import SOLVERS, Solver, get_solver, solver
from k_diffusion.utils.levels import FLOW, VE, VP, Level, Levels

__all__ = [
    "FLOW",
    "NOISES",
    "SOLVERS",
    "VE",
    "VP",
    "CallerNoise",
    "Churn",
    "KSampler",
    "Level",
    "Levels",
    "NoiseSource",
    "PathNoise",
    "Plan",
    "Run",
    "SampleNoise",
    "Solver",
    "get_solver",
    "make_plan",
    "solver",
    "unit_noise",
]
