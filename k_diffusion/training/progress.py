"""One line of live progress on stderr, and the news between."""

from __future__ import annotations

import math
import shutil
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TextIO

from k_diffusion.utils.words import printable

if TYPE_CHECKING:
    from k_diffusion.training.trainer import TrainState

LIVE, SELDOM = 0.2, 30.0
"""Seconds between two looks: on a terminal, and where each is a line of its own."""


class Progress:
    """How far a run is, how fast, its loss and the time left.

    On a terminal it is one line that lives; in a file or a pipe there is a line now and then. What
    cannot be written (the terminal is gone, the disk under a log is full) does not end the run.

    Args:
        shown: whether there is any progress, or only news.
        stream: where to; None: stderr.
        clock: seconds, from any beginning.
    """

    def __init__(
        self,
        shown: bool = True,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._shown, self._clock = shown, clock
        self._stream = sys.stderr if stream is None else stream
        self._alive = self._stream.isatty()
        self._last = -math.inf if self._alive else clock()
        self._width = 0
        self._line = ""

    def show(
        self, state: TrainState, loss: float, last: bool = False, besides: float = 0.0
    ) -> None:
        """Tell of a step, if it is time.

        Args:
            state: of the step.
            loss: as shown: a mean over the last steps.
            last: it is told in any case.
            besides: seconds that what is not a step will take until the end.
        """
        now = self._clock()
        every = LIVE if self._alive else SELDOM
        if not self._shown or (not last and 0 <= now - self._last < every):
            return
        self._last = now
        if not self._alive:
            self._write(progress_line(state, loss, besides=besides) + "\n")
            return
        # The last column stays free: some terminals begin a new line there.
        columns = shutil.get_terminal_size().columns - 1
        self._line = progress_line(state, loss, columns, besides)
        self._draw()

    def say(self, line: str) -> None:
        """A line of news, above the live one."""
        self._clear()
        self._write(printable(line) + "\n")
        if self._line:
            self._draw()

    def close(self) -> None:
        """Leave the live line as it is; what comes next begins below."""
        if self._width:
            self._write("\n")
        self._width = 0
        self._line = ""

    def _draw(self) -> None:
        self._write("\r" + self._line.ljust(self._width))
        self._width = len(self._line)

    def _clear(self) -> None:
        if self._width:
            self._write("\r" + " " * self._width + "\r")
            self._width = 0

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):  # ValueError: the stream is closed
            self._shown = False


def progress_line(state: TrainState, loss: float, columns: int = 100, besides: float = 0.0) -> str:
    """Such as ` 31% ######.............. 310 of 1,000 images | 52.3 images/s, loss 0.4312 | 00:13
    left`; in few columns the bar gives way, then the end of the line."""
    share = state.images_seen / state.total_images
    percent = f"{math.floor(100 * share):3d}% "
    rest = (
        f"{state.images_seen:,} of {state.total_images:,} images | "
        f"{_speed(state.images_per_second)} images/s, loss {loss:.4f} | "
        f"{_duration(state.seconds_left + besides)} left"
    )
    length = min(20, columns - len(percent) - len(rest) - 1)
    bar = ("#" * int(length * share)).ljust(length, ".") + " " if length > 2 else ""
    return (percent + bar + rest)[:columns]


def _speed(value: float) -> str:
    """Three digits or so."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "?"
    minutes, second = divmod(max(0, round(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    clock = f"{minute:02d}:{second:02d}"
    if days:
        return f"{days} d {hour:02d}:{clock}"
    return f"{hour}:{clock}" if hour else clock
