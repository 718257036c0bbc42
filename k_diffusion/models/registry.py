"""Models by name: from plain data to a network, with every mistake named.

Any `nn.Module` that is built from a dataclass can be registered, and is trained, saved, loaded and
sampled by its name from then on:

    @dataclass(frozen=True)
    class MineConfig:
        width: int = 64

    @register_model("mine")
    class Mine(nn.Module):
        Config = MineConfig
        prediction = "eps"      # what makes it a Denoiser, see `denoiser.make_denoiser`

        def __init__(self, config: MineConfig) -> None: ...

    make_model({"type": "mine", "width": 32})

A config, too, can have a name: `register_preset("mine_large", "mine", width=256)`.

It keeps the config as `self.config` (which is done for it where it does not). A class that is built
otherwise has a `from_config`, which takes the fields as plain data.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import nn

from k_diffusion.utils.maths import nearest, unknown

MODELS: dict[str, type[nn.Module]] = {}
"""Name -> class."""

PRESETS: dict[str, dict[str, Any]] = {}
"""Name -> a config, whose options are overridden by those that are given with the name."""

Model = TypeVar("Model", bound=type[nn.Module])


def register_model(name: str) -> Callable[[Model], Model]:
    """Make a model class known by a name.

    Args:
        name: the "type" of its configs.

    Raises:
        ValueError: another class has the name.
        TypeError: the class is no `nn.Module`, or has neither `Config` nor `from_config`.
    """

    def add(cls: Model) -> Model:
        if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
            raise TypeError(f"model {name!r} must be a class derived from nn.Module, got {cls!r}")
        if not callable(getattr(cls, "from_config", None)) and not dataclasses.is_dataclass(
            getattr(cls, "Config", None)
        ):
            raise TypeError(
                f"model {name!r}: {cls.__name__} needs a dataclass as its `Config`, from which it "
                "is built, or a from_config(dict) classmethod"
            )
        if name in MODELS:
            taken = MODELS[name]
            raise ValueError(
                f"model type {name!r} is taken by {taken.__module__}.{taken.__name__}: "
                f"register {cls.__name__} under another name"
            )
        MODELS[name] = cls
        return cls

    return add


def register_preset(name: str, model: str, **options: Any) -> None:
    """Make a config known by a name.

    Args:
        name: a "type" of configs, for `make_model`; a model that it makes is of the type `model`.
        model: in MODELS.
        options: of that model.

    Raises:
        ValueError: the name is taken, or the model is not registered.
    """
    if name in MODELS or name in PRESETS:
        raise ValueError(f"model type {name!r} is taken: register the preset under another name")
    if model not in MODELS:
        raise ValueError(unknown("model type", model, MODELS))
    PRESETS[name] = {"type": model, **options}


def make_model(config: Mapping[str, Any]) -> nn.Module:
    """A network, with fresh weights, from plain data.

    Args:
        config: "type", a name in MODELS or PRESETS, and the options of that model.

    Raises:
        ValueError: no type, an unknown type or option (the nearest one is offered), or a value
            that does not fit.
    """
    if not isinstance(config, Mapping):
        raise ValueError(f"a model's config must be a mapping, got {type(config).__name__}")
    if "type" not in config:
        known = ", ".join([*MODELS, *PRESETS])
        raise ValueError(f"the model's type is missing; known: {known}")
    name = config["type"]
    if isinstance(name, str) and name in PRESETS:
        config = {**PRESETS[name], **config, "type": PRESETS[name]["type"]}
        name = config["type"]
    if not isinstance(name, str) or name not in MODELS:
        raise ValueError(unknown("model type", name, {**MODELS, **PRESETS}))
    options = {key: value for key, value in config.items() if key != "type"}
    cls: Any = MODELS[name]
    if hasattr(cls, "from_config"):
        return cls.from_config(options)
    settings = cls.Config(**known_fields(cls.Config, options))
    check_types(settings)
    model = cls(settings)
    if getattr(model, "config", None) is None:
        model.config = settings
    return model


def model_config(model: nn.Module) -> dict[str, Any]:
    """The plain data (as JSON has it) from which `make_model` builds a model's like.

    Raises:
        ValueError: the model's class is not registered.
    """
    for name, cls in MODELS.items():
        if type(model) is cls:
            fields = dataclasses.asdict(model.config)  # type: ignore[call-overload]
            plain = {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}
            return {"type": name, **plain}
    raise ValueError(f"{type(model).__name__} has no type: register it with register_model")


def known_fields(cls: type, config: Mapping[str, Any]) -> dict[str, Any]:
    """A config's keys and values, once every key is known to be a field of a dataclass.

    Args:
        cls: the dataclass.
        config: plain data.

    Raises:
        ValueError: a key is no field; the nearest one is offered.
    """
    if not isinstance(config, Mapping):
        raise ValueError(f"{cls.__name__} is read from a mapping, got {type(config).__name__}")
    names = [field.name for field in dataclasses.fields(cls)]
    for key, value in config.items():
        if key not in names:
            close = nearest(key, names)
            hint = f"did you mean {close}?" if close else f"known: {', '.join(names)}"
            raise ValueError(f"{key} = {value!r} is no option of this model; {hint}")
    return dict(config)


def check_types(config: Any) -> None:
    """Refuse a dataclass field whose value is not of its annotated type; lists become tuples.

    Understands bool, int, float (a whole number will do), str, None, tuple[..., ...] and unions.

    Raises:
        ValueError: names the field, its value and what it takes.
    """
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, list):  # JSON knows no tuples
            value = tuple(value)
            object.__setattr__(config, field.name, value)
        if not _fits(value, hints[field.name]):
            raise ValueError(
                f"{field.name} = {value!r} does not fit; give {_wanted(hints[field.name])}"
            )


_PLURALS = {bool: "true or false values", int: "whole numbers", float: "numbers", str: "names"}
_SINGULARS = {bool: "true or false", int: "a whole number", float: "a number", str: "a name"}


def _fits(value: Any, hint: Any) -> bool:
    if typing.get_origin(hint) is tuple:
        inner = typing.get_args(hint)[0]
        return isinstance(value, tuple) and all(_fits(v, inner) for v in value)
    if typing.get_args(hint):
        return any(_fits(value, part) for part in typing.get_args(hint))
    if hint is float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return number and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _wanted(hint: Any) -> str:
    if typing.get_origin(hint) is tuple:
        return f"a list of {_PLURALS[typing.get_args(hint)[0]]}"
    if typing.get_args(hint):
        return " or ".join(_wanted(part) for part in typing.get_args(hint))
    return _SINGULARS.get(hint, "none")
