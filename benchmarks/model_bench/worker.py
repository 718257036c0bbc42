"""One library in a process of its own: reads orders as JSON lines, answers in JSON lines.

python -m model_bench.worker NAME FOLDER      (started by benchmarks/models.py)

The name "limit" is no library: its process measures what the core can do.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from processes import quiet_stdout, serve

from model_bench.library import Library
from model_bench.measure import Case, Limit, Setting


class Answers:
    """What a library's process answers."""

    def __init__(self, library: Library) -> None:
        self.library = library
        self._cases: dict[Any, Case] = {}

    def __call__(self, order: dict[str, Any]) -> Any:
        if order["do"] == "about":
            return {
                "name": self.library.name,
                "version": self.library.version,
                "missing": self.library.missing,
                "networks": [
                    {
                        "index": index,
                        "name": n.name,
                        "options": n.options,
                        "checkpoints": n.checkpointed is not None,
                        "large": n.large,
                    }
                    for index, n in enumerate(self.library.networks)
                ],
            }
        network = self.library.networks[order["index"]]
        setting = Setting(**order["setting"])
        case = self._case(order["index"], order["checkpointed"], setting)
        if order["do"] == "seconds":
            return case.seconds(order["kind"])
        if order["do"] == "free":
            self._cases.clear()
            return None
        if order["do"] == "count":
            for kind in ("forward", "both"):  # once, so that nothing is first done in a timed turn
                case.run(kind)
            found = {"parameters": case.parameters, "saved bytes": case.saved_bytes()}
            if setting.device.startswith("cuda"):
                found["peak bytes"] = case.peak_bytes()
            if not order["checkpointed"]:
                one = Case(network.make, network.call, Setting(1, setting.layout), network.size)
                found["flops"] = {kind: one.flops(kind) for kind in ("forward", "both")}
            return found
        raise ValueError(f"unknown order {order['do']!r}")

    def _case(self, index: int, checkpointed: bool, setting: Setting) -> Case:
        key = index, checkpointed, setting
        if key not in self._cases:
            network = self.library.networks[index]
            make = network.checkpointed if checkpointed else network.make
            assert make is not None
            self._cases[key] = Case(make, network.call, setting, network.size)
        return self._cases[key]


def main() -> None:
    name, folder = sys.argv[1], Path(sys.argv[2])
    answers = quiet_stdout()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if name != "limit":
        library = importlib.import_module(f"model_bench.peer_{name}").library(folder)
        serve(Answers(library), answers)
        return
    limits: dict[int, Limit] = {}

    def rates(order: dict[str, Any]) -> dict[str, float]:
        batch = order["batch"]
        if batch not in limits:
            limits[batch] = Limit(batch)
            limits[batch].rates()
        return limits[batch].rates()

    serve(rates, answers)


if __name__ == "__main__":
    main()
