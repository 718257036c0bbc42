"""One library in a process of its own: reads orders as JSON lines, answers in JSON lines.

python worker.py NAME FOLDER      (started by benchmarks/samplers.py)
"""

from __future__ import annotations

import importlib
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from processes import quiet_stdout, serve

from sampler_bench import measure
from sampler_bench.problems import load_problem


def main() -> None:
    name, folder = sys.argv[1], Path(sys.argv[2])
    answers = quiet_stdout()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    library = importlib.import_module(f"sampler_bench.peer_{name}").library(folder)
    methods = {method.name + ("" if method.exact else " *"): method for method in library.methods}
    problems: dict[str, Any] = {}
    levels: dict[str, Any] = {}
    calls: dict[Any, int] = {}
    prepared: dict[Any, Any] = {}

    def answer(order: dict[str, Any]) -> Any:
        what = order["do"]
        if what == "about":
            return {
                "name": library.name,
                "version": library.version,
                "methods": [
                    {
                        "key": key,
                        "name": m.name,
                        "like": m.like,
                        "exact": m.exact is not None,
                        "quick": m.quick is not None,
                        "stochastic": m.stochastic,
                    }
                    for key, m in methods.items()
                ],
            }
        if what == "schedules":
            return {
                key: {n: list(map(float, lay(n))) for n in range(1, order["steps"] + 1)}
                for key, lay in library.schedules.items()
            }
        if what == "levels":
            with open(order["path"]) as file:
                laid = json.load(file)
            for schedule, endings in laid.items():
                levels[schedule] = {
                    ending: {int(n): ratios for n, ratios in by_steps.items()}
                    for ending, by_steps in endings.items()
                }
            return len(levels)
        method = methods[order["method"]]
        if what == "errors":
            path = order["problem"]
            if path not in problems:
                problems[path] = load_problem(Path(path))
            problem, curve = problems[path]
            return measure.errors(method, problem, curve, levels, order["budgets"], calls)
        if what == "cost":
            return measure.cost(method, order["shape"], order["steps"])
        if what == "time":
            return measure.seconds(method, order["shape"], order["steps"], prepared)
        raise ValueError(f"unknown order {what!r}")

    torch.set_grad_enabled(False)
    serve(answer, answers)


if __name__ == "__main__":
    main()
