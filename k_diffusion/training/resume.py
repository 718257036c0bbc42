"""What a checkpoint of a run holds, and how a run goes on from one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from k_diffusion.training.augmentation_config import AugmentationConfig
from k_diffusion.training.checkpoint import (
    CONDITIONER,
    OTHERS,
    CheckpointError,
    CheckpointInfo,
    read_checkpoint,
    read_record,
)
from k_diffusion.training.compare import differences, filled, flat
from k_diffusion.training.ema import MAIN, load_averages
from k_diffusion.training.fit import ROUNDING
from k_diffusion.training.named_tensors import copy_tensors, named_tensors, own_tensors
from k_diffusion.training.optimizer import load_moments, moments, plain_state
from k_diffusion.training.parallel import Processes
from k_diffusion.training.restore import load_into
from k_diffusion.training.sharded import read_sharded

if TYPE_CHECKING:
    from k_diffusion.training.dataset import Source
    from k_diffusion.training.trainer import Trainer

FIXED = (
    "seed", "batch_size", "model", "data", "process", "conditioner", "augmentation",
    "optimizer.type",
)  # fmt: skip
"""What a resumed run must share with the one it continues: else its steps would be others."""


def tensors_of(trainer: Trainer) -> dict[str, Mapping[str, Tensor]]:
    """Part of a checkpoint -> its tensors by name, which are live."""
    return {
        "model": named_tensors(trainer.network),
        **{name: average.state_dict() for name, average in trainer.averages.items()},
        "optimizer": moments(trainer.optimizer, trainer.named),
        "loss": trainer.objective.own_tensors(),
        CONDITIONER: own_tensors(trainer.conditioner),
    }


def facts_of(trainer: Trainer) -> dict[str, Any]:
    """What a checkpoint holds beside tensors, as JSON data."""
    noise_scale, scaler, conditioner = trainer.noise_scale, trainer.scaler, trainer.conditioner
    return {
        "config": trainer.config.to_json(),
        "images_seen": trainer.images_seen,
        "step": trainer.step,
        "data": trainer.source.facts(),
        "state": {
            "ema_updates": trainer.ema.updates,
            "ema_reached": trainer.ema.reached,
            "skipped_steps": trainer.skipped_steps,
            "skipped_in_a_row": trainer.skipped_in_a_row,
            "micro_batch": trainer.gradient.allowed_by_memory,
            "passed_over": [list(part) for part in trainer.passed_over],
            "noise_scale": noise_scale.state_dict() if noise_scale else None,
            "scaler": scaler.state_dict() if scaler is not None else None,
            "optimizer": plain_state(trainer.optimizer, trainer.named, trainer.group_start),
            "extra": trainer.extra,
            "computed_with": computed_with(trainer),
            "network": type(trainer.network).__name__,
            "conditioner": None if conditioner is None else type(conditioner).__name__,
        },
    }


def computed_with(trainer: Trainer) -> dict[str, str]:
    """What decides the last bits of a step besides (seed, step): sums go in another order there."""
    device, threads = trainer.device, torch.get_num_threads()
    return {
        "torch": torch.__version__,
        "processes": str(trainer.processes.count),
        **(
            {"device": torch.cuda.get_device_name(device)}
            if device.type == "cuda"
            else {"device": device.type, "threads": str(threads)}
        ),
    }


@dataclass(frozen=True)
class RunState:
    """What `facts_of` has as "state", as far as a resume takes it up.

    Attributes:
        ema_updates, ema_reached: of the averages, see `Ema`.
        micro_batch: what memory allows; None: it has refused nothing.
        passed_over: (start, stop) of steps that are left out.
        scaler, optimizer, extra, noise_scale: as JSON data; None: the run had none.
    """

    ema_updates: int
    ema_reached: int
    skipped_steps: int
    skipped_in_a_row: int
    micro_batch: int | None
    passed_over: list[tuple[int, int]]
    noise_scale: dict[str, float] | None
    scaler: dict[str, float] | None
    optimizer: dict[str, Any] | None
    extra: dict[str, Any]


def state_of(info: CheckpointInfo) -> RunState:
    """The state in a checkpoint, of which nothing is taken up before all of it is as it must be.

    Raises:
        CheckpointError: it is not as this library writes it.
    """
    state = info.state
    try:
        return RunState(
            ema_updates=_count(state["ema_updates"]),
            ema_reached=_reached(state),
            skipped_steps=_count(state["skipped_steps"]),
            skipped_in_a_row=_count(state["skipped_in_a_row"]),
            micro_batch=None if (m := state.get("micro_batch")) is None else _count(m, 1),
            passed_over=[
                (_count(start), _count(stop, start)) for start, stop in state.get("passed_over", [])
            ],
            noise_scale=_numbers(state.get("noise_scale"), ("updates", "square", "variance")),
            scaler=_numbers(state["scaler"] or None, _SCALER),
            optimizer=_plain_optimizer(state.get("optimizer")),
            extra=dict(state["extra"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise CheckpointError(
            f"checkpoint {info.path} is whole, but its state is not one that k_diffusion writes "
            f"({reason}): {OTHERS}"
        ) from None


_SCALER = ("scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker")


def _count(value: Any, least: int = 0) -> int:
    if type(value) is not int or not least <= value < 2**63:
        raise ValueError(f"{value!r} is no whole number of at least {least}")
    return value


def _reached(state: dict[str, Any]) -> int:
    """Checkpoints of a time when each update moved the averages do not say it."""
    updates = _count(state["ema_updates"])
    reached = _count(state.get("ema_reached", updates))
    if reached > updates:
        raise ValueError(f"averages that moved at update {reached} of {updates}")
    return reached


def _numbers(given: Any, needed: tuple[str, ...]) -> dict[str, float] | None:
    if given is None:
        return None
    if not (isinstance(given, dict) and set(needed) <= set(given)):
        raise ValueError(f"{given!r} is no table of {', '.join(needed)}")
    for key, value in given.items():
        if type(value) not in (int, float):
            raise ValueError(f"{key} = {value!r} is no number")
    return given


def _plain_optimizer(given: Any) -> dict[str, Any] | None:
    """What `plain_state` gave."""
    if given is None:
        return None
    tables = [*given["weights"].values(), *given["groups"], given["weights"]]
    whole = isinstance(given["class"], str) and all(isinstance(table, dict) for table in tables)
    if not whole or any("params" in group for group in given["groups"]):
        raise ValueError("what it has of the optimizer is no table of its values")
    return dict(given)


def go_on_from(path: Path, trainer: Trainer) -> None:
    """Bring a trainer of the same run to where a checkpoint was.

    Raises:
        CheckpointError: it is damaged, of another run, or for sampling only; on every process,
            whichever of them met it.
    """
    # Shards are read together: not where one process alone would begin to.
    together = trainer.is_sharded and all(trainer.processes.gather(path.is_dir()))
    trainer.processes.together(lambda: _go_on_from(path, trainer, together), CheckpointError)


def _go_on_from(path: Path, trainer: Trainer, together: bool) -> None:
    if str(path) == "auto" and not path.exists():
        raise CheckpointError(
            "resume = 'auto' is for run_training, which knows the run's folder: give a checkpoint, "
            "such as latest_checkpoint(config.out)"
        )
    wanted = ["model", *trainer.averages, "optimizer", "loss", CONDITIONER]
    if together:
        weights = dict(trainer.named.named_parameters())
        info, parts = read_sharded(path, wanted, trainer.processes, cut_like=weights)
    else:
        info, parts = read_checkpoint(path, wanted)
    check_same_run(info, trainer)
    if not parts["model"]:
        raise CheckpointError(
            f"checkpoint {path} holds weights for sampling only: it cannot be resumed; begin a new "
            f"run from them by init_from = '{path}'"
        )
    state = state_of(info)
    load_into(trainer.network, parts["model"], info)
    try:
        if parts[CONDITIONER]:
            copy_tensors(parts[CONDITIONER], own_tensors(trainer.conditioner))
        load_averages(trainer.averages, parts, state.ema_updates, state.ema_reached)
        trainer.objective.load_own_tensors(parts["loss"])
        load_moments(trainer.optimizer, trainer.named, parts["optimizer"], state.optimizer)
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"checkpoint {path} cannot be resumed: {error}") from None
    trainer.averages_left_out = sorted(set(info.averages) - set(trainer.averages))
    if trainer.scaler is not None and state.scaler is not None:
        trainer.scaler.load_state_dict(state.scaler)
    trainer.step = info.step
    trainer.skipped_steps = state.skipped_steps
    trainer.skipped_in_a_row = state.skipped_in_a_row
    # What memory once refused it would refuse again.
    known = [m for m in (trainer.micro_batch, state.micro_batch) if m is not None]
    trainer.gradient.micro_batch = min(known, default=None)
    trainer.passed_over = state.passed_over
    if trainer.noise_scale is not None and state.noise_scale is not None:
        trainer.noise_scale.load_state_dict(state.noise_scale)
    trainer.extra = state.extra
    trainer.data_otherwise = changed_data(info.data, trainer.source)
    before, now = info.state.get("computed_with"), computed_with(trainer)
    if isinstance(before, dict):
        trainer.computed_otherwise = [
            f"{key} {before.get(key, 'none')} before and {now.get(key, 'none')} now"
            for key in sorted({*before, *now})
            if before.get(key) != now.get(key)
        ]


def changed_data(before: Mapping[str, Any], source: Source) -> list[str]:
    """In what data differ from what a checkpoint says of them, but for rounding."""
    found = {"mean": source.mean, "std": source.std}
    return [
        f"{name} {before[name]:.6g} before and {value:.6g} now"
        for name, value in found.items()
        if isinstance(before.get(name), float)
        and not math.isclose(before[name], value, rel_tol=ROUNDING, abs_tol=ROUNDING)
    ]


def begin_from(
    path: Path, network: nn.Module, conditioner: nn.Module | None, processes: Processes
) -> dict[str, Tensor]:
    """Give a new run's network, and its conditioner, the weights in a file.

    Args:
        path: a checkpoint or a file for sampling, which has the average alone.
        network: takes the weights.
        conditioner: takes what the file's has drawn for itself, where it is of the same tensors.
        processes: of the run; each reads the file.

    Returns:
        The average in it, by the weights' names.

    Raises:
        CheckpointError: it is damaged, or does not fit the network; on every process.
    """

    def read() -> dict[str, Tensor]:
        info, parts = read_checkpoint(path, ["model", MAIN, CONDITIONER])
        average = parts[MAIN] or parts["model"]
        if not average:
            raise CheckpointError(f"checkpoint {path} holds no weights to begin from")
        load_into(network, parts["model"] or average, info)
        drawn = own_tensors(conditioner)
        if {name: t.shape for name, t in parts[CONDITIONER].items()} == {
            name: t.shape for name, t in drawn.items()
        }:
            copy_tensors(parts[CONDITIONER], drawn)
        return average

    return processes.together(read, CheckpointError)


def sigma_data_of(path: str | Path) -> float | None:
    """What a checkpoint's run has as model.sigma_data; None where the file cannot tell, whose
    fault is named when all of it is read."""
    try:
        model = read_record(path)["config"]["model"]
    except (CheckpointError, KeyError, TypeError):
        return None
    found = model.get("sigma_data") if isinstance(model, dict) else None
    return found if isinstance(found, float) else None


def check_same_run(info: CheckpointInfo, trainer: Trainer) -> None:
    """Refuse a checkpoint of a run whose steps would be others."""
    theirs, ours = flat(filled(info.config)), flat(filled(trainer.config.to_json()))
    theirs["data.images"], ours["data.images"] = info.data.get("images"), len(trainer.source)
    # Checkpoints of a time when there was nothing else do not say it.
    old = {"optimizer.type": "adamw", **flat({"augmentation": AugmentationConfig().model_dump()})}
    theirs = old | theirs
    theirs, ours = (
        {k: v for k, v in both.items() if {k, k.split(".")[0]} & set(FIXED) and k != "data.path"}
        for both in (theirs, ours)
    )
    if differing := differences(theirs, ours):
        cause = ""
        if theirs.get("model.sigma_data") != ours.get("model.sigma_data") == trainer.source.std:
            cause = ' (which is "auto", of the data: they are others now)'
        raise CheckpointError(
            f"checkpoint {info.path} is of a run with {'; '.join(differing)}{cause}: resume with "
            f"the same, or begin a new run from its weights by init_from = '{info.path}'"
        )


def check_agreed(processes: Processes, step: int) -> None:
    """Refuse to begin where processes do not go on from the same place."""
    steps = processes.gather(step)
    if len(set(steps)) > 1:
        raise CheckpointError(
            f"the processes would go on from steps {', '.join(map(str, steps))}: the "
            "checkpoints must lie on a disk that all of them see"
        )
