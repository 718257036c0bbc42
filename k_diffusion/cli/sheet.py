"""A comparison of samplers as one PNG and as one HTML page that needs no other file."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from k_diffusion.utils.images import image_grid, to_uint8

if TYPE_CHECKING:
    import torch

    from k_diffusion.evaluation.sheet import Cell, Sheet

COLOURS = (
    "#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2",
    "#7f7f7f", "#bcbd22",
)  # fmt: skip
WIDTH, HEIGHT, LEFT, BOTTOM = 640, 320, 60, 36


def picture(sheet: Sheet) -> torch.Tensor:
    """All samples, uint8 (C, H, W): a row a method and schedule and seed, a column a number of
    steps, the reference last."""
    import torch

    budgets = list(dict.fromkeys(cell.steps for cell in sheet.cells))
    rows, names = [], []
    for (sampler, scheduler), cells in grouped(sheet).items():
        for i, seed in enumerate(sheet.seeds):
            rows += [cell.samples[i] for cell in cells] + [sheet.references[sampler][i]]
            names.append(f"{sampler}, {scheduler}, seed {seed}")
    first = sheet.cells[0].samples
    scale = max(1, 64 // first.shape[-1])
    over = [f"{count} steps" for count in budgets] + [f"{sheet.reference_steps} steps"]
    return image_grid(torch.stack(rows), rows_named=names, columns_named=over, scale=scale)


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
        f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in said.items()
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Samplers compared</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; margin: 2rem auto;
  max-width: 60rem; padding: 0 1rem; }}
table {{ border-collapse: collapse; margin: 1rem 0; }}
th, td {{ border: 1px solid #ccc; padding: .25rem .6rem; text-align: left; }}
td.number {{ text-align: right; font-variant-numeric: tabular-nums; }}
img {{ image-rendering: pixelated; max-width: 100%; height: auto; }}
svg {{ max-width: 100%; height: auto; }}
</style>
</head>
<body>
<h1>Samplers compared</h1>
<table>{facts}</table>
<h2>Distance to {sheet.reference_steps} steps</h2>
<p>Root mean square difference in data units, over {len(sheet.seeds)} samples, against calls of the
model. Deterministic methods are compared with heun, stochastic ones with themselves on the same
Brownian path.</p>
{curve(sheet)}
{_table(sheet)}
<h2>Samples</h2>
<p>The same seeds down the rows; the last column is the reference.</p>
<img alt="Samples of every method, schedule and number of steps"
  src="data:image/png;base64,{_png(image)}">
</body>
</html>
"""


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


def curve(sheet: Sheet) -> str:
    """The distances against calls of the model, both on logarithmic axes, as SVG."""
    groups = grouped(sheet)
    calls = [cell.calls for cell in sheet.cells]
    # A distance of 0 (the reference itself) has no logarithm: it lies on the lower edge.
    known = [cell.distance for cell in sheet.cells if cell.distance > 0] or [1.0]
    x0, x1 = math.log(min(calls)), math.log(max(calls))
    y0, y1 = math.floor(math.log10(min(known))), math.ceil(math.log10(max(known)))
    y1 = max(y1, y0 + 1)
    right = 200

    def across(count: int) -> float:
        share = (math.log(count) - x0) / (x1 - x0) if x1 > x0 else 0.5
        return LEFT + share * (WIDTH - LEFT - 12)

    def up(distance: float) -> float:
        share = (math.log10(distance) - y0) / (y1 - y0) if distance > 0 else 0.0
        return HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - 12)

    parts = [
        f'<svg viewBox="0 0 {WIDTH + right} {HEIGHT}" width="{WIDTH + right}" height="{HEIGHT}" '
        'role="img" aria-label="Distance against calls of the model" '
        'font-family="system-ui, sans-serif" font-size="12">'
    ]
    for decade in range(y0, y1 + 1):
        y = up(10.0**decade)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - 12}" stroke="#ddd"/>')
        parts.append(
            f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{10.0**decade:g}</text>'
        )
    for count in _spread(sorted(set(calls)), across):
        x = across(count)
        parts.append(f'<path d="M{x:.1f} 12V{HEIGHT - BOTTOM}" stroke="#eee"/>')
        parts.append(
            f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{count}</text>'
        )
    parts.append(
        f'<text x="{(LEFT + WIDTH) / 2:.0f}" y="{HEIGHT - 4}" text-anchor="middle">calls of the '
        "model</text>"
    )
    for k, ((sampler, scheduler), cells) in enumerate(groups.items()):
        colour = COLOURS[k % len(COLOURS)]
        dash = ' stroke-dasharray="5 3"' * (k // len(COLOURS) % 2)
        points = [(across(cell.calls), up(cell.distance)) for cell in cells]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(
            f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>'
        )
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in points]
        y = 20 + 16 * k
        parts.append(
            f'<path d="M{WIDTH} {y - 4}h18" stroke="{colour}" stroke-width="2"{dash}/>'
            f'<text x="{WIDTH + 24}" y="{y}">{html.escape(f"{sampler}, {scheduler}")}</text>'
        )
    return "".join([*parts, "</svg>"])


def _spread(counts: Sequence[int], across: object) -> list[int]:
    """Of the numbers those whose names do not overlap on the axis."""
    assert callable(across)
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
