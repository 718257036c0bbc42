"""Types and values in words: what a key takes, and a value as TOML writes it."""

from __future__ import annotations

import collections.abc
import json
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

_PLAIN = {bool: "true or false", str: "text", type(None): '"none"', Any: "anything"}
_NUMBERS = {int: "whole number", float: "number"}


def takes(hint: Any, marks: Iterable[Any] = ()) -> str:
    """What a field of an annotated type takes, bounds included, in words.

    Args:
        hint: the annotation.
        marks: what else is said of it, such as pydantic's bounds.
    """
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return takes(inner[0], [*marks, *inner[1:]])
    if origin in (typing.Union, types.UnionType):
        return ", or ".join(dict.fromkeys(takes(part, marks) for part in inner))
    if origin is typing.Literal:
        *first, last = map(toml, inner)
        return f"{', '.join(first)} or {last}" if first else last
    if origin is tuple and inner[-1] is not Ellipsis:
        each = [takes(part) for part in inner]
        alike = len(set(each)) == 1
        return f"list of {len(each)}: {f'each {_a(each[0])}' if alike else ', '.join(each)}"
    if origin in (tuple, list, collections.abc.Sequence):
        return f"list, each {_a(takes(inner[0]))}"
    if hint in _NUMBERS:
        return _NUMBERS[hint] + _bounds(marks)
    if hint in _PLAIN:
        return _PLAIN[hint]
    kind = origin or hint
    if isinstance(kind, type) and issubclass(kind, Mapping):
        named = inner and inner[1] is not Any
        return f"table, each value {_a(takes(inner[1]))}" if named else "table"
    if hasattr(kind, "model_fields"):
        return "table"
    return getattr(kind, "__name__", str(kind)).lower()


def _a(words: str) -> str:
    return f"a {words}" if words.startswith(("whole", "number", "list", "table", "text")) else words


def _bounds(marks: Iterable[Any]) -> str:
    found: dict[str, Any] = {}
    for mark in marks:
        for one in getattr(mark, "metadata", [mark]):
            for name in ("ge", "gt", "le", "lt"):
                if (value := getattr(one, name, None)) is not None:
                    found[name] = value
    low = f"from {found['ge']}" if "ge" in found else f"above {found.get('gt')}"
    high = f"{found['le']}" if "le" in found else f"below {found.get('lt')}"
    below, above = bool(found.keys() & {"le", "lt"}), bool(found.keys() & {"ge", "gt"})
    if below and above:
        return f" {low} to {high}"
    if above:
        return f" of at least {found['ge']}" if "ge" in found else f" {low}"
    if below:
        return f" of at most {high}" if "le" in found else f" {high}"
    return ""


def is_union(hint: Any) -> bool:
    """Whether an annotation says "this or that"."""
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def tables_in(hint: Any) -> list[Any]:
    """The classes of tables, which have keys of their own, in an annotation, at any depth."""
    if isinstance(hint, type) and hasattr(hint, "model_fields"):
        return [hint]
    return [kind for part in typing.get_args(hint) for kind in tables_in(part)]


def tags(table: Any) -> list[str]:
    """What tells one table from others: the only value that its first key takes, or its class."""
    first = next(iter(table.model_fields.values()), None)
    hint = None if first is None else first.annotation
    values = typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()
    return [str(values[0])] if len(values) == 1 else [table.__name__]


# ---------------------------------------------------------------- TOML


def toml(value: Any) -> str:
    """A value as TOML has it; None, which TOML has not, as the text "none".

    Raises:
        TypeError: it is no plain data.
    """
    if value is None:
        return '"none"'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else str(value)
    if isinstance(value, str):
        # JSON's escapes are TOML's too, and one more sign must not stand as it is.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(toml, value))}]"
    if isinstance(value, Mapping):
        pairs = ", ".join(f"{toml_key(key)} = {toml(one)}" for key, one in value.items())
        return f"{{ {pairs} }}" if pairs else "{}"
    raise TypeError(f"{value!r} is no plain data")


def toml_key(key: str) -> str:
    """A key as TOML has it: bare, or quoted where it must be."""
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else toml(key)


def toml_tables(data: Mapping[str, Any], above: str = "") -> list[str]:
    """The lines of a TOML file: values first, then each table under its dotted name."""
    lines = [
        f"{toml_key(key)} = {toml(value)}"
        for key, value in data.items()
        if not isinstance(value, Mapping)
    ]
    for key, value in data.items():
        if isinstance(value, Mapping):
            name = above + toml_key(key)
            lines += ["", f"[{name}]", *toml_tables(value, f"{name}.")]
    return lines
