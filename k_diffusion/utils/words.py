"""Words for messages."""

from __future__ import annotations


def reason_of(error: BaseException) -> str:
    """What an exception says, on one line; its type where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__
