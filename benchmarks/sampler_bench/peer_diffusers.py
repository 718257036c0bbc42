"""diffusers' schedulers, driven as a pipeline drives them, on levels given to them.

A scheduler lays its levels from a training process. To put all of them on the same levels, its
table of levels is replaced after `set_timesteps`, in float64, so that no rounding of a table counts
as an error of the method.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sampler_bench.library import Library, Method, Model, exploding, hold, tensor, unit


def eps_of(x: Tensor, d: Tensor, alpha: float, sigma: float) -> Tensor:
    return (x - alpha * d) / sigma


def preserving(make: Callable[[str], Any]) -> Any:
    """Schedulers in variance-preserving coordinates that keep one level a step in `sigmas`."""

    def exact(model: Model, z: Tensor, ratios: Sequence[float]) -> Tensor:
        n = len(ratios) - 1
        scheduler = make("clean" if ratios[-1] == 0 else "open")
        scheduler.set_timesteps(n)
        scheduler.sigmas = tensor(ratios)
        scheduler.set_begin_index(0)
        if hasattr(scheduler, "order_list"):
            scheduler.order_list = scheduler.get_order_list(n)
        x = z
        for k in range(n):
            alpha = unit(ratios[k])
            sigma = alpha * ratios[k]
            noise = eps_of(x, model(x, alpha, sigma), alpha, sigma)
            x = scheduler.step(noise, scheduler.timesteps[k], x).prev_sample.double()
        return exploding(x, ratios[-1])

    return exact


def exploding_(make: Callable[[str], Any]) -> Any:
    """Schedulers in variance-exploding coordinates: Euler and LMS, one level a step."""

    def exact(model: Model, z: Tensor, ratios: Sequence[float]) -> Tensor:
        n = len(ratios) - 1
        scheduler = make("clean" if ratios[-1] == 0 else "open")
        scheduler.set_timesteps(n)
        scheduler.sigmas = tensor(ratios)
        scheduler.set_begin_index(0)
        x = exploding(z, ratios[0])
        for k in range(n):
            t = scheduler.timesteps[k]
            scheduler.scale_model_input(x, t)
            noise = eps_of(x, model(x, 1.0, ratios[k]), 1.0, ratios[k])
            x = scheduler.step(noise, t, x).prev_sample.double()
        return x

    return exact


def interleaved(make: Callable[[str], Any]) -> Any:
    """Heun and DPM-2: two queries a step, which their table of timesteps tells apart.

    The timesteps are made the levels themselves; they always end in clean data.
    """

    def exact(model: Model, z: Tensor, ratios: Sequence[float]) -> Tensor:
        n = len(ratios) - 1
        scheduler = make("clean")
        scheduler._convert_to_exponential = lambda *a, **k: np.array(ratios[:-1])
        scheduler._sigma_to_t = lambda sigma, log_sigmas: sigma
        scheduler.set_timesteps(n)
        scheduler.set_begin_index(0)
        x = exploding(z, ratios[0])
        for t in scheduler.timesteps:
            level = float(t)
            noise = eps_of(x, model(x, 1.0, level), 1.0, level)
            x = scheduler.step(noise, t, x).prev_sample.double()
        return x

    return exact


def discrete(make: Callable[[int], Any]) -> Any:
    """DDIM and PNDM: levels by index in a table of alphas_cumprod, cleanest first."""

    def exact(model: Model, z: Tensor, ratios: Sequence[float]) -> Tensor:
        n = len(ratios) - 1
        scheduler = make(n)
        products = tensor([unit(ratio) ** 2 for ratio in ratios])
        scheduler.alphas_cumprod = products[:-1].flip(0)
        scheduler.final_alpha_cumprod = products[-1]
        scheduler.set_timesteps(n)
        x = z
        for t in scheduler.timesteps:
            ratio = ratios[n - 1 - int(t)]
            alpha = unit(ratio)
            noise = eps_of(x, model(x, alpha, alpha * ratio), alpha, alpha * ratio)
            x = scheduler.step(noise, t, x).prev_sample.double()
        return exploding(x, ratios[-1])

    return exact


def ipndm(make: Callable[[str], Any]) -> Any:
    def exact(model: Model, z: Tensor, ratios: Sequence[float]) -> Tensor:
        n = len(ratios) - 1
        scheduler = make("clean")
        scheduler.set_timesteps(n)
        scheduler.alphas = tensor([unit(ratio) for ratio in ratios])
        scheduler.betas = scheduler.alphas * tensor(ratios)
        scheduler.set_begin_index(0)
        x = z
        for k in range(n):
            alpha = unit(ratios[k])
            sigma = alpha * ratios[k]
            d = model(x, alpha, sigma)
            velocity = alpha * eps_of(x, d, alpha, sigma) - sigma * d
            x = scheduler.step(velocity, scheduler.timesteps[k], x).prev_sample
        return exploding(x, ratios[-1])

    return exact


def quick_for(make: Callable[[str], Any]) -> Any:
    """The loop of a pipeline."""

    def quick(x: Tensor, model: Any, steps: int) -> Any:
        scheduler = make("clean")

        def call() -> Tensor:
            scheduler.set_timesteps(steps)
            hold(model, scheduler.timesteps)  # its levels stay on the host
            sample = x
            for t in scheduler.timesteps:
                scaled = scheduler.scale_model_input(sample, t)
                sample = scheduler.step(model(scaled, t), t, sample, return_dict=False)[0]
            return sample

        return call

    return quick


def library(folder: Path) -> Library:
    sys.path.insert(0, str(folder))
    import diffusers

    logging.disable(logging.WARNING)
    diffusers.utils.logging.set_verbosity_error()
    methods: list[Method] = []

    def add(
        name: str, drive: Any, kind: str, like: str = "", noisy: bool = False, ends: Any = None,
        full: bool = False, **options: Any,
    ) -> None:  # fmt: skip
        scheduler = getattr(diffusers, f"{kind}Scheduler")
        known = scheduler.__init__.__wrapped__.__code__.co_varnames

        def make(ending: str) -> Any:
            config = dict(options)
            if ending == "open" and "final_sigmas_type" in known:
                config["final_sigmas_type"] = "sigma_min"
            if full:
                config["lower_order_final"] = False
            return scheduler(**config)

        exact = None if noisy else drive(make)
        endings = ends or ("clean", "open")
        if full:
            name, endings = f"{name}, full order to the end", ("open",)
        elif like and "lower_order_final" in known:
            # By default the order falls at the end; DPM-Solver++ and DEIS do so under 15 steps.
            like = f"{like} end_order=1" + f" | {like}" * (
                "euler_at_final" in known or "DEIS" in kind
            )
        methods.append(Method(name, like, exact, None if full else quick_for(make), endings, noisy))

    add("Euler", exploding_, "EulerDiscrete", "euler")
    add("LMS", exploding_, "LMSDiscrete", "lms order=4")
    add("Heun", interleaved, "HeunDiscrete", "heun", ends=("clean",), use_exponential_sigmas=True)
    add("KDPM2", interleaved, "KDPM2Discrete", "dpm_2", ends=("clean",),
        use_exponential_sigmas=True)  # fmt: skip
    add("IPNDM", ipndm, "IPNDM", "ipndm order=4")
    for full in (False, True):
        for order in (1, 2, 3):
            for form in ("midpoint", "heun") if order == 2 else ("midpoint",):
                like = {(2, "midpoint"): "dpmpp_2m", (2, "heun"): "dpmpp_2m_heun"}.get(
                    (order, form), "dpmpp_3m" if order == 3 else "ddim"
                )
                add(f"DPMSolverMultistep++ order {order} {form}", preserving,
                    "DPMSolverMultistep", like, full=full, solver_order=order,
                    solver_type=form)  # fmt: skip
                add(f"DPMSolverMultistep order {order} {form}", preserving,
                    "DPMSolverMultistep", full=full, ends=("open",), solver_order=order,
                    solver_type=form, algorithm_type="dpmsolver",
                    final_sigmas_type="sigma_min")  # fmt: skip
            add(f"DEISMultistep order {order}", preserving, "DEISMultistep",
                f"deis order={order}", full=full, ends=("open",), solver_order=order)  # fmt: skip
            for predict in (True, False):
                for form in ("bh1", "bh2"):
                    data = "data" if predict else "noise"
                    kind = ("" if form == "bh2" else "_bh1") + ("" if predict else "_noise")
                    like = f"unipc{kind} order={order}"
                    add(f"UniPC order {order} {form} {data}", preserving, "UniPCMultistep",
                        like, full=full, solver_order=order, solver_type=form,
                        predict_x0=predict)  # fmt: skip
        for order in (1, 2, 3, 4):
            for data in ("data", "noise"):
                like = f"sa_solver_midpoint order={order} corrector_order={order}"
                if data == "noise":  # ours corrects by two estimates at least
                    like = f"exp_abm_noise order={order}" if order > 1 else ""
                add(f"SASolver order {order} {data}, tau 0", preserving, "SASolver", like,
                    full=full, ends=("open",), predictor_order=order, corrector_order=order,
                    algorithm_type=f"{data}_prediction", tau_func=lambda t: 0)  # fmt: skip
    for order in (2, 3):
        add(f"DPMSolverSinglestep++ order {order}", preserving, "DPMSolverSinglestep",
            solver_order=order, lower_order_final=True)  # fmt: skip
        add(f"DPMSolverSinglestep order {order}", preserving, "DPMSolverSinglestep",
            solver_order=order, lower_order_final=True, algorithm_type="dpmsolver",
            final_sigmas_type="sigma_min", ends=("open",))  # fmt: skip
    add("EulerAncestral", None, "EulerAncestralDiscrete", "euler_ancestral", noisy=True)
    add("KDPM2Ancestral", None, "KDPM2AncestralDiscrete", "dpm_2_ancestral", noisy=True)
    add("DPMSolverMultistep++ SDE", None, "DPMSolverMultistep", "dpmpp_2m_sde", noisy=True,
        algorithm_type="sde-dpmsolver++")  # fmt: skip
    add("DPMSolverSDE", None, "DPMSolverSDE", "dpmpp_sde", noisy=True)
    add("SASolver order 3", None, "SASolver", "sa_solver_midpoint order=3 corrector_order=3",
        noisy=True, predictor_order=3, corrector_order=3)  # fmt: skip
    add("DDPM", None, "DDPM", "ddpm", noisy=True, clip_sample=False)

    for name, kind, like, extra in (
        ("DDIM", "DDIM", "ddim", {"clip_sample": False}),
        ("PNDM", "PNDM", "", {"skip_prk_steps": True}),
    ):
        scheduler = getattr(diffusers, f"{kind}Scheduler")

        def sized(n: int, scheduler: Any = scheduler, extra: Any = extra) -> Any:
            return scheduler(num_train_timesteps=n, timestep_spacing="leading", **extra)

        def usual(ending: str, scheduler: Any = scheduler, extra: Any = extra) -> Any:
            return scheduler(**extra)

        methods.append(Method(name, like, discrete(sized), quick_for(usual)))
    return Library("diffusers", diffusers.__version__, methods, own_schedules(diffusers))


def own_schedules(diffusers: Any) -> dict[str, Callable[[int], Sequence[float]]]:
    """Its levels: DDPM's process at three spacings, and its formulas between EDM's ends."""

    def laid(**options: Any) -> Callable[[int], Sequence[float]]:
        def levels(n: int) -> Sequence[float]:
            scheduler = diffusers.DPMSolverMultistepScheduler(**options)
            scheduler.set_timesteps(n)
            return scheduler.sigmas[:-1].tolist()

        return levels

    def formula(name: str) -> Callable[[int], Sequence[float]]:
        def levels(n: int) -> Sequence[float]:
            scheduler = diffusers.EulerDiscreteScheduler()
            ends = torch.tensor([80.0, 0.002], dtype=torch.float64)
            return np.asarray(getattr(scheduler, f"_convert_to_{name}")(ends, n)).tolist()

        return levels

    return {
        "ddpm, linspace": laid(),
        "ddpm, trailing": laid(timestep_spacing="trailing"),
        "ddpm, karras": laid(use_karras_sigmas=True),
        "ddpm, lu": laid(use_lu_lambdas=True),
        "karras": formula("karras"),
        "exponential": formula("exponential"),
        "beta": formula("beta"),
        "cosine, trailing": laid(beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing"),
    }
