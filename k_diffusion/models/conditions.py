"""What a network can be told beside its noisy data: each kind's shape, its check, its absence.

A network lists its conditions; all else follows from the list: what `forward` and a sampler refuse
by name, and what "not told" means, which training needs to hide a condition from some samples and
guidance to compare with. Absence is always something that can stand in one batch beside presence:

==========  =============================  ==========================================
kind        given                          absent
==========  =============================  ==========================================
ClassLabel  an index below num_classes     num_classes
Vector      numbers                        zeros, of which nothing is added
Tokens      a sequence, and a mask of it   a mask that is false throughout
Image       channels beside those of x     zeros
==========  =============================  ==========================================

A condition that is not given at all is absent for every sample.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from k_diffusion.utils.maths import unknown

OPTIONS = {
    "class_label": "num_classes",
    "embedding": "embedding_dim",
    "augmentation": "augmentation_dim",
    "context": "context_dim",
    "context_mask": "context_dim",
    "image": "image_channels",
}
"""The keyword of a condition -> the option of a model's config that makes the model take it."""

Size = Sequence[int] | None
Given = Mapping[str, Any]

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass(frozen=True)
class Condition(ABC):
    """One kind of condition.

    Args:
        name: the keyword under which the network takes it.
    """

    name: str

    @property
    def keywords(self) -> tuple[str, ...]:
        """All keywords that belong to it."""
        return (self.name,)

    @abstractmethod
    def check_shapes(
        self, batch: int, size: Sequence[int] | None, given: Mapping[str, Any]
    ) -> None:
        """Refuse what shapes and dtypes alone show to be wrong; reads no value of a tensor.

        Args:
            batch: samples, B.
            size: that of x without batch and channels; None where it is not known.
            given: keyword -> value, of this condition's keywords; what is None is left out.

        Raises:
            ValueError: names the condition, what it is, and the way out.
        """

    def check_values(self, given: Given) -> None:
        """Refuse wrong values; may wait for a device."""
        value = given.get(self.name)
        if value is not None and not bool(torch.isfinite(value).all()):
            raise ValueError(f"{self.name} holds values that are not finite: check what made it")

    @abstractmethod
    def drop(self, given: Mapping[str, Tensor], hidden: Tensor) -> dict[str, Tensor]:
        """The same condition, absent for some samples.

        Args:
            given: see `check_shapes`.
            hidden: for which samples, booleans of shape (B,).
        """


@dataclass(frozen=True)
class ClassLabel(Condition):
    """A class of each sample, integers of shape (B,); `num_classes` itself stands for no label."""

    num_classes: int

    def check_shapes(
        self, batch: int, size: Sequence[int] | None, given: Mapping[str, Any]
    ) -> None:
        label = _tensor(self.name, given[self.name])
        if label.dtype not in INTEGERS:
            raise ValueError(
                f"{self.name} is of {label.dtype}; class indices are integers: "
                "convert it with .long()"
            )
        if label.shape != (batch,):
            repeat = "; to use one for all, .expand(batch) it" if label.numel() == 1 else ""
            raise ValueError(
                f"{self.name} has shape {tuple(label.shape)}, but the batch has {batch} "
                f"samples: give one label a sample, shape ({batch},){repeat}"
            )

    def check_values(self, given: Given) -> None:
        label = given[self.name].long()
        wrong = label[(label < 0) | (label > self.num_classes)]
        if wrong.numel():
            raise ValueError(
                f"{self.name} holds {wrong[0].item()}; this model knows classes 0 to "
                f"{self.num_classes - 1} ({self.num_classes} stands for no label)"
            )

    def drop(self, given: Mapping[str, Tensor], hidden: Tensor) -> dict[str, Tensor]:
        # In int64, since a narrow dtype may not hold the number of classes.
        return {self.name: given[self.name].long().masked_fill(hidden, self.num_classes)}


@dataclass(frozen=True)
class Vector(Condition):
    """Numbers of each sample, shape (B, width)."""

    width: int

    def check_shapes(
        self, batch: int, size: Sequence[int] | None, given: Mapping[str, Any]
    ) -> None:
        vector = _real(self.name, given[self.name])
        if vector.shape != (batch, self.width):
            raise ValueError(
                f"{self.name} has shape {tuple(vector.shape)}; this model and a batch of "
                f"{batch} take ({batch}, {self.width})"
            )

    def drop(self, given: Mapping[str, Tensor], hidden: Tensor) -> dict[str, Tensor]:
        return {self.name: _zero(given[self.name], hidden)}


@dataclass(frozen=True)
class Tokens(Condition):
    """A sequence of each sample, shape (B, L, width): text, audio or image tokens.

    `{name}_mask`, booleans of shape (B, L), is true where a token counts; not given: everywhere.
    """

    width: int

    @property
    def mask(self) -> str:
        return f"{self.name}_mask"

    @property
    def keywords(self) -> tuple[str, ...]:
        return (self.name, self.mask)

    def check_shapes(
        self, batch: int, size: Sequence[int] | None, given: Mapping[str, Any]
    ) -> None:
        if self.name not in given:
            raise ValueError(f"{self.mask} was given without {self.name}: give both, or neither")
        tokens = _real(self.name, given[self.name])
        if tokens.ndim != 3 or tokens.shape[0] != batch or tokens.shape[2] != self.width:
            raise ValueError(
                f"{self.name} has shape {tuple(tokens.shape)}; this model and a batch of {batch} "
                f"take ({batch}, tokens, {self.width})"
            )
        if (mask := given.get(self.mask)) is None:
            return
        if _tensor(self.mask, mask).dtype != torch.bool:
            raise ValueError(
                f"{self.mask} is of {mask.dtype}; give booleans, true where a token counts: "
                "convert it with .bool()"
            )
        if mask.shape != tokens.shape[:2]:
            raise ValueError(
                f"{self.mask} has shape {tuple(mask.shape)}, but {self.name} has "
                f"{tuple(tokens.shape)}: give one truth a token, shape {tuple(tokens.shape[:2])}"
            )

    def drop(self, given: Mapping[str, Tensor], hidden: Tensor) -> dict[str, Tensor]:
        tokens = given[self.name]
        mask = given.get(self.mask)
        if mask is None:
            mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        return {self.name: tokens, self.mask: mask & ~hidden[:, None]}


@dataclass(frozen=True)
class Image(Condition):
    """Channels that are joined to those of x, shape (B, channels, ...) and of x's size.

    For super-resolution: the enlarged picture; for inpainting: the known part and its mask.
    """

    channels: int

    def check_shapes(
        self, batch: int, size: Sequence[int] | None, given: Mapping[str, Any]
    ) -> None:
        image = _real(self.name, given[self.name])
        known = tuple(image.shape[2:] if size is None else size)
        if tuple(image.shape) != (batch, self.channels, *known):
            wanted = "..." if size is None else ", ".join(map(str, known))
            raise ValueError(
                f"{self.name} has shape {tuple(image.shape)}; this model and a batch of {batch} "
                f"take ({batch}, {self.channels}, {wanted}), the size of x"
            )

    def drop(self, given: Mapping[str, Tensor], hidden: Tensor) -> dict[str, Tensor]:
        return {self.name: _zero(given[self.name], hidden)}


def check_conditions(
    conditions: Sequence[Condition],
    batch: int,
    size: Size,
    given: Given,
    *,
    values: bool,
) -> None:
    """Refuse by name what is not among a network's conditions, or does not fit them.

    Args:
        conditions: the network's.
        batch: samples, B.
        size: see `Condition.check_shapes`.
        given: keyword -> value; None: not given.
        values: whether to read the values, too (never those of meta tensors).

    Raises:
        ValueError: an unknown keyword, a wrong shape or dtype, or a value out of range.
    """
    taken = [keyword for condition in conditions for keyword in condition.keywords]
    for keyword, value in given.items():
        if keyword in taken or (keyword in OPTIONS and value is None):
            continue
        if keyword in OPTIONS:
            raise ValueError(
                f"{keyword} was given, but this model takes none: leave it out, or build the model "
                f"with {OPTIONS[keyword]}"
            )
        raise ValueError(unknown("condition", keyword, dict.fromkeys([*taken, *OPTIONS])))
    for condition in conditions:
        if not (mine := _given(condition, given)):
            continue
        condition.check_shapes(batch, size, mine)
        if values and all(value.device.type != "meta" for value in mine.values()):
            condition.check_values(mine)


def drop_conditions(
    conditions: Sequence[Condition], given: Given, hidden: Tensor
) -> dict[str, Any]:
    """Keyword arguments with every condition absent for some samples.

    Args:
        conditions: the network's.
        given: keyword -> value; None: not given.
        hidden: for which samples, booleans of shape (B,).
    """
    dropped = dict(given)
    for condition in conditions:
        if mine := _given(condition, given):
            dropped |= condition.drop(mine, hidden)
    return dropped


def _given(condition: Condition, given: Given) -> dict[str, Any]:
    return {k: given[k] for k in condition.keywords if given.get(k) is not None}


def _tensor(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise ValueError(
            f"{name} must be a tensor, got {type(value).__name__}: wrap it in torch.tensor()"
        )
    return value


def _real(name: str, value: object) -> Tensor:
    tensor = _tensor(name, value)
    if not tensor.is_floating_point():
        raise ValueError(
            f"{name} is of {tensor.dtype}; its values are real numbers: convert it with .float()"
        )
    return tensor


def _zero(value: Tensor, hidden: Tensor) -> Tensor:
    return value.masked_fill(hidden.reshape(-1, *[1] * (value.ndim - 1)), 0.0)
