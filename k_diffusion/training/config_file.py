"""Reading a run's config from a file, with every mistake as one line.

A file is TOML or JSON and cannot run code. A mistake gives one line with the key's dotted path,
the value, and the nearest key that exists.
"""

from __future__ import annotations

import json
import re
import sys
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field, ValidationError

from k_diffusion.training.config import ConfigError, TrainConfig
from k_diffusion.training.data_sections import DataConfig
from k_diffusion.training.sections import StrictConfig
from k_diffusion.training.words import is_union, tables_in, tags, takes
from k_diffusion.utils.maths import nearest, unknown


def load_config(path: str | Path, overrides: Mapping[str, Any] | None = None) -> TrainConfig:
    """Read a config from a .toml or .json file.

    Args:
        path: the file.
        overrides: dotted key -> value, put in place of the file's.

    Raises:
        ConfigError: no such file, not TOML or JSON, an unknown key, or a value that does not fit.
    """
    data = read_file(path)
    for key, value in (overrides or {}).items():
        override(data, key, value)
    return make_config(data, f"config {path}")


def make_config(data: Mapping[str, Any], name: str = "config") -> TrainConfig:
    """A TrainConfig from plain data, with every mistake as one line.

    Args:
        data: the keys of TrainConfig.
        name: what to call the config in an error.

    Raises:
        ConfigError: an unknown key, or a value that does not fit.
    """
    try:
        return TrainConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{name}: {_explain(error)}") from None


class _DataAlone(StrictConfig):
    data: DataConfig = Field(description="Where the images come from.")


def make_data(options: Mapping[str, Any], name: str = "data") -> dict[str, Any]:
    """What `make_source` takes, of the keys of a data section, with every mistake as one line.

    Raises:
        ConfigError: an unknown key, or a value that does not fit.
    """
    try:
        return _DataAlone.model_validate({"data": dict(options)}).data.model_dump()
    except ValidationError as error:
        raise ConfigError(f"{name}: {_explain(error)}") from None


def read_file(path: str | Path) -> dict[str, Any]:
    """The keys and values of a .toml or .json file, of whatever kind of config.

    Raises:
        ConfigError: no such file, not TOML or JSON, a key that stands twice, or no keys at all.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        reason = "does not exist" if isinstance(error, FileNotFoundError) else error.strerror
        raise ConfigError(f"config {path} {reason}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"config {path} is no text in UTF-8") from None
    if path.suffix == ".json":
        data = _parse_json(path, text)
    elif path.suffix == ".toml":
        data = _parse_toml(path, text)
    else:
        raise ConfigError(f"config {path} ends in {path.suffix!r}; give a .toml or .json file")
    if not isinstance(data, dict):
        raise ConfigError(f"config {path} holds a {type(data).__name__}, not keys with values")
    return data


def override(data: dict[str, Any], key: str, value: Any) -> None:
    """Put a value under a dotted key, in place of what is there.

    Raises:
        ConfigError: the key is none, or leads through something that has no keys.
    """
    *above, last = parts = key.split(".")
    if not all(parts):
        raise ConfigError(f"{key!r} is no key; give names joined by dots, such as optimizer.lr")
    for depth, part in enumerate(above):
        below = data.setdefault(part, {})
        if not isinstance(below, dict):
            there = ".".join(parts[: depth + 1])
            way = ": give the whole list" if isinstance(below, list) else ""
            raise ConfigError(f"{key}: {there} is {_short(below)}, which has no keys{way}")
        data = below
    data[last] = value


def _parse_json(path: Path, text: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        for key in keys:
            if keys.count(key) > 1:
                raise ConfigError(f"config {path}: key {key!r} stands twice")
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=unique)
    except ConfigError:
        raise
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"config {path} is no valid JSON: {error}") from None


def _parse_toml(path: Path, text: str) -> Any:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        try:
            import tomli as tomllib
        except ImportError:
            raise ConfigError(
                f"config {path}: Python 3.10 reads TOML with tomli: pip install tomli, or give "
                "the config as JSON"
            ) from None
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"config {path} is no valid TOML: {error}") from None


# ---------------------------------------------------------------- explaining


class _Place(NamedTuple):
    """Where a mistake lies: its key as the file has it, the field there, the keys of its table."""

    key: tuple[str, ...]
    field: Any
    known: list[str]
    alternatives: list[str]


def _place(loc: Sequence[int | str]) -> _Place:
    """What pydantic calls a place, without the names that it gives to parts of a union."""
    kind: Any = TrainConfig
    field: Any = None
    known = list(kind.model_fields)
    waiting: list[Any] = []
    shown: list[str] = []
    for part in loc:
        if chosen := [one for one in waiting if part in tags(one)]:
            kind, waiting = chosen[0], []
            known = list(kind.model_fields)
            continue
        if kind is None and not isinstance(part, int) and field is not None and _branches(field):
            break  # the name of a branch, and what that branch says of the value's parts
        shown.append(str(part))
        if isinstance(part, int):
            continue
        known = list(kind.model_fields) if kind is not None else []
        field = kind.model_fields.get(part) if kind is not None else None
        tables = tables_in(field.annotation) if field is not None else []
        kind, waiting = (None, tables) if len(tables) != 1 else (tables[0], [])
    return _Place(tuple(shown), field, known, [tag for one in waiting for tag in tags(one)])


def _branches(field: Any) -> bool:
    """Whether a field's value may be of several kinds, none of them a table, beside none."""
    hint = field.annotation
    kinds = [part for part in typing.get_args(hint) if part is not type(None)]
    return is_union(hint) and len(kinds) > 1 and not tables_in(hint)


def _explain(error: ValidationError) -> str:
    mistakes = error.errors(include_url=False)
    # An unknown key first: it is often the reason why another one is missing.
    first = min(mistakes, key=lambda m: m["type"] != "extra_forbidden")
    place = _place(first["loc"])
    key = ".".join(place.key)
    others = {_place(mistake["loc"]).key for mistake in mistakes} - {place.key}
    more = f" (and {len(others)} more)" if others else ""
    if first["type"] == "extra_forbidden":
        close = nearest(place.key[-1], place.known)
        prefix = "".join(f"{part}." for part in place.key[:-1])
        hint = f"did you mean {prefix}{close}?" if close else f"known: {', '.join(place.known)}"
        return f"{key} = {_short(first['input'])} is no known key; {hint}{more}"
    if first["type"] == "missing":
        return f"{key} is missing{more}"
    if first["type"] == "union_tag_not_found":
        tag = first["ctx"]["discriminator"].strip("'")
        return f"{key}.{tag} is missing; one of {', '.join(place.alternatives)}{more}"
    if first["type"] == "union_tag_invalid":
        tag = first["ctx"]["discriminator"].strip("'")
        return f"{key}: {unknown(tag, first['ctx']['tag'], place.alternatives)}{more}"
    if first["type"] == "value_error":
        message = " ".join(first["msg"].removeprefix("Value error, ").split())
        if not isinstance(first["input"], dict):
            return f"{key} = {_short(first['input'])}: {message}{more}"
        # What is wrong lies inside, and the message says where.
        joint = "." if re.match(r"[a-z_]+(\.\w+)* (= |is missing)", message) else ": "
        return f"{key}{joint if key else ''}{message}{more}"
    shown = f"{key} = {_short(first['input'])}"
    if place.field is not None and _branches(place.field):
        wanted = takes(place.field.annotation, place.field.metadata)
        return f"{shown} does not fit; give {wanted}{more}"
    if first["type"] == "literal_error":
        return f"{shown} is not one of {first['ctx']['expected']}{more}"
    if first["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return f"{shown}: input should be a table of keys{more}"
    message = " ".join(first["msg"].split())
    message = message.replace("Input should be a valid tuple", "Input should be a list")
    message = message[0].lower() + message[1:] if message.startswith("Input") else message
    return f"{shown}: {message}{more}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
