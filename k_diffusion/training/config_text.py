"""A run's config written out: in full, or as a file to begin with."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from k_diffusion.models import CONDITIONERS, MODELS
from k_diffusion.models.registry import Registry, takes_option
from k_diffusion.training.augmentation_config import with_augmentation_dim
from k_diffusion.training.config import ConfigError, TrainConfig, settled
from k_diffusion.training.config_file import make_config
from k_diffusion.training.explain import WIDTH, Entry, config_sections
from k_diffusion.training.sections import AUTO
from k_diffusion.training.words import toml, toml_tables
from k_diffusion.utils.maths import unknown
from k_diffusion.utils.scheduler import make_scheduler


def in_full(config: TrainConfig) -> dict[str, Any]:
    """A config as plain JSON data with all its defaults, those of model, conditioner and process
    too; what only the data decides stays as it is. `make_config` makes an equal run of it."""
    data = config.to_json()
    model = _filled(MODELS, with_augmentation_dim(settled(config.model), config.augmentation))
    if config.model.get("sigma_data") == AUTO:
        model["sigma_data"] = AUTO
    if "in_channels" not in config.model and takes_option(config.model, "in_channels"):
        model.pop("in_channels", None)
    data["model"] = model
    if config.conditioner is not None:
        data["conditioner"] = _filled(CONDITIONERS, config.conditioner)
    if config.process is not None:
        data["process"] = make_scheduler(**config.process).to_config()
    return data


def _filled(registry: Registry, given: Mapping[str, Any]) -> dict[str, Any]:
    settings = registry.settings(given)
    if settings is None:  # it has only from_config, which alone knows its defaults
        return dict(given)
    name = registry.presets.get(given["type"], given)["type"]
    return {"type": name, **json.loads(json.dumps(dataclasses.asdict(settings)))}


def as_json(config: TrainConfig) -> str:
    """The config in full, as JSON."""
    return json.dumps(in_full(config), indent=2, ensure_ascii=False)


def as_toml(config: TrainConfig) -> str:
    """The config in full, as TOML.

    Raises:
        ConfigError: it holds a null that TOML cannot say.
    """
    full = in_full(config)
    data = _without_null(full, config)
    if in_full(make_config(data)) != full:
        raise ConfigError(
            "this config holds a null where leaving the key out means another value, which TOML "
            "cannot say: write it as JSON"
        )
    chosen = [
        f"# {key} = {toml(AUTO)} is {name} here"
        for key, name in (("loss.weighting", config.weighting), ("loss.density", config.density))
        if getattr(config.loss, key.partition(".")[2]) == AUTO
    ]
    return "\n".join([*chosen, *toml_tables(data)])


def _without_null(data: Mapping[str, Any], owner: Any) -> dict[str, Any]:
    """As TOML can have it: "none" for a key of the config itself, elsewhere the key left out.

    Args:
        data: of the config, or of a table in it.
        owner: the config or that table.
    """
    plain: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, Mapping):
            plain[key] = _without_null(value, getattr(owner, key, None))
        elif value is not None:
            plain[key] = value
        elif isinstance(owner, BaseModel):
            plain[key] = "none"
    return plain


# ---------------------------------------------------------------- a file to begin with

_BEGIN = {
    "total_images": "1_000_000",
    "data.source": '"folder"',
    "data.path": '"images"',
    "data.size": "32",
    "model.prediction": '"edm"',
    "model.sigma_data": '"auto"',
}
"""What a first run needs to say, as TOML; the other keys have defaults."""


def template(model: str = "unet") -> str:
    """A TOML file to begin with: what must be given, and every other key, commented out.

    Args:
        model: a registered type; a preset will do.

    Raises:
        ValueError: an unknown model.
    """
    sections = config_sections()
    known = {s.path.removeprefix("model."): s for s in sections if s.path.startswith("model.")}
    if model not in known:
        raise ValueError(unknown("model", model, known))
    root, *others = sections
    tables = {section.path for section in others}
    lines = [
        "# A run of `k-diffusion train`. A line that begins with #, without a space, is a key at",
        "# its default value.",
    ]
    for entry in root.entries:
        if entry.key not in {*tables, "model", "data"}:
            lines += _lines(entry)
    chosen = [known[model], *(s for s in others if s.path in ("data.folder",) or "." not in s.path)]
    for section in chosen:
        lines += ["", f"# {section.title}", f"[{section.path.partition('.')[0]}]"]
        if section.path.startswith("model.") and not section.entries:
            lines += [f"type = {toml(model)}"]
        for entry in section.entries:
            lines += _lines(entry)
    return "\n".join(lines)


def _lines(entry: Entry) -> list[str]:
    name = entry.key.rpartition(".")[2]
    said = f"{entry.description} ({entry.takes})"
    lines = ["", *textwrap.wrap(said, WIDTH, initial_indent="# ", subsequent_indent="# ")]
    if entry.key in _BEGIN:
        return [*lines, f"{name} = {_BEGIN[entry.key]}"]
    if entry.default is None:
        return [*lines, f"{name} = {entry.takes}"]
    return [*lines, f"#{name} = {entry.default}" if entry.default else f"# {name}: left out"]
