"""Ctrl-C and SIGTERM at any moment: the step in hand is done and saved, and none is done twice."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from k_diffusion.cli import main
from k_diffusion.training import dataset, writer
from k_diffusion.training.checkpoint import read_checkpoint, read_info
from k_diffusion.training.config import TrainConfig
from k_diffusion.training.dataset import Batch, Digits
from k_diffusion.training.lock import LOCK
from k_diffusion.training.retention import list_checkpoints
from k_diffusion.training.run import RunResult, run_training
from k_diffusion.training.trainer import Trainer, TrainState

MakeConfig = Callable[..., TrainConfig]
BOTH = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])


class Loading(Digits):
    """Writes down the images of each step that is loaded, and may send signals while at it.

    Args:
        file: takes a line a step.
        number: the signal.
        at: the step (from 1) whose loading sends it; 0: the first look at the data.
        times: how often it is sent.
    """

    def __init__(self, file: Path, number: int = 0, at: int = -1, times: int = 1) -> None:
        super().__init__()
        self.file, self.number, self.at, self.times = file, number, at, times
        self.loaded = 0

    def batch(self, indices: Tensor, seeds: Sequence[int] | None = None) -> Batch:
        a_step = len(indices) == 32
        self.loaded += a_step
        if self.at == (self.loaded if a_step else 0):
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)
        if a_step:
            with self.file.open("a") as file:
                print(*indices.tolist(), file=file)
        return super().batch(indices, seeds)


def run(config: TrainConfig, **options: Any) -> tuple[RunResult, list[str]]:
    said: list[str] = []
    return run_training(config, **{"progress": False, "say": said.append, **options}), said


def tensors(path: Path) -> dict[str, Tensor]:
    _, parts = read_checkpoint(path, ["model", "ema", "optimizer"])
    return {f"{part}/{n}": t for part, named in parts.items() for n, t in named.items()}


def assert_bitwise(one: Path, other: Path) -> None:
    left, right = tensors(one), tensors(other)
    assert set(left) == set(right)
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


def expected_steps(config: TrainConfig) -> list[str]:
    stream = Trainer(config).stream
    return [" ".join(map(str, stream[step].indices.tolist())) for step in range(config.steps)]


@BOTH
@pytest.mark.parametrize("at", [1, 7, 10, 20])
def test_a_signal_while_a_batch_is_loaded(
    make_run_config: MakeConfig, tmp_path: Path, number: int, at: int
) -> None:
    """Before the first step, between, in a step that writes a checkpoint anyway, in the last."""
    config = make_run_config(checkpoint_every_images=320)
    steps = tmp_path / "steps"
    stopped, said = run(config, source=Loading(steps, number, at))
    assert stopped.images_seen == 32 * at
    assert read_info(stopped.checkpoint).step == at
    if at < 20:
        assert stopped.stopped_by == number
        assert len(said) == 1
        assert said[0].startswith(f"stopped by {signal.Signals(number).name} at {32 * at} of 640")
    else:  # it had done all it was asked to
        assert stopped.stopped_by is None
        assert not said
    assert not (Path(config.out) / LOCK).exists()
    ended, _ = run(config, source=Loading(steps), resume="auto")
    assert steps.read_text().splitlines() == expected_steps(config)
    whole, _ = run(make_run_config(out=str(tmp_path / "whole")))
    assert_bitwise(ended.checkpoint, whole.checkpoint)


@BOTH
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("background", [False, True])
def test_a_signal_while_a_checkpoint_is_written(
    make_run_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    number: int, workers: int, background: bool,
) -> None:  # fmt: skip
    config = make_run_config(
        checkpoint_every_images=160, workers=workers, background_checkpoints=background
    )
    real, done = writer.write_checkpoint, tmp_path / "done"

    def write(path: Path, contents: Any) -> str:
        if "000160" in path.name:
            os.kill(os.getpid(), number)
        return real(path, contents)

    def on_step(trainer: Trainer, state: TrainState) -> None:
        with done.open("a") as file:
            print(state.step, file=file)

    monkeypatch.setattr(writer, "write_checkpoint", write)
    stopped, _ = run(config, on_step=on_step)
    assert stopped.stopped_by == number
    # Training goes on during a write in the background, by a step or more.
    step = read_info(stopped.checkpoint).step
    assert step == 5 or (background and step < 20)
    assert not list(Path(config.out).glob(".*"))
    ended, _ = run(config, resume="auto", on_step=on_step)
    assert done.read_text().split() == [str(n) for n in range(1, 21)]
    whole, _ = run(make_run_config(out=str(tmp_path / "whole")))
    assert_bitwise(ended.checkpoint, whole.checkpoint)


@BOTH
def test_two_in_a_row_act_at_once(make_run_config: MakeConfig, tmp_path: Path, number: int) -> None:
    class Ended(BaseException):
        pass

    def end(number: int, frame: Any) -> None:
        raise Ended

    config = make_run_config(checkpoint_every_images=160)
    before = signal.signal(number, end)
    try:
        with pytest.raises(Ended):
            run(config, source=Loading(tmp_path / "steps", number, at=8, times=2))
        assert signal.getsignal(number) is end
    finally:
        signal.signal(number, before)
    assert len((tmp_path / "steps").read_text().splitlines()) == 7  # the eighth was cut short
    assert [path.name[-18:-12] for path in list_checkpoints(config.out)] == ["000160"]
    assert not list(Path(config.out).glob(".*"))
    ended, _ = run(config, resume="auto")
    whole, _ = run(make_run_config(out=str(tmp_path / "whole")))
    assert_bitwise(ended.checkpoint, whole.checkpoint)


# ---------------------------------------------------------------- the command line


@pytest.fixture
def command(tmp_path: Path) -> Iterator[list[str]]:
    config = tmp_path / "tiny.toml"
    out = str(tmp_path / "run")
    config.write_text(
        f"total_images = 320\nbatch_size = 32\nout = {out!r}\n"
        '[model]\ntype = "tiny"\nprediction = "edm"\ntime_convention = "log_sigma"\n'
        'sigma_data = "auto"\n[data]\nsource = "digits"\n'
    )
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield ["train", "--config", str(config)]
    assert {number: signal.getsignal(number) for number in before} == before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize(
    ("at", "times", "kept"), [(0, 1, 0), (0, 2, 0), (1, 1, 1), (6, 1, 6), (6, 2, 0)]
)
def test_exit_codes(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, number: int, code: int, at: int, times: int, kept: int,
) -> None:  # fmt: skip
    """While it is loading nothing is lost, so it acts at once there; and so does a second one."""
    steps = tmp_path / "steps"
    monkeypatch.setitem(dataset.SOURCES, "digits", lambda **o: Loading(steps, number, at, times))
    assert main(command) == code
    captured = capsys.readouterr()
    assert not captured.out
    last = captured.err.splitlines()[-1]
    if kept:
        (checkpoint,) = list_checkpoints(tmp_path / "run")
        assert read_info(checkpoint).step == kept
        assert last.startswith(f"k-diffusion train: stopped at {32 * kept} of 320 images")
        assert str(checkpoint) in last
        assert last.endswith("the same command with --resume goes on")
    else:
        assert last == "k-diffusion train: stopped"
        assert not list_checkpoints(tmp_path / "run")
    assert "Traceback" not in captured.err
    monkeypatch.setitem(dataset.SOURCES, "digits", lambda **options: Loading(steps))
    assert main([*command, "--resume", "auto"]) == 0
    (checkpoint,) = list_checkpoints(tmp_path / "run")[-1:]
    assert read_info(checkpoint).images_seen == 320
    loaded = steps.read_text().splitlines()
    if kept or at == 0:
        assert len(loaded) == len(set(loaded)) == 10
