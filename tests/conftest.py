"""What all tests share: one thread for each process, and a way to start several processes."""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)
# A shell without job control lets what it starts in the background ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
ROOT = Path(__file__).parents[1]


# Plans and graphs are many small objects that stay: looking at all of them again each time that
# 700 have come, as is the rule, takes a tenth of the time of all tests.
gc.set_threshold(10_000, 20, 10)
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


@pytest.fixture(scope="session")
def forking() -> Iterator[subprocess.Popen[str]]:
    """The process that others are forked from; see processes.py."""
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    with subprocess.Popen(
        [sys.executable, "-W", "error", str(ROOT / "tests/processes.py")],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that all of them can be killed at once
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


@pytest.fixture
def launch(tmp_path: Path, forking: subprocess.Popen[str]) -> Callable[..., list[str]]:
    """(file, function, processes) -> runs `function(folder)` of a test file in that many processes.

    The folder is `tmp_path`; see processes.py. Gives what each wrote to stderr; one that fails
    fails the test, unless `fails`.
    """

    def run(file: str, function: str, processes: int = 2, fails: bool = False) -> list[str]:
        assert forking.stdin is not None
        assert forking.stdout is not None
        print(
            json.dumps([file, function, str(tmp_path), processes]), file=forking.stdin, flush=True
        )
        if not select.select([forking.stdout], [], [], 300)[0]:
            os.killpg(forking.pid, signal.SIGKILL)
            raise TimeoutError(f"{function} of {file} had not ended after 300 s")
        failed = forking.stdout.readline() != "0\n"
        before = (tmp_path / "said.txt").read_text()
        files = [tmp_path / f"said-{rank}.txt" for rank in range(processes)]
        said = [file.read_text() if file.exists() else "" for file in files]
        assert failed == fails, "\n".join([before, *said])
        return said

    return run
