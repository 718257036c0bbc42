"""What every noise schedule shares: the two base classes, the registry, the checks of options."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Mapping
from typing import Any, ClassVar

from k_diffusion.utils import maths
from k_diffusion.utils.levels import CLEAN, VP, Level, Levels, Path

SCHEDULERS: dict[str, type[Scheduler]] = {}
MOST_DROPPED = 100_000
"""How many levels a strength may lay that are not kept."""


class Scheduler:
    """A noise schedule. To add one: subclass, give `path`, `half_log_snr` and `time`."""

    name: ClassVar[str] = ""
    source: ClassVar[str] = ""
    """Authors, year, arXiv id, place."""
    path: Path = VP
    timesteps: int = 1000
    time_min: float = 0.0
    time_max: float = 1.0
    adds_clean: ClassVar[bool] = False
    """Whether the schedule stops above sigma = 0: then the clean level is laid after it."""
    discrete: ClassVar[bool] = False
    """Whether it is given at `timesteps` levels alone, of which the i-th has time i / N."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in cls.__dict__:
            SCHEDULERS[cls.name] = cls

    def half_log_snr(self, time: Any) -> Any:
        """log(alpha / sigma) at a time in [time_min, time_max] (a float, or a tensor)."""
        raise NotImplementedError

    def time(self, half_log_snr: Any) -> Any:
        """The inverse of `half_log_snr`; levels outside the schedule get its nearest end."""
        raise NotImplementedError

    def level(self, time: float) -> Level:
        """The level at a time in [time_min, time_max]."""
        if not self.time_min <= time <= self.time_max:
            raise ValueError(
                f"time {time} is outside {type(self).__name__}'s [{self.time_min}, {self.time_max}]"
            )
        return self.path.at(self.half_log_snr(float(time)))

    def usual(self) -> Scheduler:
        """It without options: where that begins is nobody's mistake.

        Raises:
            TypeError, ValueError: it needs some.
        """
        return type(self)()

    def laid(self, time: float) -> Level:
        """The level that laying puts where an even spacing of time would have `time`."""
        return self.level(time)

    def levels(self, steps: int, strength: float = 1.0) -> Levels:
        """Levels on `self.path`, from the noisiest to the cleanest: `steps + 1` of them.

        Where a published rule names a level twice, it is laid once, and `ddim_uniform` lays as many
        as its stride gives: these few schedules say so, and may take another number of steps.

        Args:
            steps: number of steps, a whole number of at least 1.
            strength: share of the way from clean data to noise, in (0, 1], at which to begin, with
                as many steps as asked for: the last `steps` of round(steps / strength).
                `Levels.start_at` is the other convention, with fewer steps.

        Raises:
            ValueError: steps is not a whole number of at least 1; strength is not in (0, 1], or so
                small that it would lay 100 000 levels in vain.
        """
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps must be a whole number of at least 1, got {steps!r}")
        if not (maths.is_number(strength) and 0 < strength <= 1):
            raise ValueError(f"strength must lie in (0, 1], got {strength!r}")
        if strength == 1:
            return Levels(self._lay(steps), self.path)
        laid = steps / strength
        if laid - steps > MOST_DROPPED:
            raise ValueError(
                f"strength {strength!r} lays {laid:.6g} steps to keep the last {steps}: raise it "
                f"to {steps / (steps + MOST_DROPPED):.2g} or more, or begin at a level of your own "
                "with Levels.split"
            )
        return Levels(self._lay(round(laid)), self.path)[-steps - 1 :]

    def _lay(self, steps: int) -> list[Level]:
        times = maths.linspace(self.time_max, self.time_min, steps + (not self.adds_clean))
        return [self.laid(time) for time in times] + [CLEAN] * self.adds_clean

    def within(self, process: Scheduler) -> Scheduler:
        """This schedule with its open ends (a sigma_min of None, say) taken from a process."""
        return self

    @property
    def own_process(self) -> Scheduler | None:
        """The process that a network which carries none takes from this schedule; None where it
        only lays levels over whichever process it is given."""
        return self

    def to_config(self) -> dict[str, Any]:
        """Name and options as plain JSON data: `make_scheduler(**config)` gives an equal one."""
        if not dataclasses.is_dataclass(self) or SCHEDULERS.get(self.name) is not type(self):
            raise ValueError(f"{type(self).__name__} cannot be saved: it isn't a named scheduler")
        options = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        plain = {k: v.to_config() if isinstance(v, Scheduler) else v for k, v in options.items()}
        return {"name": self.name, **{k: v for k, v in plain.items() if v is not None}}

    @classmethod
    def summary(cls) -> str:
        """First paragraph of the docstring, on one line."""
        return (inspect.getdoc(cls) or "").split("\n\n")[0].replace("\n", " ")

    @classmethod
    def options(cls) -> dict[str, Any]:
        """The options of a registered scheduler and their defaults."""
        return {f.name: f.default for f in dataclasses.fields(cls)}  # type: ignore[arg-type]


def settle(scheduler: Any) -> None:
    """Makes the options of a frozen scheduler plain floats, whole numbers and schedulers (by what
    their fields are annotated as), or refuses them by name."""
    for field in dataclasses.fields(scheduler):
        value = getattr(scheduler, field.name)
        kind = str(field.type).partition(" |")[0]
        if value is None or kind not in ("int", "float", "Scheduler"):
            continue
        settled = _process(value) if kind == "Scheduler" else _number(field.name, value, kind)
        object.__setattr__(scheduler, field.name, settled)


def _number(name: str, value: Any, kind: str) -> float | int:
    try:
        plain = float(value)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name} must be a number, got {value!r}") from None
    if not math.isfinite(plain):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    if kind == "float":
        return plain
    least = 0 if name == "steps_offset" else 1
    if plain != int(plain) or plain < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
    return int(plain)


def _process(value: Any) -> Scheduler:
    if isinstance(value, Mapping):  # from a config
        value = make_scheduler(**value)
    elif isinstance(value, (str, Scheduler)):
        value = make_scheduler(value)
    else:
        raise ValueError(f"process must be a Scheduler or its name, got {value!r}")
    if value.own_process is not value:
        raise ValueError(
            f"process cannot be {type(value).__name__}, which only lays levels over a process: "
            "give that process"
        )
    return value


def make_scheduler(name: str | Scheduler, **options: Any) -> Scheduler:
    """A scheduler by name, as in `make_scheduler("karras", rho=5.0)`; a scheduler passes through.

    Raises:
        ValueError: unknown name or option (the nearest known one is offered).
    """
    if isinstance(name, Scheduler):
        return name
    if not isinstance(name, str) or name not in SCHEDULERS:
        raise ValueError(maths.unknown("scheduler", name, SCHEDULERS))
    kind = SCHEDULERS[name]
    for option in options:
        if option not in kind.options():
            raise ValueError(
                maths.unknown(f"option of scheduler {name!r},", option, kind.options())
            )
    return kind(**options)
