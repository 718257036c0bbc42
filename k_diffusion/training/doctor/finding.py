"""What is said of a run: findings, and what could not be looked at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


class NotSeen(Exception):
    """A check cannot be made; the message says why, and what would let it."""


@dataclass(frozen=True)
class Finding:
    """Something that is off.

    Attributes:
        says: what was seen, in plain words, with its figures.
        change: what to try: a config's key and value, or a command.
        figures: the numbers that it was judged by, as JSON data.
        check: the name of the check that found it.
    """

    says: str
    change: str
    figures: Mapping[str, Any] = field(default_factory=dict)
    check: str = ""


@dataclass(frozen=True)
class Report:
    """What a run was found to be like.

    Attributes:
        run: its folder.
        images_seen: how far it is.
        findings: what is off, in the order of the checks.
        fine: names of the checks that found nothing.
        unseen: name of a check -> why it could not be made.
    """

    run: str
    images_seen: int
    findings: tuple[Finding, ...]
    fine: tuple[str, ...]
    unseen: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """As JSON data."""
        return asdict(self)
