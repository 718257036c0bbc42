"""Writes docs/schedules.md from the registry; with --check, fails where the file is stale."""

from __future__ import annotations

import sys
from pathlib import Path

from k_diffusion.cli.schedule import schedule_entries
from k_diffusion.utils.scheduler import SCHEDULERS, Spacing

OUT = Path(__file__).with_name("schedules.md")
HEAD = """# Schedules

Made by `python docs/make_schedules.py` from the registry: do not edit.

A schedule is given to `KSampler(model, scheduler="karras")` by name, or as an object with options:
`KarrasScheduler(rho=5.0)`. It lays `steps + 1` levels, the last of them clean data. `k-diffusion
schedule karras vp --steps 20 --plot levels.png` draws them.

*Path* is the coordinates that its levels are laid in; for a model in others they are carried over
at equal log-SNR, and what cannot be (pure noise for a variance-exploding or noise-predicting
model) is refused by name. Those with *process* only lay levels, over the process of the model or
the one given; all the others are processes too, that a network can be trained on. `None` as an
option's default means the model's own.

| schedule | path | what it does | options | source |
| --- | --- | --- | --- | --- |
"""
TAIL = """
## Levels are data

`scheduler.levels(20)` gives `Levels`: `.sigmas`, `.pairs()`, `levels[i]`, and

| | |
| --- | --- |
| `levels[3:8]`, `levels.split(5)`, `levels.split(level)` | parts; `split`'s share their joint |
| `first + second` | one after the other; a shared joint once, an overlap refused |
| `levels.start_at(0.6)` | the last round(0.6 · steps) steps: fewer of them |
| `scheduler.levels(20, strength=0.6)` | 20 steps over that part: more of them are laid |
| `levels.on(FLOW)` | on another path, at equal log-SNR |
| `levels.scaled(0.5)` | for data half as large |
| `levels.flipped()` | from clean to noisy, for inversion with a solver of the ODE |
"""


def page() -> str:
    rows = []
    for entry in schedule_entries():
        kind = SCHEDULERS[entry.name]
        spacing, path = issubclass(kind, Spacing), str(kind.path)
        options = ", ".join(f"`{k}={v}`" for k, v in entry.options.items())
        where = "process" if spacing else "any" if entry.name == "custom" else path
        cells = [f"`{entry.name}`", where, entry.summary, options, entry.source]
        rows.append("| " + " | ".join(cells) + " |\n")
    return HEAD + "".join(rows) + TAIL


def main() -> None:
    if "--check" not in sys.argv:
        OUT.write_text(page(), encoding="utf-8")
    elif not OUT.exists() or OUT.read_text(encoding="utf-8") != page():
        sys.exit("docs/schedules.md is stale: run `python docs/make_schedules.py`")


if __name__ == "__main__":
    main()
