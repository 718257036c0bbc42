"""How options are read from the command line: types with errors that say what would fit."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro
from tyro.constructors import PrimitiveConstructorSpec

T = TypeVar("T")


def _spec(metavar: str, read: Callable[[str], T], show: Callable[[T], str]) -> Any:
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda words: read(words[0]),
        is_instance=lambda value: True,
        str_from_instance=lambda value: [show(value) or "none"],
    )


def whole(word: str) -> int:
    """A whole number of any sign."""
    try:
        return int(word)
    except ValueError:
        raise ValueError(f"{word!r} is not a whole number") from None


def classes(word: str) -> tuple[int, ...]:
    """`3`, `0,1,2`, `0-9`, or any mixture, in the order given."""
    found: list[int] = []
    for part in word.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(f"{word!r} is not a class or a list of classes such as 3 or 0,1,4-6")
        if dash and int(last) < int(first):
            raise ValueError(f"{part.strip()!r} counts down; give {last}-{first}")
        found += range(int(first), int(last or first) + 1)
    return tuple(found)


def settings(word: str) -> dict[str, Any]:
    """`name=value,name=value`: values as in JSON (numbers, true, [1, 2]), anything else as text."""
    found: dict[str, Any] = {}
    for part in re.split(r",(?![^\[]*\])", word):  # commas inside [brackets] belong to a value
        name, _, value = (piece.strip() for piece in part.partition("="))
        if not name or not value:
            raise ValueError(f"{part!r} is not of the form name=value")
        try:
            found[name.replace("-", "_")] = json.loads(value)
        except json.JSONDecodeError:
            found[name.replace("-", "_")] = value
    return found


def show_settings(options: dict[str, Any]) -> str:
    """The inverse of `settings`."""
    return ",".join(f"{name}={show_setting(value)}" for name, value in options.items())


def show_setting(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def resume(words: list[str]) -> str:
    """A checkpoint's path, or "auto", which stands for itself and for nothing."""
    if len(words) > 1:
        raise ValueError(f"{words[1]!r} is one value too many: give one checkpoint, or auto")
    return words[0] if words else "auto"


def _or_default(value: object) -> str:
    return "as configured" if value is None else str(value)


WholeOrNone = Annotated[int | None, _spec("INT", whole, _or_default)]
Classes = Annotated[
    tuple[int, ...], _spec("INT[,INT...]", classes, lambda value: ",".join(map(str, value)))
]
Resume = Annotated[
    str,
    PrimitiveConstructorSpec(
        nargs="*",
        metavar="[auto|FILE]",
        instance_from_str=resume,
        is_instance=lambda value: isinstance(value, str),
        str_from_instance=lambda value: [value or "no"],
    ),
]
Words = Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="VALUE")]
Settings = Annotated[dict[str, Any], _spec("NAME=VALUE[,...]", settings, show_settings)]


def newest_in(path: str) -> str:
    """A run's folder stands for the newest whole checkpoint in it; any other path for itself."""
    from k_diffusion.training import latest_checkpoint

    def say(line: str) -> None:
        print(line, file=sys.stderr)

    return str((latest_checkpoint(path, say) if Path(path).is_dir() else None) or path)
