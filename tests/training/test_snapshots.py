"""Snapshots of averages in a run's folder: when they are written, and when they go."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from k_diffusion.training.checkpoint import CheckpointError, Contents, read_checkpoint, read_info
from k_diffusion.training.config import TrainConfig
from k_diffusion.training.dataset import ArraySource, Digits
from k_diffusion.training.restore import load_denoiser
from k_diffusion.training.run import run_training
from k_diffusion.training.snapshots import (
    list_snapshots,
    read_snapshot,
    remove_snapshots_after,
    save_snapshot,
    snapshot_files,
    snapshot_path,
)
from k_diffusion.training.trainer import Trainer, TrainState

MakeConfig = Callable[..., TrainConfig]
EMA = {"profiles": [0.05, 0.10], "snapshot_every_images": 150}
# The step of 32 images that reaches each 150, and the end.
TIMES = [160, 320, 480, 608, 640]


def run(config: TrainConfig, **options: Any) -> list[str]:
    said: list[str] = []
    run_training(config, **{"progress": False, "say": said.append, **options})
    return said


def images(config: TrainConfig) -> list[int]:
    return [snapshot.images_seen for snapshot in list_snapshots(config.out)]


def contents(folder: str) -> dict[str, str]:
    """The hash of all that each holds; the order of its metadata is left to chance."""
    return {path.name: read_info(path).sha256 for path in snapshot_files(folder)}


def test_what_a_run_leaves(make_run_config: MakeConfig) -> None:
    config = make_run_config(ema=EMA)
    kept: dict[int, torch.Tensor] = {}

    def look(trainer: Trainer, state: TrainState) -> None:
        average = trainer.averages["ema_0.1"].state_dict()
        kept[state.images_seen] = average["enter.weight"].clone()

    assert not run(config, on_step=look)
    out = Path(config.out)
    names = [f"snapshot-{n:012d}.safetensors" for n in TIMES]
    assert sorted(p.name for p in (out / "ema").iterdir()) == names
    for snapshot in list_snapshots(out):
        assert snapshot.updates == snapshot.images_seen // 32
        assert snapshot.profiles == {"ema_0.05": 0.05, "ema_0.1": 0.10}
        info, parts = read_checkpoint(snapshot.path, ["ema_0.1"])
        assert info.averages == ["ema_0.05", "ema_0.1"]
        assert info.parameters == 258
        assert info.state["buffers"] == ["calls"]
        assert parts["ema_0.1"]["enter.weight"].dtype == torch.float32
        assert torch.equal(parts["ema_0.1"]["enter.weight"], kept[snapshot.images_seen])
        denoiser, _ = load_denoiser(snapshot.path, "ema_0.1")
        assert torch.equal(denoiser.network.enter.weight, kept[snapshot.images_seen])


def test_none_without_being_asked_for(make_run_config: MakeConfig) -> None:
    config = make_run_config(ema={"profiles": [0.05]}, total_images=64)
    run(config)
    assert not (Path(config.out) / "ema").exists()
    with pytest.raises(CheckpointError, match=r"no snapshots in .*ema: .*ema\.profiles"):
        list_snapshots(config.out)
    with pytest.raises(CheckpointError, match="is no snapshot of averages"):
        read_snapshot(next(Path(config.out).glob("*.safetensors")))


def test_a_stopped_and_resumed_run_leaves_the_same(
    make_run_config: MakeConfig, tmp_path: Path
) -> None:
    def stop(trainer: Trainer, state: TrainState) -> None:
        if state.step in (7, 15):
            os.kill(os.getpid(), signal.SIGTERM)

    # The folder's name is in the config, and so in the files: both runs have the same one.
    config = make_run_config(ema=EMA)
    run(config)
    whole = contents(config.out)
    run(config, overwrite=True, on_step=stop)
    assert images(config) == [160]
    run(config, resume="auto", on_step=stop)
    run(config, resume="auto")
    assert contents(config.out) == whole


def test_a_killed_run_goes_back_before_its_snapshots(make_run_config: MakeConfig) -> None:
    class Killed(BaseException):
        pass

    def kill(trainer: Trainer, state: TrainState) -> None:
        if state.step == 18:
            raise Killed

    config = make_run_config(ema=EMA, checkpoint_every_images=320)
    run(config)
    whole = contents(config.out)
    with pytest.raises(Killed):
        run(config, overwrite=True, on_step=kill)
    assert images(config) == [160, 320, 480]
    there: list[list[int]] = []

    def look(trainer: Trainer, state: TrainState) -> None:
        there.append(images(config))

    said = run(config, resume="auto", on_step=look)
    later = snapshot_path(config.out, 480)
    assert said == [f"removing 1 snapshot from {later} on: the run goes on from 320 images"]
    # The one that was written with the checkpoint stays; the other one is gone at once.
    assert there[0] == [160, 320]
    assert contents(config.out) == whole


def test_the_snapshot_is_there_before_the_checkpoint(
    make_run_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Killed between the two, a run that goes on from the checkpoint would lack the snapshot.
    seen: list[list[int]] = []
    contents = Trainer.contents

    def look(self: Trainer) -> Contents:
        seen.append(images(self.config))
        return contents(self)

    monkeypatch.setattr(Trainer, "contents", look)
    run(make_run_config(ema=EMA, checkpoint_every_images=320))
    assert seen == [[160, 320], TIMES]


def test_a_new_run_begins_without(make_run_config: MakeConfig) -> None:
    config = make_run_config(ema=EMA, total_images=320)
    run(config)
    half = snapshot_path(config.out, 160).with_name(".snapshot-000000000160.safetensors.7.tmp")
    half.touch()
    run(make_run_config(total_images=32), overwrite=True)
    assert list((Path(config.out) / "ema").iterdir()) == []


def test_remove_snapshots_after(tmp_path: Path) -> None:
    (tmp_path / "ema").mkdir()
    for n in (10, 20, 30):
        snapshot_path(tmp_path, n).touch()
    said: list[str] = []
    remove_snapshots_after(tmp_path, 30, said.append)
    assert not said
    remove_snapshots_after(tmp_path, 10, said.append)
    assert snapshot_files(tmp_path) == [snapshot_path(tmp_path, 10)]
    assert "removing 2 snapshots" in said[0]


def test_a_broken_write_leaves_nothing(
    make_run_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError("No space left on device")

    trainer = Trainer(make_run_config(ema=EMA))
    next(iter(trainer))
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left"):
        save_snapshot(trainer)
    assert list((Path(trainer.config.out) / "ema").iterdir()) == []


def test_no_snapshot_before_the_first_update(make_run_config: MakeConfig) -> None:
    digits = Digits()
    nothing = ArraySource(digits.images * float("nan"), digits.labels, digits.class_names)
    model = {"type": "tiny", "num_classes": 10}
    trainer = Trainer(make_run_config(model=model, ema=EMA, max_skipped=30), source=nothing)
    for _ in trainer:
        assert save_snapshot(trainer) is None
    assert not Path(trainer.config.out).exists()


def test_float16_rounds_weights_and_no_buffers(make_run_config: MakeConfig) -> None:
    class Own(nn.Module):
        prediction = "edm"
        time_convention = "log_sigma"
        sigma_data = 0.5
        num_classes = 10

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.full((1,), 1 / 3))
            self.register_buffer("fixed", torch.full((1,), 1 / 3))

        def forward(self, x: torch.Tensor, t: torch.Tensor, class_label: Any) -> torch.Tensor:
            return x * self.weight

    config = make_run_config(ema={**EMA, "snapshot_dtype": "float16"})
    trainer = Trainer(config, network=Own())
    next(iter(trainer))
    path = save_snapshot(trainer)
    assert path is not None
    _, parts = read_checkpoint(path, ["ema_0.1"])
    exact = trainer.averages["ema_0.1"].state_dict()
    assert torch.equal(parts["ema_0.1"]["weight"], exact["weight"].half())
    assert torch.equal(parts["ema_0.1"]["fixed"], exact["fixed"])
    exact["weight"].fill_(1e5)
    with pytest.raises(CheckpointError, match=r"weight reaches 1e\+05, too large for float16"):
        save_snapshot(trainer)
    assert read_info(path).parameters == 2
