"""Pictures of noise levels. matplotlib is imported only when one is drawn."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from k_diffusion.utils.levels import Levels

ROW = 0.24
"""Height of a schedule's row, in inches."""


def need_matplotlib() -> None:
    """
    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{str(error.name).partition('.')[0]} is not installed: pip install "
            "'k-diffusion[plot]' brings what draws"
        ) from None


def draw(schedules: dict[str, Levels], path: Path) -> None:
    """A picture of the levels: sigma and half log-SNR by step, and where they lie in log-SNR.

    The rows of the lower part, one for each schedule in its colour, name the curves above. What is
    at infinity is drawn beyond the edge of the rest, hollow or dotted.

    Args:
        schedules: levels by the name to show.
        path: the file, whose ending chooses the format.

    Raises:
        ImportError: matplotlib is not installed.
    """
    need_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    rows = 0.75 + ROW * len(schedules)
    figure = Figure(figsize=(10, 4.2 + rows), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 2, height_ratios=(4.2, rows))
    sigma, snr = (figure.add_subplot(grid[0, k]) for k in (0, 1))
    where = figure.add_subplot(grid[1, :])

    finite = [
        level.half_log_snr
        for levels in schedules.values()
        for level in levels
        if math.isfinite(level.half_log_snr)
    ] or [0.0]
    gap = 0.06 * (max(finite) - min(finite)) + 0.2
    noisiest, cleanest = min(finite) - gap, max(finite) + gap
    least = min(level.sigma for levels in schedules.values() for level in levels if level.sigma > 0)

    for k, levels in enumerate(schedules.values()):
        colour = _colour(k, len(schedules))
        heights = [max(least * math.exp(-gap), level.sigma) for level in levels]
        snrs = [min(max(level.half_log_snr, noisiest), cleanest) for level in levels]
        ends = [math.isfinite(level.half_log_snr) for level in levels]
        _curve(sigma, heights, [level.sigma > 0 for level in levels], colour)
        _curve(snr, snrs, ends, colour)
        for x, inside in zip(snrs, ends, strict=True):
            style = {"color": colour, "lw": 1.3, "ls": "-" if inside else ":"}
            where.plot([x, x], [-k - 0.36, -k + 0.36], **style)

    sigma.set(yscale="log", title="noise standard deviation sigma", xlabel="step")
    snr.set(title="half log-SNR, log(alpha / sigma)", xlabel="step")
    for axes in (sigma, snr):
        axes.grid(True, color="0.9", lw=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    where.set(
        xlabel="half log-SNR of the levels, noisy to clean (dotted or hollow: at infinity)",
        yticks=[-k for k in range(len(schedules))],
        yticklabels=[f"{name} ({levels.path})" for name, levels in schedules.items()],
        ylim=(-len(schedules) + 0.4, 0.6),
    )
    for k, label in enumerate(where.get_yticklabels()):
        label.set_color(_colour(k, len(schedules)))
    where.spines[["left", "top", "right"]].set_visible(False)
    where.tick_params(axis="y", length=0)
    save_figure(figure, path)


def save_figure(figure: Any, path: Path) -> None:
    """Write a picture whole or not at all, as its ending says: one that was there is replaced in
    one go, and stays where the new one cannot be drawn or written."""
    from k_diffusion.utils.files import write_whole

    ending = path.suffix[1:].lower()
    write_whole(path, lambda file: figure.savefig(file, format=ending))


def _curve(axes: Any, values: list[float], inside: list[bool], colour: Any) -> None:
    """One point a step; those at infinity hollow, and what leads to them dotted."""
    for i in range(len(values) - 1):
        style = "-" if inside[i] and inside[i + 1] else ":"
        axes.plot([i, i + 1], values[i : i + 2], color=colour, lw=1.2, ls=style)
    for i, value in enumerate(values):
        face = colour if inside[i] else "white"
        axes.plot(
            i, value, color=colour, marker="o", markersize=3.8, markerfacecolor=face, clip_on=False
        )


def _colour(k: int, count: int) -> Any:
    """The k-th of so many: ten that are told apart well, or as many as needed along a range."""
    from matplotlib import colormaps

    return colormaps["tab10"](k) if count <= 10 else colormaps["turbo"](0.05 + 0.9 * k / count)
