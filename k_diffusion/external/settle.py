"""What a caller says of a pipeline's run, settled: texts, seeds, the solver."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from k_diffusion.external.asked import Told
from k_diffusion.external.names import foreign_name
from k_diffusion.external.process import Conventions, config_of
from k_diffusion.sampling.registry import SOLVERS


def own_solver(scheduler: Any) -> tuple[str, dict[str, Any]]:
    """Our solver that does what a diffusers scheduler does, by its class and its config.

    Returns:
        Its name and its options.
    """
    if type(scheduler).__name__ == "PlanScheduler":
        return scheduler.config["solver"], dict(scheduler.config["options"])
    config = config_of(scheduler)
    named = foreign_name(config["_class_name"])
    return _by_config(config["_class_name"], config) or (named.solver, dict(named.options))


def _by_config(name: str, config: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """What a class stands for that has several methods, of which its config names one."""
    order = config.get("solver_order", 2)
    if name == "DPMSolverMultistepScheduler":
        heun = "_heun" if config.get("solver_type") == "heun" and order == 2 else ""
        if str(config.get("algorithm_type")).startswith("sde"):
            return "dpmpp_3m_sde" if order == 3 else f"dpmpp_2m_sde{heun}", {}
        return {1: "ddim", 3: "dpmpp_3m"}.get(order, f"dpmpp_2m{heun}"), {}
    if name == "UniPCMultistepScheduler":
        kind = "_bh1" if config.get("solver_type") == "bh1" else ""
        return f"unipc{kind if config.get('predict_x0', True) else '_noise'}", {"order": order}
    if name == "DEISMultistepScheduler":
        return "deis", {"order": order}
    if name in ("DDPMScheduler", "DDPMParallelScheduler"):
        larger = config.get("variance_type") in ("fixed_large", "fixed_large_log")
        return "ddpm", {"variance": 1.0} if larger else {}
    if name == "FlowMatchEulerDiscreteScheduler" and config.get("stochastic_sampling"):
        return "lcm", {}
    return None


def renoised(
    solver: Any, options: Mapping[str, Any], said: Conventions
) -> tuple[Any, Mapping[str, Any]]:
    """The steps that a solver stands for where the noise is that of the estimate before its limit.

    Of ddim and euler, which put the two together, they are those of CFG++ (the data of one
    estimate, the noise of another); other solvers go by the limited estimate alone.

    Returns:
        A solver, of two outputs then, and its options.
    """
    if not said.keeps_noise or solver.name not in ("ddim", "euler"):
        return solver, options
    eta = options.get("eta", 0.0)
    if eta:
        return SOLVERS["euler_ancestral_cfg_pp"], {"eta": eta}
    return SOLVERS["euler_cfg_pp"], {}


def texts(name: str, given: Any) -> list[str] | None:
    """A text or several as a list; None where nothing is given, TypeError where it is no text."""
    if given is None:
        return None
    texts = [given] if isinstance(given, str) else given
    if (
        not texts
        or not isinstance(texts, Sequence)
        or not all(isinstance(text, str) for text in texts)
    ):
        raise TypeError(f"{name} must be a text, or a list of texts, got {given!r}")
    return list(texts)


def rows_of(told: Told) -> int | None:
    """How many are told different things; None: nobody is told anything."""
    return next((len(v) for v in told.condition.values() if isinstance(v, Tensor)), None)


def repeated(told: Told, times: int) -> Told:
    """Each row so many times, one after the other."""

    def repeat(keywords: dict[str, Any]) -> dict[str, Any]:
        return {
            name: value.repeat_interleave(times, 0) if isinstance(value, Tensor) else value
            for name, value in keywords.items()
        }

    return Told(repeat(told.condition), repeat(told.negative), told.scale)


def settle_seeds(
    seed: int | None, seeds: Any, n: int | None, rows: int | None, latents: Tensor | None
) -> list[int]:
    """One seed for each image.

    Raises:
        ValueError: seeds of another number than images.
    """
    if seed is not None and seeds is not None:
        raise ValueError("give seed or seeds, not both: seeds is one for each image")
    if seeds is not None and not (isinstance(seeds, Sequence) and all(map(_is_seed, seeds))):
        raise TypeError(
            f"seeds must be whole numbers from 0 to 2^63, one for each image: {seeds!r}"
        )
    if seed is not None and not _is_seed(seed):
        raise TypeError(f"seed must be a whole number from 0 to 2^63, got {seed!r}")
    if n is not None and (isinstance(n, bool) or not isinstance(n, int) or n < 1):
        raise ValueError(f"n must be a whole number of at least 1, got {n!r}")
    if n is None and rows in (None, 1):
        given = seeds if seeds is not None else latents
        n = 1 if given is None else len(given)
    count = (rows or 1) * (n or 1)
    if seeds is not None:
        chosen = [int(s) for s in seeds]
        if len(chosen) != count:
            raise ValueError(
                f"{len(chosen)} seeds for {count} images ({rows or 1} prompts, {n or 1} of each): "
                "give one seed for each image"
            )
        return chosen
    if seed is None:
        return [int(s) for s in torch.randint(0, 2**31, (count,))]
    return [seed + i for i in range(count)]


def generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One for each seed, on the CPU, so that a seed gives the same on every device."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def _is_seed(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
