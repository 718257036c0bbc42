"""What the panels of a run's picture are drawn with. matplotlib is imported when one is drawn."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

STYLES = ("-", "--", ":", "-.")
"""Of the first, second... run where colour means something else; then from the first again."""


def draw_line(axes: Any, points: Sequence[tuple[int, float]], **style: Any) -> None:
    """A curve; a single point is a dot."""
    if points:
        x, y = zip(*points, strict=True)
        marker = "o" if len(points) == 1 else ""
        axes.plot(x, y, **{"marker": marker, "lw": 1.4, **style})


def mark_end(axes: Any, points: Sequence[tuple[int, float]], colour: Any) -> None:
    """The last value, beside its end of the curve."""
    axes.annotate(
        f"{points[-1][1]:.4g}", points[-1], xytext=(5, 0), textcoords="offset points",
        color=colour, fontsize=8, va="center", annotation_clip=False,
    )  # fmt: skip


def room_below(axes: Any, share: float) -> None:
    """Lower the axis's end by a share of its length, as it is seen."""
    low, high = axes.get_ylim()
    if axes.get_yscale() == "log":
        axes.set_ylim(low * (low / high) ** share, high)
    else:
        axes.set_ylim(low - share * (high - low), high)


def scale_of_lines(axes: Any) -> None:
    """`scale_axis` by all that has been drawn."""
    scale_axis(axes, (float(y) for line in axes.get_lines() for y in line.get_ydata()))


def scale_axis(axes: Any, values: Iterable[float]) -> None:
    """A logarithmic axis where the values are above 0 and reach over half a decade."""
    from matplotlib.ticker import LogFormatterSciNotation

    values = list(values)
    if values and min(values) > 0 and max(values) > 3 * min(values):
        axes.set_yscale("log")
        if max(values) < 30 * min(values):
            axes.yaxis.set_minor_formatter(_plain_numbers())
            axes.yaxis.set_major_formatter(_plain_numbers())
            axes.tick_params(axis="y", which="minor", labelsize=7)
        else:
            axes.yaxis.set_minor_formatter(LogFormatterSciNotation(labelOnlyBase=True))


def _plain_numbers() -> Any:
    """Labels 1, 2, 3 and 5 of each decade."""
    from matplotlib.ticker import FuncFormatter

    def label(value: float, _: object) -> str:
        if value <= 0:
            return ""
        first = round(value / 10 ** math.floor(math.log10(value) + 1e-9))
        return short(value) if first in (1, 2, 3, 5) else ""

    return FuncFormatter(label)


def in_thousands() -> Any:
    """Labels such as 20k and 5M."""
    from matplotlib.ticker import EngFormatter

    return EngFormatter(sep="")


def short(number: float) -> str:
    """Three digits, such as 1.02k or 3.5M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def dress(
    axes: Any, title: str, xlabel: str = "images seen", images: bool = True, legend: bool = True
) -> None:
    """Title, labels and, where curves have names, a legend; `images`: the axis counts them."""
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(xlabel, fontsize=9)
    axes.tick_params(labelsize=8)
    if images:
        axes.xaxis.set_major_formatter(in_thousands())
        axes.set_xlim(left=0)
    if legend:
        add_legend(axes)


def add_legend(axes: Any) -> None:
    """A legend, where curves have names."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, frameon=False)


def untold(axes: Any, title: str, words: str) -> None:
    """An empty panel that says why it is empty."""
    axes.set_title(title, fontsize=10, loc="left")
    axes.text(0.5, 0.5, words, transform=axes.transAxes, ha="center", color="0.5", fontsize=9)
    axes.set(xticks=[], yticks=[])


def colour_of(k: int) -> Any:
    """Of the k-th curve; ten, then from the first again."""
    from matplotlib import colormaps

    return colormaps["tab10"](k % 10)


def ramp(name: str, share: float) -> Any:
    """The colour at a share, 0 to 1, of a map of matplotlib."""
    from matplotlib import colormaps

    return colormaps[name](share)
