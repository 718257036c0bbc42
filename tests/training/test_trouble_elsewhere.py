"""What one process alone meets is said by all: the main one is the one that speaks."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from k_diffusion.models import MODELS
from k_diffusion.training.checkpoint import CheckpointError
from k_diffusion.training.config import ConfigError, TrainConfig
from k_diffusion.training.dataset import DataError
from k_diffusion.training.devices import leave_processes, world_size
from k_diffusion.training.run import run_training
from k_diffusion.training.trainer import Trainer

Launch = Callable[..., list[str]]


def prepared() -> Callable[..., TrainConfig]:
    """What the fixtures do, in a process of its own."""
    import conftest

    torch.set_num_threads(1)
    MODELS["tiny"], MODELS["blocks"] = conftest.Tiny, conftest.Blocks
    function: Callable[..., TrainConfig] = conftest.config_of
    return function


def message_of(kind: type[Exception], work: Callable[[], Any]) -> str:
    with pytest.raises(kind) as caught:
        work()
    assert getattr(caught.value, "everywhere", False)
    return str(caught.value)


def troubles(folder: Path) -> None:
    config_of, rank = prepared(), int(os.environ["RANK"])
    assert world_size() == 2
    for parallel in ("ddp", "fsdp"):
        config = config_of(out=str(folder / "run"), parallel=parallel)
        trainer = Trainer(config)
        for name in ("a.safetensors", "shards"):
            trainer.save(folder / f"{parallel}-{name}")
            # As on a second machine that does not see the first one's disk.
            where = folder / f"{parallel}-{name}" if not rank else folder / f"{parallel}-b-{name}"
            alone = f"{where.name} does not exist" if rank else ""
            for work in (
                lambda c=config, w=where: Trainer(c, resume=w),
                lambda t=trainer, w=where: t.go_back(w, 1, 2),
            ):
                said = message_of(CheckpointError, work)
                assert said.endswith("(on process 1 of 2)"), said
                assert alone in said, said
                assert "-b-" in said, said
        # What both meet has no number.
        said = message_of(CheckpointError, lambda c=config: Trainer(c, resume=folder / "none"))
        assert "on process" not in said, said
        assert "none does not exist" in said, said
    images = folder / f"images-{rank}"
    config = config_of(data={"source": "folder", "path": str(images), "size": [8, 8]})
    if not rank:
        from PIL import Image

        images.mkdir()
        for i in range(40):
            Image.new("L", (8, 8), i).save(images / f"{i}.png")
    said = message_of(DataError, lambda: Trainer(config))
    assert "images-1" in said, said
    assert said.endswith("(on process 1 of 2)"), said


def folder_in_use(folder: Path) -> None:
    """The lock is the main process's matter; the others end with it."""
    config = prepared()(out=str(folder / "run"), total_images=64)
    from k_diffusion.training import run_folder

    def refuse(*arguments: Any) -> None:
        raise ConfigError("out is in use")

    run_folder.RunLock = refuse  # type: ignore[assignment,misc]
    said = message_of(Exception, lambda: run_training(config, progress=False))  # type: ignore[arg-type]
    assert said == "out is in use"


def test_what_one_process_meets_is_raised_on_all(launch: Launch) -> None:
    launch(__file__, "troubles")


def test_a_folder_in_use_ends_all(launch: Launch) -> None:
    launch(__file__, "folder_in_use")


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(sys.argv[2]))
    leave_processes()
