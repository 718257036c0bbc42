"""Checkpoints in shards: whole or refused, read by any number of processes, running no code."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from k_diffusion.models import MODELS
from k_diffusion.training import load_denoiser, sharded
from k_diffusion.training.checkpoint import CheckpointError, read_checkpoint, read_info
from k_diffusion.training.config import TrainConfig
from k_diffusion.training.resume import check_agreed
from k_diffusion.training.retention import latest_checkpoint, list_checkpoints
from k_diffusion.training.run import run_training
from k_diffusion.training.trainer import Trainer, TrainState

MakeConfig = Callable[..., TrainConfig]
Launch = Callable[..., list[str]]
PARTS = ("model", "ema", "optimizer")
MODEL = {"num_classes": 10, "prediction": "edm", "time_convention": "log_sigma"}
CHANGES: dict[str, Any] = {
    "model": {"type": "blocks", "sigma_data": "auto", **MODEL},
    "batch_size": 36,
    "total_images": 36 * 12,
    "parallel": "fsdp",
    "noise_scale_decay": 0.9,
}


def contents(path: Path) -> dict[str, Tensor]:
    _, parts = read_checkpoint(path, PARTS)
    return {f"{part}/{n}": t for part, named in parts.items() for n, t in named.items()}


def prepared() -> Callable[..., TrainConfig]:
    """What the fixtures do, in a process of its own."""
    import conftest

    torch.set_num_threads(1)
    MODELS["tiny"], MODELS["blocks"] = conftest.Tiny, conftest.Blocks
    function: Callable[..., TrainConfig] = conftest.config_of
    return function


def written(folder: Path) -> None:
    """By two processes: a run to the end, checkpoints on the way; and the same moment as a file."""
    config = prepared()(**CHANGES, out=str(folder / "run"), checkpoint_every_images=36 * 4)

    def on_step(trainer: Trainer, state: TrainState) -> None:
        if state.step == 8:
            assert trainer.is_sharded
            weight = trainer.network.enter.weight
            assert weight.to_local().shape[0] == weight.shape[0] // 2
            average = trainer.ema.state_dict()["enter.weight"]
            assert average.to_local().shape == weight.to_local().shape
            trainer.save(folder / "eight.safetensors")

    result = run_training(config, progress=False, on_step=on_step)
    assert result.sha256 == read_info(result.checkpoint).sha256

    trainer = Trainer(config, resume=folder / "run/checkpoint-000000000288")
    # A write that fails on one process alone, and a disk that gives back something else.
    real, compare = sharded._sha256, sharded._compare
    if not trainer.processes.main:

        def full(file: Path) -> str:
            raise OSError(28, "No space left on device")

        sharded._sha256 = full
    with pytest.raises(CheckpointError, match=r"could not be written \(process 1: .*No space left"):
        trainer.save(folder / "never")
    sharded._sha256 = real
    if not trainer.processes.main:

        def changed(file: Path, tensors: dict[str, Tensor]) -> None:
            compare(file, {name: tensor + 1 for name, tensor in tensors.items()})

        sharded._compare = changed
    with pytest.raises(CheckpointError, match="shard-00002.* does not hold .* as it was to be"):
        trainer.save(folder / "never")
    sharded._compare = compare
    assert not (folder / "never").exists()
    # Over one that is there, and over what an earlier failure has left.
    for _ in range(2):
        assert trainer.save(folder / "again") == read_info(folder / "again").sha256
    trainer.step = 2 if trainer.processes.main else 3
    with pytest.raises(CheckpointError, match="would go on from steps 2, 3: the checkpoints must"):
        check_agreed(trainer.processes, trainer.step)


def resumed(folder: Path) -> None:
    """By three processes, from shards of two, and from a file."""
    config = prepared()(**CHANGES, out=str(folder / "three"))
    for start in ("run/checkpoint-000000000288", "eight.safetensors"):
        trainer = Trainer(config, resume=folder / start)
        assert trainer.step == 8
        trainer.save(folder / f"still-{Path(start).stem}.safetensors")
        for _ in trainer:
            pass
        trainer.save(folder / f"three-{Path(start).stem}.safetensors")


def test_written_by_two_read_by_one_and_by_three(
    make_run_config: MakeConfig, launch: Launch, tmp_path: Path
) -> None:
    launch(__file__, "written")
    run = tmp_path / "run"
    names = [path.name for path in list_checkpoints(run)]
    assert names == ["checkpoint-000000000288", "checkpoint-000000000432.safetensors"]
    assert {path.name for path in run.iterdir()} == {*names, "metrics.jsonl"}
    shards = run / names[0]
    files = sorted(path.name for path in shards.iterdir())
    assert files[:2] == ["manifest.json", "record.json"]
    assert len(files) == 4

    info, file = read_info(shards), read_info(tmp_path / "eight.safetensors")
    for key in ("config", "images_seen", "step", "data", "tensors", "parameters", "state"):
        assert getattr(info, key) == getattr(file, key), key
    assert info.bytes == sum(path.stat().st_size for path in shards.iterdir())
    assert len(info.sha256) == 64
    one, other = contents(shards), contents(tmp_path / "eight.safetensors")
    assert set(one) == set(other)
    assert any(name.startswith("optimizer/") for name in one)
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name

    # One process takes it as any other checkpoint.
    denoiser, _ = load_denoiser(shards)
    weights = denoiser.network.state_dict()
    assert all(torch.equal(weights[n], one[f"ema/{n}"]) for n in weights)
    config = make_run_config(**CHANGES)
    trainer = Trainer(config, resume=shards)
    assert trainer.noise_scale is not None
    assert trainer.noise_scale.state_dict() == info.state["noise_scale"]
    assert trainer.noise_scale.updates == 8
    for _ in trainer:
        pass
    trainer.save(tmp_path / "one.safetensors")

    launch(__file__, "resumed", processes=3)
    ends = [tmp_path / "one.safetensors", run / names[1]]
    ends += [tmp_path / f"three-{start}.safetensors" for start in (shards.name, "eight")]
    first = contents(ends[0])
    for end in ends[1:]:
        theirs = contents(end)
        for name, tensor in first.items():
            if not name.endswith("calls"):
                assert (tensor - theirs[name]).abs().max() < 1e-4, (end, name)
    for start in (shards.name, "eight"):
        still = contents(tmp_path / f"still-{start}.safetensors")
        for name, tensor in one.items():
            assert torch.equal(tensor, still[name]), name
    damages(shards, run)


def damages(shards: Path, run: Path) -> None:
    """Every damage is refused by name, and the checkpoint before is taken."""
    copy = run / "checkpoint-000000009999"

    def damaged(change: Callable[[Path], Any], message: str) -> None:
        shutil.copytree(shards, copy)
        change(copy)
        with pytest.raises(CheckpointError, match=message) as caught:
            read_checkpoint(copy, PARTS)
        assert str(copy) in str(caught.value)
        assert "\n" not in str(caught.value)
        said: list[str] = []
        assert latest_checkpoint(run, said.append) == run / "checkpoint-000000000432.safetensors"
        assert len(said) == 1
        assert "passing over checkpoint" in said[0]
        shutil.rmtree(copy)

    def flip(name: str, place: int) -> Callable[[Path], None]:
        def change(folder: Path) -> None:
            data = bytearray((folder / name).read_bytes())
            data[place] ^= 16
            (folder / name).write_bytes(data)

        return change

    files = sorted(path.name for path in shards.iterdir())
    for name in files:
        size = (shards / name).stat().st_size
        for place in (0, 9, size // 3, size // 2, size - 2, size - 1):
            damaged(flip(name, place), name)
        damaged(lambda folder, name=name: (folder / name).unlink(), f"{name} is missing|a folder")
        damaged(lambda folder, name=name: (folder / name).write_bytes(b""), name)
    damaged(lambda folder: (folder / files[2]).rename(folder / "x"), "is missing from it")
    for name in ("shard-00009-model-00001-of-00001.safetensors", ".metadata"):
        # Of another checkpoint, or what another reader would unpickle.
        damaged(
            lambda folder, name=name: shutil.copy(folder / files[2], folder / name),
            f"{name} is none of its files",
        )

    class Runs:
        def __reduce__(self) -> Any:
            return (Path.touch, (run / "ran",))

    def pickled(folder: Path) -> None:
        data = pickle.dumps(Runs())
        (folder / files[2]).write_bytes(data)
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["files"][files[2]] = sharded._sha256(folder / files[2])
        manifest["sha256"] = sharded.seal_of(manifest)
        (folder / "manifest.json").write_text(json.dumps(manifest))

    # Even where every hash has been made to fit, nothing is run.
    shutil.copytree(shards, copy)
    pickled(copy)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_checkpoint(copy, PARTS)
    assert not (run / "ran").exists()
    shutil.rmtree(copy)
