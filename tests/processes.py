"""Runs a function of a test file in several processes that train together.

    python processes.py FILE FUNCTION FOLDER COUNT

Each is forked from this one, which imports what they need once, trains nothing and has no threads.
They meet through a file: a port that is free now may be taken a moment later. What process N
writes to stderr goes to FOLDER/said-N.txt. Once one has failed, the others, which may wait for it
in vain, are killed.
"""

from __future__ import annotations

import gc
import importlib
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path


def begin(work: Callable[[Path], None], folder: Path, meeting: str, rank: int, count: int) -> None:
    """In a process just forked: `work`, then its end."""
    from torch import distributed

    from k_diffusion.training.devices import leave_processes

    said = os.open(folder / f"said-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 2)
    code = 1
    try:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        os.environ.update({name: str(value) for name, value in place.items()})
        distributed.init_process_group("gloo", meeting, rank=rank, world_size=count)
        work(folder)
        leave_processes()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def main(file: str, function: str, folder: str, processes: str) -> int:
    count = int(processes)
    sys.path.insert(0, str(Path(file).parent))
    # What trainers import when they need it; a process alone takes seconds over it.
    for name in ("accelerate", "sklearn.datasets", "torch._dynamo", "torch.distributed.fsdp"):
        importlib.import_module(name)
    work = getattr(importlib.import_module(Path(file).stem), function)
    import torch

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    with tempfile.TemporaryDirectory() as place:
        meeting = f"file://{place}/meeting"
        children: list[int] = []
        for rank in range(count):
            child = os.fork()
            if not child:
                begin(work, Path(folder), meeting, rank, count)
            children.append(child)
        failed = False
        while children:
            child, status = os.wait()
            children.remove(child)
            if status and not failed:
                failed = True
                for other in children:
                    os.kill(other, signal.SIGKILL)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
