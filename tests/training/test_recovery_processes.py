"""Two processes go back together."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from k_diffusion.training.checkpoint import read_checkpoint, read_info

HERE = Path(__file__).parent

SCRIPT = """
import importlib.util, sys
from pathlib import Path
import torch
from k_diffusion.models import MODELS
from k_diffusion.training.run import run_training
from k_diffusion.training.trainer import Trainer

def load(name):
    spec = importlib.util.spec_from_file_location(name, Path(sys.argv[2]) / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module

torch.set_num_threads(1)
conftest, recovery = load("conftest"), load("test_recovery")
MODELS["tiny"] = conftest.Tiny
out, done = Path(sys.argv[1]), []
config = conftest.config_of(**{**recovery.WATCHED, "out": str(out / "back")})
run_training(
    config,
    progress=False,
    source=recovery.planted([10, 11, 12]),
    on_step=lambda trainer, state: done.append(state.step),
)
assert done == [*range(1, 13), 9, *range(13, 21)], done
passing = Trainer(config)
assert passing.accelerator.num_processes == 2
passing.passed_over = [(9, 12)]
list(passing)
passing.save(out / "passing.safetensors")
passing.accelerator.wait_for_everyone()
torch.distributed.destroy_process_group()
"""


def test_two_processes_go_back_together(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(script), str(tmp_path), str(HERE)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ended.returncode == 0, ended.stderr
    newest = tmp_path / "back/checkpoint-000000000640.safetensors"
    assert read_info(newest).state["passed_over"] == [[9, 12]]
    parts = ["model", "ema", "optimizer"]
    _, left = read_checkpoint(newest, parts)
    _, right = read_checkpoint(tmp_path / "passing.safetensors", parts)
    for part in parts:
        assert set(left[part]) == set(right[part])
        for name, tensor in left[part].items():
            assert torch.equal(tensor, right[part][name]), name
    told = [line for line in ended.stderr.splitlines() if line.startswith("diverged from step 10")]
    assert len(told) == 1
