"""The registered solvers. To add one, write one generator in one of these files (or a new one,
imported here): registration alone gives it its tests, its row in the docs and its command line.
"""

from k_diffusion.sampling.registry import SOLVERS, Solver, get_solver, solver
from k_diffusion.sampling.solvers import (
    ancestral,
    er_sde,
    exponential,
    guided,
    linear,
    restart,
    sa_solver,
    sde,
    seeds,
)

__all__ = [
    "SOLVERS",
    "Solver",
    "ancestral",
    "er_sde",
    "exponential",
    "get_solver",
    "guided",
    "linear",
    "restart",
    "sa_solver",
    "sde",
    "seeds",
    "solver",
]
