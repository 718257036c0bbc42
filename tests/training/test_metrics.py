"""The metrics file when the disk is full, the folder is gone, or the run was killed."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from k_diffusion.training.checkpoint import read_info
from k_diffusion.training.config import TrainConfig
from k_diffusion.training.metrics import LineFile
from k_diffusion.training.run import RunResult, run_training
from k_diffusion.training.trainer import Trainer, TrainState

MakeConfig = Callable[..., TrainConfig]


def run(config: TrainConfig, **options: Any) -> tuple[RunResult, list[str]]:
    said: list[str] = []
    return run_training(config, progress=False, say=said.append, **options), said


def lines(out: str | Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    for line in found:
        for key in ("images_per_second", "seconds", "config"):
            line.pop(key, None)
    return found


@pytest.fixture
def whole(make_run_config: MakeConfig, tmp_path: Path) -> list[dict[str, Any]]:
    """The lines of a run that nothing has happened to."""
    config = make_run_config(out=str(tmp_path / "whole"), log_every_images=32)
    run(config)
    return lines(config.out)


def limit_files(size: int | None) -> None:
    """Let no file of this process grow beyond so many bytes, as on a full disk; None: any size."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard if size is None else size, hard))


def test_no_line_is_lost_on_a_disk_that_is_full_for_a_time(
    make_run_config: MakeConfig, whole: list[dict[str, Any]]
) -> None:
    config = make_run_config(log_every_images=32)
    path = Path(config.out) / "metrics.jsonl"

    def on_step(trainer: Trainer, state: TrainState) -> None:
        if state.step == 5:
            limit_files(path.stat().st_size + 20)  # a part of a line still fits
        if state.step == 6:
            assert path.read_bytes()[-1:] != b"\n"
        if state.step == 9:
            assert len(path.read_bytes().splitlines()) == 7
            limit_files(None)

    try:
        result, said = run(config, on_step=on_step)
    finally:
        limit_files(None)
    reason = os.strerror(errno.EFBIG)
    assert said == [
        f"{path} cannot be written ({reason}): its lines wait in memory until it can",
        f"{path} is written again; none of its lines is lost",
    ]
    assert lines(config.out)[:-1] == whole[:-1]
    assert read_info(result.checkpoint).state["extra"]["log"]["lines"] == 21


def test_lines_that_never_find_room_are_told(tmp_path: Path) -> None:
    said: list[str] = []
    file = LineFile(tmp_path / "lines", ["first"], said.append)
    try:
        limit_files(6)
        file.write("second")
        file.write("third")
    finally:
        limit_files(None)
    assert len(said) == 1
    file.close()
    assert said[1] == (
        f"the last 2 lines of {tmp_path / 'lines'} could not be written "
        f"({os.strerror(errno.EFBIG)})"
    )
    assert (tmp_path / "lines").read_text() == "first\n"


def test_a_folder_removed_in_mid_run_comes_back_in_full(
    make_run_config: MakeConfig, whole: list[dict[str, Any]]
) -> None:
    config = make_run_config(
        log_every_images=32, checkpoint_every_images=320, background_checkpoints=False
    )

    def on_step(trainer: Trainer, state: TrainState) -> None:
        if state.step == 13:
            shutil.rmtree(config.out)

    result, said = run(config, on_step=on_step)
    path = Path(config.out) / "metrics.jsonl"
    assert said == [f"{path} was removed in mid-run: it is written again in full"]
    assert lines(config.out)[:-1] == whole[:-1]
    assert sorted(p.name for p in Path(config.out).iterdir()) == [
        result.checkpoint.name,
        "metrics.jsonl",
    ]


def test_a_file_put_in_its_place_is_gone_on_with(tmp_path: Path) -> None:
    """As an editor does that writes a copy."""
    said: list[str] = []
    path = tmp_path / "lines"
    file = LineFile(path, ["first"], said.append)
    (tmp_path / "copy").write_text("edited\n")
    (tmp_path / "copy").replace(path)
    file.write("second")
    file.write("third")
    file.close()
    assert path.read_text() == "edited\nsecond\nthird\n"
    assert not said


def test_a_folder_that_cannot_come_back(tmp_path: Path) -> None:
    said: list[str] = []
    folder = tmp_path / "run"
    folder.mkdir()
    file = LineFile(folder / "lines", ["first"], said.append)
    shutil.rmtree(folder)
    folder.write_text("a file where the folder was")
    file.write("second")
    assert len(said) == 1
    assert said[0].startswith(f"{folder / 'lines'} cannot be written (")
    folder.unlink()
    file.write("third")
    assert (folder / "lines").read_text() == "first\nsecond\nthird\n"
    assert "written again in full" in said[1]
    assert "none of its lines is lost" in said[2]
    file.close()


def test_a_resume_cuts_by_the_number_of_lines(
    make_run_config: MakeConfig, whole: list[dict[str, Any]]
) -> None:
    """Lines of any kind, whatever they hold, are cut where the checkpoint was written."""

    class Kill(BaseException):
        pass

    def kill(trainer: Trainer, state: TrainState) -> None:
        if state.step == 14:
            raise Kill

    config = make_run_config(log_every_images=32, checkpoint_every_images=160)
    with pytest.raises(Kill):
        run(config, on_step=kill)
    path = Path(config.out) / "metrics.jsonl"
    half = path.with_name(".metrics.jsonl.123.tmp")
    half.write_text("of a kill in a start")
    with path.open("a") as file:
        file.write('{"event": "of a later version", "images_seen": 1}\n{"event": "tr')
    assert len(path.read_text().splitlines()) == 1 + 14 + 2
    run(config, resume="auto")
    assert lines(config.out)[:-1] == whole[:-1]
    assert not half.exists()
    # Where the file is gone, a new one begins with what there is to tell of the run.
    path.unlink()
    result, _ = run(make_run_config(log_every_images=32, total_images=704), resume="auto")
    events = [line["event"] for line in lines(config.out)]
    assert events == ["start", "train", "train", "end"]
    assert read_info(result.checkpoint).state["extra"]["log"]["lines"] == 3


def test_lines_are_on_the_disk_before_a_checkpoint_counts_them(
    make_run_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    real = LineFile.flush

    def flush(self: LineFile) -> None:
        order.append("lines")
        real(self)

    monkeypatch.setattr(LineFile, "flush", flush)
    remember_saves(monkeypatch, order)
    run(make_run_config(checkpoint_every_images=320))
    assert order == ["lines", "checkpoint"] * 2


def remember_saves(monkeypatch: pytest.MonkeyPatch, order: list[str]) -> None:
    real = Trainer.contents

    def contents(self: Trainer) -> Any:
        order.append("checkpoint")
        return real(self)

    monkeypatch.setattr(Trainer, "contents", contents)
