"""Two processes go back together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from k_diffusion.models import MODELS
from k_diffusion.training.checkpoint import read_checkpoint, read_info
from k_diffusion.training.run import run_training
from k_diffusion.training.trainer import Trainer


def goes_back(folder: Path) -> None:
    import conftest
    import test_recovery

    MODELS["tiny"] = conftest.Tiny
    done: list[int] = []
    config = conftest.config_of(**{**test_recovery.WATCHED, "out": str(folder / "back")})
    run_training(
        config,
        progress=False,
        source=test_recovery.planted([10, 11, 12]),
        on_step=lambda trainer, state: done.append(state.step),
    )
    assert done == [*range(1, 13), 9, *range(13, 21)], done
    passing = Trainer(config)
    assert passing.accelerator.num_processes == 2
    passing.passed_over = [(9, 12)]
    list(passing)
    passing.save(folder / "passing.safetensors")


def test_two_processes_go_back_together(launch: Callable[..., list[str]], tmp_path: Path) -> None:
    said = launch(__file__, "goes_back")
    newest = tmp_path / "back/checkpoint-000000000640.safetensors"
    assert read_info(newest).state["passed_over"] == [[9, 12]]
    parts = ["model", "ema", "optimizer"]
    _, left = read_checkpoint(newest, parts)
    _, right = read_checkpoint(tmp_path / "passing.safetensors", parts)
    for part in parts:
        assert set(left[part]) == set(right[part])
        for name, tensor in left[part].items():
            assert torch.equal(tensor, right[part][name]), name
    lines = [line for one in said for line in one.splitlines()]
    assert len([line for line in lines if line.startswith("diverged from step 10")]) == 1
