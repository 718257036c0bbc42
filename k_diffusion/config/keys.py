"""The keys of an established config: what each takes, and what it is where it is left out."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from k_diffusion.utils.maths import nearest


class Kind(NamedTuple):
    wanted: str
    fits: Callable[[Any], bool]


def is_number(value: Any) -> bool:
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    return plain and math.isfinite(value)


def whole(least: int) -> Kind:
    def fits(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= least

    return Kind(f"a whole number of at least {least}", fits)


def several(each: Kind, count: int | None = None) -> Kind:
    def fits(value: Any) -> bool:
        listed = isinstance(value, (list, tuple)) and all(map(each.fits, value))
        return listed and (len(value) == count if count else len(value) > 0)

    return Kind(f"a list of {count or 'values'}, each {each.wanted}", fits)


def _or(*kinds: Kind) -> Kind:
    wanted = " or ".join(kind.wanted for kind in kinds)
    return Kind(wanted, lambda value: any(kind.fits(value) for kind in kinds))


def _one_of(*names: str) -> Kind:
    return Kind(f"one of {', '.join(names)}", lambda value: value in names)


COUNT, AMOUNT = whole(1), whole(0)
NUMBER = Kind("a number", is_number)
POSITIVE = Kind("a number above 0", lambda v: is_number(v) and v > 0)
NOT_NEGATIVE = Kind("a number of at least 0", lambda v: is_number(v) and v >= 0)
BELOW_1 = Kind("a number from 0 to below 1", lambda v: is_number(v) and 0 <= v < 1)
SHARE = Kind("a number from 0 to 1", lambda v: is_number(v) and 0 <= v <= 1)
FLAG = Kind("true or false", lambda v: isinstance(v, bool))
NULL = Kind("null", lambda v: v is None)
OBJECT = Kind("an object, {...}", lambda v: isinstance(v, Mapping))
TEXT = Kind("a text", lambda v: isinstance(v, str))
NOT = Kind("false", lambda v: v is False)
ZERO = Kind("0", lambda v: is_number(v) and v == 0)

COMMON = {
    "type": TEXT,
    "input_channels": COUNT,
    "input_size": _or(several(COUNT, 2), COUNT),
    "sigma_data": POSITIVE,
    "sigma_min": POSITIVE,
    "sigma_max": POSITIVE,
    "sigma_sample_density": OBJECT,
    "dropout_rate": BELOW_1,
    "augment_prob": SHARE,
    "augment_wrapper": FLAG,
    "loss_config": _one_of("karras", "simple"),
    "loss_weighting": _one_of("karras", "soft-min-snr", "snr"),
    "loss_scales": NOT_NEGATIVE,
    "has_variance": FLAG,
    "skip_stages": AMOUNT,
}
_TRANSFORMER = {
    **COMMON,
    "patch_size": several(COUNT, 2),
    # Only image_v1 has these two.
    "has_variance": NOT,
    "skip_stages": ZERO,
}
KEYS: dict[str, dict[str, Kind]] = {
    "image_v1": {
        **COMMON,
        "patch_size": COUNT,
        "mapping_out": COUNT,
        "depths": several(COUNT),
        "channels": several(COUNT),
        "self_attn_depths": several(FLAG),
        "cross_attn_depths": _or(several(FLAG), NULL),
        "mapping_cond_dim": AMOUNT,
        "unet_cond_dim": AMOUNT,
        "cross_cond_dim": AMOUNT,
    },
    "image_transformer_v1": {**_TRANSFORMER, "depth": COUNT, "width": COUNT, "d_ff": AMOUNT},
    "image_transformer_v2": {
        **_TRANSFORMER,
        "depths": several(AMOUNT),
        "widths": several(COUNT),
        "d_ffs": _or(several(COUNT), NULL),
        "self_attns": _or(several(OBJECT), NULL),
        "dropout_rate": _or(BELOW_1, several(BELOW_1), NULL),
        "mapping_width": COUNT,
        "mapping_depth": AMOUNT,
        "mapping_d_ff": _or(AMOUNT, NULL),
        "mapping_cond_dim": AMOUNT,
        "mapping_dropout_rate": BELOW_1,
    },
}
"""Model type -> the keys of a config's "model", and what each takes."""

REQUIRED = {
    "image_v1": ("input_channels", "mapping_out", "depths", "channels", "self_attn_depths"),
    "image_transformer_v1": ("input_channels", "patch_size", "width", "depth"),
    "image_transformer_v2": ("input_channels", "patch_size", "widths", "depths"),
}

ATTENTIONS = {
    "global": {"d_head": COUNT},
    "neighborhood": {"d_head": COUNT, "kernel_size": COUNT},
    "shifted-window": {"d_head": COUNT, "window_size": COUNT},
    "none": {},
}

DEFAULTS: dict[str, dict[str, Any]] = {
    "model": {
        "sigma_data": 1.0,
        "dropout_rate": 0.0,
        "augment_prob": 0.0,
        "loss_config": "karras",
        "loss_weighting": "karras",
        "loss_scales": 1,
    },
    "dataset": {"type": "imagefolder", "num_classes": 0, "cond_dropout_rate": 0.1},
    "optimizer": {
        "type": "adamw", "lr": 1e-4, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 1e-4,
    },
    "lr_sched": {"type": "constant", "warmup": 0.0},
    "ema_sched": {"type": "inverse", "power": 0.6667, "max_value": 0.9999},
}  # fmt: skip
_TRANSFORMER_OPTIMIZER = {
    "type": "adamw", "lr": 5e-4, "betas": [0.9, 0.99], "eps": 1e-8, "weight_decay": 1e-4,
}  # fmt: skip
DEFAULTS_OF_TYPE: dict[str, dict[str, Any]] = {
    "image_v1": {
        "model": {
            "patch_size": 1,
            "augment_wrapper": True,
            "mapping_cond_dim": 0,
            "unet_cond_dim": 0,
            "cross_cond_dim": 0,
            "cross_attn_depths": None,
            "skip_stages": 0,
            "has_variance": False,
        },
        "optimizer": {
            "type": "adamw", "lr": 1e-4, "betas": [0.95, 0.999], "eps": 1e-6, "weight_decay": 1e-3,
        },
    },
    "image_transformer_v1": {
        "model": {"d_ff": 0, "augment_wrapper": False, "skip_stages": 0, "has_variance": False},
        "optimizer": _TRANSFORMER_OPTIMIZER,
    },
    "image_transformer_v2": {
        "model": {
            "mapping_width": 256,
            "mapping_depth": 2,
            "mapping_d_ff": None,
            "mapping_cond_dim": 0,
            "mapping_dropout_rate": 0.0,
            "d_ffs": None,
            "self_attns": None,
            "dropout_rate": None,
            "augment_wrapper": False,
            "skip_stages": 0,
            "has_variance": False,
        },
        "optimizer": _TRANSFORMER_OPTIMIZER,
    },
}  # fmt: skip


def check(where: str, values: Mapping[str, Any], kinds: Mapping[str, Kind]) -> None:
    """Refuse a value that its key does not take; absent keys pass."""
    for key, kind in kinds.items():
        if key in values and not kind.fits(values[key]):
            raise ValueError(f"{where}.{key} = {values[key]!r} does not fit: give {kind.wanted}")


def check_names(where: str, values: Mapping[str, Any], known: Iterable[str]) -> None:
    """Refuse a key that looks like a slip of the pen; say that any other has no effect."""
    known = list(known)
    for key in values:
        if key in known:
            continue
        close = nearest(key, [name for name in known if name not in values])
        if close:
            raise ValueError(f"{where}.{key} = {values[key]!r} is no key: did you mean {close}?")
        warnings.warn(f"{where}.{key} = {values[key]!r} has no effect", stacklevel=3)
