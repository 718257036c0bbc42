"""What the config of a diffusers scheduler says: what the network predicts, and on which process.

A published model carries, beside its weights, the config of a scheduler. That config, and nothing
else, tells what the network was trained to predict, at which levels, how it is told the level, and
which levels its authors draw samples on. Here it is read; a key or a value that is not understood
is refused by name, because a guess gives grey pictures and no error.

=========================================  ==========  ==============================  ===========
config                                     prediction  process                         time
=========================================  ==========  ==============================  ===========
betas, "epsilon"                           eps         linear, scaled_linear,          timestep
                                                       squaredcos, or the betas
betas, "v_prediction"                      v           the same                        timestep
betas, "sample"                            x0          the same                        timestep
betas, timestep_type "continuous"          as above    the same                        log(sigma)/4
EDM*                                       edm         karras                          log(sigma)/4
CosineDPMSolverMultistep, "v_prediction"   v           shifted_cosine (no shift)       unit
FlowMatch*, or "flow_prediction"           flow        flow                            timestep
=========================================  ==========  ==============================  ===========
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from k_diffusion.utils import maths
from k_diffusion.utils.levels import Level
from k_diffusion.utils.scheduler import (
    CustomScheduler,
    FlowScheduler,
    KarrasScheduler,
    LinearScheduler,
    ScaledLinearScheduler,
    Scheduler,
    ShiftedCosineScheduler,
    SquaredCosScheduler,
    ZeroTerminalScheduler,
)

BETAS = (
    "DDIMParallelScheduler", "DDIMScheduler", "DDPMParallelScheduler", "DDPMScheduler",
    "DEISMultistepScheduler", "DPMSolverMultistepScheduler", "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler", "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler",
    "HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler",
    "LCMScheduler", "LMSDiscreteScheduler", "PNDMScheduler", "SASolverScheduler", "TCDScheduler",
    "UniPCMultistepScheduler",
)  # fmt: skip
"""Schedulers over a discrete process of betas."""
FLOWS = (
    "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler",
)  # fmt: skip
EDMS = ("EDMDPMSolverMultistepScheduler", "EDMEulerScheduler")
COSINE = ("CosineDPMSolverMultistepScheduler",)
KNOWN = (*BETAS, *FLOWS, *EDMS, *COSINE)
FROM_SIGMA = (
    "DPMSolverSDEScheduler", "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler",
    "HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
)  # fmt: skip
"""Schedulers in variance-exploding coordinates, whose samples may begin at sigma times noise."""
KEEPS_NOISE = ("DDIMParallelScheduler", "DDIMScheduler", "TCDScheduler")
"""Schedulers that limit the estimate of x0 alone (`use_clipped_model_output` is not set)."""

PREDICTIONS = {
    "epsilon": "eps", "v_prediction": "v", "sample": "x0", "flow_prediction": "flow",
}  # fmt: skip
OURS = ("lays", "options", "schedule", "schedule_options", "solver")
"""Keys that `PlanScheduler` adds to the config of the scheduler in whose place it stands."""


@dataclass(frozen=True)
class Conventions:
    """How a network is to be called and where it may be sampled.

    Attributes:
        prediction: "eps", "v", "x0", "flow" or "edm", as in `denoiser.DENOISERS`.
        process: gives the network's time for a level.
        time_convention: "timestep", "unit" or "log_sigma"; see `NetworkDenoiser.time`.
        sigma_data: of EDM preconditioning.
        negated: the network's answer is to be negated first (EDM's "v_prediction").
        unit_start: samples begin as unit noise at the first level, instead of sigma times unit
            noise. They differ by what is left of the signal there: 0.2% for Stable Diffusion.
        clip: the estimate of x0 is kept within [-clip, clip]; None: it is left alone.
        threshold: (quantile, largest value) of dynamic thresholding; None: none.
        keeps_noise: DDIM's steps put the limited estimate together with the noise that the network
            saw, not with the noise that the limited estimate leaves.
        exploding: the scheduler itself, though over a process of betas, is variance-exploding.
    """

    prediction: str
    process: Scheduler
    time_convention: str = "timestep"
    sigma_data: float = 1.0
    negated: bool = False
    unit_start: bool = True
    clip: float | None = None
    threshold: tuple[float, float] | None = None
    keeps_noise: bool = False
    exploding: bool = False

    def handed(self, end: Level) -> float:
        """By what a finished sample is divided, that the scheduler's pipelines may decode it.

        Not 1 where it keeps noise, and the scheduler hands over x0 + sigma eps.
        """
        return end.alpha if self.exploding and end.sigma > 0 else 1.0


def config_of(scheduler: Any) -> dict[str, Any]:
    """The config of a diffusers scheduler, or one given as a mapping; its class as `_class_name`.

    Raises:
        TypeError: it is neither.
        ValueError: a class or a key that is not known.
    """
    config = getattr(scheduler, "config", scheduler)
    if not isinstance(config, Mapping):
        raise TypeError(
            f"a diffusers scheduler or its config is needed, got {type(scheduler).__name__}"
        )
    plain = dict(config)
    name = plain.get("_class_name") or (type(scheduler).__name__ if config is not scheduler else "")
    if not name:
        raise ValueError(
            "a config needs its _class_name, the diffusers scheduler whose it is: give the "
            "scheduler itself, or what save_pretrained wrote"
        )
    if name == "PlanScheduler":  # it stands in the place of another
        name = plain.get("lays")
    if name not in KNOWN:
        raise ValueError(maths.unknown("diffusers scheduler", name, KNOWN))
    plain["_class_name"] = name
    known = _options(name)
    for key in plain:
        if not key.startswith("_") and key not in known and key not in OURS:
            others = (other for other in installed() if key in _options(other))
            if next(others, None) is None:
                raise ValueError(maths.unknown(f"key in the config of {name},", key, known))
    # A config keeps the keys of schedulers that stood there before: they decide nothing here.
    kept = {k: v for k, v in plain.items() if k in known or k.startswith("_") or k in OURS}
    return {**known, **kept}


def read_conventions(scheduler: Any) -> Conventions:
    """What a diffusers scheduler, or its config, says of the network.

    Raises:
        TypeError: it is no scheduler and no config.
        ValueError: a class, a key or a value that is not known, by name.
    """
    config = config_of(scheduler)
    name = config["_class_name"]
    said = config.get("prediction_type", "flow_prediction" if name in FLOWS else "epsilon")
    if said not in PREDICTIONS:
        raise ValueError(
            maths.unknown(f"prediction_type in the config of {name},", said, PREDICTIONS)
        )
    prediction = PREDICTIONS[said]
    _check_sigmas(name, config, said)
    limits = _limits(config)
    if name in FLOWS or prediction == "flow":
        if prediction != "flow":
            raise ValueError(f"{name} is for flow networks, but prediction_type is {said!r}")
        return Conventions("flow", FlowScheduler(timesteps=config["num_train_timesteps"]), **limits)
    if name in EDMS:
        if prediction not in ("eps", "v"):
            raise ValueError(f"{name} knows no prediction_type {said!r}: epsilon or v_prediction")
        data = float(config["sigma_data"])
        process = KarrasScheduler(config["sigma_min"], config["sigma_max"], config["rho"])
        return Conventions("edm", process, "log_sigma", data, prediction == "v", **limits)
    if name in COSINE:
        if prediction != "v" or config["sigma_data"] != 1:
            raise ValueError(
                f"{name} is understood with prediction_type v_prediction and sigma_data 1, got "
                f"{said!r} and {config['sigma_data']}"
            )
        # Time is atan(sigma) · 2 / pi: the angle of the cosine schedule.
        return Conventions("v", ShiftedCosineScheduler(64, 64, -60.0, 60.0), "unit", **limits)
    continuous = config.get("timestep_type") == "continuous"
    time = "log_sigma" if continuous else "timestep"
    # The established sigmas begin at sigma times the noise; those of the others at 1, or at
    # sqrt(sigma² + 1), which is 1 at unit variance.
    unit = name not in FROM_SIGMA or config["timestep_spacing"] not in ("linspace", "trailing")
    exploding = name in FROM_SIGMA
    return Conventions(
        prediction, _process(config), time, unit_start=unit, exploding=exploding, **limits
    )


def installed() -> list[str]:
    """Those of the known schedulers that the diffusers here has."""
    import diffusers

    return [name for name in KNOWN if hasattr(diffusers, name)]


def _options(name: str) -> dict[str, Any]:
    """The keys that a scheduler's config has, and their defaults."""
    import diffusers

    kind = getattr(diffusers, name, None)
    if kind is None:
        raise ValueError(f"this diffusers has no {name}: install a newer one")
    parameters = inspect.signature(kind.__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.name != "self" and p.kind != p.VAR_KEYWORD}


def _check_sigmas(name: str, config: Mapping[str, Any], said: str) -> None:
    """Refuses ways to lay sigmas that contradict the prediction, or are not understood."""
    flow = bool(config.get("use_flow_sigmas"))
    if name not in FLOWS and flow != (said == "flow_prediction"):
        raise ValueError(
            f"use_flow_sigmas {flow} of {name} does not go with prediction_type {said!r}: flow "
            "networks are flow_prediction and have flow sigmas, others neither"
        )
    if config.get("invert_sigmas"):
        raise ValueError(f"invert_sigmas of {name} counts from clean to noisy, unlike all else")
    kind = config.get("timestep_type", "discrete")
    if kind not in ("discrete", "continuous"):
        what = f"timestep_type in the config of {name},"
        raise ValueError(maths.unknown(what, kind, ("discrete", "continuous")))


def _limits(config: Mapping[str, Any]) -> dict[str, Any]:
    """Clipping and thresholding of the estimate, as keywords of `Conventions`."""
    keeps = {"keeps_noise": config["_class_name"] in KEEPS_NOISE}
    if config.get("thresholding"):
        ratio, largest = config["dynamic_thresholding_ratio"], config["sample_max_value"]
        return {"threshold": (float(ratio), float(largest)), **keeps}
    if config.get("clip_sample"):
        return {"clip": float(config.get("clip_sample_range", 1.0)), **keeps}
    return {}


def _process(config: Mapping[str, Any]) -> Scheduler:
    """The discrete process of a config with betas."""
    betas = config.get("trained_betas")
    steps, schedule = config["num_train_timesteps"], config["beta_schedule"]
    # Ours are for 1000 timesteps, and scaled for others; theirs are as they are.
    first, last = (config[key] * steps / 1000 for key in ("beta_start", "beta_end"))
    process: Scheduler
    if betas is not None:
        process = CustomScheduler(betas=[float(beta) for beta in betas])
    elif schedule == "linear":
        process = LinearScheduler(steps, first, last)
    elif schedule == "scaled_linear":
        process = ScaledLinearScheduler(steps, first, last)
    elif schedule == "squaredcos_cap_v2":
        process = SquaredCosScheduler(steps)
    else:
        known = ("linear", "scaled_linear", "squaredcos_cap_v2")
        name = config["_class_name"]
        raise ValueError(maths.unknown(f"beta_schedule in the config of {name},", schedule, known))
    if config.get("snr_shift_scale") not in (None, 1.0):
        raise ValueError(f"snr_shift_scale {config['snr_shift_scale']} is not understood here")
    return ZeroTerminalScheduler(process) if config.get("rescale_betas_zero_snr") else process
