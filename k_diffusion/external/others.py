"""Networks of other programs as Denoisers: OpenAI's, CompVis', and any function of (x, time)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from k_diffusion.denoiser import DENOISERS, EDMDenoiser, NetworkDenoiser
from k_diffusion.utils import maths
from k_diffusion.utils.scheduler import CustomScheduler, Scheduler, make_scheduler

_MEANS = {"EPSILON": "eps", "START_X": "x0"}


class FunctionNetwork(nn.Module):
    """A function `f(x, time, **condition)` as a network.

    Args:
        function: returns a prediction of x's shape, or twice its channels, of which the second half
            (a learned variance) is left out.
        owner: the module whose parameters, device and dtype it has; None: the function, if it is a
            module.
        time_convention: "timestep", "unit" or "log_sigma"; see `NetworkDenoiser.time`.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        owner: nn.Module | None = None,
        time_convention: str = "timestep",
    ) -> None:
        super().__init__()
        if not callable(function):
            raise TypeError(f"a function of (x, time) is needed, got {type(function).__name__}")
        owner = function if owner is None and isinstance(function, nn.Module) else owner
        self.owner = owner
        # In a list, so that a module is registered once, under one name.
        self._function = [function]
        self.time_convention = time_convention

    def forward(self, x: Tensor, time: Tensor, **condition: Any) -> Tensor:
        """The prediction, shape of x (B, C, ...); time of shape (B,)."""
        out = self._function[0](x, time, **condition)
        return out[:, : x.shape[1]] if out.shape[1:2] == (2 * x.shape[1],) else out


def function_denoiser(
    function: Callable[..., Tensor],
    prediction: str,
    process: Scheduler | str,
    *,
    time_convention: str = "timestep",
    sigma_data: float = 0.5,
) -> NetworkDenoiser:
    """A plain `f(x, time, **condition)` of stated conventions as a Denoiser.

    Args:
        function: called with x of shape (B, C, ...), at the scale of the prediction's path (see
            `k_diffusion.denoiser`), and time of shape (B,) in float32.
        prediction: "eps", "v", "x0", "flow" or "edm".
        process: the schedule that it was trained on, or its name.
        time_convention: how it is told the level: "timestep" (0 to N of the process, fractional),
            "unit" (time in [0, 1]) or "log_sigma" (log(sigma) / 4).
        sigma_data: of "edm".

    Raises:
        TypeError, ValueError: something unknown, by name.
    """
    if prediction not in DENOISERS:
        raise ValueError(maths.unknown("prediction", prediction, DENOISERS))
    network = FunctionNetwork(function, time_convention=time_convention)
    laid = make_scheduler(process)
    if prediction == "edm":
        return EDMDenoiser(network, sigma_data, laid)
    return DENOISERS[prediction](network, laid)


def openai_denoiser(model: nn.Module, diffusion: Any) -> NetworkDenoiser:
    """A network of OpenAI's guided-diffusion with its `GaussianDiffusion`, respaced or not.

    The variance that such a network learns is left out: our solvers bring their own.

    Args:
        model: called as `model(x, timesteps, **condition)`; `y` is the class.
        diffusion: has `alphas_cumprod`, `model_mean_type`, `rescale_timesteps`, and where it is
            respaced `timestep_map` and `original_num_steps`.

    Raises:
        ValueError: a kind of prediction that no Denoiser has.
    """
    kind = getattr(diffusion, "model_mean_type", None)
    name = str(getattr(kind, "name", kind))
    if name not in _MEANS:
        raise ValueError(maths.unknown("model_mean_type", name, _MEANS))
    products = [float(a) for a in diffusion.alphas_cumprod]
    kept = [float(i) for i in getattr(diffusion, "timestep_map", range(len(products)))]
    whole = getattr(diffusion, "original_num_steps", len(products))
    scale = 1000 / whole if getattr(diffusion, "rescale_timesteps", False) else 1.0
    table = torch.tensor(kept) * scale

    def call(x: Tensor, time: Tensor, **condition: Any) -> Tensor:
        # Between two timesteps of a respaced process lie others, which the network knows.
        known = table.to(time)
        below = time.floor().clamp(0, len(known) - 1).long()
        above = (below + 1).clamp_max(len(known) - 1)
        return model(x, torch.lerp(known[below], known[above], time - below), **condition)

    network = FunctionNetwork(call, model)
    return DENOISERS[_MEANS[name]](network, CustomScheduler(alphas_cumprod=products))


def compvis_denoiser(model: nn.Module) -> NetworkDenoiser:
    """A `LatentDiffusion` of CompVis' latent-diffusion, or Stable Diffusion in its first form.

    Args:
        model: has `apply_model(x, timesteps, cond)`, `alphas_cumprod`, `parameterization` ("eps",
            "v" or "x0"; "eps" where it has none). The condition's keyword is `cond`.

    Raises:
        TypeError: it has no apply_model.
        ValueError: an unknown parameterization.
    """
    apply_model = getattr(model, "apply_model", None)
    if not callable(apply_model):
        raise TypeError(
            f"{type(model).__name__} has no apply_model: it is no latent-diffusion model"
        )
    kind = getattr(model, "parameterization", "eps")
    if kind not in ("eps", "v", "x0"):
        raise ValueError(maths.unknown("parameterization", kind, ("eps", "v", "x0")))

    def call(x: Tensor, time: Tensor, cond: Any = None) -> Tensor:
        return apply_model(x, time, cond)

    process = CustomScheduler(alphas_cumprod=[float(a) for a in model.alphas_cumprod])  # type: ignore[union-attr]
    return DENOISERS[kind](FunctionNetwork(call, model), process)
