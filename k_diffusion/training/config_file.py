"""Reading a run's config from a file, with every mistake as one line.

A file is TOML or JSON and cannot run code. A mistake gives one line with the key's dotted path,
the value, and the nearest key that exists.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from k_diffusion.training.config import ConfigError, DigitsConfig, FolderConfig, TrainConfig
from k_diffusion.utils.maths import nearest, unknown


def load_config(path: str | Path, overrides: Mapping[str, Any] | None = None) -> TrainConfig:
    """Read a config from a .toml or .json file.

    Args:
        path: the file.
        overrides: dotted key -> value, put in place of the file's.

    Raises:
        ConfigError: no such file, not TOML or JSON, an unknown key, or a value that does not fit.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
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
    for key, value in (overrides or {}).items():
        _override(data, key, value)
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


def _parse_json(path: Path, text: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        for key in keys:
            if keys.count(key) > 1:
                raise ConfigError(f"config {path}: key {key!r} stands twice")
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=unique)
    except (json.JSONDecodeError, RecursionError) as error:
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
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"config {path} is no valid TOML: {error}") from None


def _override(data: dict[str, Any], key: str, value: Any) -> None:
    *above, last = key.split(".")
    for part in above:
        below = data.setdefault(part, {})
        if not isinstance(below, dict):
            raise ConfigError(f"{key}: {part} is {below!r}, which has no keys")
        data = below
    data[last] = value


# ---------------------------------------------------------------- explaining


def _explain(error: ValidationError) -> str:
    mistakes = error.errors(include_url=False)
    # An unknown key first: it is often the reason why another one is missing.
    first = min(mistakes, key=lambda m: m["type"] != "extra_forbidden")
    where = _keys(first["loc"])
    key = ".".join(where)
    more = f" (and {len(mistakes) - 1} more)" if len(mistakes) > 1 else ""
    if first["type"] == "extra_forbidden":
        known = _known_keys(where[:-1], first["loc"])
        close = nearest(where[-1], known)
        prefix = "".join(f"{part}." for part in where[:-1])
        hint = f"did you mean {prefix}{close}?" if close else f"known: {', '.join(known)}"
        return f"{key} = {_short(first['input'])} is no known key; {hint}{more}"
    if first["type"] == "missing":
        return f"{key} is missing{more}"
    if first["type"] == "union_tag_not_found":
        return f"{key}.source is missing; one of digits, folder{more}"
    if first["type"] == "union_tag_invalid":
        tag = first["ctx"]["tag"]
        return f"{key}: " + unknown("source", tag, ["digits", "folder"]) + more
    if first["type"] == "literal_error":
        choices = first["ctx"]["expected"]
        return f"{key} = {_short(first['input'])} is not one of {choices}{more}"
    message = " ".join(first["msg"].removeprefix("Value error, ").split())
    message = message.replace("Input should be a valid tuple", "Input should be a list")
    if first["type"] == "value_error" and isinstance(first["input"], dict):
        # What is wrong lies inside, and the message says where.
        return f"{key}{'.' if re.match('[a-z_]+ = ', message) else ': '}{message}{more}"
    message = message[0].lower() + message[1:] if message.startswith("Input") else message
    return f"{key} = {_short(first['input'])}: {message}{more}"


def _keys(loc: Sequence[int | str]) -> list[str]:
    """The path as the file has it: without the names that pydantic gives to parts of a union."""
    parts = [str(part) for part in loc]
    if parts[:1] == ["data"] and len(parts) > 1 and parts[1] in ("digits", "folder"):
        del parts[1]
    return parts


def _known_keys(above: Sequence[str], loc: Sequence[int | str]) -> list[str]:
    kind: Any = TrainConfig
    if above[:1] == ["data"]:
        kind = FolderConfig if loc[1] == "folder" else DigitsConfig
    elif above:
        kind = TrainConfig.model_fields[above[0]].annotation
    return list(kind.model_fields)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
