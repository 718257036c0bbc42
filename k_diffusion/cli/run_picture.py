"""Pictures of runs. matplotlib is imported only when one is drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from k_diffusion.training.history import History, TrainLine, series
from k_diffusion.training.lengths import average_lengths

from .figures_picture import figure_panels
from .panels import (
    STYLES,
    add_legend,
    colour_of,
    draw_line,
    dress,
    in_thousands,
    mark_end,
    ramp,
    room_below,
    scale_axis,
    scale_of_lines,
    short,
    untold,
)
from .plot import need_matplotlib, save_figure

TIMES = 5
"""Moments at which the loss is shown by noise level."""


def draw_runs(runs: Mapping[str, History], path: Path) -> None:
    """A picture of runs, laid over each other.

    Args:
        runs: by the name to show.
        path: the file, whose ending chooses the format.

    Raises:
        ImportError: matplotlib is not installed.
    """
    need_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.09, h_pad=0.09)
    figures = figure_panels(runs)
    figure = Figure(figsize=(15, 13.5 if figures else 10.5), dpi=130, layout=layout)
    FigureCanvasAgg(figure)
    figure.suptitle(_title(runs), fontsize=11, x=0.01, ha="left")
    last = [_averages, _speed]
    if any(line.noise_scale is not None for run in runs.values() for line in run.lines):
        last.append(_noise_scale)
    rows: list[Any] = [
        ([_loss, _by_sigma], (2, 1)),
        ([_bands, _learning_rate, _gradient], None),
        (last, None),
    ]
    heights = [1.15, 1, 1]
    if figures:
        rows.append((figures, None))
        heights.append(0.95)
    parts: Any = figure.subfigures(len(rows), 1, height_ratios=heights)
    for part, (panels, widths) in zip(parts, rows, strict=True):
        row = part.subplots(1, len(panels), width_ratios=widths, squeeze=False)[0]
        for panel, axes in zip(panels, row, strict=True):
            axes.grid(True, color="0.92", lw=0.8)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
            panel(axes, runs)
    save_figure(figure, path)


def _title(runs: Mapping[str, History]) -> str:
    if len(runs) > 1:
        return "  |  ".join(f"{name}: {run.images_seen:,} images" for name, run in runs.items())
    ((name, run),) = runs.items()
    model = run.setting("model.type", "a network")
    total = run.setting("total_images")
    of = f" of {total:,}" if isinstance(total, int) else ""
    size = run.start.get("parameters")
    parameters = f", {size:,} parameters" if isinstance(size, int) else ""
    return f"{name}: {model}{parameters}, {run.images_seen:,}{of} images seen"


# ---------------------------------------------------------------- panels


def _loss(axes: Any, runs: Mapping[str, History]) -> None:
    found = {name: list(series(run.lines, "loss")) for name, run in runs.items()}
    for k, (name, points) in enumerate(found.items()):
        draw_line(axes, points, color=colour_of(k), label=name if len(runs) > 1 else None)
    scale_axis(axes, (value for points in found.values() for _, value in points))
    for k, run in enumerate(runs.values()):
        _marks(axes, run, "0.35" if len(runs) == 1 else colour_of(k))
    for k, points in enumerate(found.values()):
        if len(runs) == 1 and points:
            mark_end(axes, points, colour_of(k))
    dress(axes, "loss, mean since the line before")


def _marks(axes: Any, run: History, colour: Any) -> None:
    """Where steps were skipped, losses were spikes, and the run went back: along the lower edge."""
    low = axes.get_xaxis_transform()
    for kind, marker, height, label in (
        ("skipped", "x", 0.03, "step not finite, skipped"),
        ("spike", "^", 0.07, "spike"),
    ):
        at = [event.images_seen for event in run.of_kind(kind)]
        if at:
            axes.plot(
                at, [height] * len(at), transform=low, color=colour, marker=marker, ls="",
                ms=5, mew=1.2, label=f"{label} ({len(at)})", clip_on=False, alpha=0.8,
            )  # fmt: skip
    ends = [event for event in run.of_kind("end") if "reason" in event.facts]
    for n, event in enumerate(ends):
        said = "ended by an error" if n == 0 else None
        axes.axvline(event.images_seen, color=colour, lw=1.4, ls=":", label=said)
    backs = run.of_kind("roll_back")
    for n, event in enumerate(backs):
        said = f"went back to here ({len(backs)})" if n == 0 else None
        axes.axvline(event.images_seen, color=colour, lw=1.0, ls=(0, (4, 3)), label=said)


def _by_sigma(axes: Any, runs: Mapping[str, History]) -> None:
    """The bands' losses against sigma: at several times of one run, or the last of several."""
    told = False
    for k, (name, run) in enumerate(runs.items()):
        lines = [line for line in run.lines if line.bands]
        if not lines or not run.band_edges:
            continue
        told = True
        shown = _spread(lines, TIMES) if len(runs) == 1 else lines[-1:]
        for n, (images, bands) in enumerate(_smoothed(lines, shown)):
            share = n / max(len(shown) - 1, 1)
            colour = ramp("viridis", 0.95 - 0.9 * share) if len(runs) == 1 else colour_of(k)
            said = f"{short(images)} images" if len(runs) == 1 else name
            _staircase(axes, run.band_edges, bands, color=colour, label=said)
    if not told:
        untold(axes, "loss by noise level", "this run has told none")
        return
    axes.set_xscale("log")
    scale_of_lines(axes)
    when = "at several times" if len(runs) == 1 else "at the end"
    dress(axes, f"loss by noise level, {when}", "sigma", images=False, legend=False)
    room_below(axes, 0.35)
    columns = 3 if len(runs) == 1 else 1
    axes.legend(fontsize=8, frameon=False, loc="lower center", ncols=columns, columnspacing=1.2)


def _bands(axes: Any, runs: Mapping[str, History]) -> None:
    from matplotlib.lines import Line2D

    handles: list[Any] = []
    for k, run in enumerate(runs.values()):
        count = len(run.band_edges) + 1
        for band in range(count if run.band_edges else 0):
            points = [
                (line.images_seen, value)
                for line in run.lines
                if band < len(line.bands) and (value := line.bands[band]) is not None
            ]
            colour = ramp("plasma", 0.9 * band / max(count - 1, 1))
            draw_line(axes, points, color=colour, ls=STYLES[k % len(STYLES)], lw=1.2)
            if len(handles) < count:
                label = _interval(run.band_edges, band)
                handles.append(Line2D([], [], color=colour, label=label))
    if not handles:
        untold(axes, "loss per band of sigma", "this run has told none")
        return
    scale_of_lines(axes)
    dress(axes, "loss per band of sigma", legend=False)
    handles.reverse()
    if len(runs) > 1:
        handles += [
            Line2D([], [], color="0.35", ls=STYLES[k % len(STYLES)], label=name)
            for k, (name, run) in enumerate(runs.items())
            if run.band_edges
        ]
    axes.legend(
        handles=handles, title="sigma", fontsize=7, title_fontsize=8, frameon=False,
        loc="center left", bbox_to_anchor=(1.0, 0.5), handlelength=1.2, borderaxespad=0.3,
    )  # fmt: skip


def _learning_rate(axes: Any, runs: Mapping[str, History]) -> None:
    _plain(axes, runs, "lr", "learning rate")
    axes.set_ylim(bottom=0)


def _gradient(axes: Any, runs: Mapping[str, History]) -> None:
    _plain(axes, runs, "grad_norm", "norm of the gradient, before clipping", scale=True)
    clips = {run.setting("grad_clip") for run in runs.values()}
    for clip in sorted(c for c in clips if isinstance(c, (int, float))):
        axes.axhline(clip, color="0.35", lw=1.0, ls=(0, (4, 3)), label=f"grad_clip = {clip:g}")
    if clips != {None}:
        add_legend(axes)


def _averages(axes: Any, runs: Mapping[str, History]) -> None:
    several = len(runs) > 1
    for k, (name, run) in enumerate(runs.items()):
        for n, (average, points) in enumerate(average_lengths(run).items()):
            label = f"{name} {average}" if several else average
            colour = colour_of(k) if several else colour_of(n)
            draw_line(axes, points, color=colour, label=label, ls=STYLES[n % 4] if several else "-")
    scale_of_lines(axes)
    dress(axes, "how far back the averages reach, images")
    axes.yaxis.set_major_formatter(in_thousands())


def _speed(axes: Any, runs: Mapping[str, History]) -> None:
    _plain(axes, runs, "images_per_second", "images a second")
    axes.set_ylim(bottom=0)


def _noise_scale(axes: Any, runs: Mapping[str, History]) -> None:
    _plain(axes, runs, "noise_scale", "gradient noise scale, images", scale=True)
    axes.margins(y=0.1)
    for size in sorted({run.batch_size for run in runs.values() if run.batch_size}):
        axes.axhline(size, color="0.35", lw=1.0, ls=(0, (4, 3)), label=f"batch_size = {size}")
    add_legend(axes)


def _plain(
    axes: Any, runs: Mapping[str, History], name: str, title: str, scale: bool = False
) -> None:
    for k, run in enumerate(runs.values()):
        draw_line(axes, list(series(run.lines, name)), color=colour_of(k))
    if scale:
        scale_of_lines(axes)
    dress(axes, title, legend=False)


# ---------------------------------------------------------------- their parts


def _staircase(
    axes: Any, edges: Sequence[float], bands: Sequence[float | None], **style: Any
) -> None:
    """Each band's value over its sigmas, at the middle of it; the outer two reach as far again."""
    ratio = edges[1] / edges[0] if len(edges) > 1 else 2.0
    top = edges[-1] / edges[-2] if len(edges) > 1 else 2.0
    bounds = [edges[0] / ratio, *edges, edges[-1] * top]
    points = [
        (math.sqrt(a * b), value)
        for a, b, value in zip(bounds, bounds[1:], bands, strict=False)
        if value is not None and a > 0
    ]
    if points:
        x, y = zip(*points, strict=True)
        axes.plot(x, y, marker="o", ms=3.5, lw=1.3, **style)


def _smoothed(
    lines: Sequence[TrainLine], shown: Sequence[TrainLine]
) -> list[tuple[int, tuple[float | None, ...]]]:
    """The bands at each line shown, as means over the lines around it: one line is few samples."""
    width = max(1, len(lines) // (3 * TIMES))
    found = []
    for line in shown:
        at = lines.index(line)
        near = lines[max(0, at - width + 1) : at + 1] if at else lines[:1]
        columns = zip(*(one.bands for one in near), strict=False)
        means = tuple(_mean([v for v in column if v is not None]) for column in columns)
        found.append((line.images_seen, means))
    return found


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _spread(lines: Sequence[TrainLine], count: int) -> list[TrainLine]:
    """So many lines whose images seen grow by a factor, the first and the last one among them."""
    first, last = lines[0].images_seen, lines[-1].images_seen
    wanted = [
        first * (last / max(first, 1)) ** (n / max(count - 1, 1)) if first else last
        for n in range(count)
    ]
    chosen = {min(lines, key=lambda line: abs(line.images_seen - w)).images_seen for w in wanted}
    return [line for line in lines if line.images_seen in chosen]


def _interval(edges: Sequence[float], band: int) -> str:
    low = f"{edges[band - 1]:.2g}" if band else "0"
    return f"{low} to {edges[band]:.2g}" if band < len(edges) else f"above {edges[-1]:.2g}"
