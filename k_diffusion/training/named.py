"""Functions that configs name, each with its keyword-only arguments as its options."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from k_diffusion.utils.maths import unknown


class Table(dict[str, Any]):
    """Name -> function, or class, of one kind.

    Args:
        kind: what its entries are called in errors.
        reserved: what a config says of an entry of this kind beside the entry's own options.
    """

    def __init__(self, kind: str, reserved: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.kind, self.reserved = kind, reserved

    def register(self, name: str) -> Callable[[Any], Any]:
        """A decorator that makes a function known by name; the same one may come again.

        Raises:
            ValueError: another has the name, or an option's name is reserved.
        """

        def add(function: Any) -> Any:
            taken = self.get(name)
            if taken is not None and _origin(taken) != _origin(function):
                raise ValueError(
                    f"{self.kind} {name!r} is taken by {'.'.join(_origin(taken))}: register "
                    f"{'.'.join(_origin(function))} under another name"
                )
            for option in self.reserved:
                if option in options_of(function):
                    raise ValueError(
                        f"{self.kind} {name!r} has an option {option!r}, which every {self.kind} "
                        "has already: call it otherwise"
                    )
            self[name] = function
            return function

        return add

    def find(self, name: str, options: Mapping[str, Any]) -> Any:
        """The function called `name`, once these options are seen to fit it.

        Raises:
            ValueError: an unknown name or option (the nearest one is offered), one that is missing,
                or a value of another type than the default's.
        """
        if name not in self:
            own = "; one of your own is known once its file is imported: by --plugin FILE.py"
            raise ValueError(unknown(self.kind, name, self) + own)
        known = options_of(self[name])
        for option, value in options.items():
            if option not in known:
                raise ValueError(unknown(f"option of {self.kind} {name!r},", option, known))
            wanted = _kind(known[option].default)
            if wanted and _kind(value) != wanted:
                raise ValueError(
                    f"option {option} of {self.kind} {name!r} is {value!r}; give {wanted}"
                )
        for option, parameter in known.items():
            if parameter.default is parameter.empty and option not in options:
                raise ValueError(
                    f"option {option} of {self.kind} {name!r} is missing: it has no usual value"
                )
        return self[name]


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "true or false"
    return {int: "a number", float: "a number", str: "text"}.get(type(value), "")


def options_of(function: Any) -> dict[str, inspect.Parameter]:
    """The keyword-only arguments of a function, or of what makes an instance of a class."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY}


def _origin(function: Any) -> tuple[str, str]:
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return str(getattr(function, "__module__", "")), str(name)
