"""What a guidance holds for each sample, and how it goes with the samples.

A run hands its denoiser some of its samples (those that an adaptive solver asks about, those that
need more steps, a batch of many), or all of them twice, for two estimates in one call. The keywords
of a condition go along. So what belongs to a sample travels as a keyword: under a name that was
given in its place, or, where it was bound to the guidance itself, under one that no keyword of a
model could have.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

Keywords = dict[str, Any]


class Held:
    """A value of a guidance: one for all samples, one a sample, or the name of a keyword.

    Args:
        owner: whose attribute it is.
        name: of the attribute.
        like_x: a tensor has one value a sample only where it has as many dimensions as x; else,
            wherever it has any.
    """

    def __init__(self, owner: Any, name: str, *, like_x: bool = False) -> None:
        self.name, self.value, self._like_x = name, getattr(owner, name), like_x
        self.keyword = f"k_diffusion {name} {id(owner)}"
        if isinstance(self.value, str):
            self.keyword = self.value

    def of(self, condition: Mapping[str, Any]) -> Any:
        """The value for the samples that a condition is for.

        Raises:
            ValueError: it is to be a keyword that the condition does not have.
        """
        if self.keyword in condition:
            return condition[self.keyword]
        if isinstance(self.value, str):
            raise ValueError(
                f"{self.name} is the keyword {self.value!r} of the run, which was not given: give "
                f"condition={{{self.value!r}: ...}}"
            )
        return self.value

    def beside(self, condition: Mapping[str, Any], x: Tensor) -> Any:
        """The same; a tensor on the device of x."""
        value = self.of(condition)
        return placed(value, x.device) if isinstance(value, Tensor) else value

    def lengths(self, ndim: int) -> set[int]:
        """Of its tensors that have one value a sample, for samples in a batch of `ndim` axes."""
        if isinstance(self.value, str):
            return set()
        tensors = (t for t in _tensors(self.value) if t.ndim)
        return {len(t) for t in tensors if not self._like_x or t.ndim == ndim} - {1}


class Holder:
    """What may hold values of samples, or have something inside that does."""

    def held(self) -> tuple[Held, ...]:
        """Its own values that may be per sample."""
        return ()

    def inside(self) -> tuple[Any, ...]:
        """What it asks: denoisers, and whatever else may be a Holder."""
        return ()

    def own_keywords(self) -> frozenset[str]:
        """Names of a run's keywords that are for itself, and not for a model."""
        return frozenset(held.keyword for held in self.held())

    def passed(self, condition: Keywords, *parts: Any) -> Keywords:
        """A condition as it goes to something inside: without what is only for others in here."""
        only = keywords_of(self) - keywords_of(*parts)
        return without(condition, only)


def without(condition: Keywords, names: frozenset[str]) -> Keywords:
    """A condition without some of its keywords."""
    return {k: v for k, v in condition.items() if k not in names} if names else condition


def keywords_of(*parts: Any) -> frozenset[str]:
    """Names of a run's keywords that are for guidance, in one or more denoisers."""
    names: frozenset[str] = frozenset()
    for part in parts:
        if isinstance(part, Holder):
            names |= part.own_keywords() | keywords_of(*part.inside())
    return names


def bound_rows(denoiser: Any, shape: Sequence[int]) -> Keywords:
    """What guidance holds for each sample of a batch, as the keywords that carry it.

    Args:
        denoiser: a Denoiser, guided or not.
        shape: of the batch, (B, ...).
    """
    if shape[0] < 2:  # nothing can be cut from it
        return {}
    found = _all_held(denoiser)
    return {held.keyword: held.value for held in found if shape[0] in held.lengths(len(shape))}


def beside(denoiser: Any, condition: Keywords, x: Tensor) -> Keywords:
    """A condition whose tensors for guidance are on the device of x."""
    names = {held.keyword for held in _all_held(denoiser)}
    return {
        name: placed(value, x.device) if name in names and isinstance(value, Tensor) else value
        for name, value in condition.items()
    }


_PLACED: Any = WeakTensorKeyDictionary()


def placed(value: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor on a device and in a dtype, moved when it is first asked for there and then kept.

    A move from the host waits for it, so that one at each call of a model would be a wait at each.
    What is written into afterwards is moved anew.
    """
    dtype = dtype or value.dtype
    if value.device == device and value.dtype == dtype:
        return value
    if value.requires_grad or value.is_inference():  # a graph to keep, or no count of the writes
        return value.to(device, dtype)
    known = _PLACED.setdefault(value, {})
    version, moved = known.get((device, dtype), (-1, value))
    if version != value._version:
        moved = value.to(device, dtype)
        known[device, dtype] = value._version, moved
    return moved


def wide_shape(shape: tuple[int, ...], ndim: int) -> tuple[int, ...]:
    """The shape of a mask in so many dimensions.

    Raises:
        ValueError: it lacks one alone, and that may be the batch's or the channels'.
    """
    if len(shape) == ndim - 1 >= 2 and shape[0] != 1:
        raise ValueError(
            f"mask has shape {shape}, which may be one for each sample or one for each channel: "
            f"give {(shape[0], 1, *shape[1:])} or {(1, *shape)}"
        )
    return (1,) * (ndim - len(shape)) + shape


def check_bound(denoiser: Any, shape: Sequence[int]) -> None:
    """Refuses what guidance holds for each sample of another batch.

    Raises:
        ValueError: a tensor with neither one value for all, nor one a sample.
    """
    for held in _all_held(denoiser):
        for length in sorted(held.lengths(len(shape)) - {shape[0]}):
            raise ValueError(
                f"the guidance's {held.name} holds {length} values, one a sample, but there are "
                f"{shape[0]} samples: give {shape[0]} or one, or name a keyword of the run in its "
                "place"
            )


def _all_held(part: Any) -> Iterator[Held]:
    if isinstance(part, Holder):
        yield from part.held()
        for each in part.inside():
            yield from _all_held(each)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each)
