"""The registered solvers. To add one, write one generator in one of these files (or a new one,
imported here): registration alone gives it its tests, its row in the docs and its command line.
"""

from k_diffusion.sampling.registry import SOLVERS, Solver, get_solver, solver
from k_diffusion.sampling.solvers import (
    adams,
    deis,
    exponential,
    exponential_rk,
    linear,
    linear_multistep,
    multistep,
    runge_kutta,
    singlestep,
    stochastic,
    unipc,
)

__all__ = [
    "SOLVERS",
    "Solver",
    "adams",
    "deis",
    "exponential",
    "exponential_rk",
    "get_solver",
    "linear",
    "linear_multistep",
    "multistep",
    "runge_kutta",
    "singlestep",
    "solver",
    "stochastic",
    "unipc",
]
