"""`sample_dpm_fast`: named by two sigmas and a number of calls, not by a list of sigmas."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import Tensor

from k_diffusion.sampling.compat_checks import check_input
from k_diffusion.sampling.compat_tools import NoiseSampler, as_time, face, number
from k_diffusion.sampling.established import (
    Callback,
    EstablishedNoise,
    Model,
    drive,
)
from k_diffusion.sampling.expr import Interval
from k_diffusion.sampling.plan import make_plan
from k_diffusion.utils.levels import VE, Level, Levels


@torch.no_grad()
def sample_dpm_fast(
    model: Model,
    x: Tensor,
    sigma_min: float,
    sigma_max: float,
    n: int,
    extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 0.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """DPM-Solver-fast: third-order steps at even log sigma; see `dpm_fast`.

    Args:
        sigma_min, sigma_max: the last and the first sigma, above 0.
        n: calls of the model.

    Source: Lu et al. 2022, arXiv:2206.00927, section 3.4.
    """
    name = "sample_dpm_fast"
    check_input(name, model, x)
    ends = {"sigma_max": float(sigma_max), "sigma_min": float(sigma_min)}
    for key, value in ends.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{key} of {name} must be finite and above 0, got {value}")
    n = operator.index(n)
    if n < 1:
        raise ValueError(f"n of {name}, the calls of the model, must be 1 or more, got {n}")
    high, low = ends.values()
    if high == low:
        raise ValueError(f"sigma_min and sigma_max of {name} must differ, both are {low}")
    if low > high and eta:
        raise ValueError(f"eta of {name} must be 0 to go up from {high} to {low}, got {eta}")

    tail = (2, 1) if n % 3 == 0 else (n % 3,)
    count = n // 3 + 1
    step = math.log(low / high) / count
    inner = [high * math.exp(k * step) for k in range(1, count)]
    levels = [Level(1.0, sigma) for sigma in (high, *inner, low)]
    # Up, from clean to noisy, is inversion.
    laid = Levels(levels, VE) if low < high else Levels(levels[::-1], VE).flipped()
    options = {"eta": number(eta), "s_noise": number(s_noise), "tail": tail}
    plan = make_plan("dpm_fast", laid, intervals=True, **options)

    # What programs are told of the levels is formed as ever.
    first, last = (as_time(end).log().neg() for end in (sigma_max, sigma_min))
    ts = torch.linspace(float(first), float(last), count + 1, device=x.device).unbind()
    index = {level.sigma: i for i, level in enumerate(levels)}

    def sigma(i: int) -> Tensor:
        return ts[i].neg().exp()

    def describe(i: int, level: Level) -> dict[str, Any]:
        return {"sigma": sigma(i), "sigma_hat": sigma(i), "t": ts[i], "t_up": ts[i]}

    noise, passed, drawn = None, None, set()
    if plan.stochastic:
        own = face().default_noise_sampler(x) if noise_sampler is None else noise_sampler

        def times(interval: Interval) -> tuple[Tensor, Tensor]:
            i = index[interval.start.sigma]
            drawn.add(i)
            return sigma(i), sigma(i + 1)

        noise = EstablishedNoise(x, own, times)
    if noise_sampler is not None:  # a program may count on being asked, used or not

        def passed(i: int) -> None:
            if i not in drawn:
                noise_sampler(sigma(i), sigma(i + 1))

    with face().tqdm(total=n, disable=disable) as bar:
        return drive(
            name,
            plan,
            model,
            x,
            extra_args,
            callback,
            noise,
            range(count),
            describe,
            asked=bar.update,
            passed=passed,
            copied=True,
            stacklevel=4,
        )
