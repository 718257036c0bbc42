"""`k-diffusion plot`: how a run has gone, in one picture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from .problems import UsageError, as_usage
from .run_picture import draw_runs

ENDINGS = (".png", ".svg", ".pdf")


@dataclass
class Plot:
    """Draw how a run has gone: loss, loss by noise level, learning rate, gradient, averages, speed.

    It reads nothing but the run's metrics.jsonl, also while the run goes on. Several runs are laid
    over each other.
    """

    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """The run's folder, or those of several."""
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """The picture, a .png, .svg or .pdf; without it plot.png in the run's folder, which is
    replaced."""
    overwrite: bool = False
    """Replace the picture if it is already there."""

    def run(self) -> None:
        from k_diffusion.training.history import read_history

        with as_usage():
            histories = [read_history(run) for run in self.runs]
        path = self._path()
        names = names_of(self.runs)
        draw_runs(dict(zip(names, histories, strict=True)), path)
        print(f"{path} shows {', '.join(names)}")

    def _path(self) -> Path:
        if not self.runs:
            raise UsageError("a run is missing: give its folder")
        if self.out is None:
            if len(self.runs) > 1:
                raise UsageError("several runs lie in no one folder: say where to draw, by -o")
            run = Path(self.runs[0])
            return (run if run.is_dir() else run.parent) / "plot.png"
        if self.out.suffix.lower() not in ENDINGS:
            raise UsageError(f"-o {self.out} has no known ending: give .png, .svg or .pdf")
        if not self.out.parent.is_dir():
            raise UsageError(f"-o {self.out}: there is no folder {self.out.parent}")
        if self.out.exists() and not self.overwrite:
            raise UsageError(f"-o {self.out} is there already; another name, or --overwrite")
        return self.out


def names_of(runs: tuple[str, ...]) -> list[str]:
    """A short name for each: the last parts of its path, as many as tell all of them apart."""
    parts = [Path(run).absolute().parts for run in runs]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(one[-count:]) for one in parts]
        if len(set(names)) == len(names):
            return names
    raise UsageError("a run is given twice")
