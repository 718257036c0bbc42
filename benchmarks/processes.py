"""What the benchmarks share: a process for each library, the machine's name, JSON that reads well.

A library's process reads orders as JSON lines and answers in JSON lines (`serve`); the benchmark
holds its end (`Worker`).
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


class Worker:
    """A library's process, as the benchmark sees it.

    Args:
        module: what the process runs, such as "sampler_bench.worker".
        name: the library, of which that module has an adapter.
        folder: where the library lies.
    """

    def __init__(self, module: str, name: str, folder: Path) -> None:
        self.name = name
        command = [sys.executable, "-m", module, name, str(folder.resolve())]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=HERE
        )

    @cached_property
    def about(self) -> dict[str, Any]:
        """Name, version and what the library has to be measured."""
        found: dict[str, Any] = self.ask(do="about")
        return found

    def ask(self, **order: Any) -> Any:
        """The answer to an order.

        Raises:
            RuntimeError: the library failed, with its words.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of {self.name} ended: see its words above")
        reply = json.loads(line)
        if "failed" in reply:
            raise RuntimeError(f"{self.name}, {order}: {reply['failed']}")
        return reply["answer"]

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def quiet_stdout() -> Any:
    """The stream for answers; what a library prints goes to stderr from now on.

    Called before a library is imported, so that its words do not come between the answers.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def serve(answer: Callable[[dict[str, Any]], Any], answers: Any) -> None:
    """Answers the orders that come on stdin until there are no more."""
    for line in sys.stdin:
        try:
            reply = {"answer": answer(json.loads(line))}
        except Exception as failure:
            reply = {"failed": f"{type(failure).__name__}: {failure}"}
        answers.write(json.dumps(reply) + "\n")
        answers.flush()


def pretty(value: Any, depth: int = 0) -> str:
    """JSON with a line for each row, so that two runs can be compared line by line."""
    text = json.dumps(value)
    if len(text) <= 300 or not isinstance(value, (dict, list)) or not value:
        return text
    inside, end = "\n" + " " * (depth + 1), "\n" + " " * depth
    if isinstance(value, list):
        parts = [pretty(v, depth + 1) for v in value]
        return "[" + inside + ("," + inside).join(parts) + end + "]"
    parts = [f"{json.dumps(k)}: {pretty(v, depth + 1)}" for k, v in value.items()]
    return "{" + inside + ("," + inside).join(parts) + end + "}"


def machine() -> dict[str, Any]:
    """Processor and versions, of a measure on one thread."""
    import torch

    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.split(":")[1].strip() for line in text.splitlines() if "model name" in line]
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": 1,
    }
