"""What went wrong, in one line: from an exception, or from tyro's boxed message."""

from __future__ import annotations

import itertools
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from k_diffusion.utils.words import printable

_LONGEST = 500


class UsageError(ValueError):
    """The command line itself asks for what cannot be: exit code 2 (any other failure: 1)."""

    everywhere = True  # of several processes all meet it, so that one may speak for them


class Stopped(Exception):
    """A signal ended the work at a good place; nothing is lost.

    Args:
        signal: its number; the exit code is 128 + signal.
        message: what is kept and how to go on.
    """

    def __init__(self, signal: int, message: str) -> None:
        super().__init__(message)
        self.signal = signal


def process_number() -> int:
    """Which of the processes this is that torchrun or accelerate has started; 0: first or only."""
    return int(os.environ.get("RANK", "0"))


@contextmanager
def as_usage() -> Iterator[None]:
    """What is refused inside was asked for on the command line."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from error


@contextmanager
def plain_warnings(name: str) -> Iterator[None]:
    """What a sampler warns of inside is a line on stderr of the first process, once.

    Args:
        name: the command that says so.
    """
    from k_diffusion.sampling import SamplingAdvice

    said: set[str] = set()

    def show(message: Warning | str, *_: object, **__: object) -> None:
        line = _flat(str(message))
        if process_number() == 0 and line not in said:
            print(f"{name}: warning: {line}", file=sys.stderr)
        said.add(line)

    with warnings.catch_warnings():
        warnings.simplefilter("always", SamplingAdvice)
        warnings.showwarning = show
        yield


def one_line(error: BaseException) -> str:
    """The message of an exception on one line, with its type where it is not a user's mistake."""
    if isinstance(error, OSError) and error.strerror:
        named = f"{error.filename}: " if error.filename is not None else ""
        return _flat(f"{named}{error.strerror}")
    message = _flat(str(error))
    ours = type(error).__module__.partition(".")[0] == "k_diffusion"
    if message and (ours or isinstance(error, (ValueError, OSError, ImportError, ArithmeticError))):
        return message
    kind = type(error).__name__
    return f"{kind}: {message or 'no message'} (K_DIFFUSION_TRACEBACK=1 shows where)"


def unboxed(text: str) -> str:
    """tyro's box of several lines as one: what it says before its pointer to the help.

    tyro has no public way to catch a mistake, so this goes by what it prints. A message that it
    words anew in some version comes out as it stands.
    """
    lines = [line.strip("│ ") for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()]
    if lines and lines[0].startswith("╭"):
        lines = lines[1:]  # the title, in the upper edge
    elif len(lines) > 1 and _is_rule(lines[1]):
        lines = lines[2:]  # the title over a line, where the terminal has no UTF-8
    message = _flat(" ".join(itertools.takewhile(lambda line: not _is_rule(line), lines)))
    if found := re.match(r"Missing from .+?: (\S+)", message):
        return f"{found[1]} is missing"
    if found := re.match(r"Missing value for argument '(.+?)'", message):
        return f"{found[1]} is given without a value"
    message = re.sub(r"^Error parsing (\S+?):", r"\1:", message)
    message = re.sub(r"invalid literal for int\(\) with base 10: (.+)", whole, message)
    return re.sub(r"could not convert string to float: (.+)", r"\1 is not a number", message)


def whole(found: re.Match[str]) -> str:
    """What to say of a word that int() refused."""
    return f"{found[1]} is not a whole number"


def _is_rule(line: str) -> bool:
    return len(line) > 2 and not line.strip("─╰╯-")


def _flat(text: str) -> str:
    line = printable(" ".join(text.split()))
    return line if len(line) <= _LONGEST else line[: _LONGEST - 3] + "..."
