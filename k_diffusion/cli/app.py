"""Which command is meant, its options, and every failure as one line and an exit code."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import signal
import sys
from collections.abc import Sequence
from typing import Annotated, Any, Protocol, Union, get_type_hints

import tyro

from k_diffusion.utils import maths

from .compare import Compare
from .config import Config
from .doctor import Doctor
from .ema import MakeEma
from .encode import Encode
from .evaluate import Evaluate
from .export import Export
from .info import Info
from .plot_run import Plot
from .problems import Stopped, UsageError, one_line, process_number, unboxed
from .sample import Sample
from .sample_pipeline import SamplePipeline
from .samplers import Samplers
from .schedule import Schedule
from .signals import Terminated, terminable
from .train import Train

PROGRAM = "k-diffusion"


class Command(Protocol):
    """A dataclass of options (its docstrings are the help) that can run."""

    def run(self) -> None:
        """Do the work, or raise; a `UsageError` where the options themselves are at fault."""
        ...


COMMANDS: dict[str, type[Any]] = {
    "train": Train,
    "sample": Sample,
    "evaluate": Evaluate,
    "compare": Compare,
    "info": Info,
    "plot": Plot,
    "doctor": Doctor,
    "samplers": Samplers,
    "schedule": Schedule,
    "export": Export,
    "ema": MakeEma,
    "encode": Encode,
    "config": Config,
}
_STYLE = (tyro.conf.FlagCreatePairsOff,)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `k-diffusion` with these arguments (None: the program's own) and give its exit code.

    0: done; 1: it failed; 2: the command line is at fault; 130 or 143: stopped by Ctrl-C or
    SIGTERM. A failure is one line on stderr; K_DIFFUSION_TRACEBACK=1 shows the traceback too.
    """
    # Threads of torch that wait for one another keep a core busy meanwhile, by default for so long
    # that on cores shared with other programs training slows down twenty times. Read by GNU OpenMP
    # when torch is first imported; on idle cores it costs nothing.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = PROGRAM
    try:
        with terminable():
            if not arguments or arguments[0].startswith("-"):
                return _without_command(arguments)
            command = arguments[0]
            if command not in COMMANDS:
                raise UsageError(maths.unknown("command", command, COMMANDS))
            name = f"{PROGRAM} {command}"
            options = _parse(_kind(command, arguments[1:]), name, arguments[1:])
            if options is not None:
                options.run()
            sys.stdout.flush()
            return 0
    except UsageError as error:
        return _fail(name, error, 2)
    except Stopped as error:
        if process_number() == 0:
            print(f"{name}: {error}", file=sys.stderr)
        return 128 + error.signal
    except KeyboardInterrupt:
        print(f"{name}: stopped", file=sys.stderr)
        return 128 + signal.SIGINT
    except Terminated:
        print(f"{name}: stopped", file=sys.stderr)
        return 128 + signal.SIGTERM
    except BrokenPipeError:
        # The reader of our output has gone (`| head`): nothing is wrong, nothing is left to say.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ModuleNotFoundError as error:
        missing = f"{error.name} is not installed: pip install 'k-diffusion[train]' brings it"
        return _fail(name, RuntimeError(missing), 1)
    except Exception as error:
        return _fail(name, error, 1)


def _fail(name: str, error: Exception, code: int) -> int:
    if os.environ.get("K_DIFFUSION_TRACEBACK") == "1":
        import traceback

        traceback.print_exc()
    if number := process_number():
        if getattr(error, "everywhere", False):
            return code
        name = f"{name}, process {number}"
    print(f"{name}: error: {one_line(error)}", file=sys.stderr)
    return code


def _without_command(arguments: list[str]) -> int:
    if arguments[:1] == ["--version"]:
        from importlib.metadata import version

        print(f"{PROGRAM} {version('k-diffusion')}")
        return 0
    if arguments[:1] in (["-h"], ["--help"]):
        commands: Any = Union[  # noqa: UP007 (made from a tuple)
            tuple(Annotated[kind, tyro.conf.subcommand(name)] for name, kind in COMMANDS.items())
        ]
        with contextlib.suppress(SystemExit):
            tyro.cli(
                commands,
                prog=PROGRAM,
                description="Train diffusion models and draw from them.",
                args=["--help"],
            )
        return 0
    known = ", ".join(COMMANDS)
    if not arguments:
        raise UsageError(f"a command is missing; one of {known} (see {PROGRAM} --help)")
    raise UsageError(f"{arguments[0]!r} stands before the command; begin with one of {known}")


def _kind(command: str, arguments: Sequence[str]) -> type[Any]:
    """What a command's name means: `sample --model` draws from what comes from elsewhere."""
    foreign = any(word == "--model" or word.startswith("--model=") for word in arguments)
    return SamplePipeline if command == "sample" and foreign else COMMANDS[command]


def _parse(command: type[Any], name: str, arguments: list[str]) -> Command | None:
    """The options as an instance of `command`, or None where help was asked for and given.

    Raises:
        UsageError: an unknown, missing or ill-typed option.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            options, unknown = tyro.cli(
                command, prog=name, args=arguments, return_unknown_args=True, config=_STYLE
            )
    except SystemExit as end:
        if not end.code:
            return None
        _refuse_unknown(command, arguments)  # a mistyped option explains a missing value
        raise UsageError(unboxed(said.getvalue())) from None
    if unknown:
        _refuse_unknown(command, unknown)
        raise UsageError(f"{unknown[0]!r} is one argument too many (see {name} --help)")
    return options


def _refuse_unknown(command: type[Any], arguments: list[str]) -> None:
    hints = get_type_hints(command, include_extras=True)
    known = {"help"} | {
        field.name.replace("_", "-")
        for field in dataclasses.fields(command)
        if tyro.conf.Positional not in getattr(hints[field.name], "__metadata__", ())
    }
    for argument in arguments:
        option = argument.partition("=")[0].replace("_", "-")
        if option.startswith("--") and option[2:] not in known:
            close = maths.nearest(option[2:], known)
            hint = f"did you mean --{close}?" if close else "--help lists the options"
            raise UsageError(f"unknown option {option!r}; {hint}")
