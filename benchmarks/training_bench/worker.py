"""One library in a process of its own: reads orders as JSON lines, answers in JSON lines.

python -m training_bench.worker NAME FOLDER      (started by benchmarks/training.py)
"""

from __future__ import annotations

import importlib
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from processes import quiet_stdout, serve

from training_bench.library import Setting, Stopwatch, Training


class Answers:
    """What a library's process answers.

    Args:
        make: the training of a setting.
    """

    def __init__(self, make: Any) -> None:
        self._make = make
        self._watch = Stopwatch()
        self._training: Training | None = None

    def __call__(self, order: dict[str, Any]) -> Any:
        if order["do"] == "begin":
            torch.set_num_threads(order["threads"])
            self._training = self._make(Setting(**order["setting"]))
            return {
                "name": self._training.name,
                "version": self._training.version,
                "parameters": self._training.parameters,
            }
        assert self._training is not None
        if order["do"] == "steps":
            # First some that do not count: batches made ahead in a pause cost nothing in them.
            count = order["skipped"] + order["steps"]
            self._watch.steps.clear()
            self._training.run(count, order["ema_every"], self._watch)
            return self._watch.steps[order["skipped"] :]
        if order["do"] == "load":
            self._training.load(0)
            start = time.perf_counter()
            for number in range(order["batches"]):
                self._training.load(number)
            return (time.perf_counter() - start) / order["batches"]
        if order["do"] == "end":
            self._training.close()
            return None
        raise ValueError(f"unknown order {order['do']!r}")


def main() -> None:
    name, folder = sys.argv[1], Path(sys.argv[2])
    answers = quiet_stdout()
    warnings.simplefilter("ignore")
    library = importlib.import_module(f"training_bench.peer_{name}")
    serve(Answers(lambda setting: library.training(folder, setting)), answers)


if __name__ == "__main__":
    main()
