"""Previews and loggers where two processes train: the main one's affair, which changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from k_diffusion.models import MODELS
from k_diffusion.training.checkpoint import read_checkpoint
from k_diffusion.training.devices import leave_processes
from k_diffusion.training.run import run_training

Launch = Callable[..., list[str]]
SHOWN: dict[str, dict[str, Any]] = {
    "plain": {},
    "shown": {"preview": {"every_images": 200, "count": 6, "steps": 4, "guidance": 2.0}},
}


class Recorder:
    """Stands for a logger."""

    package = module = "json"

    def __init__(self, config: Any, images_seen: int, going_on: bool) -> None:
        self.file = Path(config.out) / "told.txt"
        assert not self.file.exists(), "another process has one"
        self.file.write_text("")

    def fact(self, event: str, facts: Any) -> None:
        with self.file.open("a") as file:
            file.write(f"{event} {facts['images_seen']}\n")

    def picture(self, images_seen: int, image: Any) -> None:
        self.fact("picture", {"images_seen": images_seen})

    def flush(self) -> None:
        pass

    close = flush


def as_two(folder: Path) -> None:
    import conftest

    from k_diffusion.training.loggers import LOGGERS

    torch.set_num_threads(1)
    MODELS["tiny"] = conftest.Tiny
    LOGGERS["tensorboard"] = Recorder
    for name, changes in SHOWN.items():
        out = str(folder / name)
        config = conftest.config_of(out=out, loggers=["tensorboard"], total_images=320, **changes)
        run_training(config, progress=False, say=lambda line: None)
    leave_processes()


def test_two_processes(launch: Launch, tmp_path: Path) -> None:
    launch(__file__, "as_two", 2)
    assert not (tmp_path / "plain" / "previews").exists()
    found = sorted(path.name for path in (tmp_path / "shown" / "previews").iterdir())
    assert found == ["preview-000000000224.png", "preview-000000000320.png"]
    told = (tmp_path / "shown" / "told.txt").read_text().splitlines()
    assert told == [
        "train 96", "train 192", "picture 224", "train 288", "train 320", "picture 320", "end 320"
    ]  # fmt: skip
    parts = ["model", "ema", "optimizer"]
    name = "checkpoint-000000000320.safetensors"
    one, other = (read_checkpoint(tmp_path / run / name, parts)[1] for run in SHOWN)
    for part in parts:
        assert set(one[part]) == set(other[part])
        assert all(torch.equal(value, other[part][key]) for key, value in one[part].items())
