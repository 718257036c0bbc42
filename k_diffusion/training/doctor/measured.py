"""What is off by the weights themselves: some images of the data, at a few noise levels, with fixed
noise, go through the network once with each set of weights or conditions that are compared.

docs/watching.md has the thresholds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from k_diffusion.models import Conditioner
from k_diffusion.sampling import KSampler, unit_noise
from k_diffusion.training.augmentation import unaugmented
from k_diffusion.training.checkpoint import LAST, CheckpointInfo
from k_diffusion.training.conditioning import condition_of
from k_diffusion.training.data_sections import DataConfig
from k_diffusion.training.dataset import DataError, Source, as_float, make_source
from k_diffusion.training.doctor.finding import Finding, NotSeen
from k_diffusion.training.ema import MAIN
from k_diffusion.training.loss import noisy
from k_diffusion.training.restore import load_conditioner, load_denoiser
from k_diffusion.training.told import Told, evenly, make_told, of_one_size
from k_diffusion.utils.scheduler import make_scheduler

LEVELS = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0)
"""Noise over signal at which losses are compared, in standard deviations of the data."""
ERRORS = 3.0
"""Standard errors that a difference must exceed."""
WORSE = 0.03
"""Share by which the average's loss may exceed that of the weights, or of a longer average."""
TOLD = 0.01
"""Share by which another image's condition must raise the loss, at the level where it does most."""
LEAST = 8
"""Images whose condition is another than that of the image they are compared with, at least."""
SAMPLER, SCHEDULER, STEPS = "dpmpp_2m", "karras", 20
"""What `k-diffusion sample` takes unless told otherwise."""
DISTANCE = 0.05
"""Change of the samples with four times as many steps, root mean square, as a share of theirs."""
DRAWN = 16
"""Samples drawn for that."""


@dataclass(frozen=True)
class Patient:
    """A checkpoint and images to look at it with.

    Attributes:
        info: of the checkpoint.
        weights: name of an average, or "last" -> denoiser; "ema" among them
            where the checkpoint has it.
        conditioner: makes what the network is told; None: nothing, or without data.
        x0: some images of the data, floats of shape (B, ...); None: there are none at hand.
        condition: keyword -> value, of these images.
        no_data: why there are none.
        told: what drawn samples are told; None: it cannot be had without data.
    """

    info: CheckpointInfo
    weights: Mapping[str, Any]
    conditioner: Conditioner | None
    x0: Tensor | None
    condition: Mapping[str, Tensor]
    no_data: str = ""
    told: Told | None = None

    def images(self) -> Tensor:
        """The images, or the reason why there are none."""
        if self.x0 is None:
            raise NotSeen(self.no_data)
        return self.x0

    @property
    def main(self) -> Any:
        """The denoiser that sampling takes."""
        return self.weights.get(MAIN) or next(iter(self.weights.values()))


def open_patient(checkpoint: Path, device: torch.device | str, count: int) -> Patient:
    """Load a checkpoint and, where its data can be opened, some images.

    Args:
        checkpoint: the file.
        device: where to compute.
        count: images, spread evenly over the data.

    Raises:
        CheckpointError: it cannot be used.
    """
    denoiser, info = load_denoiser(checkpoint, LAST, device)
    weights = {LAST: denoiser}
    for name in info.averages:
        weights[name] = load_denoiser(checkpoint, name, device)[0]
    conditioner = load_conditioner(info, device)
    usual = partial(make_told, denoiser.network, conditioner, count=DRAWN, seed=0, device=device)
    try:
        source = _open_data(info)
        x0, condition = _images(source, conditioner, count, device)
    except NotSeen as reason:
        told = None
        with suppress(ValueError):  # the conditioner cannot tell nothing
            told = usual(source=None)
        return Patient(info, weights, conditioner, None, {}, str(reason), told)
    condition |= unaugmented(denoiser.network, len(x0), device)
    return Patient(info, weights, conditioner, x0, condition, told=usual(source=source))


@torch.no_grad()
def _images(
    source: Source, conditioner: Conditioner | None, count: int, device: torch.device | str
) -> tuple[Tensor, dict[str, Tensor]]:
    """Some images of one size, evenly spread, and their condition.

    Raises:
        NotSeen: the data does not hold what the network is told.
    """
    members, _ = of_one_size(source)
    n = min(count, len(members))
    batch = source.batch(evenly(members, n))
    x0 = as_float(batch.images.to(device))
    if conditioner is None:
        return x0, {}
    try:
        return x0, condition_of(conditioner, batch, x0, source.class_names, range(n))
    except ValueError as error:
        raise NotSeen(f"the data at hand does not say what the network is told ({error})") from None


def _open_data(info: CheckpointInfo) -> Source:
    """The data that a checkpoint was trained on.

    Raises:
        NotSeen: it is not at hand, or is another.
    """
    told: Any = info.config.get("data")
    try:
        options = TypeAdapter(DataConfig).validate_python(told).model_dump()
        source = make_source(**options)
        facts = source.facts()
    except (DataError, ValidationError, OSError, ImportError) as error:
        reason = str(error).partition("\n")[0]
        raise NotSeen(f"the run's data cannot be opened here ({reason})") from None
    for key in ("shape", "images", "mean", "std"):
        if not _same(facts.get(key), info.data.get(key)):
            raise NotSeen(
                f"the data at hand is another than the run's: its {key} is {facts.get(key)}, and "
                f"was {info.data.get(key)}"
            )
    return source


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-4, abs_tol=1e-6)
    return bool(one == other)


# ---------------------------------------------------------------- losses


@torch.no_grad()
def errors(denoiser: Any, x0: Tensor, condition: Mapping[str, Tensor], scale: float) -> Tensor:
    """|D - x0|², a mean over each image, at all `LEVELS` times scale: float64, shape (L, B).

    The noise is the same at every call.
    """
    noise = unit_noise(tuple(x0.shape[1:]), list(range(len(x0))), x0.device)
    found = []
    for level in LEVELS:
        half_log_snr = torch.full((len(x0),), -math.log(level * scale), dtype=torch.float64)
        sigma = denoiser.path.sigma(half_log_snr)
        sigma = sigma.to(x0.device, torch.float32 if x0.device.type == "mps" else torch.float64)
        x, _ = noisy(denoiser, x0, sigma, noise.to(x0.dtype))
        error = denoiser(x, sigma, **condition) - x0
        found.append(error.double().square().flatten(1).mean(1).cpu())
    return torch.stack(found)


def excess(one: Tensor, other: Tensor) -> tuple[float, float]:
    """By which share the losses of the one are above those of the other, and its standard error.

    Args:
        one, other: of the same images at the same levels, shape (L, B). Each level counts as much,
            whatever the size of its loss.
    """
    share = ((one - other) / other.mean(1, keepdim=True)).mean(0)
    if len(share) < 2:
        return float(share.mean()), math.inf
    return float(share.mean()), float(share.std() / math.sqrt(len(share)))


def average_measured(patient: Patient) -> Finding | None:
    """An average that is worse than the weights, or than a longer average."""
    x0 = patient.images()
    if MAIN not in patient.weights:
        raise NotSeen("the checkpoint holds one set of weights alone")
    scale = _scale(patient)
    losses = {
        name: errors(denoiser, x0, patient.condition, scale)
        for name, denoiser in patient.weights.items()
    }
    figures = {name: float(loss.mean(1).mean()) for name, loss in losses.items()}
    over, error = excess(losses[MAIN], losses[LAST])
    if over > WORSE and over > ERRORS * error:
        shorter = _better(losses, MAIN)
        other = f"k-diffusion sample --weights {shorter}, a better average, or " if shorter else ""
        return Finding(
            f"on {len(x0)} images of the data the average's loss is {over:.1%} above that of the "
            f"last weights (standard error {error:.1%}): it is too long for so short a run",
            f"{other}a longer run, or a lower ema.max_decay",
            {"losses": figures, "excess": over, "standard_error": error},
        )
    better = _better(losses, MAIN)
    if better:
        over, error = excess(losses[MAIN], losses[better])
        return Finding(
            f"on {len(x0)} images of the data the average's loss is {over:.1%} above that of "
            f"{better} (standard error {error:.1%})",
            f"k-diffusion sample --weights {better}, or a higher ema.max_decay",
            {"losses": figures, "excess": over, "standard_error": error, "better": better},
        )
    return None


def _better(losses: Mapping[str, Tensor], than: str) -> str:
    """The average whose loss is lowest, if that of another is well above it; else nothing."""
    averages = [name for name in losses if name not in (LAST, than)]
    if not averages:
        return ""
    best = min(averages, key=lambda name: excess(losses[name], losses[than])[0])
    over, error = excess(losses[than], losses[best])
    return best if over > WORSE and over > ERRORS * error else ""


def conditioning(patient: Patient) -> Finding | None:
    """A network that is told things and does not listen."""
    if patient.conditioner is None:
        raise NotSeen("the network is told nothing")
    dropout = patient.info.config.get("condition_dropout", 0.0)
    if dropout >= 1:
        return Finding(
            "condition_dropout is 1, so that the network is never told anything",
            "condition_dropout = 0.1",
            {"condition_dropout": dropout},
        )
    x0 = patient.images()
    others = {name: value.roll(len(x0) // 2, 0) for name, value in patient.condition.items()}
    differ = torch.zeros(len(x0), dtype=torch.bool)
    for name, value in patient.condition.items():
        differ |= (value != others[name]).reshape(len(x0), -1).any(1).cpu()
    if int(differ.sum()) < LEAST:
        raise NotSeen(f"{int(differ.sum())} of {len(x0)} images have a condition of their own")
    scale, network = _scale(patient), patient.main
    true = errors(network, x0, patient.condition, scale)[:, differ]
    wrong = errors(network, x0, others, scale)[:, differ]
    found = [excess(wrong[k : k + 1], true[k : k + 1]) for k in range(len(LEVELS))]
    sigmas = [level * scale for level in LEVELS]
    figures = {
        "noise_over_signal": sigmas,
        "excess": [over for over, _ in found],
        "standard_error": [error for _, error in found],
    }
    if any(over > TOLD and over > ERRORS * error for over, error in found):
        return None
    most = max(over for over, _ in found)
    change = "look whether the labels belong to their images, and a longer run"
    if dropout > 0.3:
        change = f"condition_dropout = 0.1 (it is {dropout:g}), or " + change
    chance = ", which may be chance" if most > TOLD else ""
    return Finding(
        f"the network does not listen to its condition: with that of another image its loss is at "
        f"most {max(most, 0.0):.1%} higher than with the image's own{chance} "
        f"({int(differ.sum())} images, noise from {sigmas[0]:.2g} to {sigmas[-1]:.2g} times the "
        "signal)",
        change,
        figures,
    )


def _scale(patient: Patient) -> float:
    std = patient.info.data.get("std")
    return float(std) if isinstance(std, (int, float)) and std > 0 else 1.0


# ---------------------------------------------------------------- samples


def steps_in_sampling(patient: Patient) -> Finding | None:
    """Samples that change with more steps than `k-diffusion sample` takes by default."""
    sampler = KSampler(patient.main, make_scheduler(SCHEDULER), SAMPLER)
    if patient.told is None:
        raise NotSeen(f"the network must be told something, and {patient.no_data}")
    condition = patient.told(range(DRAWN))
    shape = patient.told.shape or tuple(patient.info.data["shape"])
    noise = unit_noise(shape, list(range(DRAWN)), sampler.device)

    def drawn(steps: int) -> Tensor:
        return sampler.sample(noise, steps, condition, seed=list(range(DRAWN))).double()

    fine, far = drawn(4 * STEPS), {}
    for steps in (STEPS, 2 * STEPS):
        far[steps] = float(
            (drawn(steps) - fine).square().mean().sqrt() / fine.square().mean().sqrt()
        )
        if far[steps] <= DISTANCE:
            break
    if far[STEPS] <= DISTANCE:
        return None
    enough = 2 * STEPS if far.get(2 * STEPS, math.inf) <= DISTANCE else 0
    change = f"k-diffusion sample --steps {enough}" if enough else "k-diffusion sample --steps auto"
    return Finding(
        f"{STEPS} steps of {SAMPLER} are too few for this model: with {4 * STEPS} steps from the "
        f"same noises the samples change by {far[STEPS]:.1%} of their size",
        f"{change}; k-diffusion compare shows other methods",
        {"steps": STEPS, "distance": {str(steps): value for steps, value in far.items()}},
    )


CHECKS: dict[str, Callable[[Patient], Finding | None]] = {
    "average measured": average_measured,
    "conditioning": conditioning,
    "steps in sampling": steps_in_sampling,
}
"""Name -> check, in the order in which they are told."""
