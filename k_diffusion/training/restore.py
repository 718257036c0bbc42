"""A denoiser, its conditioner and weights out of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from k_diffusion.denoiser import make_denoiser
from k_diffusion.models import (
    CONDITIONERS,
    ClassConditioner,
    Conditioner,
    make_conditioner,
    make_model,
)
from k_diffusion.models.registry import model_trait
from k_diffusion.training.card import model_card
from k_diffusion.training.checkpoint import (
    CONDITIONER,
    LAST,
    CheckpointError,
    CheckpointInfo,
    read_checkpoint,
    save_checkpoint,
)
from k_diffusion.training.compare import differences, filled, flat, full_model
from k_diffusion.training.named_tensors import copy_tensors, named_tensors, own_tensors
from k_diffusion.utils.maths import nearest
from k_diffusion.utils.scheduler import make_scheduler
from k_diffusion.utils.words import reason_of


def load_denoiser(
    path: str | Path,
    weights: str = "ema",
    device: str | torch.device = "cpu",
    network: nn.Module | None = None,
) -> tuple[Any, CheckpointInfo]:
    """Rebuild the trained network as a Denoiser, in evaluation mode.

    Args:
        path: a checkpoint, or what `save_inference` wrote.
        weights: "ema": the averaged ones; "last": those after the last step; or another of the
            info's `averages`, such as "ema_0.05".
        device: where to put it.
        network: takes the weights instead of one built from the config: for a network of your own.

    Returns:
        The denoiser, and what the checkpoint says about itself.

    Raises:
        CheckpointError: missing, damaged, not a checkpoint, or it does not fit the network.
    """
    info, parts = read_checkpoint(path, [_part(weights)])
    chosen = _chosen(info, parts, weights)
    try:
        process = info.config.get("process")
        scheduler = make_scheduler(**process) if process else None
        if network is None:
            network = make_model(info.config["model"])
        denoiser = make_denoiser(network, scheduler)
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"checkpoint {path} holds a network that cannot be built here ({reason_of(error)})"
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
            conditioner = make_conditioner(config)
            if any(name.startswith(f"{CONDITIONER}/") for name in info.tensors):
                _, parts = read_checkpoint(info.path, [CONDITIONER])
                copy_tensors(parts[CONDITIONER], own_tensors(conditioner))
            return conditioner.to(device)
        classes = int(model_trait(info.config["model"], "num_classes", 0))
        if not classes:
            return None
        names = info.data.get("class_names") or ()
        return ClassConditioner(
            num_classes=classes, class_names=tuple(names) if len(names) == classes else ()
        ).to(device)
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"checkpoint {info.path} has a conditioner that cannot be made here "
            f"({reason_of(error)})"
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


def save_inference(
    source: str | Path,
    path: str | Path,
    *,
    weights: str = "ema",
    dtype: torch.dtype | None = None,
    licence: str = "",
    note: str = "",
) -> str:
    """Write from a checkpoint one that holds only what sampling needs, and a model card.

    Args:
        source: a checkpoint.
        path: the file to write.
        weights: which are taken, see `load_denoiser`; in the new file they are "ema".
        dtype: what they are stored as; None: as they are. Those that are no floats stay.
        licence, note: for the card, see `model_card`.

    Returns:
        The new checkpoint's sha256.

    Raises:
        CheckpointError: the source is damaged, has no such weights, or has a network or conditioner
            that nobody could rebuild from the file; or a weight is beyond the dtype.
    """
    info, parts = read_checkpoint(source, [_part(weights), CONDITIONER])
    chosen = _chosen(info, parts, weights)
    _check_rebuildable(info, chosen)
    if dtype is not None:
        chosen = {name: _stored(info, name, t, dtype) for name, t in chosen.items()}
    floats = {_name(t.dtype) for t in chosen.values() if t.is_floating_point()}
    card = model_card(
        info,
        weights=info.state.get("weights", weights),
        dtype=" and ".join(sorted(floats)),
        licence=licence,
        note=note,
    )
    return save_checkpoint(
        path,
        {"ema": chosen, CONDITIONER: parts[CONDITIONER]},
        config=info.config,
        images_seen=info.images_seen,
        step=info.step,
        data=info.data,
        state={key: info.state.get(key) for key in ("network", "conditioner")}
        | {"weights": info.state.get("weights", weights)},
        card=card,
    )


def _check_rebuildable(info: CheckpointInfo, weights: Mapping[str, Tensor]) -> None:
    """Refuse what was trained in Python with parts that the file could not name."""
    state = info.state
    own = state.get("conditioner")
    if own not in (None, ClassConditioner.__name__) and not info.config.get("conditioner"):
        raise CheckpointError(
            f"checkpoint {info.path} was trained with the conditioner {own}, which has no type, so "
            "that the file could not name it: register it by @register_conditioner, and train with "
            "it again"
        )
    try:
        network = make_model(info.config["model"])
        if conditioner := info.config.get("conditioner"):
            CONDITIONERS.settings(conditioner)
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"checkpoint {info.path} holds a network or conditioner that is not known here "
            f"({reason_of(error)})"
        ) from None
    trained = state.get("network", type(network).__name__)
    if trained != type(network).__name__:
        raise CheckpointError(
            f"checkpoint {info.path} holds a {trained}, but its config names "
            f"{info.config['model']['type']!r}, a {type(network).__name__}: register the class by "
            "@register_model, and train with its type in the config"
        )
    load_into(network, weights, info)


def _stored(info: CheckpointInfo, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    stored = tensor.to(dtype)
    if not bool(stored.isfinite().all()) and bool(tensor.isfinite().all()):
        raise CheckpointError(
            f"checkpoint {info.path} has the value {float(tensor.abs().max()):.3g} in {name}, "
            f"beyond {_name(dtype)}: give bfloat16 or float32"
        )
    return stored


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _part(weights: str) -> str:
    return "model" if weights == LAST else weights


def _chosen(
    info: CheckpointInfo, parts: Mapping[str, dict[str, Tensor]], weights: str
) -> dict[str, Tensor]:
    chosen = parts[_part(weights)]
    if not chosen or weights not in info.weights:
        way = nearest(weights, info.weights) or next(iter(info.weights), "")
        raise CheckpointError(
            f"checkpoint {info.path} holds no weights {weights!r}, only "
            f"{', '.join(info.weights) or 'nothing'}" + (f": ask for {way!r}" if way else "")
        )
    return chosen
