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

It keeps the config as `self.config` (which is done for it where it does not). A class that is built
otherwise has a `from_config`, which takes the fields as plain data.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import re
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from k_diffusion.utils.maths import nearest, unknown

Registered = TypeVar("Registered", bound=type)


class Registry(dict[str, type[Any]]):
    """Name -> class, of one kind of part that configs name: models, conditioners, autoencoders.

    Args:
        kind: what its classes are called in errors.
        base: what they derive from.
        homes: name -> module of this package, of classes that register themselves when that module
            is imported, which is not done before they are asked for.
    """

    def __init__(self, kind: str, base: type, homes: Mapping[str, str] | None = None) -> None:
        super().__init__()
        self.kind, self.base, self.homes = kind, base, dict(homes or {})
        self.presets: dict[str, dict[str, Any]] = {}

    def register(self, name: str) -> Callable[[Registered], Registered]:
        """A decorator that makes a class known by a name.

        Raises:
            ValueError: another class has the name.
            TypeError: the class is not of the kind, or has neither `Config` nor `from_config`.
        """

        def add(cls: Registered) -> Registered:
            base = "nn.Module" if self.base is nn.Module else self.base.__name__
            if not (isinstance(cls, type) and issubclass(cls, self.base)):
                raise TypeError(
                    f"{self.kind} {name!r} must be a class derived from {base}, got {cls!r}"
                )
            if not callable(getattr(cls, "from_config", None)) and not dataclasses.is_dataclass(
                getattr(cls, "Config", None)
            ):
                raise TypeError(
                    f"{self.kind} {name!r}: {cls.__name__} needs a dataclass as its `Config`, from "
                    "which it is built, or a from_config(dict) classmethod"
                )
            if name in self:
                taken = self[name]
                raise ValueError(
                    f"{self.kind} type {name!r} is taken by {taken.__module__}.{taken.__name__}: "
                    f"register {cls.__name__} under another name"
                )
            self[name] = cls
            return cls

        return add

    def find(self, config: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The class that a config names, and the config's other keys.

        Raises:
            ValueError: no mapping, no type, or an unknown one; the nearest one is offered.
        """
        if not isinstance(config, Mapping):
            raise ValueError(
                f"{_a(self.kind)}'s config must be a mapping, got {type(config).__name__}"
            )
        known = dict.fromkeys([*self, *self.homes, *self.presets])
        if "type" not in config:
            raise ValueError(f"the {self.kind}'s type is missing; known: {', '.join(known)}")
        name = config["type"]
        if not isinstance(name, str) or name not in known:
            own = "One of your own is known once its file is imported: by --plugin FILE.py"
            told = unknown(f"{self.kind} type", name, known)
            # Before the list, which is long.
            raise ValueError(re.sub("known: ", rf"{own}. Known: ", told, count=1, flags=re.I))
        if name in self.presets:
            config = {**self.presets[name], **config, "type": self.presets[name]["type"]}
            name = config["type"]
        if name not in self:
            importlib.import_module(self.homes[name])
        return self[name], {key: value for key, value in config.items() if key != "type"}

    def settings(self, config: Mapping[str, Any]) -> Any:
        """The dataclass of a config, checked, without building what it describes.

        None for a class that has only `from_config`.

        Raises:
            ValueError: see `find`; an unknown option, a missing one, or a value that does not fit.
        """
        cls, options = self.find(config)
        if not dataclasses.is_dataclass(getattr(cls, "Config", None)):
            return None
        given = known_fields(cls.Config, options, self.kind)
        for field in dataclasses.fields(cls.Config):
            no_default = field.default is field.default_factory is dataclasses.MISSING
            if field.init and no_default and field.name not in given:
                raise ValueError(f"{field.name} is missing: {config['type']!r} cannot do without")
        settings = cls.Config(**given)
        check_types(settings)
        return settings

    def make(self, config: Mapping[str, Any]) -> Any:
        """What a config describes, from plain data.

        Raises:
            ValueError: see `settings`; or its class fails, or its sizes are more than memory holds.
        """
        cls, options = self.find(config)
        if cls.__module__ == __package__ or cls.__module__.startswith(f"{__package__}."):
            _check_depths(options)  # in a class of one's own, the names may mean something else
        whole = hasattr(cls, "from_config")
        settings = None if whole else self.settings(config)
        try:
            made = cls.from_config(options) if whole else cls(settings)
        except ValueError:
            raise
        except Exception as error:
            reason = _too_large(error)
            lacks = isinstance(error, RuntimeError) and torch.get_default_device().type == "meta"
            if lacks and not reason:  # not the class's fault, perhaps: meta has not all of torch
                raise
            reason = reason or f"{cls.__module__}.{cls.__name__}: {type(error).__name__}: {error}"
            raise ValueError(
                f"{self.kind} {config['type']!r} cannot be built ({reason})"
                + (": give smaller sizes" if reason.startswith("its weights") else "")
            ) from error
        if not whole and getattr(made, "config", None) is None:
            made.config = settings
        return made

    def config(self, made: Any) -> dict[str, Any]:
        """The plain data (as JSON has it) from which `make` builds its like.

        Raises:
            ValueError: its class is not registered.
        """
        for name, cls in self.items():
            if type(made) is cls:
                return {"type": name, **_plain(dataclasses.asdict(made.config))}
        raise ValueError(
            f"{type(made).__name__} has no type: register it with register_{self.kind}"
        )


MODELS = Registry("model", nn.Module, {"established": "k_diffusion.config.network"})
"""Name -> class."""

PRESETS = MODELS.presets
"""Name -> a config, whose options are overridden by those that are given with the name."""

register_model = MODELS.register
"""`@register_model("name")` on a class makes it the "type" of configs, see above."""


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
    return MODELS.make(config)


def model_config(model: nn.Module) -> dict[str, Any]:
    """The plain data (as JSON has it) from which `make_model` builds a model's like.

    Raises:
        ValueError: the model's class is not registered.
    """
    return MODELS.config(model)


def model_trait(config: Mapping[str, Any], name: str, default: Any) -> Any:
    """What a model of this config has as an attribute, told without building it.

    Args:
        config: see `make_model`.
        name: a field of the model's config, or an attribute of its class, such as "prediction".
        default: where it has neither.

    Raises:
        ValueError: the config is refused.
    """
    cls, options = MODELS.find(config)
    if name in options:
        return options[name]
    return getattr(MODELS.settings(config), name, getattr(cls, name, default))


def known_classes(model: Any) -> int:
    """How many classes a model knows: its `num_classes`, or its config's; 0: none."""
    own = getattr(model, "num_classes", None)
    return int(getattr(getattr(model, "config", None), "num_classes", 0) if own is None else own)


def known_augmentation(model: Any) -> int:
    """How many numbers a model takes that say how a sample was augmented: its `augmentation_dim`,
    or its config's; 0: none."""
    own = getattr(model, "augmentation_dim", None)
    its = getattr(getattr(model, "config", None), "augmentation_dim", 0)
    return int(its if own is None else own)


def takes_option(config: Mapping[str, Any], name: str) -> bool:
    """Whether a model of this config's type has such an option.

    True, too, for a class of which that is not known, since it has only `from_config`.
    """
    Config = getattr(MODELS.find(config)[0], "Config", None)
    fields = dataclasses.fields(Config) if dataclasses.is_dataclass(Config) else None
    return fields is None or name in [field.name for field in fields]


MOST_BLOCKS = 1000
"""Of a level: each is made one by one, and a slip of the finger should not take minutes."""

_DEPTHS = ("blocks", "depth", "depths", "mapping_depth")


def _check_depths(options: Mapping[str, Any]) -> None:
    for name in _DEPTHS:
        value = options.get(name, 0)
        for number in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(number, int) and number > MOST_BLOCKS:
                raise ValueError(
                    f"{name} = {_plain(value)} is too large; give at most {MOST_BLOCKS}"
                )


def _too_large(error: Exception) -> str:
    """Why sizes cannot be had, if that is what the error says; torch has no type for it."""
    text = str(error)
    words = ("can't allocate", "out of memory", "calculation overflowed", "Overflow when unpacking")
    if isinstance(error, (MemoryError, OverflowError)) or any(word in text for word in words):
        bytes_ = re.search(r"allocate (\d+) bytes", text)
        size = f": one of them has {int(bytes_[1]) / 2**30:,.0f} GiB" if bytes_ else ""
        return f"its weights are more than memory holds{size}"
    return ""


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _a(kind: str) -> str:
    return f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"


def known_fields(cls: type, config: Mapping[str, Any], kind: str = "model") -> dict[str, Any]:
    """A config's keys and values, once every key is known to be a field of a dataclass.

    Args:
        cls: the dataclass.
        config: plain data.
        kind: what the options are those of.

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
            raise ValueError(f"{key} = {value!r} is no option of this {kind}; {hint}")
    return dict(config)


def check_types(config: Any) -> None:
    """Refuse a dataclass field whose value is not of its annotated type; lists become tuples.

    Understands bool, int, float (a whole number will do), str, None, tuples, lists, mappings,
    Literal and unions; what is annotated otherwise passes unless it is of another class.

    Raises:
        ValueError: names the field, its value and what it takes.
    """
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, hint = getattr(config, field.name), hints[field.name]
        if isinstance(value, list) and typing.get_origin(hint) is not list:  # JSON has no tuples
            value = tuple(value)
            object.__setattr__(config, field.name, value)
        if not _fits(value, hint):
            raise ValueError(f"{field.name} = {value!r} does not fit; give {_wanted(hint)}")


_PLURALS = {bool: "true or false values", int: "whole numbers", float: "numbers", str: "names"}
_SINGULARS = {bool: "true or false", int: "a whole number", float: "a number", str: "a name"}


def _fits(value: Any, hint: Any) -> bool:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return value in inner
    if origin is tuple and inner[-1] is not Ellipsis:
        every = isinstance(value, tuple) and len(value) == len(inner)
        return every and all(map(_fits, value, inner))
    if origin in (tuple, list):
        return isinstance(value, origin) and all(_fits(v, inner[0]) for v in value)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in inner)
    if hint is float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return number and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is Any:  # a class of its own from Python 3.11 on
        return True
    kind = origin or hint
    return not isinstance(kind, type) or isinstance(value, kind)


def _wanted(hint: Any) -> str:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return f"one of {', '.join(map(repr, inner))}"
    if origin is tuple and inner[-1] is not Ellipsis:
        return f"a list of {len(inner)}: {', '.join(map(_wanted, inner))}"
    if origin in (tuple, list):
        return f"a list of {_PLURALS.get(inner[0], 'values')}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_wanted, inner))
    if isinstance(origin or hint, type) and issubclass(origin or hint, Mapping):
        return "a table of names and values"
    return _SINGULARS.get(hint) or ("none" if hint is type(None) else f"a {hint}")
