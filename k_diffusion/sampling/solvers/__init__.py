"""The registered solvers. To add one, write one generator in one of these files (or a new one,
imported here): registration alone gives it its tests, its row in the docs and its command line.
"""

from k_diffusion.sampling.registry import SOLVERS, Solver, get_solver, solver
from k_diffusion.sampling.solvers import (
    adams,
    ancestral,
    deis,
    er_sde,
    exponential,
    exponential_rk,
    guided,
    linear,
    linear_multistep,
    multistep,
    restart,
    runge_kutta,
    sa_solver,
    sde,
    seeds,
    singlestep,
    unipc,
)

__all__ = [
    "SOLVERS",
    "Solver",
    "adams",
    "ancestral",
    "deis",
    "er_sde",
    "exponential",
    "exponential_rk",
    "get_solver",
    "guided",
    "linear",
    "linear_multistep",
    "multistep",
    "restart",
    "runge_kutta",
    "sa_solver",
    "sde",
    "seeds",
    "singlestep",
    "solver",
    "unipc",
]
