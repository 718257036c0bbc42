"""From a config to the noise levels that its training draws."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from k_diffusion import utils
from k_diffusion.config.keys import COMMON, NOT_NEGATIVE, NUMBER, POSITIVE, Kind, check, check_names
from k_diffusion.utils.maths import unknown

_WHERE = "sigma_sample_density"


def make_sample_density(config: Mapping[str, Any]) -> Callable[..., Tensor]:
    """What draws noise levels for training: `sample_density(shape, device=..., dtype=...)`.

    Args:
        config: the "model" of a config: its sigma_sample_density, and sigma_data, sigma_min,
            sigma_max, input_size, from which most of the density's defaults come.

    Raises:
        ValueError: an unknown density, or a missing or misspelt key or a wrong value of one.
    """
    said = ("sigma_data", "sigma_min", "sigma_max", "input_size", _WHERE)
    check("model", config, {key: COMMON[key] for key in said})
    given = dict(_of(config, _WHERE, "the training"))
    kind = given.pop("type", None)
    if not isinstance(kind, str) or kind not in _DENSITIES:
        raise ValueError(unknown(f"{_WHERE}.type", kind, _DENSITIES))
    density = _DENSITIES[kind]
    check_names(_WHERE, given, [*density.needs, *density.needs.values(), *density.defaults])
    options: dict[str, Any] = {}
    for name, other in density.needs.items():
        if (name in given) == (other in given):
            raise ValueError(
                f"{_WHERE}.{name} is {'there twice' if name in given else 'missing'}: {kind} needs "
                f"it once, as {name} or as {other}"
            )
        options[name] = given.get(name, given.get(other))
    for name, default in density.defaults.items():
        options[name] = given[name] if name in given else default(config)
    check(_WHERE, options, {name: {**_KINDS, **density.kinds}[name] for name in options})
    low, high = options.get("min_value", -1.0), options.get("max_value", math.inf)
    if low >= high:
        raise ValueError(
            f"{_WHERE}.min_value = {low} is not below max_value = {high}: give a smaller one"
        )
    if density.takes_sigma_data:
        options["sigma_data"] = config.get("sigma_data", 1.0)
    return partial(density.draw, **options)


def _of(config: Mapping[str, Any], key: str, who: str) -> Any:
    if key not in config:
        raise ValueError(f"model.{key} is missing: {who} needs it")
    return config[key]


def _size(config: Mapping[str, Any]) -> int:
    size = _of(config, "input_size", "a density's default")
    return size if isinstance(size, int) else max(size)


def _sigma(end: str) -> Callable[[Mapping[str, Any]], float]:
    return lambda config: _of(config, f"sigma_{end}", "a density's default")


def _number(value: float) -> Callable[[Mapping[str, Any]], float]:
    return lambda config: value


@dataclass(frozen=True)
class _Density:
    """What draws; its keys without a default, each with its other name; those with one; what keys
    take that take less than elsewhere."""

    draw: Callable[..., Tensor]
    needs: dict[str, str] = field(default_factory=dict)
    defaults: dict[str, Callable[[Mapping[str, Any]], float]] = field(default_factory=dict)
    takes_sigma_data: bool = False
    kinds: dict[str, Kind] = field(default_factory=dict)


_KINDS = {
    "loc": NUMBER,
    "scale": POSITIVE,
    "scale_1": POSITIVE,
    "scale_2": POSITIVE,
    "min_value": NOT_NEGATIVE,
    "max_value": Kind("a number above 0", lambda value: value == math.inf or POSITIVE.fits(value)),
    "image_d": POSITIVE,
    "noise_d_low": POSITIVE,
    "noise_d_high": POSITIVE,
}

_COSINE = _Density(
    utils.rand_v_diffusion,
    defaults={"min_value": _number(1e-3), "max_value": _number(1e3)},
    takes_sigma_data=True,
)
_DENSITIES = {
    "lognormal": _Density(utils.rand_log_normal, {"loc": "mean", "scale": "std"}),
    "loglogistic": _Density(
        utils.rand_log_logistic,
        defaults={
            "loc": lambda config: math.log(config.get("sigma_data", 1.0)),
            "scale": _number(0.5),
            "min_value": _number(0.0),
            "max_value": _number(math.inf),
        },
    ),
    "loguniform": _Density(
        utils.rand_log_uniform,
        defaults={"min_value": _sigma("min"), "max_value": _sigma("max")},
        kinds={"min_value": POSITIVE, "max_value": POSITIVE},
    ),
    "v-diffusion": _COSINE,
    "cosine": _COSINE,
    "split-lognormal": _Density(
        utils.rand_split_log_normal, {"loc": "mean", "scale_1": "std_1", "scale_2": "std_2"}
    ),
    "cosine-interpolated": _Density(
        utils.rand_cosine_interpolated,
        defaults={
            "image_d": _size,
            "noise_d_low": _number(32),
            "noise_d_high": _size,
            "min_value": lambda config: min(_sigma("min")(config), 1e-3),
            "max_value": lambda config: max(_sigma("max")(config), 1e3),
        },
        takes_sigma_data=True,
    ),
}
