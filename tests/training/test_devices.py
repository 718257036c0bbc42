"""The memory that a training process keeps."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

COUNT = """
import resource, torch
from k_diffusion.training.devices import keep_freed_memory

if {kept}:
    assert keep_freed_memory()
torch.set_num_threads(1)

def step():
    blocks = [torch.ones(2**21) for _ in range(20)]  # 8 MiB each
    return sum(float(block[0]) for block in blocks)

for _ in range(4):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    step()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 4)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of glibc")
def test_memory_that_is_freed_is_kept() -> None:
    """Without, 160 MiB of blocks are got from the system and handed back in every step."""

    def faults(kept: bool) -> int:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
        if not kept:  # glibc may learn by itself to keep blocks of a size: not with a fixed one
            environment |= {"MALLOC_MMAP_THRESHOLD_": "131072"}
        command = [sys.executable, "-c", COUNT.format(kept=kept)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert faults(kept=True) < 100
    assert faults(kept=False) > 1000


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of glibc")
def test_the_environment_has_the_last_word() -> None:
    code = "from k_diffusion.training.devices import keep_freed_memory; print(keep_freed_memory())"
    for name in ("MALLOC_TRIM_THRESHOLD_",):
        done = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, name: "65536"},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert done.stdout.strip() == "False"
