"""From a file, or plain data, to a whole config."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from k_diffusion import utils
from k_diffusion.config.keys import (
    AMOUNT,
    ATTENTIONS,
    COUNT,
    DEFAULTS,
    DEFAULTS_OF_TYPE,
    KEYS,
    REQUIRED,
    SHARE,
    check,
    check_names,
    is_number,
)
from k_diffusion.utils.maths import unknown


def round_to_power_of_two(x: float, tol: float) -> int:
    """x rounded to the multiple of the largest power of two that changes it by a share of tol.

    Args:
        x: above 1.
        tol: the share of x; where none is near enough, x is rounded to a whole number.

    Raises:
        ValueError: x is not above 1.
    """
    if not (is_number(x) and x > 1):
        raise ValueError(f"x = {x!r} cannot be rounded to a power of two: give a number above 1")
    multiples = [round(x / 2**i) * 2**i for i in range(math.ceil(math.log2(x)))]
    return next((m for m in reversed(multiples) if abs((m - x) / x) <= tol), multiples[0])


def load_config(path_or_dict: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """A config with the defaults of its model type.

    Args:
        path_or_dict: a JSON file, a safetensors file with the config in its metadata, or the data
            itself, which stays as it is.

    Returns:
        "model", "dataset", "optimizer", "lr_sched", "ema_sched", and whatever else was there.

    Raises:
        ValueError: no JSON, no config, an unknown model type, a missing or misspelt key, or a value
            that does not fit.
    """
    config = path_or_dict if isinstance(path_or_dict, Mapping) else _read(Path(path_or_dict))
    if not isinstance(config, Mapping):
        raise ValueError(f"a config is an object, {{...}}, got {type(config).__name__}")
    for section in ("model", *DEFAULTS):
        if not isinstance(config.get(section, {}), Mapping):
            raise ValueError(
                f"{section} = {config[section]!r} does not fit: give an object, {{...}}"
            )
    kind = config.get("model", {}).get("type")
    if kind is None:
        raise ValueError(f"model.type is missing: give {', '.join(KEYS)}")
    if not isinstance(kind, str) or kind not in KEYS:
        raise ValueError(unknown("model.type", kind, KEYS))
    check_names("model", config["model"], KEYS[kind])
    config = _merged(_merged(DEFAULTS, DEFAULTS_OF_TYPE[kind]), config)
    model = config["model"]
    for key in REQUIRED[kind]:
        if key not in model:
            raise ValueError(f"model.{key} is missing: {kind} needs {KEYS[kind][key].wanted}")
    check("model", model, KEYS[kind])
    check("dataset", config["dataset"], {"num_classes": AMOUNT, "cond_dropout_rate": SHARE})
    if model.get("sigma_min", 0) >= model.get("sigma_max", math.inf):
        raise ValueError(
            f"model.sigma_min = {model['sigma_min']} is not below sigma_max = "
            f"{model['sigma_max']}: give a smaller one"
        )
    if kind == "image_transformer_v1":
        model["d_ff"] = model["d_ff"] or round_to_power_of_two(model["width"] * 8 / 3, tol=0.05)
    elif kind == "image_transformer_v2":
        _complete_v2(model)
    return config


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors":
        text = metadata_of(path).get("config")
        if text is None:
            raise ValueError(
                f"{path} holds no config in its metadata: give its config as a JSON file"
            )
    else:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{path} is no text in UTF-8: give a JSON file") from None
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({error}): configs are plain data") from None


def metadata_of(path: Path) -> Mapping[str, str]:
    """What a safetensors file says beside its tensors.

    Raises:
        ValueError: the file is damaged, or no safetensors file.
    """
    from safetensors import SafetensorError

    try:
        return utils.get_safetensors_metadata(path) or {}
    except SafetensorError as error:
        raise ValueError(
            f"{path} is truncated, damaged or no safetensors file ({error}): use another copy"
        ) from None


def _merged(base: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of both, objects joined key by key; elsewhere the second counts."""
    both = {key: deepcopy(value) for key, value in base.items()}
    for key, value in more.items():
        if isinstance(value, Mapping) and isinstance(both.get(key), Mapping):
            both[key] = _merged(both[key], value)
        else:
            both[key] = deepcopy(value)
    return both


def _complete_v2(model: dict[str, Any]) -> None:
    """What the other keys of an image_transformer_v2 say of those that are left open."""
    widths = model["widths"]
    levels = len(widths)
    model["mapping_d_ff"] = model["mapping_d_ff"] or 3 * model["mapping_width"]
    model["d_ffs"] = model["d_ffs"] or [3 * width for width in widths]
    if model["self_attns"] is None:
        fine = {"type": "neighborhood", "d_head": 64, "kernel_size": 7}
        attentions = [*([fine] * (levels - 1)), {"type": "global", "d_head": 64}]
        model["self_attns"] = [dict(attention) for attention in attentions]
    rate = model["dropout_rate"]
    if not isinstance(rate, (list, tuple)):
        model["dropout_rate"] = [float(rate or 0)] * levels
    for key in ("depths", "d_ffs", "self_attns", "dropout_rate"):
        if len(model[key]) != levels:
            raise ValueError(
                f"model.{key} = {model[key]!r} has {len(model[key])} entries, but model.widths = "
                f"{widths!r} makes {levels} levels: give one a level"
            )
    for i, attention in enumerate(model["self_attns"]):
        where = f"model.self_attns[{i}]"
        kind = attention.get("type")
        if not isinstance(kind, str) or kind not in ATTENTIONS:
            raise ValueError(unknown(f"{where}.type", kind, ATTENTIONS))
        check_names(where, attention, ("type", *ATTENTIONS[kind]))
        check(where, attention, ATTENTIONS[kind])
        if kind == "shifted-window" and "window_size" not in attention:
            raise ValueError(f"{where}.window_size is missing: shifted-window needs {COUNT.wanted}")
        if widths[i] % (head := attention.get("d_head", 64)) and kind != "none":
            raise ValueError(
                f"{where}.d_head = {head} does not divide model.widths[{i}] = {widths[i]}: give a "
                "divisor"
            )
