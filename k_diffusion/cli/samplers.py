"""`k-diffusion samplers`: the registry as a table."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """What the table says of one sampler."""

    name: str
    order: int
    """True order of convergence, with default options."""
    claimed: list[int]
    """The order that its name gives it; one for each value of its option `order`, if it has one."""
    evaluations_per_step: int | None
    """Calls of the model a step, away from the run's ends; None: adaptive steps."""
    stochastic: bool
    live_tensors: int | None
    """The most state-sized tensors that a run holds at once; None: adaptive steps."""
    source: str
    summary: str
    options: dict[str, Any]


@dataclass
class Samplers:
    """List the samplers: order, calls of the model a step, noise, live tensors, source."""

    json: bool = False
    """Print JSON, with each sampler's options too."""

    def run(self) -> None:
        rows = sampler_rows()
        if self.json:
            print(json.dumps([asdict(row) for row in rows], indent=2, default=str))
        else:
            print(table(rows))


def sampler_rows() -> list[Row]:
    """One row a registered sampler, in order of registration, measured on traced plans; then those
    of adaptive steps."""
    from k_diffusion.sampling import ADAPTIVE, SOLVERS, make_plan
    from k_diffusion.utils.scheduler import KarrasScheduler

    rows = []
    for name, solver in SOLVERS.items():
        short, long = (make_plan(solver, KarrasScheduler().levels(steps)) for steps in (20, 30))
        rows.append(
            Row(
                name,
                solver.order,
                [claimed for _, claimed, _ in solver.variants],
                round((long.evaluations - short.evaluations) / 10),
                solver.stochastic,
                long.live,
                solver.source,
                solver.summary,
                dict(solver.options),
            )
        )
    for name, adaptive in ADAPTIVE.items():
        pair = adaptive.pair
        summary = (
            f"Adaptive steps for each sample, by the difference of its orders {pair.order} and "
            f"{pair.order - 1} ({len(pair.nodes) - pair.carries} calls a step)."
        )
        options = dict(adaptive.options)
        rows.append(
            Row(name, pair.order, [pair.order], None, False, None, pair.source, summary, options)
        )
    return rows


def table(rows: list[Row]) -> str:
    """Aligned plain text with a header."""
    lines = [("sampler", "order", "calls/step", "noise", "live", "source")]
    for row in rows:
        noise = "yes" if row.stochastic else "no"
        calls = "adaptive" if row.evaluations_per_step is None else str(row.evaluations_per_step)
        live = "" if row.live_tensors is None else str(row.live_tensors)
        numbers = (str(row.order), calls, noise, live)
        lines.append((row.name, *numbers, row.source))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
