"""What a run's config says in full, and in what two differ."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from k_diffusion.models import MODELS, make_model, model_config


def full_model(network: nn.Module, given: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a network with all its fields, the defaults and a preset's among them.

    So what is trained today is the same network tomorrow, whatever the preset's name stands for
    then.

    Args:
        network: of any class; where it is not registered, or has no dataclass as its config, there
            is nothing but what was given.
        given: the "model" of a run's config.
    """
    registered = type(network) in MODELS.values()
    if not (registered and dataclasses.is_dataclass(getattr(network, "config", None))):
        return dict(given)
    return model_config(network)


def filled(config: Mapping[str, Any]) -> dict[str, Any]:
    """A run's config whose model has all fields; as it is where that cannot be built here."""
    try:
        with torch.device("meta"):
            model = full_model(make_model(config["model"]), config["model"])
    except (ValueError, TypeError, KeyError, NotImplementedError):
        return dict(config)
    return {**config, "model": model}


def flat(config: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Dotted key -> value; tuples as JSON has them."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{above}{key}.")
        else:
            found[above + key] = list(value) if isinstance(value, tuple) else value
    return found


def same_config(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two runs' configs, as JSON data, say the same in full."""
    return flat(filled(one)) == flat(filled(other))


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """ "key = theirs, not ours" for every key in which two flat configs differ, by name."""
    return [
        f"{key} = {theirs.get(key)!r}, not {ours.get(key)!r}"
        for key in sorted(set(theirs) | set(ours))
        if theirs.get(key) != ours.get(key)
    ]
