"""Conditioners: from what people have (a class's name, a text, a picture, a sound) to keyword
arguments of a network.

A `Conditioner` makes a condition of raw input, and the null condition of the same shapes, with
which guidance compares and which training shows now and then. It is frozen: what learns belongs in
the network. One of your own is a class and a dataclass:

    @dataclass(frozen=True, kw_only=True)
    class AgeConfig:
        reads: str = "age"

    @register_conditioner("age")
    class Age(Conditioner):
        Config = AgeConfig
        keywords = ("embedding",)

        def forward(self, raw):                      # ages in years, of B samples
            years = torch.tensor([float(age) for age in raw], device=self.device)
            return {"embedding": torch.stack([years / 100, torch.ones_like(years)], 1)}

        def null(self, batch, like=None):
            return {"embedding": torch.zeros(batch, 2, device=self.device)}
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from k_diffusion.models.conditions import INTEGERS
from k_diffusion.models.registry import Registry, check_types, known_fields
from k_diffusion.utils.augmentation import uniforms
from k_diffusion.utils.maths import fold_seed, unknown


class Conditioner(nn.Module, ABC):
    """Raw input -> keyword arguments of a network; abstract.

    Args:
        config: a `Config`; None: from the options.
        options: fields of the config. Its `reads` is the name of the raw input in training batches:
            "label" (class indices), "class_name", "clean" (the clean data itself), or what the
            source adds.

    Raises:
        ValueError: an unknown option, or one that does not fit.
    """

    Config: ClassVar[type]
    keywords: tuple[str, ...]
    """All keyword arguments that it gives."""
    loads_weights: ClassVar[bool] = False
    """Whether its weights come from a file or the hub each time it is made. Those of any other,
    drawn by the seed of a run, are held by the run's checkpoints."""

    def __init__(self, config: Any = None, /, **options: Any) -> None:
        super().__init__()
        if config is None:
            config = self.Config(**known_fields(self.Config, options, "conditioner"))
            check_types(config)
        elif not isinstance(config, self.Config) or options:
            raise ValueError(
                f"{type(self).__name__} is built from a {self.Config.__name__}, or from its fields "
                f"by keyword, got {config!r}{' and options' if options else ''}"
            )
        self.config = config
        self._here: Tensor
        self.register_buffer("_here", torch.zeros(0), persistent=False)

    @property
    def device(self) -> torch.device:
        """Where its conditions are made; `.to(device)` changes it."""
        return self._here.device

    @abstractmethod
    def forward(self, raw: Any) -> dict[str, Tensor]:
        """The condition of B samples.

        Args:
            raw: one raw input a sample.

        Raises:
            ValueError: the input cannot be used.
        """

    @abstractmethod
    def null(self, batch: int, like: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The condition that means none, for so many samples.

        Args:
            batch: samples, B.
            like: a condition of this conditioner, whose shapes it takes, so that both can stand in
                one batch; None: the shapes that the config tells.

        Raises:
            ValueError: the config does not tell the shapes.
        """

    def from_batch(self, raws: Mapping[str, Any], seeds: Sequence[int]) -> dict[str, Tensor]:
        """The condition of a training batch.

        Args:
            raws: name -> raw inputs of B samples.
            seeds: one a sample, for what is left to chance.

        Raises:
            ValueError: what it reads is not there.
        """
        return self(self.find(raws))

    def find(self, raws: Mapping[str, Any]) -> Any:
        """What this conditioner reads, out of a batch's raw inputs."""
        if not hasattr(self.config, "reads"):
            raise TypeError(
                f"{type(self).__name__}.Config has no field `reads`, the name of the raw input in "
                "training batches: give it one, or write a from_batch"
            )
        if self.config.reads not in raws:
            raise ValueError(
                f"{type(self).__name__} reads {self.config.reads!r}, but a batch of this data has "
                f"{', '.join(raws)}: give another name as its `reads`, or data that has it"
            )
        return raws[self.config.reads]

    def read(self, word: str) -> Any:
        """Raw input of one sample from a word of the command line: itself, or the file it names."""
        return [word]

    def hide(self, condition: Mapping[str, Tensor], hidden: Tensor) -> dict[str, Tensor]:
        """A condition of this conditioner, absent for some samples.

        Args:
            condition: keyword -> value.
            hidden: for which samples, booleans of shape (B,).
        """
        null = self.null(len(hidden), condition)
        return {
            keyword: torch.where(hidden.reshape(-1, *[1] * (value.ndim - 1)), null[keyword], value)
            for keyword, value in condition.items()
        }


CONDITIONERS = Registry("conditioner", Conditioner, {"text": "k_diffusion.external.text"})
"""Name -> class."""

register_conditioner = CONDITIONERS.register
"""`@register_conditioner("name")` on a class makes it the "type" of configs."""


def make_conditioner(config: Mapping[str, Any]) -> Conditioner:
    """A conditioner from plain data.

    Args:
        config: "type", a name in CONDITIONERS, and the options of that conditioner.

    Raises:
        ValueError: no type, an unknown type or option (the nearest one is offered), or a value
            that does not fit.
    """
    return CONDITIONERS.make(config)


def conditioner_config(conditioner: Conditioner) -> dict[str, Any]:
    """The plain data (as JSON has it) from which `make_conditioner` builds a conditioner's like.

    Raises:
        ValueError: its class is not registered.
    """
    return CONDITIONERS.config(conditioner)


# ---------------------------------------------------------------- classes


@dataclass(frozen=True, kw_only=True)
class ClassConfig:
    """Which classes there are.

    Args:
        num_classes: their number; 0: as many as there are names.
        class_names: one name a class, or none.
        reads: see `Conditioner`.
    """

    num_classes: int = 0
    class_names: tuple[str, ...] = ()
    reads: str = "label"

    def __post_init__(self) -> None:
        check_types(self)
        if self.num_classes < 0:
            raise ValueError(f"num_classes = {self.num_classes} is negative; give their number")
        count = self.num_classes or len(self.class_names)
        object.__setattr__(self, "num_classes", count)
        if count < 1:
            raise ValueError("num_classes = 0 and class_names is empty; give one of them")
        if self.class_names and len(self.class_names) != count:
            raise ValueError(
                f"num_classes = {count}, but class_names has {len(self.class_names)}; give one "
                "name a class, or leave num_classes out"
            )
        twice = [name for name in self.class_names if self.class_names.count(name) > 1]
        if twice:
            raise ValueError(f"class_names has {twice[0]!r} twice; give each class its own name")


@register_conditioner("class")
class ClassConditioner(Conditioner):
    """Classes, each by its name or its index; None: no class."""

    Config = ClassConfig
    config: ClassConfig
    keywords = ("class_label",)

    def forward(self, raw: Any) -> dict[str, Tensor]:
        """{"class_label": int64 of shape (B,)}; raw: names, indices or None, or integers (B,)."""
        if not isinstance(raw, Tensor):
            raw = torch.tensor([self._index(one) for one in raw], dtype=torch.int64)
        elif raw.dtype not in INTEGERS or raw.ndim != 1:
            raise ValueError(
                f"class indices are integers of shape (B,), got {raw.dtype} of {tuple(raw.shape)}"
            )
        return {"class_label": raw.to(self.device, torch.int64)}

    def null(self, batch: int, like: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        return {"class_label": torch.full((batch,), self.config.num_classes, device=self.device)}

    def read(self, word: str) -> Any:
        number = word not in self.config.class_names and word.isdecimal()
        return [int(word) if number else word]

    def _index(self, one: object) -> int:
        count, names = self.config.num_classes, self.config.class_names
        if one is None:
            return count
        if isinstance(one, str):
            if one not in names:
                raise ValueError(unknown("class", one, names))
            return names.index(one)
        try:
            index = operator.index(one)  # type: ignore[arg-type]
        except TypeError:  # 1.5 is no class, and not the class 1
            index = -1
        if not 0 <= index < count:
            raise ValueError(f"class {one} does not exist: there are 0 to {count - 1}")
        return index


# ---------------------------------------------------------------- several together


@dataclass(frozen=True, kw_only=True)
class CompositeConfig:
    """Which conditioners are joined.

    Args:
        parts: name -> config of a conditioner.
        part_dropout: the probability with which training hides each part from a sample, one by one,
            so that the network can be told any of them alone.
    """

    parts: dict[str, Any]
    part_dropout: float = 0.0

    def __post_init__(self) -> None:
        check_types(self)
        if not self.parts:
            raise ValueError("parts is empty; give at least one conditioner")
        _check_share(self.part_dropout)
        for name, part in self.parts.items():
            try:
                CONDITIONERS.settings(part)
            except ValueError as error:  # noqa: PERF203 (a few parts, each to be named)
                raise ValueError(f"parts.{name}: {error}") from None


def _check_share(part_dropout: float) -> None:
    if not 0 <= part_dropout < 1:
        raise ValueError(f"part_dropout = {part_dropout} is outside [0, 1); give 0 to hide none")


@register_conditioner("composite")
class CompositeConditioner(Conditioner):
    """Several conditioners as one, for a network that is told several things at once.

    Sequences for the same keyword (a text's tokens and a sound's, say) are put one after the other
    if they are of one width; any other keyword may be given by one part only. Its raw input is a
    mapping, part -> raw input; a part that is left out is absent for all samples.

    Args:
        config: which parts to make; None: they are given.
        part_dropout: see `CompositeConfig`.
        parts: name -> conditioner.

    Raises:
        ValueError: two parts give the same keyword.
    """

    Config = CompositeConfig

    def __init__(
        self,
        config: CompositeConfig | None = None,
        /,
        *,
        part_dropout: float = 0.0,
        **parts: Conditioner,
    ) -> None:
        if config is None:
            if not parts or not all(isinstance(part, Conditioner) for part in parts.values()):
                raise ValueError(f"a composite is made of conditioners by name, got {parts}")
        else:
            parts = {name: make_conditioner(part) for name, part in config.parts.items()}
            part_dropout = config.part_dropout
        _check_share(part_dropout)
        nn.Module.__init__(self)
        self.register_buffer("_here", torch.zeros(0), persistent=False)
        self.names = tuple(parts)
        self.part_dropout = part_dropout
        self.modules_in_order = nn.ModuleList(parts.values())
        self.keywords = tuple(dict.fromkeys(k for p in parts.values() for k in p.keywords))
        for keyword in self.keywords:
            giving = [name for name, part in parts.items() if keyword in part.keywords]
            if len(giving) > 1 and not self._is_sequence(keyword):
                raise ValueError(
                    f"{keyword} is given by {' and by '.join(map(repr, giving))}: only sequences "
                    "can be joined; leave one part out, or let it give another keyword"
                )

    @property
    def parts(self) -> dict[str, Conditioner]:
        """Name -> conditioner."""
        return dict(zip(self.names, cast(Any, self.modules_in_order), strict=True))

    @property
    def config(self) -> CompositeConfig:
        """What builds its like; a part that is not registered has none, which is refused."""
        return CompositeConfig(
            parts={name: conditioner_config(part) for name, part in self.parts.items()},
            part_dropout=self.part_dropout,
        )

    def forward(self, raw: Any) -> dict[str, Tensor]:
        """All parts' keyword arguments; raw: part -> raw input of B samples."""
        if not isinstance(raw, Mapping) or not raw:
            raise ValueError(
                f"a composite takes a mapping, part -> raw input, got {type(raw).__name__}; its "
                f"parts are {', '.join(self.names)}"
            )
        parts = self.parts
        for name in raw:
            if name not in parts:
                raise ValueError(unknown("part", name, parts))
        return self._merge({name: parts[name](one) for name, one in raw.items()})

    def null(self, batch: int, like: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        if like is None:
            return self._merge({name: part.null(batch) for name, part in self.parts.items()})
        nulls: dict[str, Tensor] = {}
        for part in self.parts.values():
            if mine := {k: like[k] for k in part.keywords if k in like}:
                nulls |= {k: v for k, v in part.null(batch, mine).items() if k in mine}
        for keyword in filter(self._is_sequence, like):  # as long as all parts' together
            nulls[keyword] = like[keyword].new_zeros(batch, *like[keyword].shape[1:])
        return nulls

    def from_batch(self, raws: Mapping[str, Any], seeds: Sequence[int]) -> dict[str, Tensor]:
        made = {}
        for index, (name, part) in enumerate(self.parts.items()):
            mine = [fold_seed(seed, index) for seed in seeds]
            made[name] = part.from_batch(raws, mine)
            if self.part_dropout:
                hidden = uniforms(mine, len(mine))[:, 0] < self.part_dropout
                made[name] = part.hide(made[name], hidden.to(self.device))
        return self._merge(made)

    def read(self, word: str) -> Any:
        """One part's raw input, from `part=word`."""
        name, equals, rest = word.partition("=")
        if not equals or name not in self.names:
            raise ValueError(
                f"{word!r} is not of the form part=value; the parts are {', '.join(self.names)}"
            )
        return {name: self.parts[name].read(rest)}

    def _is_sequence(self, keyword: str) -> bool:
        """Whether it is a sequence, or the mask of one."""
        mask = f"{keyword.removesuffix('_mask')}_mask"
        return mask in self.keywords

    def _merge(self, made: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
        """One condition of the parts' own; what a part does not give is absent."""
        counts = {name: len(next(iter(condition.values()))) for name, condition in made.items()}
        batch = next(iter(counts.values()))
        if set(counts.values()) != {batch}:
            each = ", ".join(f"{count} of {name!r}" for name, count in counts.items())
            raise ValueError(f"the parts are told of different samples, {each}: give one a sample")
        merged: dict[str, Tensor] = {}
        whose: dict[str, str] = {}
        for name, part in self.parts.items():
            condition = made[name] if name in made else part.null(batch)
            for keyword, value in condition.items():
                if keyword not in merged:
                    merged[keyword], whose[keyword] = value, name
                    continue
                before = merged[keyword]
                if before.shape[2:] != value.shape[2:]:
                    raise ValueError(
                        f"{keyword} is of width {before.shape[2]} from {whose[keyword]!r} but of "
                        f"{value.shape[2]} from {name!r}: sequences of one width can be joined"
                    )
                merged[keyword] = torch.cat([before, value.to(before.dtype)], 1)
        return merged
