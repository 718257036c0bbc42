"""How options are read from the command line: types with errors that say what would fit."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from k_diffusion.utils.maths import unknown

from .problems import UsageError

T = TypeVar("T")
WEIGHTS = Path(__file__).parent.parent / "weights"
"""Where the models lie that come with the library, each a file for sampling with its card."""
OURS = "k-diffusion:"
"""Before the name of one of them, which no file or folder of somebody's own then is taken for."""


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


def names(word: str) -> tuple[str, ...]:
    """`euler,heun`: names without a blank, each once."""
    return tuple(dict.fromkeys(part.strip() for part in word.split(",") if part.strip()))


def wholes(word: str) -> tuple[int, ...]:
    """`5,10,20`: whole numbers, each once."""
    return tuple(dict.fromkeys(whole(part.strip()) for part in word.split(",") if part.strip()))


def settings(word: str) -> dict[str, Any]:
    """`name=value,name=value`: values as in JSON (numbers, true, null, [1, 2], {"a": 1}), anything
    else as text."""
    found: dict[str, Any] = {}
    for part in _parts(word):
        name, _, value = (piece.strip() for piece in part.partition("="))
        name = name.replace("-", "_")
        if not name or not value:
            raise ValueError(f"{part!r} is not of the form name=value")
        if name in found:
            raise ValueError(f"{name} is given twice")
        found[name] = _value(name, value)
    return found


def _parts(word: str) -> list[str]:
    """What stands between commas, but for those in brackets and in "quotes"."""
    parts, depth, quoted, escaped = [""], 0, False, False
    for sign in word:
        quoted, escaped = quoted != (sign == '"' and not escaped), sign == "\\" and not escaped
        if not quoted:
            depth += (sign in "[{") - (sign in "]}")
        if sign == "," and depth <= 0 and not quoted:
            parts.append("")
        else:
            parts[-1] += sign
    return parts


def _value(name: str, value: str) -> Any:
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        if value[0] in '[{"':
            raise ValueError(
                f"{name}: {value} is not as JSON has it, such as [1, true] or "
                '{"name": "cosine"} (in a shell, within \'single quotes\')'
            ) from None
        return value


def show_settings(options: dict[str, Any]) -> str:
    """The inverse of `settings`."""
    return ",".join(f"{name}={show_setting(value)}" for name, value in options.items())


def show_setting(value: Any) -> str:
    """A value as it is typed: the inverse of how one is read."""
    return value if isinstance(value, str) else json.dumps(value)


def whole_or_auto(word: str) -> int | str:
    """A whole number of any sign, or "auto"."""
    return word if word == "auto" else whole(word)


def resume(words: list[str]) -> str:
    """A checkpoint's path, or "auto", which stands for itself and for nothing."""
    if len(words) > 1:
        raise ValueError(f"{words[1]!r} is one value too many: give one checkpoint, or auto")
    return words[0] if words else "auto"


def _or_default(value: object) -> str:
    return "as configured" if value is None else str(value)


WholeOrNone = Annotated[int | None, _spec("INT", whole, _or_default)]
WholeOrAuto = Annotated[int | str | None, _spec("INT|auto", whole_or_auto, _or_default)]
Classes = Annotated[
    tuple[int, ...], _spec("INT[,INT...]", classes, lambda value: ",".join(map(str, value)))
]
Names = Annotated[tuple[str, ...], _spec("NAME[,NAME...]", names, ",".join)]
Wholes = Annotated[
    tuple[int, ...], _spec("INT[,INT...]", wholes, lambda value: ",".join(map(str, value)))
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
MoreSettings = Annotated[
    tuple[Annotated[dict[str, Any], _spec("NAME=VALUE[,...]", settings, show_settings)], ...],
    tyro.conf.UseAppendAction,
]
"""Settings that may be given several times; `joined` makes one of them."""
Settings = Annotated[dict[str, Any], _spec("NAME=VALUE[,...]", settings, show_settings)]


def joined(given: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    """All settings of several options.

    Raises:
        ValueError: a name stands in two of them.
    """
    found: dict[str, Any] = {}
    for one in given:
        for name, value in one.items():
            if name in found:
                raise ValueError(f"{name} is given twice")
            found[name] = value
    return found


def newest_in(path: str) -> str:
    """A run's folder stands for its newest whole checkpoint, `OURS` and a name for the file of
    a model that comes with the library; any other path for itself."""
    from k_diffusion.training import latest_checkpoint

    if path.startswith(OURS):
        name = path.removeprefix(OURS)
        known = [file.stem for file in sorted(WEIGHTS.glob("*.safetensors"))]
        if name not in known:
            raise UsageError(unknown("model that comes with the library", name, known))
        return str(WEIGHTS / f"{name}.safetensors")

    def say(line: str) -> None:
        print(line, file=sys.stderr)

    return str((latest_checkpoint(path, say) if Path(path).is_dir() else None) or path)
