"""Conditions under their established names, refused as `conditions` refuses those of this library.

A label and a vector of one length pass each other's arithmetic by broadcasting, an embedding reads
whatever a wrong index finds: so shapes are checked at every call, and values once before a run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from k_diffusion.models.conditions import Condition, check_conditions
from k_diffusion.utils.maths import unknown

OPTIONS = {
    "class_cond": "num_classes",
    "mapping_cond": "mapping_cond_dim",
    "unet_cond": "unet_cond_dim",
    "cross_cond": "cross_cond_dim",
}
"""The keyword of a condition -> the option that makes an established network take it."""


def check_established(
    conditions: Mapping[Condition, int],
    batch: int,
    size: Sequence[int] | None,
    given: Mapping[str, Any],
    *,
    values: bool,
) -> None:
    """Refuse by name what an established network cannot take.

    Args:
        conditions: all kinds that its `forward` has, with their widths; 0: this one takes none.
        batch, size, values: see `check_conditions`.
        given: keyword -> value; None: not given.

    Raises:
        ValueError: an unknown keyword, one that this network was not built for, a wrong shape or
            dtype, or a value out of range.
    """
    kinds = {condition.name: width for condition, width in conditions.items()}
    for name, value in given.items():
        if value is None:
            continue
        if name not in kinds:
            raise ValueError(unknown("condition", name, kinds))
        if not kinds[name]:
            raise ValueError(
                f"{name} was given, but this model takes none: leave it out, or build the model "
                f"with {OPTIONS[name]}"
            )
    taken = [condition for condition, width in conditions.items() if width]
    there = {name: value for name, value in given.items() if value is not None}
    check_conditions(taken, batch, size, there, values=values)
