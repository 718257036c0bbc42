"""Denoisers: the one currency of the library, `(x, sigma, **condition) -> x0 estimate`.

Every kind of network (EDM, noise, velocity, data or flow prediction) becomes a Denoiser here. Each
lives on one path of levels, whose coordinates its x and sigma are in:

=========  ====  ==============================================================
prediction path  x0 estimate from the network's output F(x, time)
=========  ====  ==============================================================
edm        ve    c_skip x + c_out F(c_in x, log(sigma) / 4)
eps        vp    (x - sigma F) / alpha
v          vp    alpha x - sigma F
x0         vp    F
flow       flow  x - sigma F
=========  ====  ==============================================================
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from k_diffusion.utils import maths
from k_diffusion.utils.levels import FLOW, VE, VP, Level, Path
from k_diffusion.utils.scheduler import (
    FlowScheduler,
    KarrasScheduler,
    LinearScheduler,
    Scheduler,
)


@runtime_checkable
class Denoiser(Protocol):
    """Anything that estimates clean data. A plain function counts as one on the VE path.

    `path` says in which coordinates x and sigma are; `alpha` is the signal scale there. A denoiser
    with a true `float64_sigma` is handed sigma in float64 (where the device has it), because alpha
    cannot be told from a float32 sigma near 1; any other gets sigma in x's dtype.
    """

    path: Path

    def alpha(self, sigma: Tensor) -> Tensor:
        """The signal scale at sigma, shape (B,)."""
        ...

    def __call__(self, x: Tensor, sigma: Tensor, **condition: Any) -> Tensor:
        """The estimate of x0, shape of x (B, ...), at noise standard deviations sigma (B,)."""
        ...


@dataclass(frozen=True, slots=True)
class Call:
    """What a run knows on the host about one call of its denoiser.

    Attributes:
        k: how many calls came before, in this run.
        level: of x, and of every sample.
        run: one object for each run, which is told from others by `is`; None: not told.
    """

    k: int
    level: Level
    run: object = field(default=None, compare=False, repr=False)


def mark_call(sigma: Tensor, call: Call) -> Tensor:
    """sigma itself, which tells `call_of` of the call from now on.

    So a wrapper of a denoiser may choose by the level what to compute, and begin anew with each
    run, without reading sigma, for which the host would have to wait for the device.
    """
    sigma.k_diffusion_call = call  # type: ignore[attr-defined]
    return sigma


def call_of(sigma: Any) -> Call | None:
    """What is known on the host about the call that handed out this sigma; None: nothing."""
    return getattr(sigma, "k_diffusion_call", None)


def _along(factor: Tensor, x: Tensor) -> Tensor:
    """A factor per sample, shape (B,), made to multiply x, shape (B, ...), in x's dtype."""
    return factor.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))


def check_output(network: nn.Module, output: Any, shape: Sequence[int]) -> Tensor:
    """What a network returned, if it is what a prediction must be.

    Args:
        network: to be named.
        output: what it returned.
        shape: that of its input.

    Raises:
        TypeError: it is no tensor.
        ValueError: it has another shape.
    """
    name = type(network).__name__
    if not isinstance(output, Tensor):
        raise TypeError(
            f"{name} returned {type(output).__name__}; its forward must return a tensor of the "
            f"shape of x, {tuple(shape)}"
        )
    if output.shape != tuple(shape):
        raise ValueError(
            f"{name} returned shape {tuple(output.shape)}; its forward must return the shape of x, "
            f"{tuple(shape)}"
        )
    return output


class NetworkDenoiser(nn.Module):
    """What the five kinds share; abstract. `estimate` is the formula of the kind.

    Args:
        network: called as `network(x, time, **condition)`, x of shape (B, ...), time of shape (B,)
            in float32; x comes in the dtype of the network's parameters.
        process: the schedule that the network was trained on, which gives its time.
    """

    path: Path
    prediction: ClassVar[str]
    float64_sigma = True
    time_convention: str

    def __init__(self, network: nn.Module, process: Scheduler) -> None:
        super().__init__()
        if process.own_process is not process:
            raise ValueError(
                f"{type(process).__name__} only lays levels over a process, which a network cannot "
                "be trained on: give it to KSampler as its scheduler, and the process here"
            )
        self.network = network
        self.process = process
        convention = getattr(network, "time_convention", "timestep")
        if convention not in ("timestep", "unit", "log_sigma"):
            raise ValueError(
                maths.unknown("time_convention", convention, ["timestep", "unit", "log_sigma"])
            )
        self.time_convention = convention

    def alpha(self, sigma: Any) -> Any:
        """The signal scale at sigma, a float or a tensor."""
        return self.path.alpha(sigma)

    def time(self, half_log_snr: Any) -> Any:
        """The network's time at log(alpha / sigma), in the network's own convention.

        "timestep": time × N of the process, fractional; "unit": time in [0, 1]; "log_sigma":
        log(sigma / alpha) / 4 (c_noise of Karras et al. 2022, table 1).
        """
        if self.time_convention == "log_sigma":
            return half_log_snr * -0.25
        time = self.process.time(half_log_snr)
        return time * self.process.timesteps if self.time_convention == "timestep" else time

    def check_condition(self, batch: int, **condition: Any) -> None:
        """Refuses by name what the network cannot take; done once before a run.

        Raises:
            ValueError: an unknown keyword, a wrong length or a value out of range.
        """
        check = getattr(self.network, "check_condition", None)
        if check is not None:
            check(batch, **condition)

    def estimate(self, x: Tensor, alpha: Tensor, sigma: Tensor, call: Any) -> Tensor:
        """x0 from `call(network input)`; alpha and sigma are of shape (B,)."""
        raise NotImplementedError

    def forward(self, x: Tensor, sigma: Tensor | float, **condition: Any) -> Tensor:
        """The estimate of x0.

        Args:
            x: noisy data, shape (B, ...), in this denoiser's coordinates.
            sigma: noise standard deviation in the same units, shape (B,) or (), or a number.
            condition: keyword arguments for the network.
        """
        return self._denoise(self.network, x, sigma, condition)

    def with_variance(
        self, x: Tensor, sigma: Tensor | float, **condition: Any
    ) -> tuple[Tensor, Tensor]:
        """The estimate of x0, and the log variance of the error of what the network predicts.

        For a network that, called with `return_variance=True`, returns both its prediction and that
        logarithm, shape (B,); the arguments are those of `forward`.

        Raises:
            TypeError: the network returned something else.
        """
        told: list[Tensor] = []

        def network(*args: Any, **kwargs: Any) -> Any:
            both = self.network(*args, return_variance=True, **kwargs)
            if not (isinstance(both, tuple) and len(both) == 2):
                raise TypeError(
                    f"{type(self.network).__name__} returned {type(both).__name__}; with "
                    "return_variance=True it must return its prediction and a log variance"
                )
            told.append(both[1])
            return both[0]

        return self._denoise(network, x, sigma, condition), told[0]

    def _denoise(
        self, network: Any, x: Tensor, sigma: Tensor | float, condition: Mapping[str, Any]
    ) -> Tensor:
        if not isinstance(sigma, Tensor):
            sigma = torch.tensor(float(sigma), dtype=torch.float64, device=x.device)
        if sigma.shape not in ((), x.shape[:1]):
            raise ValueError(
                f"sigma must have one value per sample, shape ({x.shape[0]},), got "
                f"{tuple(sigma.shape)} for x of shape {tuple(x.shape)}"
            )
        # The coefficients are a few numbers a sample, in float64 so that alpha stays exact.
        if sigma.device.type != "mps":
            sigma = sigma.double()
        sigma = sigma.expand(x.shape[0])
        alpha = self.path.alpha(sigma)
        time = self.time(alpha.log() - sigma.log()).float()
        dtype = next((p.dtype for p in self.network.parameters()), x.dtype)

        def call(inputs: Tensor) -> Tensor:
            output = network(inputs.to(dtype), time, **condition)
            return check_output(self.network, output, x.shape).to(x.dtype)

        return self.estimate(x, alpha, sigma, call)


class EDMDenoiser(NetworkDenoiser):
    """EDM preconditioning (Karras et al. 2022, arXiv:2206.00364, eq. 7 and table 1).

    Args:
        network: sees unit-variance input, and log(sigma) / 4 as its time.
        sigma_data: standard deviation of the clean data.
        process: the range of levels to sample in; None: sigma from 0.002 to 80.
    """

    path = VE
    prediction = "edm"

    def __init__(
        self, network: nn.Module, sigma_data: float = 0.5, process: Scheduler | None = None
    ) -> None:
        super().__init__(network, process or KarrasScheduler())
        if not sigma_data > 0:
            raise ValueError(f"sigma_data must be above 0, got {sigma_data}")
        self.sigma_data = float(sigma_data)
        self.time_convention = getattr(network, "time_convention", "log_sigma")

    def estimate(self, x: Tensor, alpha: Tensor, sigma: Tensor, call: Any) -> Tensor:
        total = sigma**2 + self.sigma_data**2
        c_skip = self.sigma_data**2 / total
        c_out = sigma * self.sigma_data / total.sqrt()
        c_in = 1 / total.sqrt()
        return _along(c_skip, x) * x + _along(c_out, x) * call(_along(c_in, x) * x)


class EpsDenoiser(NetworkDenoiser):
    """From a network that predicts the noise (Ho et al. 2020, arXiv:2006.11239, eq. 15).

    Its estimate does not exist at alpha = 0; KSampler refuses to begin there.
    """

    path = VP
    prediction = "eps"

    def __init__(self, network: nn.Module, process: Scheduler | None = None) -> None:
        super().__init__(network, process or LinearScheduler())

    def estimate(self, x: Tensor, alpha: Tensor, sigma: Tensor, call: Any) -> Tensor:
        return (x - _along(sigma, x) * call(x)) / _along(alpha, x)


class VDenoiser(NetworkDenoiser):
    """From a network that predicts v = alpha eps - sigma x0 (Salimans and Ho 2022,
    arXiv:2202.00512, section 4)."""

    path = VP
    prediction = "v"

    def __init__(self, network: nn.Module, process: Scheduler | None = None) -> None:
        super().__init__(network, process or LinearScheduler())

    def estimate(self, x: Tensor, alpha: Tensor, sigma: Tensor, call: Any) -> Tensor:
        return _along(alpha, x) * x - _along(sigma, x) * call(x)


class X0Denoiser(NetworkDenoiser):
    """From a network that predicts the clean data itself, at variance-preserving input."""

    path = VP
    prediction = "x0"

    def __init__(self, network: nn.Module, process: Scheduler | None = None) -> None:
        super().__init__(network, process or LinearScheduler())

    def estimate(self, x: Tensor, alpha: Tensor, sigma: Tensor, call: Any) -> Tensor:
        return call(x)


class FlowDenoiser(NetworkDenoiser):
    """From a network that predicts eps - x0, the velocity of the straight path from data to noise
    (Liu et al. 2022, arXiv:2209.03003, eq. 1; Lipman et al. 2022, arXiv:2210.02747)."""

    path = FLOW
    prediction = "flow"

    def __init__(self, network: nn.Module, process: Scheduler | None = None) -> None:
        super().__init__(network, process or FlowScheduler())

    def estimate(self, x: Tensor, alpha: Tensor, sigma: Tensor, call: Any) -> Tensor:
        return x - _along(sigma, x) * call(x)


DENOISERS: dict[str, type[NetworkDenoiser]] = {
    kind.prediction: kind
    for kind in (EDMDenoiser, EpsDenoiser, VDenoiser, X0Denoiser, FlowDenoiser)
}


def make_denoiser(model: Any, process: Scheduler | None = None) -> Any:
    """A Denoiser from whatever the user holds.

    Args:
        model: a Denoiser (returned as it is), a network (an `nn.Module` that carries `prediction`
            and perhaps `time_convention`, `sigma_data`, `process`), or a plain function
            `(x, sigma, **condition) -> x0`, which is taken to be variance exploding.
        process: the process of a bare network that carries none.

    Raises:
        ValueError: the network's prediction kind is unknown.
        TypeError: the model cannot be called.
    """
    if isinstance(model, Denoiser):
        return model
    if not callable(model):
        raise TypeError(f"a model must be callable, got {type(model).__name__}")
    prediction = getattr(model, "prediction", None)
    if prediction is None:
        if isinstance(model, nn.Module):
            raise ValueError(
                f"{type(model).__name__} carries no `prediction`: wrap it in EpsDenoiser, "
                "VDenoiser, X0Denoiser, FlowDenoiser or EDMDenoiser, or in FunctionDenoiser if it "
                "already returns x0"
            )
        return FunctionDenoiser(model)
    if prediction not in DENOISERS:
        raise ValueError(maths.unknown("prediction", prediction, DENOISERS))
    process = getattr(model, "process", None) or process
    if prediction == "edm":
        return EDMDenoiser(model, getattr(model, "sigma_data", 0.5), process)
    return DENOISERS[prediction](model, process)  # type: ignore[arg-type]


class FunctionDenoiser:
    """A plain function `(x, sigma, **condition) -> x0` as a Denoiser.

    Args:
        function: x of shape (B, ...), sigma of shape (B,) in x's dtype.
        path: the coordinates of x and sigma.
    """

    float64_sigma = False

    def __init__(self, function: Any, path: Path = VE) -> None:
        self.function = function
        self.path = path

    def alpha(self, sigma: Any) -> Any:
        """The signal scale at sigma, a float or a tensor."""
        return self.path.alpha(sigma)

    def __call__(self, x: Tensor, sigma: Tensor, **condition: Any) -> Tensor:
        return self.function(x, sigma, **condition)


def model_device(model: Any) -> torch.device | None:
    """The device of a model's first parameter, or None where it has none."""
    parameters = getattr(model, "parameters", None)
    first = next(iter(parameters()), None) if callable(parameters) else None
    return None if first is None else first.device
