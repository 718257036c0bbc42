"""Our samplers beside k-diffusion, diffusers, azula and smalldiffusion: error, time, memory, waits.

    make bench                              # installs the peers into benchmarks/.peers first
    python benchmarks/samplers.py --quick   # under a minute: fewer budgets, rounds and schedules

Each library runs in a process of its own and is given the same problems on the same levels; timed
runs take turns. Writes benchmarks/results/samplers.json, docs/benchmarks.md and its pictures.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from processes import Worker, machine, pretty
from sampler_bench import report, summary
from sampler_bench.problems import PROBLEMS

HERE = Path(__file__).resolve().parent
WORKER = "sampler_bench.worker"
PEERS = ("k_diffusion", "diffusers", "azula", "smalldiffusion")
BUDGETS = (5, 6, 8, 10, 15, 20, 30, 50)
QUICK_SCHEDULES = ("karras from 0.002", "exponential from 0.002", "kl_optimal from 0.002")
SHAPES = ((1, 4, 64, 64), (16, 3, 64, 64))
STEPS = 30  # of a timed run
WIDEST, FINEST = 80.0, 0.002  # the way that a schedule must cover, in sigma / alpha (EDM's)


def settle(ratio: float) -> float:
    """A ratio without the rounding of single precision at the ends that most schedules share."""
    for end, near in ((WIDEST, 1e-5), (FINEST, 1e-4)):
        if abs(ratio / end - 1) < near:
            return end
    return ratio


Levels = dict[str, dict[str, dict[int, list[float]]]]


def lay(workers: Sequence[Worker], steps: int) -> Levels:
    """All schedules of all libraries, each once: name -> ending -> number of steps -> ratios.

    A schedule counts at the numbers of steps at which it begins no lower than WIDEST (else it would
    be given a part of the way for nothing) and, for the open ending, comes down to FINEST.
    """
    levels: Levels = {}
    known: list[dict[int, list[float]]] = []
    for worker in workers:
        for name, laid in worker.ask(do="schedules", steps=steps + 1).items():
            noisy = {int(n): [settle(r) for r in ratios] for n, ratios in laid.items()}
            if any(_equal(noisy, other) for other in known):
                continue
            known.append(noisy)
            by_ending: dict[str, dict[int, list[float]]] = {"clean": {}, "open": {}}
            for n, ratios in noisy.items():
                falls = all(a > b > 0 for a, b in itertools.pairwise(ratios))
                if len(ratios) != n or not falls or ratios[0] < WIDEST:
                    continue
                if n <= steps:
                    by_ending["clean"][n] = [*ratios, 0.0]
                if n > 1 and ratios[-1] <= FINEST:
                    by_ending["open"][n - 1] = ratios
            kept = {ending: found for ending, found in by_ending.items() if found}
            if kept:
                own = "" if worker.name == "ours" else f" ({worker.about['name']})"
                levels[name + own] = kept
    return levels


def _equal(a: dict[int, list[float]], b: dict[int, list[float]]) -> bool:
    return a.keys() == b.keys() and all(
        len(a[n]) == len(b[n])
        and all(math.isclose(x, y, rel_tol=2e-5) for x, y in zip(a[n], b[n], strict=True))
        for n in a
    )


def measure_errors(
    workers: Sequence[Worker], levels: Levels, budgets: Sequence[int], folder: Path
) -> list[dict[str, Any]]:
    """Every method on every schedule; two libraries at a time."""
    ratios = {r for ends in levels.values() for laid in ends.values() for v in laid.values()
              for r in (v[0], v[-1])}  # fmt: skip
    paths = {}
    for name, make in PROBLEMS.items():
        problem = make()
        paths[name] = folder / f"{name}.npz"
        problem.save(paths[name], problem.curve(ratios))
    path = folder / "levels.json"
    path.write_text(json.dumps(levels))

    def of_one(worker: Worker, part: slice) -> list[dict[str, Any]]:
        worker.ask(do="levels", path=str(path))
        rows = []
        exact = [method for method in worker.about["methods"] if method["exact"]]
        for method, problem in itertools.product(exact[part], paths):
            found = worker.ask(
                do="errors", method=method["key"], problem=str(paths[problem]), budgets=budgets
            )
            head = {"library": worker.about["name"], "method": method["name"],
                    "like": method["like"], "problem": problem}  # fmt: skip
            rows += [head | row for row in found]
        return rows

    # Ours has the most methods: two processes share them.
    twice = [w for w in workers if w.name == "ours"]
    twins = [Worker(WORKER, "ours", HERE) for _ in twice]
    jobs = [(w, slice(0, None, 2)) for w in twice] + [(w, slice(1, None, 2)) for w in twins]
    jobs += [(w, slice(None)) for w in workers if w.name != "ours"]
    with ThreadPoolExecutor(2) as pool:
        rows = [row for found in pool.map(lambda job: of_one(*job), jobs) for row in found]
    for worker in twins:
        worker.close()
    return rows


def shared(workers: Sequence[Worker]) -> list[tuple[str, list[tuple[Worker, dict[str, Any]]]]]:
    """Methods of ours whose cost can be measured, each with the peers' methods like it."""
    groups: dict[str, list[tuple[Worker, dict[str, Any]]]] = {}
    for worker in workers:
        for method in worker.about["methods"]:
            name = summary.as_called(method["like"])
            if method["quick"] and name:
                groups.setdefault(name, []).append((worker, method))
    return [
        (name, members)
        for name, members in sorted(groups.items())
        if {w.name for w, _ in members} > {"ours"}  # and a peer
    ]


def measure_costs(workers: Sequence[Worker], steps: int) -> list[dict[str, Any]]:
    """Live tensors and waits of each shared method."""
    rows = []
    for name, members in shared(workers):
        for worker, method in members:
            try:
                found = worker.ask(do="cost", method=method["key"], shape=SHAPES[0], steps=steps)
            except RuntimeError as failure:
                print(f"not measured: {failure}", file=sys.stderr)
                continue
            rows.append({"like": name, "library": worker.about["name"],
                         "method": method["name"], "stochastic": method["stochastic"],
                         **found})  # fmt: skip
    return rows


def measure_times(
    workers: Sequence[Worker], rounds: int, steps: int, shapes: Sequence[Sequence[int]]
) -> list[dict[str, Any]]:
    """Median microseconds an evaluation outside the model; one run of each method in turn."""
    rows = []
    for (name, members), shape in itertools.product(shared(workers), shapes):
        times: dict[tuple[str, str], list[float]] = {}
        for _ in range(rounds + 1):  # the first makes plans and warms up
            for worker, method in members:
                try:
                    seconds, calls = worker.ask(
                        do="time", method=method["key"], shape=shape, steps=steps
                    )
                except RuntimeError as failure:
                    print(f"not measured: {failure}", file=sys.stderr)
                    continue
                key = worker.about["name"], method["name"]
                times.setdefault(key, []).append(1e6 * seconds / calls)
        for (library, method), values in times.items():
            rows.append({"like": name, "library": library, "method": method, "shape": shape,
                         "microseconds": statistics.median(values[1:])})  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer budgets, rounds, schedules")
    parser.add_argument("--parts", default="errors,costs,times", help="what to measure")
    parser.add_argument("--schedules", help="only those whose names begin so: karras,kl_optimal")
    parser.add_argument("--peers", type=Path, default=HERE / ".peers", help="where they lie")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "samplers.json")
    parser.add_argument("--docs", type=Path, default=HERE.parent / "docs")
    parser.add_argument("--rows", type=Path, help="also write every single error to this file")
    parser.add_argument("--rounds", type=int, default=15, help="timed runs of each method")
    args = parser.parse_args()
    start = time.perf_counter()
    missing = [name for name in PEERS if not (args.peers / name).exists()]
    if missing:
        sys.exit(f"{', '.join(missing)} not installed in {args.peers}: run `make bench`")
    workers = [Worker(WORKER, "ours", HERE)] + [
        Worker(WORKER, name, args.peers / name) for name in PEERS
    ]
    budgets = (5, 10, 20) if args.quick else BUDGETS
    wanted = set(args.parts.split(","))
    results: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {}
    parts: dict[str, int] = results.get("about", {}).get("parts", {})
    results["about"] = machine() | {
        "libraries": {w.about["name"]: w.about["version"] for w in workers},
        "steps of a timed run": 8 if args.quick else STEPS,
        "quick": args.quick,
    }
    if "errors" in wanted:
        levels = lay(workers, max(budgets))
        few = QUICK_SCHEDULES if args.quick else ()
        few = tuple(args.schedules.split(",")) if args.schedules else few
        if few:
            levels = {name: found for name, found in levels.items() if name.startswith(few)}
        with tempfile.TemporaryDirectory() as folder:
            rows = measure_errors(workers, levels, budgets, Path(folder))
        print(f"{len(rows)} errors in {time.perf_counter() - start:.0f} s", file=sys.stderr)
        results["errors"] = summary.of_errors(rows, budgets)
        results["errors"]["schedules"] = sorted(levels)
        if args.rows:
            args.rows.write_text(json.dumps(rows))
    if "costs" in wanted:
        results["costs"] = summary.of_costs(measure_costs(workers, 8 if args.quick else 20))
    if "times" in wanted:
        rounds, shapes = (2, SHAPES[:1]) if args.quick else (args.rounds, SHAPES)
        steps = results["about"]["steps of a timed run"]
        results["times"] = summary.of_times(measure_times(workers, rounds, steps, shapes))
    for worker in workers:
        worker.close()
    # Parts that are measured one after the other add up to one report.
    parts = {p: before for p, before in parts.items() if not set(p.split(",")) <= wanted}
    parts[",".join(sorted(wanted))] = round(time.perf_counter() - start)
    results["about"]["parts"] = parts
    results["about"]["seconds"] = sum(parts.values())
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(pretty(results) + "\n")
    if {"errors", "costs", "times"} <= set(results):
        report.write(results, args.docs)
    print(f"{args.out} after {results['about']['seconds']} s")


if __name__ == "__main__":
    main()
