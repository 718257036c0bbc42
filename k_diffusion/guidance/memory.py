"""What a guidance keeps from call to call of one run, and forgets when another run begins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch

from k_diffusion.denoiser import Call

Kept = TypeVar("Kept")


class RunMemory(Generic[Kept]):
    """One thing kept for each place of a run.

    A guided model may be asked more than once at a level, always in the same order: each of these
    places has a memory of its own, which is void where the shape of x changes, as where a guidance
    around it asks for two estimates at once from some level on. A run is told by `Call.run`, not by
    its first call, at which nobody may be asked; where two runs are told alike, a count that falls
    begins another.

    Args:
        make: makes what is kept, empty.
    """

    def __init__(self, make: Callable[[], Kept]) -> None:
        self._make = make
        self._run: object = None
        self._k = -1
        self._place = 0
        self._kept: dict[int, Kept] = {}
        self._shapes: dict[int, torch.Size] = {}

    def turn(self, call: Call, shape: torch.Size) -> bool:
        """Goes on to a call about an x of this shape; whether a run begins with it."""
        begins = self._k < 0 or call.run is not self._run or call.k < self._k
        if begins:
            self._run, self._kept, self._shapes = call.run, {}, {}
        self._place = 0 if begins or call.k != self._k else self._place + 1
        self._k = call.k
        if self._shapes.setdefault(self._place, shape) != shape:
            self._shapes[self._place] = shape
            self._kept.pop(self._place, None)
        return begins

    @property
    def kept(self) -> Kept:
        """What is kept at the place of the call gone on to last."""
        if self._place not in self._kept:
            self.kept = self._make()
        return self._kept[self._place]

    @kept.setter
    def kept(self, value: Kept) -> None:
        self._kept[self._place] = value
