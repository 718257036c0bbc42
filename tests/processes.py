"""Runs functions of test files in several processes that train together.

Reads lines of JSON, [file, function, folder, processes], and answers each with a line once all of
them have ended: 0, or 1 if one has failed. Importing what they need takes seconds, so this process
does it once; it trains nothing and has no threads. For each line it forks one that imports the file
and forks the processes. They meet through a file: a port that is free now may be taken a moment
later. What process N writes to stderr goes to folder/said-N.txt, all else to folder/said.txt. Once
one has failed, the others, which may wait for it in vain, are killed.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path


def say_to(file: Path) -> None:
    """What this process writes to stderr goes to the file from now on."""
    os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)


def begin(work: Callable[[Path], None], folder: Path, meeting: str, rank: int, count: int) -> None:
    """In a process just forked: `work`, then its end."""
    from torch import distributed

    from k_diffusion.training.devices import leave_processes

    say_to(folder / f"said-{rank}.txt")
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


def run(file: str, function: str, folder: str, count: int) -> int:
    """In a process of its own: the function in `count` others; whether one has failed."""
    sys.path.insert(0, str(Path(file).parent))
    work = getattr(importlib.import_module(Path(file).stem), function)
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


def main() -> None:
    # What trainers import when they need it, too.
    for name in ("accelerate", "sklearn.datasets", "torch._dynamo", "torch.distributed.fsdp"):
        importlib.import_module(name)
    importlib.import_module("k_diffusion.training.run")
    import torch

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        file, function, folder, count = json.loads(line)
        child = os.fork()
        if not child:
            failed = 1
            try:
                say_to(Path(folder) / "said.txt")
                os.dup2(2, 1)  # where the answers go nothing else may
                failed = run(file, function, folder, count)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(failed)
        _, status = os.waitpid(child, 0)
        print(int(status != 0), flush=True)


if __name__ == "__main__":
    main()
