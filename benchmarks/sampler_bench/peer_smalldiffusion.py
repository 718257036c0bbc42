"""smalldiffusion's one sampler, with the settings that its README names."""

from __future__ import annotations

import sys
import types
from collections.abc import Sequence
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sampler_bench.library import Library, Method, Model, exploding, tensor


class _Anything:
    """Stands for torchvision, which its image data sets import and its sampler does not."""

    def __getattr__(self, name: str) -> Any:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self


def library(folder: Path) -> Library:
    sys.path.insert(0, str(folder))
    vision = types.ModuleType("torchvision")
    vision.transforms = _Anything()  # type: ignore[attr-defined]
    sys.modules.setdefault("torchvision", vision)
    import smalldiffusion as small
    from accelerate import Accelerator

    # Made once, as its examples do in a loop of samples; it holds no state between calls.
    accelerator = Accelerator(cpu=True)

    class Network(torch.nn.Module, small.ModelMixin):
        """A model in its manner: predicts the noise."""

        def __init__(self, noise: Any, shape: Sequence[int]) -> None:
            super().__init__()
            self.noise, self.input_dims = noise, tuple(shape)

        def forward(self, x: Tensor, sigma: Tensor, cond: Any = None) -> Tensor:
            return self.noise(x, sigma)

    def last(states: Any) -> Tensor:
        state: Tensor
        for state in states:  # noqa: B007  (a generator: only its last state is wanted)
            pass
        return state

    def method(name: str, like: str, gam: float, mu: float) -> Method:
        def exact(model: Model, z: Tensor, ratios: Sequence[float]) -> Tensor:
            def noise(x: Tensor, sigma: Tensor) -> Tensor:
                return (x - model(x, 1.0, sigma.item())) / sigma

            sigmas, x = tensor(ratios), exploding(z, ratios[0])
            network = Network(noise, x.shape[1:])
            return last(small.samples(network, sigmas, gam, mu, xt=x, accelerator=accelerator))

        def quick(x: Tensor, model: Any, steps: int) -> Any:
            sigmas = small.ScheduleLogLinear(1000, 0.002, 80.0).sample_sigmas(steps)
            network = Network(model, x.shape[1:])
            return lambda: last(
                small.samples(network, sigmas, gam, mu, xt=x, accelerator=accelerator)
            )

        return Method(name, like, None if mu else exact, quick, stochastic=mu > 0)

    methods = [
        method("samples, gam 1", "euler", 1.0, 0.0),
        method("samples, gam 2", "gradient_estimation", 2.0, 0.0),
        method("samples, gam 1, mu 0.5", "", 1.0, 0.5),
    ]

    def own(schedule: Any) -> Any:
        return lambda n: schedule.sample_sigmas(n).double().tolist()[:-1]

    schedules = {
        "log-linear": own(small.ScheduleLogLinear(1000, 0.002, 80.0)),
        "ddpm": own(small.ScheduleDDPM()),
        "cosine": own(small.ScheduleCosine()),
    }
    version = next(
        d.version for d in distributions(path=[str(folder)]) if d.name == "smalldiffusion"
    )
    return Library("smalldiffusion", version, methods, schedules)
