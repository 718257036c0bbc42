"""Sampling: `KSampler`, and the parts it is made of."""

from k_diffusion.sampling import solvers  # noqa: F401  (registers them)
from k_diffusion.sampling.engine import NoiseSource, Run
from k_diffusion.sampling.ksampler import KSampler
from k_diffusion.sampling.noise import CallerNoise, SampleNoise, unit_noise
from k_diffusion.sampling.plan import Churn, Plan, make_plan
from k_diffusion.sampling.solvers import SOLVERS, Solver, get_solver, solver
from k_diffusion.utils.levels import FLOW, VE, VP, Level, Levels

__all__ = [
    "FLOW",
    "SOLVERS",
    "VE",
    "VP",
    "CallerNoise",
    "Churn",
    "KSampler",
    "Level",
    "Levels",
    "NoiseSource",
    "Plan",
    "Run",
    "SampleNoise",
    "Solver",
    "get_solver",
    "make_plan",
    "solver",
    "unit_noise",
]
