"""`k-diffusion schedule`: the noise schedules as a list, a table of levels, and a picture."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from .plot import draw
from .problems import UsageError, as_usage
from .values import Settings

if TYPE_CHECKING:
    from k_diffusion.utils.levels import Levels
    from k_diffusion.utils.scheduler import Scheduler


@dataclass(frozen=True)
class Entry:
    """What the list says of one schedule."""

    name: str
    summary: str
    source: str
    options: dict[str, Any]


@dataclass(frozen=True)
class Line:
    """What the table says of one level."""

    index: int
    sigma: float
    alpha: float
    half_log_snr: float
    time: float


@dataclass
class Schedule:
    """Show the noise levels that a schedule lays; without a name, list the schedules."""

    names: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="NAME")] = ()
    """One schedule or several."""
    steps: int = 20
    """Steps from noise to data."""
    scheduler_options: Settings = field(default_factory=dict)
    """Options of the levels, such as rho=5,sigma_max=40 or process=cosine; each goes to those of
    the schedules that have it."""
    path: str = ""
    """Show the levels in the coordinates of ve, vp or flow, at equal log-SNR; without it in the
    schedule's own."""
    plot: Path | None = None
    """Draw them into this file, a .png, .svg or .pdf."""
    overwrite: bool = False
    """Replace the picture if it is already there."""
    json: bool = False
    """Print JSON."""

    def run(self) -> None:
        if not self.names:
            self._list()
            return
        if self.steps < 1:
            raise UsageError(f"--steps is {self.steps}; give a whole number of at least 1")
        self._check_plot()
        with as_usage():
            laid = self._laid()
        if self.json:
            found = {name: [asdict(line) for line in lines(*one)] for name, one in laid.items()}
            print(json.dumps(_finite(found), indent=2))
        else:
            print("\n\n".join(table(name, *one, self.steps) for name, one in laid.items()))
        if self.plot is not None:
            draw({name: levels for name, (_, levels) in laid.items()}, self.plot)

    def _list(self) -> None:
        if self.plot is not None or self.scheduler_options or self.path:
            raise UsageError("name a schedule, as in k-diffusion schedule karras; there are many")
        entries = schedule_entries()
        if self.json:
            print(json.dumps([asdict(entry) for entry in entries], indent=2, default=str))
            return
        width = max(len(entry.name) for entry in entries)
        for entry in entries:
            print(f"{entry.name:<{width}}  {entry.summary}")

    def _check_plot(self) -> None:
        """Refuse, before the work, a picture that could not be written."""
        if self.plot is None:
            return
        if self.plot.suffix.lower() not in (".png", ".svg", ".pdf"):
            raise UsageError(f"--plot {self.plot} has no known ending: give .png, .svg or .pdf")
        if not self.plot.parent.is_dir():
            raise UsageError(f"--plot {self.plot}: there is no folder {self.plot.parent}")
        if self.plot.exists() and not self.overwrite:
            raise UsageError(f"--plot {self.plot} is there already; another name, or --overwrite")

    def _laid(self) -> dict[str, tuple[Scheduler, Levels]]:
        from k_diffusion.utils.levels import make_path
        from k_diffusion.utils.maths import unknown
        from k_diffusion.utils.scheduler import SCHEDULERS, make_scheduler

        for name in self.names:
            if name not in SCHEDULERS:
                raise ValueError(unknown("scheduler", name, SCHEDULERS))
        known = {option for name in self.names for option in SCHEDULERS[name].options()}
        for option in self.scheduler_options:
            if option not in known:
                raise ValueError(unknown(f"option of {' and '.join(self.names)},", option, known))
        laid = {}
        for name in self.names:
            own = SCHEDULERS[name].options()
            given = {k: v for k, v in self.scheduler_options.items() if k in own}
            scheduler = make_scheduler(name, **given)
            levels = scheduler.levels(self.steps)
            laid[name] = scheduler, levels.on(make_path(self.path)) if self.path else levels
        return laid


def schedule_entries() -> list[Entry]:
    """One entry a registered schedule, in order of its name."""
    from k_diffusion.utils.scheduler import SCHEDULERS

    return [
        Entry(name, kind.summary(), kind.source, _options(kind))
        for name, kind in sorted(SCHEDULERS.items())
    ]


def _options(kind: type[Scheduler]) -> dict[str, Any]:
    return {k: None if v is dataclasses.MISSING else v for k, v in kind.options().items()}


def lines(scheduler: Scheduler, levels: Levels) -> list[Line]:
    """The levels with the schedule's own time of each."""
    return [
        Line(i, v.sigma, v.alpha, v.half_log_snr, scheduler.time(v.half_log_snr))
        for i, v in enumerate(levels)
    ]


def table(name: str, scheduler: Scheduler, levels: Levels, asked: int) -> str:
    """The levels as aligned plain text with a header, which says if there are other than `asked`
    steps."""
    rows: list[tuple[str, ...]] = [("step", "sigma", "alpha", "half log-SNR", "time")]
    for line in lines(scheduler, levels):
        numbers = line.sigma, line.alpha, line.half_log_snr, line.time
        rows.append((str(line.index), *(f"{number:.6g}" for number in numbers)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    text = ["  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
    laid = len(levels) - 1
    head = f"{name}: {laid} step{'s' * (laid != 1)} on the {levels.path} path"
    if laid != asked:
        head += f", not the {asked} asked for: that is what its rule lays"
    return "\n".join([head, *text])


def _finite(value: Any) -> Any:
    """JSON has no infinity: as text."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
