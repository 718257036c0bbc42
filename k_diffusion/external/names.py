"""What other programs call our solvers and schedules: diffusers, ComfyUI, Stable Diffusion web UI.

    solver, schedule, options = foreign_name("DPM++ 2M SDE Karras")   # of the web UI, A1111
    solver, schedule, options = foreign_name("uni_pc_bh2")            # of ComfyUI
    solver, schedule, options = foreign_name("DPMSolverMultistepScheduler")

Names tell the method. Where a program's own implementation departs from it, docs/foreign-names.md
says how and by how much: 2e-3 of the largest value for diffusers' Heun in 20 steps, say, which runs
in variance-exploding coordinates; nothing for its DDIM, Euler, DPM-Solver++(2M), DDPM and LCM.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from k_diffusion.utils import maths


class Named(NamedTuple):
    """What a name of another program means here.

    Attributes:
        solver: a name of ours.
        schedule: a name of ours; None: the name says nothing of the levels.
        options: of the solver.
    """

    solver: str
    schedule: str | None = None
    options: Mapping[str, Any] = {}


DIFFUSERS: dict[str, Named] = {
    "CosineDPMSolverMultistepScheduler": Named("dpmpp_2m_sde"),
    "DDIMParallelScheduler": Named("ddim"),
    "DDIMScheduler": Named("ddim"),
    "DDPMParallelScheduler": Named("ddpm"),
    "DDPMScheduler": Named("ddpm"),
    "DEISMultistepScheduler": Named("deis"),
    "DPMSolverMultistepScheduler": Named("dpmpp_2m"),
    "DPMSolverSDEScheduler": Named("dpmpp_sde"),
    "DPMSolverSinglestepScheduler": Named("dpmpp_2s"),
    "EDMDPMSolverMultistepScheduler": Named("dpmpp_2m"),
    "EDMEulerScheduler": Named("euler"),
    "EulerAncestralDiscreteScheduler": Named("euler_ancestral"),
    "EulerDiscreteScheduler": Named("euler"),
    "FlowMatchEulerDiscreteScheduler": Named("euler"),
    "FlowMatchHeunDiscreteScheduler": Named("heun"),
    "FlowMatchLCMScheduler": Named("lcm"),
    "HeunDiscreteScheduler": Named("heun"),
    "KDPM2AncestralDiscreteScheduler": Named("dpm_2_ancestral"),
    "KDPM2DiscreteScheduler": Named("dpm_2"),
    "LCMScheduler": Named("lcm"),
    "LMSDiscreteScheduler": Named("lms"),
    "PNDMScheduler": Named("ipndm"),
    "SASolverScheduler": Named("sa_solver"),
    "TCDScheduler": Named("ddim"),
    "UniPCMultistepScheduler": Named("unipc"),
}

_SAME = (
    "ddim", "ddpm", "deis", "dpm_2", "dpm_2_ancestral", "dpm_adaptive", "dpm_fast", "dpmpp_2m",
    "dpmpp_2m_cfg_pp", "dpmpp_2m_sde", "dpmpp_2m_sde_heun", "dpmpp_2s_ancestral",
    "dpmpp_2s_ancestral_cfg_pp", "dpmpp_3m_sde", "dpmpp_sde", "er_sde", "euler", "euler_ancestral",
    "euler_ancestral_cfg_pp", "euler_cfg_pp", "gradient_estimation", "heun", "heunpp2", "ipndm",
    "ipndm_v", "lcm", "lms", "res_multistep", "res_multistep_cfg_pp", "sa_solver",
    "sa_solver_pece", "seeds_2", "seeds_3",
)  # fmt: skip
COMFYUI: dict[str, Named] = {
    **{name: Named(name) for name in _SAME},
    **{
        f"{name}_gpu": Named(name)  # there: where the noise is made
        for name in ("dpmpp_2m_sde", "dpmpp_2m_sde_heun", "dpmpp_3m_sde", "dpmpp_sde")
    },
    "uni_pc": Named("unipc_bh1"),
    "uni_pc_bh2": Named("unipc"),
}
COMFYUI_SCHEDULES: dict[str, str] = {
    name: name
    for name in (
        "beta", "ddim_uniform", "exponential", "karras", "kl_optimal", "linear_quadratic", "normal",
        "sgm_uniform", "simple",
    )
}  # fmt: skip

A1111: dict[str, Named] = {
    "DDIM": Named("ddim", "ddim_uniform"),
    "DPM adaptive": Named("dpm_adaptive"),
    "DPM fast": Named("dpm_fast"),
    "DPM++ 2M": Named("dpmpp_2m"),
    "DPM++ 2M SDE": Named("dpmpp_2m_sde"),
    "DPM++ 2M SDE Heun": Named("dpmpp_2m_sde_heun"),
    "DPM++ 2S a": Named("dpmpp_2s_ancestral"),
    "DPM++ 3M SDE": Named("dpmpp_3m_sde"),
    "DPM++ SDE": Named("dpmpp_sde"),
    "DPM2": Named("dpm_2"),
    "DPM2 a": Named("dpm_2_ancestral"),
    "Euler": Named("euler"),
    "Euler a": Named("euler_ancestral"),
    "Heun": Named("heun"),
    "LCM": Named("lcm"),
    "LMS": Named("lms"),
    "PLMS": Named("ipndm"),
    "Restart": Named("restart", "karras"),
    "UniPC": Named("unipc_bh1"),
}
A1111_SCHEDULES: dict[str, str] = {
    "Align Your Steps": "align_your_steps",
    "Beta": "beta",
    "DDIM": "ddim_uniform",
    "Exponential": "exponential",
    "KL Optimal": "kl_optimal",
    "Karras": "karras",
    "Normal": "normal",
    "Polyexponential": "polyexponential",
    "SGM Uniform": "sgm_uniform",
    "Simple": "simple",
    "Uniform": "normal",
}


def foreign_name(name: str) -> Named:
    """What a sampler's name in another program means here.

    Args:
        name: a scheduler class of diffusers, a sampler of ComfyUI ("dpmpp_2m"), or one of the web
            UI ("DPM++ 2M"), there with a schedule after it or not ("DPM++ 2M Karras").

    Raises:
        ValueError: no program is known to use that name; the nearest known is offered.
    """
    for table in (DIFFUSERS, COMFYUI, A1111):
        if name in table:
            return table[name]
    for ending, schedule in A1111_SCHEDULES.items():
        sampler = name.removesuffix(f" {ending}")
        if sampler != name and sampler in A1111:
            return A1111[sampler]._replace(schedule=schedule)
    raise ValueError(maths.unknown("foreign sampler", name, (*DIFFUSERS, *COMFYUI, *A1111)))


def foreign_schedule(name: str) -> str:
    """Our name of a schedule of ComfyUI ("sgm_uniform") or the web UI ("SGM Uniform").

    Raises:
        ValueError: no program is known to use that name.
    """
    known = {**COMFYUI_SCHEDULES, **A1111_SCHEDULES}
    if name not in known:
        raise ValueError(maths.unknown("foreign schedule", name, known))
    return known[name]
