"""Ctrl-C and SIGTERM: at once, or at the next good place."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Terminated(BaseException):
    """SIGTERM arrived. Like KeyboardInterrupt, no `except Exception` swallows it."""


class StopRequest:
    """Which signal asked for an end, once one has."""

    signal: int | None = None


@contextmanager
def terminable() -> Iterator[None]:
    """While inside, SIGTERM raises `Terminated`, so that temporary files are taken away."""

    def end(number: int, frame: FrameType | None) -> None:
        raise Terminated

    with _handling(signal.SIGTERM, handler=end):
        yield


@contextmanager
def stop_asked() -> Iterator[StopRequest]:
    """While inside, the first Ctrl-C or SIGTERM only sets `.signal`; a second one ends at once."""
    request = StopRequest()

    def ask(number: int, frame: FrameType | None) -> None:
        if request.signal is not None:
            raise KeyboardInterrupt if number == signal.SIGINT else Terminated
        request.signal = number

    with _handling(signal.SIGINT, signal.SIGTERM, handler=ask):
        yield request


@contextmanager
def _handling(*numbers: signal.Signals, handler: signal._HANDLER) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # Python hands signals to the main thread alone; there, others decide
        return
    before = [signal.signal(number, handler) for number in numbers]
    try:
        yield
    finally:
        for number, old in zip(numbers, before, strict=True):
            signal.signal(number, old)
