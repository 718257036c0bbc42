"""What the measures say, and docs/benchmarks-training.md made from it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sampler_bench.report import table

from training_bench.library import INSIDE, PARTS

OURS = "ours"
OUTSIDE = 0.5  # what is asked of us: of the peer's time outside forward and backward

Row = dict[str, Any]


def row(head: Mapping[str, Any], turns: Sequence[Sequence[Mapping[str, float]]], batch: int) -> Row:
    """A setting's figures: of each part the median over turns of the mean over a turn's steps.

    Not the median over steps: some of what a library does comes only every tenth step.

    Args:
        head: library, key, setting.
        turns: the stopwatch's steps, in seconds.
        batch: images of a step.
    """

    def milliseconds(seconds_of: Any) -> float:
        means = [statistics.fmean(seconds_of(step) for step in turn) for turn in turns]
        return round(1e3 * statistics.median(means), 4)

    def other(step: Mapping[str, float]) -> float:
        return step["total"] - sum(step.get(part, 0.0) for part in (*INSIDE, *PARTS))

    found: Row = {**head, "step, ms": milliseconds(lambda step: step["total"])}
    for part in (*INSIDE, *PARTS):
        found[f"{part}, ms"] = milliseconds(lambda step, part=part: step.get(part, 0.0))
    found["other, ms"] = milliseconds(other)
    found["outside, ms"] = milliseconds(
        lambda step: step["total"] - sum(step.get(part, 0.0) for part in INSIDE)
    )
    found["images/s"] = round(1e3 * batch / found["step, ms"], 3)
    return found


def goals(results: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """What is asked, the bound, the figure, and whether it is met: at equal settings."""
    ours_at = {r["setting"]: r for r in results["rows"] if r["key"] == OURS}
    found = []
    for theirs in (r for r in results["rows"] if r["key"] != OURS):
        ours = ours_at[theirs["setting"]]
        beside = f"beside {theirs['library']}, both averages {theirs['setting']}"
        share = ours["outside, ms"] / theirs["outside, ms"]
        faster = ours["images/s"] / theirs["images/s"]
        found += [
            (f"time outside forward and backward, {beside}", f"at most {OUTSIDE}", f"{share:.3f}",
             "met" if share <= OUTSIDE else f"missed by {share / OUTSIDE - 1:.1%}"),
            (f"images/s of the whole step, {beside}", "at least 1", f"{faster:.3f}",
             "met" if faster >= 1 else f"missed by {1 - faster:.1%}"),
        ]  # fmt: skip
    return found


ABOUT = """\
# Benchmark of training

Made by `make bench` (`python benchmarks/training.py`): do not edit.

Both libraries trained the same network, the peer's Unet of {parameters:.2f} million parameters
({network}), in one run of {seconds} seconds on {processor}, {threads} threads, {workers} processes
that load, Python {python}, PyTorch {torch}: {libraries}.
Images are 3×32×32, PNG files on disk, half of them mirrored, in batches of {batch}, float32. Each
library runs in a process of its own; turns of {steps} steps alternate, {rounds} of each, and the
first {skipped} steps of a turn do not count. Figures are medians over turns of means over a turn's
steps, by the wall clock.

*Outside* is all of a step that is neither the network's forward nor the backward pass: waiting for
*data*, drawing noise, the loss, the *clipping* of the gradient, the *optimiser* (ours AdamW, theirs
Adam, both with the same learning rate and betas), the averaged weights (*EMA*), and *other*, the
progress line among it. Like is compared with like: both averages updated in every step, which is
our default, and both every tenth step, which is the peer's (ours by `ema.update_every_steps = 10`).
In the second both leave out nine of ten updates; ours gives the tenth the weight of all ten, the
peer's that of one. *A batch* is what making one takes without processes that load.
torchvision, through which the peer's images go, has a stand-in that makes the same calls of Pillow.
"""


def page(results: Mapping[str, Any]) -> str:
    """The text of docs/benchmarks-training.md."""
    about = results["about"]
    keys = ("seconds", "processor", "python", "torch", "threads", "workers", "batch", "steps",
            "rounds", "skipped", "network")  # fmt: skip
    text = ABOUT.format(
        **{key: about[key] for key in keys},
        libraries=", ".join(f"{name} {version}" for name, version in about["libraries"].items()),
        parameters=about["parameters"] / 1e6,
    )
    columns = ("step, ms", *(f"{part}, ms" for part in INSIDE), "outside, ms",
               *(f"{part}, ms" for part in PARTS), "other, ms")  # fmt: skip
    rows = [
        (
            f"**{r['library']}**" if r["key"] == OURS else r["library"],
            r["setting"],
            f"{r['images/s']:.2f}",
            *(f"{r[column]:.1f}" for column in columns),
            f"{r['a batch, ms']:.1f}",
        )
        for r in results["rows"]
    ]
    names = [{"ema, ms": "EMA, ms", "optimizer, ms": "optimiser, ms"}.get(c, c) for c in columns]
    head = ("library", "average", "images/s", *names, "a batch, ms")
    parts = [text, table(head, rows), "## Goals and what was measured\n"]
    parts.append(table(("goal", "bound", "measured", ""), goals(results)))
    parts.append(_defaults(results["rows"]))
    return "\n".join(parts).rstrip() + "\n"


def _defaults(rows: Sequence[Row]) -> str:
    """What unequal defaults give: ours, in the first row, beside theirs, in the last."""
    ours, theirs = rows[0], rows[-1]
    share = ours["outside, ms"] / theirs["outside, ms"]
    return (
        f"Each with its own default, ours {ours['setting']} beside theirs {theirs['setting']}: "
        f"{share:.3f} of the time outside.\n"
    )


def write(results: Mapping[str, Any], docs: Path) -> None:
    """Writes benchmarks-training.md into a folder."""
    docs.mkdir(exist_ok=True)
    (docs / "benchmarks-training.md").write_text(page(results), encoding="utf-8")
