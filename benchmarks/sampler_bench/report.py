"""docs/benchmarks.md and its pictures, made from the results."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sampler_bench.summary import OURS, as_called

COLOURS = {
    OURS: "#d1342f",
    "k-diffusion": "#4063d8",
    "diffusers": "#389826",
    "azula": "#9558b2",
    "smalldiffusion": "#8a8a8a",
}
MARKS = {OURS: "o", "k-diffusion": "s", "diffusers": "^", "azula": "D", "smalldiffusion": "v"}
PROBLEMS = {
    "spectrum": "Gaussian with a decaying spectrum",
    "digits": "mixture fitted to images of digits",
}
ENDINGS = {"clean": "to clean data", "open": "to sigma 0.002"}
SHOWN = ("euler", "dpmpp_2m", "unipc order=3")
"""Methods of ours drawn beside the best: what most people use."""

ABOUT = """\
# Benchmarks

Made by `make bench` (`python benchmarks/samplers.py`): do not edit.

Each part (errors; times and memory) was measured in one run of all libraries, {minutes} together,
on {processor}, one thread, Python {python}, PyTorch {torch}:
{libraries}.

Each library runs in a process of its own; timed runs take turns. Figures of time move by some
tenths from run to run on a machine that does other work beside; all others are exact and come out
the same everywhere.
"""
ERRORS = """\
## Error against exact solutions

Two problems have a probability-flow map that is known in float64: one Gaussian in 256 dimensions
whose standard deviations decay from 1 to 1/64 as a power law, and ten Gaussians with the full
covariances of scikit-learn's 8×8 images of digits, one a class. The denoiser is exact, so all error
is the sampler's. It is the root mean square distance of the end state to where the exact flow
carries the same noise (the digits' standard deviations go from 0.04 to 2.4). Samplers that draw
noise take part with eta = 0, where they have it: at other eta there is no end state to compare.

Every method ran on every schedule: ours, and each library's own. A schedule counts where it begins
at sigma / alpha = 80 or above and, in the problems "to sigma 0.002", ends there; in those "to clean
data" the last step goes to sigma = 0. Each method has as many steps as its calls of the model
allow within the budget. Ours also ran on flow levels (alpha + sigma = 1), where that differs.

![Error of the best sampler of each library, by evaluations](benchmarks.png)
"""


def write(results: dict[str, Any], docs: Path) -> None:
    """Writes benchmarks.md, benchmarks.png and benchmarks_time.png into a folder."""
    about = results["about"]
    versions = ", ".join(f"{k} {v}" for k, v in about["libraries"].items())
    seconds = about["seconds"]
    parts = [
        ABOUT.format(
            minutes=f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{seconds} seconds",
            processor=about["processor"],
            python=about["python"],
            torch=about["torch"],
            libraries=versions,
        ),
        "## Goals and what was measured\n",
        goals(results),
        ERRORS,
        frontier(results["errors"]),
        "## The same method in two libraries\n\n"
        "Our error over theirs on the same levels, over all problems, schedules and budgets: the "
        "geometric mean and the largest.\n",
        same_method(results["errors"]),
        "## Time outside the model\n\n"
        f"Microseconds an evaluation, medians, {about['steps of a timed run']} steps, float32, a "
        "model that has its answer ready. `KSampler` with its plan cached, the others as their "
        "documentation calls them.\n\n"
        "![Microseconds an evaluation](benchmarks_time.png)\n",
        times(results["times"]),
        "## Memory and waits\n\n"
        "The most tensors of the state's size that are alive at once in a run of 20 steps at "
        "1×4×64×64, the caller's x and the model's answer included; and how often a step reads a "
        "value that lies on the device with a GPU (each makes the host wait), between the first "
        "call of the model and the last.\n",
        costs(results["costs"]),
        failures(results["errors"]),
    ]
    docs.mkdir(exist_ok=True)
    (docs / "benchmarks.md").write_text("\n".join(part for part in parts if part).rstrip() + "\n")
    draw_errors(results["errors"], docs / "benchmarks.png")
    draw_times(results["times"], docs / "benchmarks_time.png")


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def verdict(value: float, goal: float) -> str:
    if value <= goal * (1 + 1e-9):
        return "met"
    return f"missed by {value / goal - 1:.1%}" if goal else f"missed by {value:g}"


def goals(results: dict[str, Any]) -> str:
    rows: list[tuple[str, str, str, str]] = []

    def add(what: str, value: float, goal: float, where: str = "") -> None:
        at = f"{value:.3g}" + (f" ({where})" if where else "")
        rows.append((what, f"at most {goal:g}", at, verdict(value, goal)))

    cases = [c for c in results["errors"]["best"] if "ours / best of theirs" in c]
    worst = max(cases, key=lambda c: c["ours / best of theirs"])
    where = f"{worst['problem']}, {worst['ending']}, {worst['budget']} evaluations"
    add("best error, ours over the best of theirs", worst["ours / best of theirs"], 1.0, where)
    pairs = results["errors"]["same method"]
    if pairs:
        pair = max(pairs, key=lambda p: p["largest"])
        where = f"{pair['ours']} beside {pair['library']} {pair['method']}"
        add("error, same method and levels", pair["largest"], 1.01, where)
        bad = sum(p["largest"] > 1.01 for p in pairs)
        add("pairs of the same method above 1.01", bad, 0, f"of {len(pairs)}")
    for name, mean in results["times"]["means"].items():
        tree = name.startswith("with a Brownian tree")
        path = "refinable path" in name
        if name.startswith("established"):
            continue
        if path and not tree:
            continue
        goal = 0.35 if path else 0.05 if tree else 0.25
        add(f"time, {name}: geometric mean", mean["geometric mean"], goal)
        if not tree:
            add(f"time, {name}: largest", mean["largest"], 0.6, mean["largest of"])
    live = [r for r in results["costs"] if r["library"] == OURS and "least of theirs" in r]
    live = [r for r in live if not r["method"].startswith("sample_")]
    paths = [r for r in live if r["method"].endswith("refinable path")]
    usual = [r for r in live if r not in paths]
    if usual:
        most = max(usual, key=lambda r: r["live"] - r["least of theirs"]["live"])
        add("live tensors, ours less theirs", most["live"] - most["least of theirs"]["live"], 0,
            most["method"])  # fmt: skip
        for chosen, name, goal in ((usual, "stochastic", 8), (paths, "on a refinable path", 24)):
            noisy = [r for r in chosen if r["stochastic"]]
            if noisy:
                most = max(noisy, key=lambda r: r["live"])
                add(f"live tensors, {name}", most["live"], goal, most["method"])
        most = max(live, key=lambda r: r["waits a step"])
        add("waits for the device a step", most["waits a step"], 0)
    return table(
        ("goal", "bound", "measured (worst)", ""), [(r[0], r[1], r[2], r[3]) for r in rows]
    )


def frontier(errors: dict[str, Any]) -> str:
    text = []
    for problem, title in PROBLEMS.items():
        for ending, end in ENDINGS.items():
            cases = [c for c in errors["best"] if (c["problem"], c["ending"]) == (problem, ending)]
            rows = []
            for case in cases:
                libraries = case["libraries"]
                mine = libraries.get(OURS)
                theirs = {k: v for k, v in libraries.items() if k != OURS}
                if mine is None or not theirs:
                    continue
                rival = min(theirs, key=lambda k: theirs[k]["error"])
                other = theirs[rival]
                rows.append((
                    case["budget"],
                    f"{mine['error']:.3g}", f"{mine['method']}; {mine['schedule']}",
                    f"{other['error']:.3g}",
                    f"{rival}: {other['method']}; {other['schedule']}",
                    f"{case['ours / best of theirs']:.3f}",
                ))  # fmt: skip
            head = ("evaluations", "ours", "by", "best of theirs", "by", "ratio")
            text.append(f"### The {title}, {end}\n\n{table(head, rows)}")
    return "\n".join(text)


def same_method(errors: dict[str, Any]) -> str:
    rows = []
    for p in errors["same method"]:
        at = p["largest at"]
        rows.append((
            p["ours"], f"{p['library']}: {p['method']}", p["ending"], p["cases"],
            f"{p['geometric mean']:.4f}", f"{p['largest']:.4f}",
            f"{at['problem']}, {at['schedule']}, {at['budget']}" if p["largest"] > 1.01 else "",
        ))  # fmt: skip
    head = ("ours", "theirs", "ending", "cases", "mean", "largest", "where, if above 1.01")
    return table(head, rows)


def times(results: dict[str, Any]) -> str:
    rows = [
        (r["method"], "×".join(map(str, r["shape"])), f"{r['ours']:.0f}", f"{r['theirs']:.0f}",
         r["rival"], f"{r['ratio']:.3f}")
        for r in results["ratios"]
    ]  # fmt: skip
    return table(("ours", "shape", "µs", "theirs, µs", "the better of them", "ratio"), rows)


def costs(results: Sequence[dict[str, Any]]) -> str:
    rows = [
        (r["like"], r["library"], r["method"], r["live"], f"{r['waits a step']:.2g}")
        for r in results
    ]
    return table(("method", "library", "as", "live tensors", "waits a step"), rows)


def failures(errors: dict[str, Any]) -> str:
    if not errors["failed"]:
        return ""
    rows = errors["failed"].items()
    return "## What did not run\n\n" + table(("method", "why (the first reason)"), rows)


def draw_errors(errors: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(2, 2, figsize=(11, 8.5), sharex=True, layout="constrained")
    for axes, (problem, ending) in zip(
        grid.flat, [(p, e) for e in ENDINGS for p in PROBLEMS], strict=True
    ):
        cases = [c for c in errors["best"] if (c["problem"], c["ending"]) == (problem, ending)]
        mine = errors["methods"].get(problem, {}).get(ending, {}).get(OURS, {})
        for name, style in zip(SHOWN, (":", "-.", "--"), strict=True):
            points = sorted((int(b), e[0]) for b, e in mine.get(name, {}).items())
            axes.plot(*zip(*points, strict=True), style, color="black", lw=1, alpha=0.6,
                      label=f"{name}, ours")  # fmt: skip
        for library in [*list(COLOURS)[1:], OURS]:
            points = [
                (c["budget"], c["libraries"][library]["error"])
                for c in cases
                if library in c["libraries"]
            ]
            own = library == OURS
            axes.plot(*zip(*points, strict=True), MARKS[library] + "-", color=COLOURS[library],
                      lw=2.4 if own else 1.4, ms=7 if own else 5,
                      label=f"best of {library}")  # fmt: skip
        axes.set(xscale="log", yscale="log", title=f"{PROBLEMS[problem]}, {ENDINGS[ending]}")
        axes.set_xticks(errors["budgets"], [str(b) for b in errors["budgets"]])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    for axes in grid[-1]:
        axes.set_xlabel("evaluations of the model")
    for axes in grid[:, 0]:
        axes.set_ylabel("root mean square error")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def draw_times(results: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    first = min(tuple(r["shape"]) for r in results["rows"])
    rows = [r for r in results["rows"] if tuple(r["shape"]) == first]
    rows = [r for r in rows if not (r["library"] == OURS and r["method"].startswith("sample_"))]
    names = sorted({r["like"] for r in rows if r["library"] == OURS}, reverse=True)
    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.32 * len(names)), layout="constrained")
    for library in COLOURS:
        points = [(r["microseconds"], names.index(as_called(r["like"]))) for r in rows
                  if r["library"] == library and as_called(r["like"]) in names
                  and not r["method"].endswith("refinable path")]  # fmt: skip
        if points:
            axes.plot(*zip(*points, strict=True), MARKS[library], color=COLOURS[library], ms=7,
                      label=library)  # fmt: skip
    points = [(r["microseconds"], names.index(r["like"])) for r in rows
              if r["method"].endswith("refinable path")]  # fmt: skip
    if points:
        axes.plot(*zip(*points, strict=True), "o", mfc="none", color=COLOURS[OURS], ms=8,
                  label="ours, refinable path")  # fmt: skip
    axes.set(xscale="log", xlabel="microseconds an evaluation outside the model, "
             + "×".join(map(str, first)))  # fmt: skip
    axes.set_yticks(range(len(names)), names)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
