"""Words for messages."""

from __future__ import annotations


def reason_of(error: BaseException) -> str:
    """What an exception says, on one line; its type where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def printable(text: str) -> str:
    """Text that a terminal shows as it is: what would move its cursor or change its colours, such
    as in the name of a file, as an escape."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
