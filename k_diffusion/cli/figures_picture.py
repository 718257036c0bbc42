"""The panels of a run's picture that show what its evaluations have found."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from k_diffusion.training.history import History, Judge

from .panels import STYLES, add_legend, colour_of, draw_line, dress, mark_end

FAR = ("fid", "kid")
"""Distances: from 0 on, the less the better; each in a panel of its own."""
ERROR = "_error"
"""What the name of a figure's standard error ends in."""

DOTS = {"marker": "o", "ms": 3.0}
MARKS = ("o", "s", "^", "D", "v")

Panel = Callable[[Any, Mapping[str, History]], None]
"""Draws on axes, of runs by name."""
Found = Mapping[str, Mapping[Judge, Mapping[str, list[tuple[int, float]]]]]


def figure_panels(runs: Mapping[str, History]) -> list[Panel]:
    """What draws them, each on the axes that it is given; none where no run was evaluated."""
    found: Found = {name: run.figures() for name, run in runs.items()}
    names = {name for judges in found.values() for by_name in judges.values() for name in by_name}
    shares = sorted(n for n in names if n not in FAR and not n.endswith(ERROR))
    panels: list[Panel] = [partial(_distance, found, name) for name in FAR if name in names]
    if shares:
        panels.append(partial(_shares, found, shares))
    return panels


def _distance(found: Found, name: str, axes: Any, runs: Mapping[str, History]) -> None:
    """A curve for each run and judge, its standard error around it."""
    judges = _judges(found, name)
    k = 0
    for run, by_judge in found.items():
        for judge, figures in by_judge.items():
            if name not in figures:
                continue
            words = [run] if len(found) > 1 else []
            words += [_words(judge)] if len(judges) > 1 else []
            points, colour = figures[name], colour_of(k)
            draw_line(axes, points, color=colour, label=", ".join(words) or None, **DOTS)
            _errors(axes, points, dict(figures.get(name + ERROR, [])), colour)
            k += 1
            if len(found) == len(judges) == 1:
                mark_end(axes, points, colour)
    by = f", {_words(judges[0])}" if len(judges) == 1 else ""
    dress(axes, f"{name.upper()}{by}", legend=False)
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]) if name == "kid" else 0.0)
    add_legend(axes)


def _errors(
    axes: Any, points: Sequence[tuple[int, float]], errors: Mapping[int, float], colour: Any
) -> None:
    told = [(x, y, errors[x]) for x, y in points if x in errors]
    if told:
        x, y, error = zip(*told, strict=True)
        low, high = ([a + sign * b for a, b in zip(y, error, strict=True)] for sign in (-1, 1))
        axes.fill_between(x, low, high, color=colour, alpha=0.18, lw=0)


def _shares(found: Found, names: Sequence[str], axes: Any, runs: Mapping[str, History]) -> None:
    """Colours and marks tell the figures, strokes the runs and their judges."""
    from matplotlib.lines import Line2D

    judged = [(run, judge) for run, by_judge in found.items() for judge in by_judge]
    style = {pair: STYLES[k % len(STYLES)] for k, pair in enumerate(judged)}
    for run, judge in judged:
        for n, name in enumerate(names):
            points = found[run][judge].get(name, [])
            look: dict[str, Any] = {**DOTS, "marker": MARKS[n % len(MARKS)], "clip_on": False}
            draw_line(axes, points, color=colour_of(n), ls=style[run, judge], zorder=3, **look)
    judges = list(dict.fromkeys(judge for _, judge in judged))
    by = f", {_words(judges[0])}" if len(judges) == 1 else ""
    dress(axes, f"shares{by}", legend=False)
    axes.set_ylim(0.0, max(1.02, axes.get_ylim()[1]))
    handles = [
        Line2D([], [], color=colour_of(n), marker=MARKS[n % len(MARKS)], ms=3.0, label=name)
        for n, name in enumerate(names)
    ]
    if len(judged) > 1:
        for run, judge in judged:
            words = [run] * (len(found) > 1) + [_words(judge)] * (len(judges) > 1)
            label = ",\n".join(words)
            handles.append(Line2D([], [], color="0.35", ls=style[run, judge], label=label))
    axes.legend(
        handles=handles, fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5),
        handlelength=1.8, borderaxespad=0.3,
    )  # fmt: skip


def _judges(found: Found, name: str) -> list[Judge]:
    """By whom a figure was found in any run."""
    return list(dict.fromkeys(j for run in found.values() for j, by in run.items() if name in by))


def _words(judge: Judge) -> str:
    beside = f", data {judge.data}" if judge.data else ""
    return f"{judge.samples:,} samples by {judge.extractor}{beside}"
