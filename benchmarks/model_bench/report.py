"""What the measures say, and docs/benchmarks-models.md made from it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sampler_bench.report import table

from model_bench.library import FLOPS, PARAMETERS

OURS = "ours"
SHARE, LESS_MEMORY, MORE_TIME = 0.90, 0.40, 1.35  # what is asked of us

Row = dict[str, Any]


def row(
    head: Mapping[str, Any],
    counted: Mapping[str, Any],
    seconds: Mapping[str, Sequence[float]],
    batch: int,
    limit: float,
) -> Row:
    """A setting's figures.

    Args:
        head: library, network, options, layout.
        counted: "parameters", "saved bytes" of a batch, and "flops" of an image, forward and both.
        seconds: "forward" and "both": of each round, for a batch.
        batch: images of a call.
        limit: FLOP a second of the best plain operation.
    """
    flops = counted["flops"]
    found: Row = {
        **head,
        "parameters": counted["parameters"],
        "GFLOP an image": round(flops["forward"] / 1e9, 4),
        "GFLOP an image, both": round(flops["both"] / 1e9, 4),
        "saved MB": round(counted["saved bytes"] / 1e6, 3),
        "saved MB per GFLOP": round(
            counted["saved bytes"] / 1e6 / (batch * flops["forward"] / 1e9), 4
        ),
    }
    for kind, times in seconds.items():
        found[f"{kind}, median s"] = round(statistics.median(times), 5)
        found[f"{kind}, GFLOP/s"] = round(batch * flops[kind] / min(times) / 1e9, 2)
        found[f"{kind}, share"] = round(batch * flops[kind] / min(times) / limit, 4)
    return found


def best(rows: Sequence[Row]) -> list[Row]:
    """Of each network the setting that is fastest forward and backward; the fastest first.

    Compiled networks are listed by themselves.
    """
    groups: dict[tuple[str, str, bool], Row] = {}
    for one in rows:
        key = one["library"], one["network"], one["compiled"]
        if key not in groups or one["both, share"] > groups[key]["both, share"]:
            groups[key] = one
    return sorted(groups.values(), key=lambda r: -r["both, share"])


def comparable(one: Row) -> bool:
    """Whether a network is of the size that is asked for."""
    low, high = PARAMETERS
    less, more = FLOPS
    return low <= one["parameters"] <= high and less <= 1e9 * one["GFLOP an image"] <= more


def goals(results: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """What is asked, the bound, the figure, and whether it is met."""
    rows = best(results["networks"])
    plain = [r for r in rows if not r["compiled"]]
    ours = [r for r in plain if r["key"] == OURS and r["network"] == "unet"]
    peers = [r for r in plain if r["key"] != OURS]
    found = []

    def add(what: str, value: float, bound: float, at_least: bool, where: str = "") -> None:
        met = value >= bound if at_least else value <= bound
        off = f"missed by {abs(value / bound - 1):.1%}"
        text = f"{value:.3g}" + (f" ({where})" if where else "")
        sign = "at least" if at_least else "at most"
        found.append((what, f"{sign} {bound:.3g}", text, "met" if met else off))

    for mine in ours:
        share = mine["both, share"]
        add("unet, forward and backward: share of the limit", share, SHARE, True)
        if peers:
            rival = max(peers, key=lambda r: r["both, share"])
            add("the same, beside the best peer", share, rival["both, share"], True,
                f"{rival['library']}'s is the bound")  # fmt: skip
            lean = min(peers, key=lambda r: r["saved MB per GFLOP"])
            add("unet, saved MB per GFLOP", mine["saved MB per GFLOP"],
                lean["saved MB per GFLOP"], False, f"{lean['library']}'s is the bound")  # fmt: skip
    for one in results["checkpointing"]:
        name = f"{one['network']}, all blocks checkpointed"
        add(f"{name}: saved bytes, of the plain ones", one["bytes"], LESS_MEMORY, False)
        add(f"{name}: time, of the plain one", one["time"], MORE_TIME, False)
    return found


ABOUT = """\
# Benchmarks of the networks

Made by `make bench` (`python benchmarks/models.py`): do not edit.

All libraries were measured in one run of {seconds} seconds on {processor}, one thread, Python
{python}, PyTorch {torch}: {libraries}. Images are 3×32×32 in batches of {batch}, in float32. Each
library runs in a process of its own; timed calls take turns with each other and with the plain
operations that set the limit. Every network ran in both memory formats, and with each of its
settings: the fastest is listed.

*GFLOP* are those of matrix products, convolutions and attention, forward, a multiplication and an
addition being two; torch's counter counts them for all alike, the backward pass of fused attention
as its four products. *Share* is the GFLOP/s of the fastest of {rounds} rounds over those of the
best plain 3×3 convolution or matrix product of the run ({limit:.1f} GFLOP/s: {by}). *Saved* is what
the forward pass keeps for the backward pass, every storage once, parameters left out.
"""


def page(results: Mapping[str, Any]) -> str:
    """The text of docs/benchmarks-models.md."""
    about, limit = results["about"], results["limit"]
    text = ABOUT.format(
        **{k: about[k] for k in ("seconds", "processor", "python", "torch", "batch", "rounds")},
        libraries=", ".join(f"{k} {v}" for k, v in about["libraries"].items()),
        limit=limit["GFLOP/s"],
        by=limit["by"],
    )
    rows = [
        (
            f"**{r['network']}**" if r["key"] == OURS else f"{r['library']}: {r['network']}",
            f"{r['parameters'] / 1e6:.1f}",
            f"{r['GFLOP an image']:.2f}",
            f"{r['forward, median s']:.3f}",
            f"{r['both, median s']:.3f}",
            f"{r['forward, share']:.2f}",
            f"{r['both, share']:.2f}",
            f"{r['saved MB']:.0f}",
            f"{r['saved MB per GFLOP']:.2f}",
            r["layout"]
            + (", compiled" if r["compiled"] else "")
            + ("" if comparable(r) else "; not of the size asked for"),
        )
        for r in best(results["networks"])
    ]
    head = (
        "network",
        "million parameters",
        "GFLOP an image",
        "forward, s",
        "and backward, s",
        "share, forward",
        "share, both",
        "saved, MB",
        "MB per GFLOP",
        "memory format",
    )
    parts = [text, table(head, rows)]
    parts.append("## Goals and what was measured\n")
    parts.append(table(("goal", "bound", "measured", ""), goals(results)))
    parts.append("## All blocks checkpointed\n")
    parts.append(
        table(
            ("network", "saved, MB", "of the plain", "forward and backward, s", "of the plain"),
            [
                (c["network"], f"{c['saved MB']:.1f}", f"{c['bytes']:.3f}",
                 f"{c['both, median s']:.3f}", f"{c['time']:.3f}")
                for c in results["checkpointing"]
            ],
        )
    )  # fmt: skip
    parts.append("## What was built\n")
    parts.append(
        table(
            ("network", "options"),
            [(f"{r['library']}: {r['network']}", r["options"]) for r in best(results["networks"])],
        )
    )
    parts += [f"- {line}\n" for line in results["missing"]]
    return "\n".join(parts).rstrip() + "\n"


def write(results: Mapping[str, Any], docs: Path) -> None:
    """Writes benchmarks-models.md into a folder."""
    docs.mkdir(exist_ok=True)
    (docs / "benchmarks-models.md").write_text(page(results), encoding="utf-8")
