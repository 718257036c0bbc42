"""`kill -9` at drawn steps and in writes, in small; benchmarks/kill.py does it fifty times."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
STEPS = 60
KINDS = ("step", "write", "snapshot", "start", "step", "write")


def benchmark() -> Any:
    """benchmarks/kill.py, which says what differs between the ends of two runs."""
    spec = importlib.util.spec_from_file_location("kill_bench", ROOT / "benchmarks/kill.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["kill_bench"] = module
    spec.loader.exec_module(module)
    return module


def config_in(out: Path) -> Any:
    """A run with all that a resume must carry."""
    from conftest import config_of

    return config_of(
        out=str(out),
        total_images=32 * STEPS,
        micro_batch_size=16,
        loss={"uncertainty": True},
        ema={"profiles": [0.05, 0.1], "snapshot_every_images": 32 * 6},
        noise_scale_decay=0.9,
        checkpoint_every_images=32 * 4,
        keep_every_images=32 * 20,
        spikes={"factor": 1.5, "window": 20},
    )


def killed_at(config: Any, kind: str, count: int) -> None:
    """In a child: go on, and be killed after so many steps, in a write, or before the first."""
    from k_diffusion.training import checkpoint, run, run_folder, snapshots

    def kill(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if kind == "write":
        checkpoint._verify_written = kill  # the file stands under its hidden name
    if kind == "snapshot":
        write = snapshots.save_checkpoint
        snapshots.save_checkpoint = lambda *args, **facts: (write(*args, **facts), kill())
    if kind == "start":
        run_folder.remove_snapshots_after = kill
    done = 0

    def on_step(trainer: Any, state: Any) -> None:
        nonlocal done
        done += 1
        if kind == "step" and done == count:
            kill()

    run.run_training(config, resume="auto", progress=False, on_step=on_step)


def status_of(work: Any) -> int:
    """How a child ends that shares what is imported here."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def all_attempts(folder: Path) -> None:
    """The run never killed, and the one killed; nothing trains in this process, which forks."""
    import conftest

    from k_diffusion.models import MODELS

    # What trainers import when they need it: once, not in each of the children.
    for name in ("accelerate", "sklearn.datasets", "torch._dynamo", "k_diffusion.training.run"):
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    torch.set_num_threads(1)
    MODELS["tiny"] = conftest.Tiny
    draw = random.Random(5)
    moments = [(kind, draw.randint(1, 9)) for kind in draw.sample(KINDS, len(KINDS))]
    whole, killed = (config_in(folder / name) for name in ("whole", "killed"))
    ends = [status_of(lambda: killed_at(whole, "", 0))]
    half = 0
    for kind, count in moments:
        ends.append(status_of(lambda kind=kind, count=count: killed_at(killed, kind, count)))
        half += bool(list((folder / "killed").glob("**/.*.tmp")))
    ends.append(status_of(lambda: killed_at(killed, "", 0)))
    (folder / "ends.json").write_text(json.dumps([ends, half]))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="attempts are forked")
def test_a_run_killed_again_and_again_ends_bitwise_as_one_never_killed(tmp_path: Path) -> None:
    command = [sys.executable, __file__, str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    ends, half = json.loads((tmp_path / "ends.json").read_text())
    assert ends == [0, *[-signal.SIGKILL] * len(KINDS), 0], ended.stderr
    assert half >= 2
    bench = benchmark()
    assert bench.differences(tmp_path / "whole", tmp_path / "killed") == []
    found = bench.compared(tmp_path / "whole")
    parts = ("model", "ema", "ema_0.05", "ema_0.1", "optimizer", "loss")
    assert all(found[f"tensors of {part}"] for part in parts)
    assert (found["snapshots"], found["checkpoints"]) == (10, 4)
    # And it would see one number that differs.
    for path in (tmp_path / "killed").glob("**/*.safetensors"):
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    with pytest.raises(bench.CheckpointError, match="is not what was written"):
        bench.differences(tmp_path / "whole", tmp_path / "killed")


if __name__ == "__main__":
    all_attempts(Path(sys.argv[1]))
