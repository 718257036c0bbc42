"""Writing in the background: the same file, one at a time, and no failure that goes unsaid."""

from __future__ import annotations

import errno
import os
import resource
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from k_diffusion.training import writer as writer_module
from k_diffusion.training.checkpoint import (
    CheckpointError,
    Contents,
    make_contents,
    read_checkpoint,
    read_info,
    save_checkpoint,
    write_checkpoint,
)
from k_diffusion.training.config import TrainConfig
from k_diffusion.training.retention import latest_checkpoint, list_checkpoints
from k_diffusion.training.run import run_training
from k_diffusion.training.trainer import Trainer, TrainState
from k_diffusion.training.writer import CheckpointWriter, HostCopy

MakeConfig = Callable[..., TrainConfig]


class Gate:
    """Holds every write until it is opened; so no test depends on who is faster."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.reached = threading.Event(), threading.Event()
        self.written: list[str] = []

        def write(path: Path, contents: Contents) -> str:
            self.reached.set()
            assert self.open.wait(60)
            self.written.append(path.name)
            return write_checkpoint(path, contents)

        monkeypatch.setattr(writer_module, "write_checkpoint", write)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch)


def contents_of(*tensors: Tensor, **facts: Any) -> Contents:
    named = {f"w{i}": tensor for i, tensor in enumerate(tensors)}
    return make_contents({"model": named}, **{"config": {}, "images_seen": 1, "step": 1, **facts})


def no_space(monkeypatch: pytest.MonkeyPatch, at_call: int = 1) -> None:
    """From that file on, the disk is full."""
    calls = []
    open_file = Path.open

    class Full:
        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *error: Any) -> None:
            self.file.close()

        def write(self, data: Any) -> int:
            self.file.write(bytes(data)[:100])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def open_full(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        file = open_file(path, mode, *args, **options)
        if not path.name.endswith(".tmp") or mode != "wb":
            return file
        calls.append(path)
        return Full(file) if len(calls) >= at_call else file

    monkeypatch.setattr(Path, "open", open_full)


# ---------------------------------------------------------------- one write


def test_what_is_written_is_of_the_moment_of_the_save(tmp_path: Path, gate: Gate) -> None:
    weight, state = torch.arange(6.0), {"extra": {"steps": 1}}
    direct = tmp_path / "direct.safetensors"
    write_checkpoint(direct, contents_of(weight, torch.ones(()), state=state))
    path = tmp_path / "a.safetensors"
    with CheckpointWriter() as writer:
        writer.save(path, contents_of(weight, torch.ones(()), state=state))
        assert gate.reached.wait(60)
        weight.mul_(0)
        state["extra"]["steps"] = 2
        assert not path.exists()
        gate.open.set()
        sha256 = writer.wait()
    assert path.read_bytes() == direct.read_bytes()
    assert sha256 == read_info(path).sha256


def test_one_write_at_a_time(tmp_path: Path, gate: Gate) -> None:
    paths = [tmp_path / f"{name}.safetensors" for name in "ab"]
    order: list[str] = []

    def save_second() -> None:
        writer.save(paths[1], contents_of(torch.ones(3)), lambda: order.append("after b"))
        order.append("b")

    with CheckpointWriter() as writer:
        writer.save(paths[0], contents_of(torch.zeros(3)), lambda: order.append("after a"))
        second = threading.Thread(target=save_second)
        second.start()
        assert gate.reached.wait(60)
        assert second.is_alive()
        assert gate.written == []
        gate.open.set()
        second.join()
    assert order[0] == "after a"
    assert sorted(order) == ["after a", "after b", "b"]
    assert [float(read_checkpoint(p, ["model"])[1]["model"]["w0"].sum()) for p in paths] == [0, 3]


def test_the_host_copy_takes_its_memory_again() -> None:
    host = HostCopy()
    tensors = {"a": torch.ones(3), "b": torch.arange(4), "c": torch.ones(2, 2, requires_grad=True)}
    first = host.take(tensors)
    places = {name: tensor.data_ptr() for name, tensor in first.items()}
    assert not {t.data_ptr() for t in tensors.values()} & set(places.values())
    assert not any(tensor.requires_grad for tensor in first.values())
    second = host.take({"a": torch.full((3,), 2.0), "b": torch.ones(5), "d": torch.ones(1)})
    assert second["a"].data_ptr() == places["a"]
    assert second["a"].tolist() == [2, 2, 2]
    assert set(second) == {"a", "b", "d"}
    assert len(second["b"]) == 5


@pytest.mark.parametrize("background", [True, False])
def test_a_full_disk_is_told_and_the_old_file_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, background: bool
) -> None:
    path = tmp_path / "a.safetensors"
    write_checkpoint(path, contents_of(torch.zeros(3)))
    old = path.read_bytes()
    no_space(monkeypatch)
    gone: list[Path] = []
    said = (
        f"checkpoint {path} could not be written (No space left on device); what was there before "
        "is untouched"
    )
    writer = CheckpointWriter(background=background)
    if background:
        writer.save(path, contents_of(torch.ones(3)), lambda: gone.append(path))
    with pytest.raises(CheckpointError) as caught:  # in the background, the next one tells
        writer.save(path, contents_of(torch.ones(3)), lambda: gone.append(path))
    assert str(caught.value) == said
    assert gone == []
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]
    assert writer.wait() == ""  # it has been told


def test_a_file_that_may_grow_no_further(tmp_path: Path) -> None:
    """The system itself refuses, in the middle of the tensors."""
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, {"model": {"w": torch.zeros(10)}}, config={}, images_seen=0, step=0)
    old = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"could not be written \(File too large\)"):
            write_checkpoint(path, contents_of(torch.zeros(10_000)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_what_the_disk_does_not_hold_is_not_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bit that turns on the way to the disk is seen before the old file goes."""
    path = tmp_path / "a.safetensors"
    write_checkpoint(path, contents_of(torch.zeros(3)))
    old, fsync = path.read_bytes(), os.fsync

    def turn_a_bit(handle: int) -> None:
        fsync(handle)
        (half,) = tmp_path.glob(".*.tmp")
        data = bytearray(half.read_bytes())
        data[-2] ^= 1
        half.write_bytes(data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", turn_a_bit)
        with pytest.raises(CheckpointError, match="read back from the disk it is not what was"):
            write_checkpoint(path, contents_of(torch.ones(3)))
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]
    write_checkpoint(path, contents_of(torch.ones(3)))
    assert path.read_bytes() != old


def test_a_failure_is_raised_at_the_end_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_space(monkeypatch)
    said: list[str] = []

    def save_and_leave() -> None:
        with CheckpointWriter(say=said.append) as writer:
            writer.save(tmp_path / "a.safetensors", contents_of(torch.ones(3)))

    with pytest.raises(CheckpointError, match="No space left on device"):
        save_and_leave()
    assert said == []


def test_a_failure_beside_another_error_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_space(monkeypatch)
    said: list[str] = []

    def fail() -> None:
        with CheckpointWriter(say=said.append) as writer:
            writer.save(tmp_path / "a.safetensors", contents_of(torch.ones(3)))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert len(said) == 1
    assert "could not be written (No space left on device)" in said[0]


# ---------------------------------------------------------------- in a run


def run(config: TrainConfig, **options: Any) -> Any:
    return run_training(config, progress=False, say=lambda line: None, **options)


def test_a_run_writes_what_would_be_written_at_once(
    make_run_config: MakeConfig, tmp_path: Path
) -> None:
    """Bitwise; also where a step that follows has changed weights, moments and the log's sums."""

    def at_once(trainer: Trainer, state: TrainState) -> None:
        if state.step % 3 == 0 or state.step == 20:
            trainer.save(tmp_path / f"checkpoint-{state.images_seen:012d}.safetensors")

    config = make_run_config(checkpoint_every_images=96, keep_checkpoints=99)
    run(config, on_step=at_once)
    found = list_checkpoints(config.out)
    assert len(found) == 7
    for path in found:
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()


def test_a_run_ends_with_the_write(make_run_config: MakeConfig, gate: Gate) -> None:
    """Step 15 is not held up by the write of step 10's checkpoint; the end is."""

    def look(trainer: Trainer, state: TrainState) -> None:
        if state.step == 15:
            assert gate.reached.is_set()
            assert list_checkpoints(trainer.config.out) == []
            gate.open.set()

    result = run(make_run_config(checkpoint_every_images=320), on_step=look)
    assert gate.written == [
        "checkpoint-000000000320.safetensors",
        "checkpoint-000000000640.safetensors",
    ]
    assert read_info(result.checkpoint).sha256 == result.sha256


@pytest.mark.parametrize("background", [True, False])
def test_the_config_says_in_which_thread(
    make_run_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, background: bool
) -> None:
    main: list[bool] = []

    def write(path: Path, contents: Contents) -> str:
        main.append(threading.current_thread() is threading.main_thread())
        return write_checkpoint(path, contents)

    monkeypatch.setattr(writer_module, "write_checkpoint", write)
    run(make_run_config(background_checkpoints=background, checkpoint_every_images=320))
    assert main == [not background] * 2


def test_a_stop_and_an_error_wait_for_the_write(make_run_config: MakeConfig, gate: Gate) -> None:
    class Kill(BaseException):
        pass

    def stop(trainer: Trainer, state: TrainState) -> None:
        if state.step == 3:
            gate.open.clear()
            threading.Timer(0.05, gate.open.set).start()
            os.kill(os.getpid(), signal.SIGTERM)

    def fail(trainer: Trainer, state: TrainState) -> None:
        if state.step == 11:
            threading.Timer(0.05, gate.open.set).start()
            raise Kill

    config = make_run_config(checkpoint_every_images=320)
    with pytest.raises(Kill):
        run(config, on_step=fail)
    path = Path(config.out) / "checkpoint-000000000320.safetensors"
    assert latest_checkpoint(config.out) == path
    assert not [t for t in threading.enumerate() if t.name == "checkpoint"]
    config = make_run_config(out=config.out + "2")
    there: list[int] = []

    def say(line: str) -> None:
        assert line.startswith("stopped by SIGTERM at 96 of 640 images; checkpoint: ")
        there.append(len(list_checkpoints(config.out)))

    stopped = run_training(config, on_step=stop, say=say, progress=False)
    assert there == [1]
    assert stopped.stopped_by == signal.SIGTERM
    assert read_info(stopped.checkpoint).sha256 == stopped.sha256


@pytest.mark.parametrize("at_call", [2, 3])
def test_a_disk_that_fills_up_ends_the_run_and_leaves_the_old(
    make_run_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, at_call: int
) -> None:
    config = make_run_config(checkpoint_every_images=320, keep_checkpoints=1, total_images=960)
    with monkeypatch.context() as patch:
        no_space(patch, at_call)
        with pytest.raises(CheckpointError) as caught:
            run(config)
    failed = Path(config.out) / f"checkpoint-{320 * at_call:012d}.safetensors"
    assert str(caught.value) == (
        f"checkpoint {failed} could not be written (No space left on device); what was there "
        "before is untouched"
    )
    (old,) = list_checkpoints(config.out)  # one of two is kept, yet not for one that failed
    assert old.name == f"checkpoint-{320 * (at_call - 1):012d}.safetensors"
    assert sorted(p.name for p in old.parent.iterdir()) == [old.name, "metrics.jsonl"]
    assert run(config, resume="auto").resumed_from == old
