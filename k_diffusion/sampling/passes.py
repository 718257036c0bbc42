"""What a call of KSampler.sample does with a start: a pass, or several of more and more steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from k_diffusion.guidance.held import bound_rows
from k_diffusion.sampling.adaptive import AdaptiveSolver, take_rows
from k_diffusion.sampling.auto_steps import make_auto, refine
from k_diffusion.sampling.nonfinite import explain
from k_diffusion.sampling.start import Start, whole
from k_diffusion.sampling.walk import Walk
from k_diffusion.sampling.watch import Watchers
from k_diffusion.utils import maths

ON_NAN = ("raise", "report")
MakeWalk = Callable[[Start, int, Mapping[str, Any]], Walk]


@dataclass(frozen=True)
class Drawn:
    """What a pass gives: samples in the state's dtype, and what it took (see `Result`)."""

    x: Tensor
    steps: tuple[int, ...]
    changes: tuple[float, ...] | None = None


class Passes:
    """Runs passes, counts the calls of the model, and gathers what is to be warned of.

    Args:
        make_walk: (start, steps, keywords) -> what a pass walks.
        watchers: who looks on.
        progress: whether to show a bar for each pass.
        on_nan: see `KSampler.sample`.

    Raises:
        ValueError: an unknown `on_nan`.
    """

    def __init__(
        self, make_walk: MakeWalk, watchers: Watchers, progress: bool, on_nan: str
    ) -> None:
        if on_nan not in ON_NAN:
            raise ValueError(maths.unknown("on_nan", on_nan, ON_NAN))
        self._make_walk = make_walk
        self._watchers = watchers
        self._progress = progress
        self._warn = self._report if on_nan == "report" else None
        self.calls = 0
        self.warnings: list[Warning] = []

    def draw(self, start: Start, steps: Any, keywords: Mapping[str, Any]) -> Drawn:
        """Draws all samples of a start.

        Args:
            steps: a number, "auto" or an AutoSteps.
            keywords: the denoiser's.

        Raises:
            ValueError: steps are to be found by a run that cannot be refined.
        """
        if start.strength == 0:
            return Drawn(start.unchanged(), (0,) * len(start))
        auto = make_auto(steps)
        if auto is None:
            return Drawn(self._once(start, steps, keywords), (whole(steps),) * len(start))
        walked = self._make_walk(start, auto.first, keywords)
        _check_refinable(walked)
        everyone = {**bound_rows(walked.denoiser, start.noise.shape), **keywords}

        def run(rows: Sequence[int], steps: int) -> Tensor:
            if len(rows) == len(start):
                return self._once(start, steps, keywords)
            index = torch.tensor(rows, device=start.noise.device)
            told = {name: take_rows(v, index, len(start)) for name, v in everyone.items()}
            return self._once(start.rows(rows), steps, told)

        x, taken, changes = refine(auto, len(start), run)
        if said := auto.unsettled(taken, changes):
            self.warnings.append(UserWarning(said))
        return Drawn(x, taken, changes)

    def _report(self, message: str) -> None:
        self.warnings.append(RuntimeWarning(message))

    def _once(self, start: Start, steps: int, keywords: Mapping[str, Any]) -> Tensor:
        walk = self._make_walk(start, steps, keywords)
        what = f"the result of {walk.solver.name} after {steps} steps"
        told = self._watchers.begin(start.noise, lambda: walk.starts)
        bar = progress_bar(walk.calls) if self._progress else None
        calls = walk.calls

        def tick() -> None:
            self.calls += 1
            if bar is not None:
                bar.update()

        try:
            x = walk.run(told, tick if bar is not None or calls is None else None)
        except FloatingPointError as error:
            if not isinstance(walk.solver, AdaptiveSolver):
                raise
            # It reads errors anyway, and cannot go on from one that is no number.
            why = explain(walk.run, walk.step_of, self._watchers.callback)
            raise FloatingPointError(f"{error}; {why}") from error
        finally:
            if bar is not None:
                bar.close()
        if bar is None and calls is not None:
            self.calls += calls
        self._watchers.end()
        return walk.checked(x, what, self._warn, self._watchers.callback)


def _check_refinable(walk: Walk) -> None:
    """Refuses what does not converge, sample by sample, as its steps are refined."""
    name = walk.solver.name
    if not walk.plans:
        raise ValueError(f"{name} finds its steps itself: give it a tolerance, and steps a number")
    draws = [draw for plan in walk.plans for draw in plan.draws]
    if len(walk.stages) > 1 or any(draw.interval.fresh for draw in draws):
        raise ValueError(
            f"{name} draws noise that belongs to no path here (resample, churn, restart), so that "
            f"more steps are another sample: give steps a number"
        )
    if draws and walk.noise != "path":
        raise ValueError(
            f'{name} draws noise: steps="auto" needs noise="path", on which a sample stays the '
            "same and converges as its steps are refined"
        )


def progress_bar(total: int | None) -> Any:
    """A bar on standard error that counts calls of the model."""
    from tqdm import tqdm

    return tqdm(total=total, desc="sampling", unit="call", leave=False)
