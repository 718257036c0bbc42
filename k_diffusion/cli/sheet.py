"""A comparison of samplers as one PNG and as one HTML page that needs no other file."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from k_diffusion.utils.images import image_grid, to_uint8

if TYPE_CHECKING:
    import torch

    from k_diffusion.evaluation.sheet import Cell, Sheet

COLOURS = (
    "#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2",
    "#7f7f7f", "#bcbd22",
)  # fmt: skip
DASHES = (None, (7, 4), (2, 3), (12, 4), (1, 5), (4, 8))
WIDTH, HEIGHT, LEFT, BOTTOM, LEGEND = 640, 320, 60, 36, 200
WIDEST = 960


def picture(sheet: Sheet) -> torch.Tensor:
    """All samples, uint8 (C, H, W): a block for each method and schedule, in it a row a seed, and a
    column a number of steps, the reference last."""
    import torch

    budgets = list(dict.fromkeys(cell.steps for cell in sheet.cells))
    over = [f"{count} steps" for count in (*budgets, sheet.reference_steps)]
    blocks = []
    for (sampler, scheduler), cells in grouped(sheet).items():
        # Of each seed its samples, from few steps to many.
        columns = [*(cell.samples for cell in cells), sheet.references[sampler]]
        rows = torch.stack(columns, 1).flatten(0, 1)
        block = image_grid(
            rows,
            rows_named=[f"seed {seed}" for seed in sheet.seeds],
            columns_named=over,
            title=f"{sampler}, {scheduler}",
            scale=max(1, 64 // rows.shape[-1]),
        )
        blocks.append(block)
    return _tiled(blocks, WIDEST)


def _tiled(blocks: Sequence[torch.Tensor], width: int, gap: int = 16) -> torch.Tensor:
    """Images side by side, in as many lines as it takes to stay within a width where that can be.

    Columns of blocks are as wide as the widest, and a line as high as the highest."""
    import torch
    import torch.nn.functional as F

    height, wide = (max(block.shape[axis] for block in blocks) for axis in (1, 2))
    across = max(1, (width + gap) // (wide + gap))
    padded = [
        F.pad(b, (0, wide + gap - b.shape[2], height - b.shape[1], gap), value=255) for b in blocks
    ]
    across = min(across, len(padded))
    padded += [torch.full_like(padded[0], 255)] * (-len(padded) % across)
    lines = [torch.cat(padded[i : i + across], 2) for i in range(0, len(padded), across)]
    return torch.cat(lines, 1)[:, :-gap, :-gap]


def whole_picture(sheet: Sheet) -> torch.Tensor:
    """The curve and the figures above all samples, uint8 (3, H, W)."""
    import torch
    import torch.nn.functional as F

    above, below = curve_picture(sheet), F.pad(picture(sheet)[:3], (8, 0, 8, 0), value=255)
    below = below[:1].expand(3, -1, -1) if below.shape[0] < 3 else below
    width = max(above.shape[2], below.shape[2])
    return torch.cat([F.pad(p, (0, width - p.shape[2]), value=255) for p in (above, below)], 1)


def grouped(sheet: Sheet) -> Mapping[tuple[str, str], list[Cell]]:
    """The cells of each method and schedule, by steps."""
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in sheet.cells:
        groups.setdefault((cell.sampler, cell.scheduler), []).append(cell)
    return groups


def page(sheet: Sheet, image: torch.Tensor, said: Mapping[str, str]) -> str:
    """The page: what was compared, distances as a curve and as figures, and the samples.

    Args:
        sheet: the comparison.
        image: from `picture`.
        said: what to say of it, name -> text.
    """
    facts = "".join(
        f"<tr><th>{html.escape(k)}</th><td>{_words(v)}</td></tr>" for k, v in said.items()
    )
    alone = ", ".join(sheet.off_path)
    except_for = (
        f"""
That of {html.escape(alone)} lies on no path, and need not be the same at other numbers of steps:
the distance holds that, too."""
        if alone
        else ""
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Samplers compared</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; margin: 2rem auto;
  max-width: 62rem; padding: 0 1rem; }}
table {{ border-collapse: collapse; margin: 1rem 0; }}
th, td {{ border: 1px solid #ccc; padding: .25rem .6rem; text-align: left; }}
th {{ white-space: nowrap; }}
td.number {{ text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }}
.wide {{ overflow-x: auto; }}
.word {{ display: inline-block; max-width: 100%; overflow-wrap: anywhere; }}
img {{ image-rendering: pixelated; max-width: 100%; height: auto; }}
svg {{ display: block; }}
</style>
</head>
<body>
<h1>Samplers compared</h1>
<table>{facts}</table>
<h2>Distance to {sheet.reference_steps} steps</h2>
<p>Root mean square difference in data units, over {len(sheet.seeds)} samples, against calls of the
model. Deterministic methods are compared with heun, stochastic ones with themselves on the same
Brownian path.{except_for}</p>
<div class="wide">{curve(sheet)}</div>
<div class="wide">{_table(sheet)}</div>
<h2>Samples</h2>
<p>The same seeds down the rows; the last column is the reference.</p>
<img alt="Samples of every method, schedule and number of steps"
  src="data:image/png;base64,{_png(image)}">
</body>
</html>
"""


def _words(text: str) -> str:
    """A text whose words break nowhere but at their ends, unless one alone is too long."""
    return " ".join(f'<span class="word">{html.escape(word)}</span>' for word in text.split(" "))


def _table(sheet: Sheet) -> str:
    budgets = list(dict.fromkeys(cell.steps for cell in sheet.cells))
    head = "".join(f"<th>{count} steps</th>" for count in budgets)
    rows = []
    for (sampler, scheduler), cells in grouped(sheet).items():
        numbers = "".join(
            f'<td class="number">{cell.distance:.4f} ({cell.calls} calls)</td>' for cell in cells
        )
        rows.append(
            f"<tr><td>{html.escape(sampler)}</td><td>{html.escape(scheduler)}</td>{numbers}</tr>"
        )
    return f"<table><tr><th>sampler</th><th>schedule</th>{head}</tr>{''.join(rows)}</table>"


@dataclass(frozen=True)
class Line:
    """A line through points (x, y), in pixels from the upper left."""

    points: tuple[tuple[float, float], ...]
    colour: str
    width: int = 1
    dots: bool = False
    dash: tuple[int, int] | None = None


@dataclass(frozen=True)
class Word:
    """A text on the base line y that begins, has its middle or ends at x."""

    x: float
    y: float
    text: str
    anchor: str = "start"


def drawing(sheet: Sheet) -> list[Line | Word]:
    """The distances against calls of the model, both on logarithmic axes."""
    calls = [cell.calls for cell in sheet.cells]
    # A distance of 0 (the reference itself) has no logarithm: it lies on the lower edge.
    known = [cell.distance for cell in sheet.cells if cell.distance > 0] or [1.0]
    x0, x1 = math.log(min(calls)), math.log(max(calls))
    y0, y1 = math.floor(math.log10(min(known))), math.ceil(math.log10(max(known)))
    y1 = max(y1, y0 + 1)
    foot = HEIGHT - BOTTOM

    def across(count: int) -> float:
        share = (math.log(count) - x0) / (x1 - x0) if x1 > x0 else 0.5
        return LEFT + share * (WIDTH - LEFT - 12)

    def up(distance: float) -> float:
        share = (math.log10(distance) - y0) / (y1 - y0) if distance > 0 else 0.0
        return foot - share * (foot - 12)

    drawn: list[Line | Word] = []
    for decade in range(y0, y1 + 1):
        y = up(10.0**decade)
        drawn.append(Line(((LEFT, y), (WIDTH - 12, y)), "#dddddd"))
        drawn.append(Word(LEFT - 6, y + 4, f"{10.0**decade:g}", "end"))
    for count in _spread(sorted(set(calls)), across):
        drawn.append(Line(((across(count), 12), (across(count), foot)), "#eeeeee"))
        drawn.append(Word(across(count), foot + 16, str(count), "middle"))
    said = f"distance to {sheet.reference_steps} steps, against calls of the model"
    drawn.append(Word((LEFT + WIDTH) / 2, HEIGHT - 4, said, "middle"))
    looks = _looks(sheet)
    for k, ((sampler, scheduler), cells) in enumerate(grouped(sheet).items()):
        (colour, dash), y = looks[sampler, scheduler], 20 + 16 * k
        points = tuple((across(cell.calls), up(cell.distance)) for cell in cells)
        drawn.append(Line(points, colour, 2, True, dash))
        drawn.append(Line(((WIDTH, y - 4), (WIDTH + 26, y - 4)), colour, 2, False, dash))
        drawn.append(Word(WIDTH + 32, y, f"{sampler}, {scheduler}"))
    return drawn


def _looks(sheet: Sheet) -> Mapping[tuple[str, str], tuple[str, tuple[int, int] | None]]:
    """Colour and dashes of each line: as many colours as they are, or one for each sampler, whose
    schedules are told apart by dashes."""
    groups = list(grouped(sheet))
    if len(groups) <= len(COLOURS):
        return {group: (COLOURS[k], None) for k, group in enumerate(groups)}
    samplers, schedulers = (list(dict.fromkeys(names)) for names in zip(*groups, strict=True))
    looks = {}
    for sampler, scheduler in groups:
        turn, colour = divmod(samplers.index(sampler), len(COLOURS))
        dash = DASHES[(schedulers.index(scheduler) + turn * len(schedulers)) % len(DASHES)]
        looks[sampler, scheduler] = COLOURS[colour], dash
    return looks


def _size(sheet: Sheet) -> tuple[int, int]:
    groups = grouped(sheet)
    names = max(len(f"{sampler}, {scheduler}") for sampler, scheduler in groups)
    return WIDTH + max(LEGEND, 40 + 7 * names), max(HEIGHT, 28 + 16 * len(groups))


def curve(sheet: Sheet) -> str:
    """The drawing as SVG."""
    width, height = _size(sheet)
    parts = [
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        'aria-label="Distance against calls of the model" font-family="system-ui, sans-serif" '
        'font-size="12">'
    ]
    for item in drawing(sheet):
        if isinstance(item, Word):
            parts.append(
                f'<text x="{item.x:.1f}" y="{item.y:.1f}" text-anchor="{item.anchor}">'
                f"{html.escape(item.text)}</text>"
            )
            continue
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in item.points)
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{item.colour}" '
            f'stroke-width="{item.width}"{_dashed(item)}/>'
        )
        if item.dots:
            parts += [
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{item.colour}"/>'
                for x, y in item.points
            ]
    return "".join([*parts, "</svg>"])


def curve_picture(sheet: Sheet) -> torch.Tensor:
    """The drawing and the figures as an image, uint8 (3, H, W)."""
    import torch
    from PIL import Image, ImageDraw, ImageFont

    groups = grouped(sheet)
    width, height = _size(sheet)
    name = max(len(f"{sampler}, {scheduler}") for sampler, scheduler in groups) * 7 + 16
    columns = max(map(len, groups.values()))
    size = (max(width, name + 150 * columns), height + 16 * len(groups) + 24)
    paper = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(paper), ImageFont.load_default()
    for item in drawing(sheet):
        if isinstance(item, Word):
            long = draw.textlength(item.text, font=font)
            x = item.x - {"start": 0.0, "middle": long / 2, "end": long}[item.anchor]
            draw.text((x, item.y), item.text, fill="#222222", font=font, anchor="ls")
            continue
        for part in _strokes(item):
            draw.line(part, fill=item.colour, width=item.width)
        for x, y in item.points if item.dots else ():
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=item.colour)
    for row, ((sampler, scheduler), cells) in enumerate(groups.items()):
        y = height + 16 * row + 16
        draw.text((8, y), f"{sampler}, {scheduler}", fill="#222222", font=font, anchor="ls")
        for k, cell in enumerate(cells):
            text = f"{cell.steps} steps: {cell.distance:.4f}"
            draw.text((name + 150 * k, y), text, fill="#222222", font=font, anchor="ls")
    raw = torch.frombuffer(bytearray(paper.tobytes()), dtype=torch.uint8)
    return raw.view(paper.height, paper.width, 3).permute(2, 0, 1).clone()


def _dashed(line: Line) -> str:
    return "" if line.dash is None else f' stroke-dasharray="{line.dash[0]} {line.dash[1]}"'


def _strokes(line: Line) -> list[list[tuple[float, float]]]:
    """What is to be drawn of a line: all of it at one go, or its dashes."""
    if line.dash is None:
        return [list(line.points)]
    strokes, (on, off), done = [], line.dash, 0.0
    for (x0, y0), (x1, y1) in zip(line.points, line.points[1:], strict=False):
        long = math.hypot(x1 - x0, y1 - y0)
        at = -(done % (on + off))  # where the dash that is under way began
        done += long
        while at < long:
            ends = [min(max(end / long, 0.0), 1.0) for end in (at, at + on)]
            if ends[1] > ends[0]:
                strokes.append([(x0 + t * (x1 - x0), y0 + t * (y1 - y0)) for t in ends])
            at += on + off
    return strokes


def _spread(counts: Sequence[int], across: Callable[[int], float]) -> list[int]:
    """Of the numbers those whose names do not overlap on the axis."""
    kept: list[int] = []
    for count in counts:
        if not kept or across(count) - across(kept[-1]) > 28:
            kept.append(count)
    return kept


def _png(image: torch.Tensor) -> str:
    from PIL import Image

    array = to_uint8(image).permute(1, 2, 0).contiguous().numpy()
    buffer = io.BytesIO()
    Image.fromarray(array[..., 0] if array.shape[2] == 1 else array).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
