"""One thread per test process: the machine's cores are shared by pytest-xdist's workers."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)
ROOT = Path(__file__).parents[1]


@pytest.fixture
def launch(tmp_path: Path) -> Callable[..., list[str]]:
    """(file, function, processes) -> runs `function(folder)` of a test file in that many processes.

    The file is run as a program, and the folder is `tmp_path`. Gives what each wrote to stderr;
    one that fails fails the test, unless `fails`.
    """

    def run(file: str, function: str, processes: int = 2, fails: bool = False) -> list[str]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {
            **os.environ,
            "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(processes),
            "OMP_NUM_THREADS": "1",
        }
        started = [
            subprocess.Popen(
                [sys.executable, "-W", "error", file, function, str(tmp_path)],
                env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(processes)
        ]
        try:
            said = [process.communicate(timeout=200)[1] for process in started]
        finally:
            for process in started:
                process.kill()
        codes = [process.returncode for process in started]
        assert fails or not any(codes), "\n".join([str(codes), *said])
        return said

    return run
