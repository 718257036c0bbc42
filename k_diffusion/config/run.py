"""From a config's file to a run, whichever of the two kinds it is of: ours or an established one.

An established config says what is trained and how, but not for how long; its `dataset` may name
data that is not read here. So the command line adds `--total-images`, and `--data FOLDER`. Its
steps are of 64 images unless a batch_size is given; what it counts in steps is counted in images
here. What cannot be taken over is refused by name.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from k_diffusion.config.density import make_sample_density
from k_diffusion.config.keys import (
    AMOUNT,
    BELOW_1,
    DEFAULTS,
    NOT_NEGATIVE,
    POSITIVE,
    SHARE,
    TEXT,
    ZERO,
    Kind,
    check,
    several,
)
from k_diffusion.config.reading import load_config
from k_diffusion.training.config import ConfigError, TrainConfig
from k_diffusion.training.config_file import make_config, override, read_file
from k_diffusion.training.sections import AUTO
from k_diffusion.utils.maths import nearest, unknown

SECTIONS = ("model", *DEFAULTS)
BATCH = 64
"""Images a step where nobody says; the established program's."""


def load_run(path: str | Path, overrides: Mapping[str, Any] | None = None) -> TrainConfig:
    """Read a run's config from a .toml or .json file, ours or an established one.

    Args:
        path: the file.
        overrides: dotted key -> value, put in place of the file's. Those that begin with the name
            of one of its own sections are keys of an established config, others ours.

    Raises:
        ConfigError: see `training.load_config`; or something that cannot be taken over.
    """
    data, overrides = read_file(path), dict(overrides or {})
    if overrides.get("batch_size") == AUTO and "micro_batch_size" not in overrides:
        overrides["micro_batch_size"] = overrides.pop("batch_size")
    if is_established(data):
        try:
            data = to_run(data, overrides)
        except ValueError as error:
            raise ConfigError(f"config {path}: {error}") from None
        overrides = {key: v for key, v in overrides.items() if not _theirs(key)}
    own = data.get("data")
    if "data.path" in overrides and isinstance(own, Mapping):
        source = "archive" if str(overrides["data.path"]).endswith((".zip", ".tar")) else "folder"
        if own.get("source") not in ("archive", "folder"):
            own = {}  # the file's own data has other keys: it gives way as a whole
        data["data"] = {**own, "source": source}
    for key, value in overrides.items():
        override(data, key, value)
    return make_config(data, f"config {path}")


def is_established(data: Mapping[str, Any]) -> bool:
    """Whether this is an established config, by the sections and keys that only these have."""
    if "data" in data:
        return False
    model = data.get("model")
    own = {"dataset", "lr_sched", "ema_sched"} & data.keys()
    return bool(own) or (isinstance(model, Mapping) and "input_channels" in model)


def _theirs(key: str) -> bool:
    return key.partition(".")[0] in SECTIONS


def to_run(config: Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The keys of a TrainConfig from an established config.

    Args:
        config: the established config; stays as it is.
        overrides: dotted keys; those of its own sections are put in place here, of the others it is
            seen what they will say instead of the config.

    Raises:
        ValueError: see `k_diffusion.config.load_config`; or something that cannot be taken over.
    """
    overrides = overrides or {}
    given = deepcopy(dict(config))
    for key, value in overrides.items():
        if _theirs(key):
            override(given, key, value)
    for key in given:
        if key not in SECTIONS:
            raise ValueError(f"{unknown('section', key, SECTIONS)}: take it out")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        try:
            whole = load_config(given)
        except UserWarning as warning:
            raise ValueError(f"{warning}: take it out") from None
    batch = overrides.get("batch_size", BATCH)
    batch = batch if isinstance(batch, int) and batch > 0 else BATCH  # what is refused later
    data = _data(whole, overrides)
    return {
        "model": {
            "type": "established",
            "model": _model(whole["model"]),
            "num_classes": whole["dataset"]["num_classes"],
        },
        **({"data": data} if data is not None else {}),
        "process": _process(whole["model"]),
        "loss": _loss(whole["model"]),
        "optimizer": _optimizer(whole["optimizer"]) | _course(whole["lr_sched"], batch),
        "ema": _ema(whole["ema_sched"]),
        "batch_size": batch,
        "condition_dropout": whole["dataset"]["cond_dropout_rate"],
        "grad_clip": None,
    }


def _checked(where: str, section: Mapping[str, Any], kinds: Mapping[str, Kind]) -> None:
    """Refuse keys that are not taken over, and values that do not fit."""
    for key, value in section.items():
        if key not in kinds:
            close = nearest(key, kinds)
            way = f"did you mean {close}?" if close else f"known: {', '.join(kinds)}"
            raise ValueError(f"{where}.{key} = {value!r} cannot be taken over; {way}")
    check(where, section, kinds)


def _type(where: str, section: Mapping[str, Any], known: Mapping[str, Any], way: str) -> str:
    kind = section.get("type")
    if not isinstance(kind, str) or kind not in known:
        raise ValueError(f"{where}.type = {kind!r} cannot be taken over: {way}")
    return kind


# ---------------------------------------------------------------- section by section

_FOLDERS = {"imagefolder": None, "imagefolder-class": None}
_DATASET = {
    "type": TEXT,
    "location": TEXT,
    "num_classes": AMOUNT,
    "cond_dropout_rate": SHARE,
    # Of data that is not read here; without a meaning for a folder.
    "image_key": TEXT,
    "class_key": TEXT,
    "key": TEXT,
}


def _data(whole: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any] | None:
    """The data's keys; None where the overrides have others."""
    dataset, model = whole["dataset"], whole["model"]
    _checked("dataset", dataset, _DATASET)
    if "data" in overrides or "data.source" in overrides:
        return None
    data: dict[str, Any] = {
        "source": "folder",
        "channels": model["input_channels"],
        "classes": "folders" if dataset["num_classes"] else "none",
    }
    if "data.path" not in overrides:
        way = f"only {' and '.join(_FOLDERS)} are; give --data FOLDER or --data digits"
        _type("dataset", dataset, _FOLDERS, way)
        if "location" not in dataset:
            raise ValueError("dataset.location is missing: give it, or --data FOLDER")
        data["path"] = dataset["location"]
    if "data.size" not in overrides:
        if "input_size" not in model:
            raise ValueError("model.input_size is missing: give it, or --set data.size=SIZE")
        data["size"] = model["input_size"]
    return data


_NOT_TAKEN = {
    "augment_prob": "training here has no such augmentation yet",
    "mapping_cond_dim": "nothing in the data gives mapping_cond",
    "unet_cond_dim": "nothing in the data gives unet_cond",
    "cross_cond_dim": "nothing in the data gives cross_cond",
}


def _model(model: Mapping[str, Any]) -> dict[str, Any]:
    for key, reason in _NOT_TAKEN.items():
        if value := model.get(key, 0):
            none = "false" if isinstance(value, bool) else "0"
            raise ValueError(
                f"model.{key} = {value!r} cannot be taken over: {reason}; give {none} "
                f"(--set model.{key}={none})"
            )
    return dict(model)


def _process(model: Mapping[str, Any]) -> dict[str, Any]:
    """The range of levels; it is only sampled in, what is trained on is the density's."""
    return {"name": "karras"} | {k: model[k] for k in ("sigma_min", "sigma_max") if k in model}


_WEIGHTINGS = {"karras": "edm", "soft-min-snr": "soft_min_snr", "snr": "snr"}
_DENSITIES: dict[str, tuple[str, dict[str, str]]] = {
    "rand_log_normal": ("lognormal", {"loc": "mean", "scale": "std"}),
    "rand_log_uniform": ("loguniform", {"min_value": "min", "max_value": "max"}),
    "rand_log_logistic": (
        "loglogistic",
        {"loc": "loc", "scale": "scale", "min_value": "min", "max_value": "max"},
    ),
    "rand_v_diffusion": ("v_diffusion", {"min_value": "min", "max_value": "max"}),
    "rand_split_log_normal": (
        "split_lognormal",
        {"loc": "mode", "scale_1": "std_below", "scale_2": "std_above"},
    ),
    "rand_cosine_interpolated": (
        "cosine_interpolated",
        {
            "image_d": "image_d",
            "noise_d_low": "noise_d_low",
            "noise_d_high": "noise_d_high",
            "min_value": "min",
            "max_value": "max",
        },
    ),
}
"""What draws the levels -> the density here, and what its options are called."""


def _loss(model: Mapping[str, Any]) -> dict[str, Any]:
    draw = make_sample_density(model)
    density, names = _DENSITIES[draw.func.__name__]  # type: ignore[attr-defined]
    options = {
        names[key]: float(value)
        for key, value in draw.keywords.items()  # type: ignore[attr-defined]
        if key in names and math.isfinite(value)
    }
    levels = {"density": density, "density_options": options}
    if model["has_variance"]:  # then neither weighting nor scales have a part in the loss
        return {**levels, "variance": True}
    if model["loss_config"] == "simple":  # nor here, where the noise is learned
        return {**levels, "weighting": "eps"}
    scales = {"scales": float(model["loss_scales"])} if model["loss_scales"] != 1 else {}
    return {**levels, **scales, "weighting": _WEIGHTINGS[model["loss_weighting"]]}


def _optimizer(section: Mapping[str, Any]) -> dict[str, Any]:
    kinds = {
        "type": TEXT,
        "lr": POSITIVE,
        "betas": several(BELOW_1, 2),
        "eps": POSITIVE,
        "weight_decay": NOT_NEGATIVE,
    }
    kind = _type("optimizer", section, {"adamw": None, "adam": None}, "give adamw")
    _checked("optimizer", section, kinds)
    if kind == "adam" and section["weight_decay"]:
        raise ValueError(
            f"optimizer.weight_decay = {section['weight_decay']} of adam cannot be taken over, "
            "whose decay is part of the gradient: give 0, or adamw"
        )
    return {key: value for key, value in section.items() if key != "type"}


_COURSES: dict[str, dict[str, Kind]] = {
    "constant": {},
    "inverse": {"inv_gamma": POSITIVE, "power": POSITIVE, "min_lr": NOT_NEGATIVE},
    "exponential": {"num_steps": POSITIVE, "decay": POSITIVE, "min_lr": NOT_NEGATIVE},
}


def _course(section: Mapping[str, Any], batch: int) -> dict[str, Any]:
    """The course of the learning rate, in images."""
    kind = _type("lr_sched", section, _COURSES, f"give one of {', '.join(_COURSES)}")
    _checked("lr_sched", section, {"type": TEXT, "warmup": BELOW_1, **_COURSES[kind]})
    course = {key: section[key] for key in ("power", "decay", "min_lr") if key in section}
    if section["warmup"]:
        course["warmup_decay"] = section["warmup"]
    if kind == "exponential" and "num_steps" not in section:
        raise ValueError("lr_sched.num_steps is missing: exponential needs it")
    if kind != "constant":
        steps = section["num_steps"] if kind == "exponential" else section.get("inv_gamma", 1.0)
        course["decay_images"] = float(steps * batch)
    return {"schedule": kind, **course}


def _ema(section: Mapping[str, Any]) -> dict[str, Any]:
    kinds = {
        "type": TEXT,
        "power": POSITIVE,
        "max_value": SHARE,
        "inv_gamma": POSITIVE,
        "min_value": ZERO,
        "start_at": ZERO,
    }
    kind = _type("ema_sched", section, {"inverse": None, "constant": None}, "give inverse")
    _checked("ema_sched", section, kinds)
    if kind == "constant":
        # The first update takes the weights of the first step: from the second on, max_value.
        return {"max_decay": section["max_value"], "inv_gamma": 1e-9, "power": 1.0}
    options = {"power": section["power"], "max_decay": section["max_value"]}
    return options | ({"inv_gamma": section["inv_gamma"]} if "inv_gamma" in section else {})
