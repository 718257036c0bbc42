"""A denoiser, its conditioner and weights out of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from k_diffusion.denoiser import make_denoiser
from k_diffusion.models import ClassConditioner, Conditioner, make_conditioner, make_model
from k_diffusion.models.registry import model_trait
from k_diffusion.training.checkpoint import (
    CheckpointError,
    CheckpointInfo,
    copy_tensors,
    named_tensors,
    read_checkpoint,
    save_checkpoint,
)
from k_diffusion.training.compare import differences, filled, flat, full_model
from k_diffusion.utils.maths import nearest
from k_diffusion.utils.scheduler import make_scheduler


def load_denoiser(
    path: str | Path,
    ema: bool | str = True,
    device: str | torch.device = "cpu",
    network: nn.Module | None = None,
) -> tuple[Any, CheckpointInfo]:
    """Rebuild the trained network as a Denoiser, in evaluation mode.

    Args:
        path: a checkpoint, or what `save_inference` wrote.
        ema: True: the averaged weights; False: the last ones; a name: that average, one of the
            info's `averages`, such as "ema_0.05".
        device: where to put it.
        network: takes the weights instead of one built from the config: for a network of your own.

    Returns:
        The denoiser, and what the checkpoint says about itself.

    Raises:
        CheckpointError: missing, damaged, not a checkpoint, or it does not fit the network.
    """
    info, weights = read_checkpoint(path, [_weights_part(ema)])
    chosen = _chosen(info, weights, ema)
    try:
        process = info.config.get("process")
        scheduler = make_scheduler(**process) if process else None
        if network is None:
            network = make_model(info.config["model"])
        denoiser = make_denoiser(network, scheduler)
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"checkpoint {path} holds a network that cannot be built here ({_line(error)})"
        ) from None
    load_into(network, chosen, info)
    return denoiser.to(device).eval().requires_grad_(False), info


def load_conditioner(
    info: CheckpointInfo, device: str | torch.device = "cpu"
) -> Conditioner | None:
    """What makes a network's condition, as it was trained with; None: it is told nothing.

    Args:
        info: of the checkpoint.
        device: where to put it.

    Raises:
        CheckpointError: it cannot be made here.
    """
    try:
        if config := info.config.get("conditioner"):
            return make_conditioner(config).to(device)
        classes = int(model_trait(info.config["model"], "num_classes", 0))
        if not classes:
            return None
        names = info.data.get("class_names") or ()
        return ClassConditioner(
            num_classes=classes, class_names=tuple(names) if len(names) == classes else ()
        ).to(device)
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"checkpoint {info.path} has a conditioner that cannot be made here ({_line(error)})"
        ) from None


def load_into(network: nn.Module, weights: Mapping[str, Tensor], info: CheckpointInfo) -> None:
    """Copy a checkpoint's weights into a network.

    Raises:
        CheckpointError: names or shapes differ; nothing is copied then. The message has the keys in
            which the network's config differs from the one trained, where both are known.
    """
    try:
        copy_tensors(weights, named_tensors(network))
    except ValueError as error:
        trained = filled(info.config).get("model", {})
        ours = full_model(network, trained) if trained else {}
        differing = differences(flat(trained), flat(ours))
        way = f", with {'; '.join(differing)}" if differing else ""
        raise CheckpointError(
            f"checkpoint {info.path} does not fit {type(network).__name__}: {error}; "
            f"use the config that it was trained with{way}"
        ) from None


def save_inference(source: str | Path, path: str | Path, *, ema: bool | str = True) -> str:
    """Write from a checkpoint one that holds only what sampling needs: one set of weights.

    Args:
        source: a checkpoint.
        path: the file to write.
        ema: which weights are taken, see `load_denoiser`; in the new file they are "ema".

    Returns:
        The new checkpoint's sha256.
    """
    info, weights = read_checkpoint(source, [_weights_part(ema)])
    return save_checkpoint(
        path,
        {"ema": _chosen(info, weights, ema)},
        config=info.config,
        images_seen=info.images_seen,
        step=info.step,
        data=info.data,
        state={"weights": info.state.get("weights", _weights_part(ema))},
    )


def _weights_part(ema: bool | str) -> str:
    return ema if isinstance(ema, str) else "ema" if ema else "model"


def _chosen(
    info: CheckpointInfo, weights: Mapping[str, dict[str, Tensor]], ema: bool | str
) -> dict[str, Tensor]:
    part = _weights_part(ema)
    chosen = weights[part]
    if not chosen or (isinstance(ema, str) and part not in info.averages):
        there = sorted({name.partition("/")[0] for name in info.tensors})
        averages = info.averages
        way = nearest(part, averages) or (averages[0] if averages else "model")
        asked = {"ema": "ema=True", "model": "ema=False"}.get(way, f"ema={way!r}")
        raise CheckpointError(
            f"checkpoint {info.path} holds no "
            f"{f'average {part}' if isinstance(ema, str) else f'{part} weights'}, only "
            f"{', '.join(there) or 'nothing'}: ask for {asked}"
        )
    return chosen


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
