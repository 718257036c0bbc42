"""azula's samplers, on levels given to them by a schedule that knows these levels alone."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sampler_bench.library import Library, Method, Model, exploding, hold


def library(folder: Path) -> Library:
    sys.path.insert(0, str(folder))
    import azula
    from azula import sample
    from azula.denoise import Denoiser, DiracPosterior
    from azula.noise import CosineSchedule, RectifiedSchedule, Schedule, VPSchedule

    class Given(Schedule):
        """Step k of n has time 1 - k / n."""

        def __init__(self, ratios: Sequence[float], dtype: torch.dtype) -> None:
            self.sigmas = torch.tensor(list(ratios), dtype=dtype)

        def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
            n = len(self.sigmas) - 1
            sigma = self.sigmas[((1 - t) * n).round().long()]
            return torch.ones_like(sigma), sigma

    class Exact(Denoiser):
        def __init__(self, model: Model, schedule: Schedule) -> None:
            super().__init__()
            self.model, self.schedule = model, schedule

        def forward(self, x_t: Tensor, t: Tensor, **kwargs: Any) -> DiracPosterior:
            sigma = self.schedule(t)[1]
            return DiracPosterior(self.model(x_t, 1.0, sigma.item()))

    class Ready(Denoiser):
        def __init__(self, model: Any, schedule: Schedule) -> None:
            super().__init__()
            self.model, self.schedule = model, schedule

        def forward(self, x_t: Tensor, t: Tensor, **kwargs: Any) -> DiracPosterior:
            return DiracPosterior(self.model(x_t, t))

    def method(kind: str, like: str = "", stochastic: bool = False, **options: Any) -> Method:
        make = getattr(sample, kind)

        def exact(model: Model, z: Tensor, ratios: Sequence[float]) -> Tensor:
            denoiser = Exact(model, Given(ratios, torch.float64))
            sampler = make(
                denoiser, steps=len(ratios) - 1, silent=True, dtype=torch.float64, **options
            )
            return sampler(exploding(z, ratios[0]))

        def quick(x: Tensor, model: Any, steps: int) -> Any:
            from azula.noise import VESchedule

            denoiser = Ready(model, VESchedule(0.002, 80.0))

            class Holding(make):  # type: ignore[misc, valid-type]
                @property
                def timesteps(self) -> Tensor:
                    times: Tensor = super().timesteps
                    hold(model, times)
                    return times

            return lambda: Holding(denoiser, steps=steps, silent=True, **options)(x)

        # At sigma = 0 its formulas in log(sigma) or 1 / sigma are not finite.
        clean = kind in ("DDIMSampler", "EulerSampler", "zABSampler")
        ends = ("clean", "open") if clean else ("open",)
        text = ", ".join(f"{k} {v}" for k, v in options.items())
        return Method(
            f"{kind} {text}".strip(),
            like,
            None if stochastic else exact,
            quick,
            ends,
            stochastic,
        )

    methods = [
        method("DDIMSampler", "ddim"),
        method("EulerSampler", "euler"),
        method("HeunSampler", "heun"),
        method("DDPMSampler", stochastic=True),
    ]
    for order in (2, 3, 4):
        methods += [
            method("zABSampler", f"lms order={order}", order=order),
            method("vABSampler", f"lms order={order}, flow levels", order=order),
            method("zEABSampler", f"deis order={order}", order=order),
            method("xEABSampler", f"exp_ab_low order={order}", order=order),
            method("REABSampler", order=order),
        ]

    def own(schedule: Schedule) -> Any:
        def levels(n: int) -> list[float]:
            alpha, sigma = schedule(torch.linspace(1.0, 0.0, n, dtype=torch.float64))
            return (sigma / alpha).tolist()

        return levels

    schedules = {
        "vp": own(VPSchedule()),
        "cosine": own(CosineSchedule()),
        "rectified": own(RectifiedSchedule()),
    }
    return Library("azula", azula.__version__, methods, schedules)
