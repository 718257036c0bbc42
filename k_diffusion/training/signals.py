"""Ctrl-C and SIGTERM as a request, which a run answers at a good place."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch


class StopRequest:
    """Which signal asked for an end, once one has."""

    signal: int | None = None


class StopAsked(Exception):
    """A signal has asked for an end in the midst of something that can be done anew.

    Args:
        signal: its number.
    """

    everywhere = True  # as in ConfigError: it is raised on all processes at once

    def __init__(self, signal: int) -> None:
        super().__init__(f"signal {signal} asks for an end")
        self.signal = signal


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Within the block the first Ctrl-C or SIGTERM only sets `.signal`; a second acts as before."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request  # Python gives signals to the main thread alone
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def ask(number: int, frame: FrameType | None) -> None:
        request.signal = number
        restore()

    try:
        for number in before:
            signal.signal(number, ask)
        yield request
    finally:
        restore()


def agreed(accelerator: Any, number: int | None) -> int | None:
    """The signal, once any process has one: all of them must stop after the same step."""
    if accelerator.num_processes == 1:
        return number
    flags = torch.tensor([number or 0], device=accelerator.device)
    return int(accelerator.gather(flags).max()) or None


def looking(accelerator: Any, request: StopRequest) -> Callable[[], None]:
    """What long work calls between its parts, all processes alike: it ends the work on each of them
    once any has a signal.

    Raises (when called):
        StopAsked: one has.
    """

    def look() -> None:
        if (number := agreed(accelerator, request.signal)) is not None:
            raise StopAsked(number)

    return look
