"""What the loop tells of its speed, and where processes may begin."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from k_diffusion.training.checkpoint import CheckpointError
from k_diffusion.training.config import TrainConfig
from k_diffusion.training.parallel import Processes
from k_diffusion.training.state import SPEED_STEPS, Speed
from k_diffusion.training.trainer import Trainer


def test_speed_is_that_of_the_last_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    speed = Speed()
    for step in range(1, 201):
        now += float(step)  # ever slower
        seconds = sum(range(max(0, step - SPEED_STEPS) + 1, step + 1))
        assert abs(speed.after(10) * seconds / (10 * min(step, SPEED_STEPS)) - 1) < 1e-12


def test_time_beside_the_training_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    speed = Speed()
    for step in range(1, 8):
        now += 2.0
        assert abs(speed.after(10) - 5.0) < 1e-12
        if step % 3 == 0:
            with suppress(KeyError), speed.standing():  # however it ends
                now += 100.0
                raise KeyError


def test_a_clock_that_stands_still_is_no_division_by_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.perf_counter", lambda: 7.0)
    assert abs(Speed().after(32) / 32e9 - 1) < 1e-12


def test_processes_are_asked_from_which_step_they_go_on(
    make_run_config: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(make_run_config())
    trainer.step = 3
    trainer.save(tmp_path / "a.safetensors")
    # As if another process had found an older checkpoint.
    monkeypatch.setattr(Processes, "gather", lambda self, value: [value, value - 1 if value else 0])
    Trainer(make_run_config())
    with pytest.raises(CheckpointError, match="would go on from steps 3, 2: the checkpoints must"):
        Trainer(make_run_config(), resume=tmp_path / "a.safetensors")
