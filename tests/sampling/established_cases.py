"""The calls that ours and the original are compared on, and what both are called with."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FIXTURE = Path(__file__).with_name("established.safetensors")
SHAPE = (2, 1, 4, 4)
STEPS = (1, 2, 7, 30)
NOISES = [{"eta": 0.0}, {"eta": 0.5}, {"eta": 1.0}, {"eta": 1.0, "s_noise": 0.9}]
CHURNS = [
    {},
    {"s_churn": 12.0, "s_tmin": 0.3, "s_tmax": 6.0, "s_noise": 1.0},
    {"s_churn": 0.5, "s_noise": 0.9},
]


def model(x: Tensor, sigma: Tensor) -> Tensor:
    """A smooth denoiser that is not linear and couples neighbours; it has no parameters."""
    s = sigma.view(-1, *[1] * (x.ndim - 1))
    return torch.tanh((0.8 * x + 0.3 * x.roll(1, -1)) / (1 + s**2).sqrt() + 0.2) * 0.9


def sigmas(steps: int, zero: bool) -> list[float]:
    """`steps + 1` sigmas on uneven levels, the last 0 or not."""
    n = steps if zero else steps + 1
    ramp = [k / max(n - 1, 1) for k in range(n)]
    top, low = 14.6, 0.03
    values = [(top ** (1 / 7) + r * (low ** (1 / 7) - top ** (1 / 7))) ** 7 for r in ramp]
    return [*values, 0.0] if zero else values


def start(dtype: torch.dtype, sigma: float, seed: int) -> Tensor:
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (noise * sigma).to(dtype)


def cases() -> Iterator[dict[str, Any]]:
    """Each call: the function, its number of steps, its keywords, the seed of torch's generator
    and, where noise is not the function's own default, the seed of a Brownian tree."""
    counter = itertools.count(1)
    table = [
        ("sample_euler", CHURNS),
        ("sample_heun", CHURNS),
        ("sample_dpm_2", CHURNS),
        ("sample_lms", [{"order": order} for order in (1, 2, 3, 4)]),
        ("sample_dpmpp_2m", [{}]),
        ("sample_euler_ancestral", NOISES),
        ("sample_dpm_2_ancestral", NOISES),
        ("sample_dpmpp_2s_ancestral", NOISES),
        ("sample_dpmpp_sde", [*NOISES, {"r": 0.3}]),
        ("sample_dpmpp_2m_sde", NOISES),
        ("sample_dpmpp_2m_sde", [{**noise, "solver_type": "heun"} for noise in NOISES]),
        ("sample_dpmpp_3m_sde", NOISES),
    ]
    for steps, zero in itertools.product(STEPS, (True, False)):
        levels = sigmas(steps, zero)
        for name, variants in table:
            for options in variants:
                yield {"name": name, "sigmas": levels, "options": options, "seed": next(counter)}
    for n in (*STEPS, 6, 8):
        for options in NOISES:
            yield {"name": "sample_dpm_fast", "n": n, "options": options, "seed": next(counter)}
    for name in ("sample_euler_ancestral", "sample_dpmpp_sde", "sample_dpmpp_2m_sde"):
        for tree in (5, [6, 7]):
            levels = sigmas(7, True)
            yield {"name": name, "sigmas": levels, "options": {}, "seed": 1, "tree": tree}
    for name in ("euler", "heun", "dpm_2", "lms", "dpmpp_2m"):  # inversion
        levels = sigmas(7, False)[::-1]
        yield {"name": f"sample_{name}", "sigmas": levels, "options": {}, "seed": 2}
    yield {"name": "sample_dpm_fast", "n": 8, "options": {}, "seed": 2, "up": True}


def call(module: Any, case: dict[str, Any], dtype: torch.dtype, **keywords: Any) -> Tensor:
    """Makes one call, of ours or of the original.

    Args:
        module: the `sampling` module.
        dtype: of x and of sigmas.
        keywords: further arguments, in the place of the case's own.
    """
    function = getattr(module, case["name"])
    keywords = {"disable": True, **case["options"], **keywords}
    if "sigmas" not in case:
        top, low = (0.03, 14.6) if case.get("up") else (14.6, 0.03)
        x = start(case.get("start", dtype), top, case["seed"]).to(dtype)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)  # the original keeps its levels in it
        try:
            torch.manual_seed(case["seed"])
            return function(model, x, low, top, case["n"], **keywords)
        finally:
            torch.set_default_dtype(before)
    levels = torch.tensor(case["sigmas"], dtype=torch.float64).to(dtype)
    x = start(case.get("start", dtype), float(levels[0]), case["seed"]).to(dtype)
    if "tree" in case and "noise_sampler" not in keywords:
        ends = levels[levels > 0].min(), levels.max()
        keywords["noise_sampler"] = module.BrownianTreeNoiseSampler(x, *ends, seed=case["tree"])
    torch.manual_seed(case["seed"])
    return function(model, x, levels, **keywords)


def difference(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the largest value of b."""
    return float((a.double() - b.double()).abs().max() / b.double().abs().max())


def label(case: dict[str, Any]) -> str:
    options = " ".join(f"{k}={v}" for k, v in case["options"].items())
    size = f"n={case['n']}" if "n" in case else f"{len(case['sigmas']) - 1} steps"
    end = "" if "n" in case else " to 0" if case["sigmas"][-1] == 0 else " above 0"
    if case.get("up") or ("sigmas" in case and case["sigmas"][0] < case["sigmas"][-1]):
        end += " up"
    tree = f" tree {case['tree']}" if "tree" in case else ""
    return f"{case['name']} {size}{end} {options}{tree}".strip()


def finite(x: Tensor) -> bool:
    return math.isfinite(float(x.double().sum()))
