"""What the measured rows say about the goals."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

OURS = "k_diffusion (ours)"
Row = dict[str, Any]
ROUNDING = 1e-7
"""Errors of both sides below this are rounding of tables in single precision: not compared."""


def geometric_mean(values: Iterable[float]) -> float:
    return statistics.geometric_mean(list(values))


def of_errors(rows: Sequence[Row], budgets: Sequence[int]) -> dict[str, Any]:
    """The best of each library at each budget, each method's best, and pairs of the same method."""
    good = [row for row in rows if "error" in row]
    failed: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        if "failed" in row:
            failed[f"{row['library']}: {row['method']}, {row['ending']}"].add(row["failed"])
    return {
        "budgets": list(budgets),
        "best": best(good),
        "same method": pairs(good),
        "methods": by_method(good),
        "failed": {key: sorted(reasons)[0] for key, reasons in sorted(failed.items())},
    }


def best(rows: Sequence[Row]) -> list[Row]:
    """For each problem, ending and budget: the least error of each library and what made it."""
    found: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        key = row["problem"], row["ending"], row["budget"], row["library"]
        if key not in found or row["error"] < found[key]["error"]:
            found[key] = row
    cases: dict[tuple[Any, ...], Row] = {}
    for (problem, ending, budget, library), row in sorted(found.items()):
        case = cases.setdefault(
            (problem, ending, budget),
            {"problem": problem, "ending": ending, "budget": budget, "libraries": {}},
        )
        case["libraries"][library] = {k: row[k] for k in ("error", "method", "schedule")}
    for case in cases.values():
        errors = {name: made["error"] for name, made in case["libraries"].items()}
        theirs = [error for name, error in errors.items() if name != OURS]
        if OURS in errors and theirs:
            case["ours / best of theirs"] = errors[OURS] / min(theirs)
    return list(cases.values())


def counterpart(row: Row) -> str:
    """The method of ours that a row has the formula of; of "a | b" b from 15 evaluations on."""
    under, _, later = row["like"].partition(" | ")
    return later if later and row["budget"] >= 15 else under


def as_called(like: str) -> str:
    """The same without an order that falls at the end, which costs nothing."""
    return like.partition(" | ")[0].removesuffix(" end_order=1")


def pairs(rows: Sequence[Row]) -> list[Row]:
    """Ours against each peer's method of the same formula, on the same levels."""

    def key_of(row: Row) -> tuple[Any, ...]:
        return counterpart(row), *(row[k] for k in ("problem", "ending", "schedule", "budget"))

    ours: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        if row["library"] == OURS and row["like"]:
            ours[key_of(row)].append(row)
    ratios: dict[tuple[str, str, str, str], list[tuple[float, Row]]] = defaultdict(list)
    for row in rows:
        if row["library"] == OURS or not row["like"]:
            continue
        for mine in ours.get(key_of(row), []):
            if max(mine["error"], row["error"]) >= ROUNDING:
                pair = mine["method"], row["library"], row["method"], row["ending"]
                ratios[pair].append((mine["error"] / row["error"], row))
    found = []
    for (mine_name, library, method, ending), values in sorted(ratios.items()):
        worst, where = max(values, key=lambda pair: pair[0])
        found.append({
            "ours": mine_name, "library": library, "method": method, "ending": ending,
            "cases": len(values),
            "geometric mean": geometric_mean(ratio for ratio, _ in values),
            "largest": worst,
            "largest at": {k: where[k] for k in ("problem", "schedule", "budget")},
        })  # fmt: skip
    return found


def by_method(rows: Sequence[Row]) -> dict[str, Any]:
    """problem -> ending -> library -> method -> budget -> [least error, its schedule]."""
    tree: dict[str, Any] = {}
    for row in rows:
        place = tree
        for key in ("problem", "ending", "library", "method"):
            place = place.setdefault(row[key], {})
        budget = str(row["budget"])
        if budget not in place or row["error"] < place[budget][0]:
            place[budget] = [float(f"{row['error']:.4g}"), row["schedule"]]
    return tree


def of_costs(rows: Sequence[Row]) -> list[Row]:
    """As measured; ours beside the least of the peers."""
    for row in rows:
        if row["library"] == OURS:
            theirs = [
                r for r in rows if as_called(r["like"]) == row["like"] and r["library"] != OURS
            ]
            row["least of theirs"] = {
                key: min(r[key] for r in theirs) for key in ("live", "waits a step")
            }
    return list(rows)


TREE = ("dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde")
"""The samplers for which k-diffusion walks a Brownian tree."""


def of_times(rows: Sequence[Row]) -> dict[str, Any]:
    """Ratios to the better of k-diffusion and diffusers (for the samplers of a Brownian tree: to
    k-diffusion's), and their geometric means."""
    ratios = []
    for row in rows:
        tree = row["like"] in TREE
        rivals = ("k-diffusion",) if tree else ("k-diffusion", "diffusers")
        theirs = [
            r
            for r in rows
            if r["library"] in rivals
            and (as_called(r["like"]), r["shape"]) == (row["like"], row["shape"])
        ]
        if row["library"] != OURS or not theirs:
            continue
        rival = min(theirs, key=lambda r: r["microseconds"])
        kind = "with a Brownian tree there" if tree else "all others"
        established = row["method"].startswith("sample_")
        if row["method"].endswith(", refinable path"):
            kind += ", ours on a refinable path"
        ratios.append({
            "method": row["method"], "shape": list(row["shape"]),
            "kind": f"established functions, {kind}" if established else kind,
            "ours": row["microseconds"], "theirs": rival["microseconds"],
            "rival": f"{rival['library']}: {rival['method']}",
            "ratio": row["microseconds"] / rival["microseconds"],
        })  # fmt: skip
    means: dict[str, Any] = {}
    for kind in sorted({r["kind"] for r in ratios}):
        for shape in sorted({tuple(r["shape"]) for r in ratios}):
            chosen = [r for r in ratios if r["kind"] == kind and tuple(r["shape"]) == shape]
            worst = max(chosen, key=lambda r: r["ratio"])
            means[f"{kind}, {'×'.join(map(str, shape))}"] = {
                "geometric mean": geometric_mean(r["ratio"] for r in chosen),
                "largest": worst["ratio"],
                "largest of": worst["method"],
                "methods": len(chosen),
            }
    return {"rows": [*rows], "ratios": ratios, "means": means}
