"""The memory that a training process keeps."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from k_diffusion.training.devices import keep_freed_memory

# Each in a process of its own, as what is set stays; forked, as to import torch takes a second.
COUNT = """
import ctypes, json, os, resource, sys, torch
from k_diffusion.training.devices import keep_freed_memory

torch.set_num_threads(1)

def step():
    blocks = [torch.ones(2**21) for _ in range(20)]  # 8 MiB each
    return sum(float(block[0]) for block in blocks)

def faults(kept):
    if kept:
        assert keep_freed_memory()
    else:  # glibc may learn by itself to keep blocks of a size: not with a fixed threshold
        assert ctypes.CDLL(None).mallopt(-3, 131072)
    for _ in range(4):
        step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        step()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 4

for kept in (True, False):
    if not os.fork():
        os.write(1, f"{json.dumps([kept, faults(kept)])}\\n".encode())
        os._exit(0)
    assert os.wait()[1] == 0
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of glibc")
def test_memory_that_is_freed_is_kept() -> None:
    """Without, 160 MiB of blocks are got from the system and handed back in every step."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    command = [sys.executable, "-c", COUNT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    faults = dict(json.loads(line) for line in done.stdout.splitlines())
    assert faults[True] < 100
    assert faults[False] > 1000


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of glibc")
@pytest.mark.parametrize(
    "name", ["MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "LD_PRELOAD"]
)
def test_the_environment_has_the_last_word(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for other in [key for key in os.environ if key.startswith("MALLOC_") or key == "LD_PRELOAD"]:
        monkeypatch.delenv(other)
    monkeypatch.setattr("ctypes.CDLL", None)  # nothing is set
    monkeypatch.setenv(name, "65536")
    assert not keep_freed_memory.__wrapped__()
    monkeypatch.delenv(name)
    with pytest.raises(TypeError):
        keep_freed_memory.__wrapped__()
