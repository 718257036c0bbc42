"""What models refuse alike: levels and heads that cannot be, sizes that they cannot share out."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor


def check_axes(x: Tensor, channels: int, axes: Sequence[str]) -> None:
    """Refuse an x that has not these axes beside batch and channels, or an empty one.

    Args:
        x: the data.
        channels: what the model takes.
        axes: their names.

    Raises:
        ValueError: the message has the shape and what is taken.
    """
    if x.ndim != 2 + len(axes):
        raise ValueError(
            f"x has shape {tuple(x.shape)}; this model takes (batch, {channels}, {', '.join(axes)})"
        )
    for name, size in zip(axes, x.shape[2:], strict=True):
        if size == 0:
            raise ValueError(f"x has {name} 0, of shape {tuple(x.shape)}: give at least 1")


def check_sides(x: Tensor, sides: Sequence[tuple[int, int]], reason: str) -> None:
    """Refuse an image whose height or width a model cannot share out.

    Args:
        x: images, shape (B, C, H, W).
        sides: of height and of width, what it must be a multiple of, and at least.
        reason: what other sizes do not allow: "which {reason}".

    Raises:
        ValueError: the message has the size and the nearest that work.
    """
    for name, size, (factor, least) in zip(("height", "width"), x.shape[2:], sides, strict=True):
        if size % factor or size < least:
            near = [max(least, n * factor) for n in (size // factor, -(-size // factor))]
            works = " or ".join(str(n) for n in dict.fromkeys(near))
            raise ValueError(
                f"x has {name} {size}, which {reason}; the nearest that works: {works} (a multiple "
                f"of {factor}, at least {least})"
            )


def check_heads(head_channels: int, widths: Sequence[int], where: str) -> None:
    """Refuse heads that do not divide the channels that attend.

    Args:
        head_channels: channels of one head.
        widths: all numbers of channels that attend.
        where: of what they are the channels: "the 40 channels {where}".

    Raises:
        ValueError: the message has the largest number below that works.
    """
    for channels in widths:
        if channels % head_channels:
            most = min(head_channels, common := math.gcd(*widths))
            fitting = next(n for n in range(most, 0, -1) if common % n == 0)
            raise ValueError(
                f"head_channels = {head_channels} does not divide the {channels} channels {where}; "
                f"head_channels = {fitting} works"
            )


def check_levels(channel_mults: tuple[int, ...], **settings: tuple[bool, ...] | None) -> None:
    """Refuse levels without channels, and settings that are not one a level.

    Args:
        channel_mults: one factor a level.
        settings: name -> true or false for each level; None: not given.

    Raises:
        ValueError: the message has the setting and an example that works.
    """
    if not channel_mults or min(channel_mults) < 1:
        raise ValueError(
            f"channel_mults = {channel_mults} has no level, or one without channels; give one "
            "factor of at least 1 a level, such as (1, 2)"
        )
    levels = len(channel_mults)
    for name, given in settings.items():
        if given is not None and len(given) != levels:
            raise ValueError(
                f"{name} = {given} has {len(given)} entries, but channel_mults = {channel_mults} "
                f"makes {levels} levels; give true or false for each, such as "
                f"{(*[False] * (levels - 1), True)}"
            )
