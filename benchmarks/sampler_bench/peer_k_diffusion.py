"""k-diffusion 0.1.1 under a name of its own, without the packages that its utilities import."""

from __future__ import annotations

import importlib.util
import inspect
import sys
import types
from collections.abc import Sequence
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sampler_bench.library import Library, Method, Model, exploding, hold, tensor


def load_module(folder: Path) -> Any:
    """Its sampling module; torchsde and torchdiffeq are found beside it."""
    sys.path.append(str(folder))
    package = types.ModuleType("peer_k_diffusion")
    package.__path__ = [str(folder / "k_diffusion")]
    utils = types.ModuleType("peer_k_diffusion.utils")
    utils.append_dims = lambda x, n: x[(...,) + (None,) * (n - x.ndim)]  # type: ignore[attr-defined]
    package.utils = utils  # type: ignore[attr-defined]
    sys.modules.update({"peer_k_diffusion": package, "peer_k_diffusion.utils": utils})
    name = "peer_k_diffusion.sampling"
    spec = importlib.util.spec_from_file_location(name, folder / "k_diffusion" / "sampling.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


NAMES = (
    "euler", "heun", "dpm_2", "lms", "dpmpp_2m", "euler_ancestral", "dpm_2_ancestral",
    "dpmpp_2s_ancestral", "dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde",
)  # fmt: skip

LIKE = {"lms": "lms order=4"}


def wrap(function: Any, options: dict[str, Any]) -> Any:
    def exact(model: Model, z: Tensor, ratios: Sequence[float]) -> Tensor:
        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            return model(x, 1.0, sigma[0].item())

        x = exploding(z, ratios[0])
        keywords = dict(options)
        if "eta" in options:
            # At eta 0 noise counts for nothing, but a tree that is made all the same does not end
            # where sigma spans more than single precision tells apart (zero_terminal_snr).
            keywords["noise_sampler"] = lambda s, t: torch.zeros_like(x)
        return function(denoise, x, tensor(ratios), disable=True, **keywords)

    return exact


def quick_for(function: Any, karras: Any) -> Any:
    def quick(x: Tensor, model: Any, steps: int) -> Any:
        sigmas = karras(steps, 0.002, 80.0)
        hold(model, sigmas)
        return lambda: function(model, x, sigmas, disable=True)

    return quick


def methods(module: Any) -> list[Method]:
    """The sample_* functions of a module that has them, theirs or ours of the same names."""
    found = []
    for name in NAMES:
        function = getattr(module, f"sample_{name}", None)
        if function is None:
            continue
        parameters = inspect.signature(function).parameters
        noisy = "noise_sampler" in parameters
        options = {"eta": 0.0} if noisy else {}
        found.append(
            Method(
                f"sample_{name}" + (", eta 0" if noisy else ""),
                like=LIKE.get(name, name),
                exact=wrap(function, options),
                quick=quick_for(function, module.get_sigmas_karras),
                stochastic=noisy,
            )
        )
        if "solver_type" in parameters:
            exact = wrap(function, {**options, "solver_type": "heun"})
            found.append(Method(f"sample_{name}, heun, eta 0", f"{name}_heun", exact))

    fast = getattr(module, "sample_dpm_fast", None)
    if fast is not None:
        # It lays its levels itself, between two ends.
        def exact_fast(model: Model, z: Tensor, ratios: Sequence[float]) -> Tensor:
            def denoise(x: Tensor, sigma: Tensor) -> Tensor:
                return model(x, 1.0, sigma.reshape(-1)[0].item())

            x = exploding(z, ratios[0])
            n = len(ratios) - 1
            with torch.no_grad():
                return fast(denoise, x, ratios[-1], ratios[0], n, disable=True)

        found.append(Method("sample_dpm_fast", exact=exact_fast, endings=("open",)))
    return found


def library(folder: Path) -> Library:
    module = load_module(folder)
    version = next(
        (d.version for d in distributions(path=[str(folder)]) if d.name == "k-diffusion"), "?"
    )

    def levels(name: str, *ends: float) -> Any:
        return lambda n: getattr(module, f"get_sigmas_{name}")(n, *ends).tolist()[:-1]

    schedules = {
        "karras": levels("karras", 0.002, 80.0),
        "exponential": levels("exponential", 0.002, 80.0),
        "polyexponential, rho 2": lambda n: module.get_sigmas_polyexponential(
            n, 0.002, 80.0, 2.0
        ).tolist()[:-1],
        "vp": levels("vp"),
    }
    return Library("k-diffusion", version, methods(module), schedules)
