"""Every key of a run's config, with what it takes, its default and its meaning.

All of it is read from the classes that check the config, from the registries and from docstrings:
a key, a model or a weighting that is added appears by itself.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import textwrap
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Union

from pydantic import BaseModel

from k_diffusion.models import CONDITIONERS, MODELS
from k_diffusion.models.registry import Registry
from k_diffusion.training.config import TrainConfig
from k_diffusion.training.extra_losses import LOSSES
from k_diffusion.training.learning_rate import COURSES
from k_diffusion.training.loss import DENSITIES, WEIGHTINGS
from k_diffusion.training.named import options_of
from k_diffusion.training.sections import COURSE_OPTIONS
from k_diffusion.training.words import is_union, tables_in, tags, takes, toml
from k_diffusion.utils.maths import unknown
from k_diffusion.utils.scheduler import SCHEDULERS, Spacing

WIDTH = 96


@dataclass(frozen=True)
class Entry:
    """A key.

    Attributes:
        key: dotted, as files and `--set` have it.
        takes: what its value may be.
        default: as TOML writes it; "": it may be left out; None: it must be given.
        description: what it is for.
    """

    key: str
    takes: str
    default: str | None
    description: str


@dataclass(frozen=True)
class Section:
    """Keys that belong together: a table, or what comes with one of its choices.

    Attributes:
        path: such as "optimizer", "data.folder", "model.unet", "loss.density.lognormal"; "" is the
            config itself.
        title: what they are those of, in a line.
        entries: in order.
    """

    path: str
    title: str
    entries: tuple[Entry, ...]


def config_sections(kind: type[BaseModel] = TrainConfig) -> list[Section]:
    """All there is to say of a config, the keys of tables before those that their choices add."""
    return list(_table(kind, "", "", _first_paragraph(kind)))


def narrowed(sections: list[Section], name: str) -> list[Section]:
    """What is said of one key, table or choice, such as "optimizer.lr", "loss" or "model.unet".

    Raises:
        ValueError: there is no such thing; the nearest is offered.
    """
    found = []
    for section in sections:
        whole = _within(section.path, name)
        entries = tuple(e for e in section.entries if whole or _within(e.key, name))
        if whole or entries:
            found.append(dataclasses.replace(section, entries=entries))
    if not found:
        known = [s.path for s in sections if s.path] + [e.key for s in sections for e in s.entries]
        close = unknown("key", name, dict.fromkeys(known))
        raise ValueError(re.sub(r"[Kk]nown: .*", "--explain alone lists all", close))
    return found


def _within(path: str, name: str) -> bool:
    return path == name or path.startswith(f"{name}.")


def as_text(sections: list[Section]) -> str:
    """As plain text, the same on a terminal and in a file."""
    parts = []
    for section in sections:
        head = f"{section.path}: {section.title}" if section.path else section.title
        parts.append(textwrap.fill(head, WIDTH, initial_indent="== ", subsequent_indent="   "))
        for entry in section.entries:
            value = f"= {entry.default}" if entry.default else "(may be left out)"
            value = "(must be given)" if entry.default is None else value
            said = [entry.takes, entry.description]
            indent = {"initial_indent": "    ", "subsequent_indent": "    "}
            lines = [textwrap.fill(text, WIDTH, **indent) for text in said if text]  # type: ignore[arg-type]
            parts.append("\n".join([f"{entry.key} {value}", *lines]))
    return "\n\n".join(parts)


# ---------------------------------------------------------------- the config's own tables


def _table(kind: type[BaseModel], path: str, keys: str, title: str) -> Iterator[Section]:
    entries: list[Entry] = []
    below: list[Section] = []
    for name, field in kind.model_fields.items():
        key = keys + name
        default = (
            None if field.is_required() else _plain(field.get_default(call_default_factory=True))
        )
        words = takes(field.annotation, field.metadata)
        tables = tables_in(field.annotation)
        if len(tables) > 1:
            choices = " or ".join(toml(tag) for table in tables for tag in tags(table))
            words = f"table, of which the first key says which kind it is: {choices}"
        description = " ".join((field.description or "").split())
        entries.append(Entry(key, words, default, description))
        for table in tables:
            inner = f"{key}.{tags(table)[0]}" if len(tables) > 1 else key
            below += _table(table, inner, f"{key}.", _first_paragraph(table))
        if key in _CHOICES:
            below += _CHOICES[key]()
    yield Section(path, title, tuple(entries))
    yield from below


def _plain(default: Any) -> str:
    return "{}" if isinstance(default, BaseModel) else toml(default)


# ---------------------------------------------------------------- what choices add


def _registered(registry: Registry, key: str) -> Iterator[Section]:
    for name, home in registry.homes.items():
        if name not in registry:
            importlib.import_module(home)
    for name, cls in registry.items():
        config = getattr(cls, "Config", None)
        about = _first_paragraph(cls)
        if config is None:
            yield Section(f"{key}.{name}", f"{about} Its options are its own from_config's.", ())
            continue
        kind = Entry(f"{key}.type", toml(name), None, f"Which {registry.kind} this is.")
        fields = (_from_data(entry) for entry in _fields(config, key))
        yield Section(f"{key}.{name}", about, (kind, *fields))
    for name, preset in registry.presets.items():
        options = ", ".join(f"{k} = {toml(v)}" for k, v in preset.items() if k != "type")
        yield Section(f"{key}.{name}", f"{preset['type']} with {options or 'its defaults'}.", ())


def _from_data(entry: Entry) -> Entry:
    """What a run takes from its data where it is left out."""
    if entry.key != "model.in_channels":
        return entry
    return dataclasses.replace(entry, default="", description=entry.description + " The data's.")


def _processes() -> Iterator[Section]:
    for name, kind in sorted(SCHEDULERS.items()):
        if not issubclass(kind, Spacing):  # which only lay levels
            entry = Entry("process.name", toml(name), None, "Which schedule this is.")
            about = f"{kind.summary()} ({kind.source})"
            yield Section(f"process.{name}", about, (entry, *_fields(kind, "process")))


def _functions(table: Mapping[str, Any], key: str) -> Iterator[Section]:
    for name, function in table.items():
        yield Section(
            f"{key}.{name}", _first_paragraph(function), tuple(_options(function, f"{key}_options"))
        )


def _losses() -> Iterator[Section]:
    for name, loss in LOSSES.items():
        key = f"loss.extra.{name}"
        weight = Entry(f"{key}.weight", "number above 0", "1.0", "What its mean is multiplied by.")
        yield Section(key, _first_paragraph(loss), (weight, *_options(loss, key)))


def _options(function: Any, key: str) -> Iterator[Entry]:
    """The options of a function, or of a class, that a config names."""
    hints = typing.get_type_hints(
        function.__init__ if isinstance(function, type) else function,  # type: ignore[misc]
        include_extras=True,
    )
    about = documented(function)
    for name, option in options_of(function).items():
        yield Entry(
            f"{key}.{name}",
            takes(_without_none(hints.get(name, Any))),
            _default(option.default, option.empty),
            about.get(name, ""),
        )


def _courses() -> Iterator[Section]:
    for name, course in COURSES.items():
        options = ", ".join(f"optimizer.{option}" for option in COURSE_OPTIONS[name])
        title = _first_paragraph(course) + (f" Its options: {options}." if options else "")
        yield Section(f"optimizer.schedule.{name}", title, ())


_CHOICES: dict[str, Callable[[], Iterator[Section]]] = {
    "model": lambda: _registered(MODELS, "model"),
    "conditioner": lambda: _registered(CONDITIONERS, "conditioner"),
    "process": _processes,
    "loss.weighting": lambda: _functions(WEIGHTINGS, "loss.weighting"),
    "loss.density": lambda: _functions(DENSITIES, "loss.density"),
    "loss.extra": _losses,
    "optimizer.schedule": _courses,
}
"""Keys whose value is a name in a registry -> what each of these names adds."""


def _fields(kind: type[Any], key: str) -> Iterator[Entry]:
    hints = typing.get_type_hints(kind, include_extras=True)
    about: dict[str, str] = {}
    for cls in reversed(kind.__mro__):
        about |= documented(cls)
    for field in dataclasses.fields(kind):
        made = field.default_factory
        default = made() if made is not dataclasses.MISSING else field.default
        yield Entry(
            f"{key}.{field.name}",
            takes(_without_none(hints[field.name])),
            _default(default, dataclasses.MISSING),
            about.get(field.name, ""),
        )


def _default(value: Any, missing: Any) -> str | None:
    return None if value is missing else "" if value is None else toml(value)


def _without_none(hint: Any) -> Any:
    """Inside a model and its like, a key is left out where Python would say None."""
    if not is_union(hint):
        return hint
    return Union[tuple(part for part in typing.get_args(hint) if part is not type(None))]  # noqa: UP007


def documented(thing: Any) -> dict[str, str]:
    """Name -> text, of the Args of a docstring of its own."""
    found: dict[str, list[str]] = {}
    inside, names = False, list[str]()
    for line in inspect.cleandoc(vars(thing).get("__doc__") or thing.__doc__ or "").splitlines():
        if line and not line.startswith(" "):
            inside = line == "Args:"
        elif inside and (head := re.match(r" {4}(\w+(?:, \w+)*): (.*)", line)):
            names = head[1].split(", ")
            found |= {name: [head[2]] for name in names}
        elif inside:
            for name in names:
                found[name].append(line.strip())
    return {name: _sentence(" ".join(words)) for name, words in found.items()}


def _sentence(text: str) -> str:
    text = re.sub(r"\bNone:", "left out:", " ".join(text.split()))
    return text[:1].upper() + text[1:]


def _first_paragraph(thing: Any) -> str:
    return " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split())
