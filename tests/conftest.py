"""What all tests share: one thread for each process, and a way to start several processes."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)
# A shell without job control lets what it starts in the background ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
ROOT = Path(__file__).parents[1]


KEPT = 200
"""So many modules imported since the last time are worth another look at all that is there."""
_frozen_at = 0


def _keep_what_is_imported() -> None:
    """Whatever has been imported by now stays: no collection of garbage need look at it again."""
    global _frozen_at
    if len(sys.modules) < _frozen_at + KEPT:
        return
    gc.collect()
    gc.freeze()
    _frozen_at = len(sys.modules)


def pytest_collection_finish() -> None:
    _keep_what_is_imported()


def pytest_runtest_logfinish() -> None:
    """Some tests import more: compilers, data sets. Left to be searched, each of the collections
    after it takes tenths of a second."""
    _keep_what_is_imported()


@pytest.fixture
def launch(tmp_path: Path) -> Callable[..., list[str]]:
    """(file, function, processes) -> runs `function(folder)` of a test file in that many processes.

    The folder is `tmp_path`; see processes.py. Gives what each wrote to stderr; one that fails
    fails the test, unless `fails`.
    """

    def run(file: str, function: str, processes: int = 2, fails: bool = False) -> list[str]:
        command = [sys.executable, "-W", "error", str(ROOT / "tests/processes.py")]
        environment = {
            **os.environ,
            "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        ended = subprocess.run(
            [*command, file, function, str(tmp_path), str(processes)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
            timeout=300,
        )
        said = [(tmp_path / f"said-{rank}.txt").read_text() for rank in range(processes)]
        assert fails or not ended.returncode, "\n".join([ended.stderr, *said])
        return said

    return run
