"""Two runs in one folder, and what a killed one leaves."""

from __future__ import annotations

import errno
import os
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from k_diffusion.training import lock
from k_diffusion.training.check import check_run
from k_diffusion.training.config import ConfigError, TrainConfig
from k_diffusion.training.lock import LOCK, RunLock, refuse_busy
from k_diffusion.training.retention import list_checkpoints
from k_diffusion.training.run import run_training
from k_diffusion.training.trainer import Trainer, TrainState

MakeConfig = Callable[..., TrainConfig]

HOLDER = """
import sys, time
from pathlib import Path
from k_diffusion.training.lock import RunLock
held = RunLock(Path(sys.argv[1]), print)
print("held", flush=True)
time.sleep(600)
"""


@contextmanager
def another(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that has the lock."""
    command = [sys.executable, "-c", HOLDER, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def test_the_second_run_names_the_first_and_a_killed_one_is_taken_over(
    make_run_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_run_config(total_images=64)
    out = Path(config.out)
    out.mkdir()
    said: list[str] = []
    with another(out) as process:
        message = f"'{out}' is in use by another run, process {process.pid}: wait for its end"
        for resume in (None, "auto"):
            with monkeypatch.context() as patch:
                patch.delattr("k_diffusion.training.run.Trainer")  # before anything is loaded
                with pytest.raises(ConfigError, match=message):
                    run_training(config, resume=resume, progress=False, say=said.append)
        with pytest.raises(ConfigError, match=message):
            RunLock(out, said.append)  # though it may have come between the look and this
        assert sorted(path.name for path in out.iterdir()) == [LOCK]
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert (out / LOCK).exists()
        refuse_busy(out)
        run_training(config, progress=False, say=said.append)
        assert said == [f"taking over {out} from process {process.pid}, which is gone"]
    assert not (out / LOCK).exists()


def test_a_run_in_the_same_process_and_its_children(make_run_config: MakeConfig) -> None:
    config = make_run_config(workers=2, total_images=96)
    again: list[str] = []

    def begin_another(trainer: Trainer, state: TrainState) -> None:
        if state.step == 2:
            with pytest.raises(ConfigError, match=f"process {os.getpid()}, which is this one"):
                run_training(config, overwrite=True, progress=False)
            with pytest.raises(ConfigError, match=f"process {os.getpid()}, which is this one"):
                check_run(config, overwrite=True)
            with pytest.raises(ConfigError, match=f"process {os.getpid()}, which is this one"):
                RunLock(Path(config.out), again.append)
            code = "import sys, pathlib, k_diffusion.training.lock as l; "
            code += "l.refuse_busy(pathlib.Path(sys.argv[1]))"
            command = [sys.executable, "-c", code, config.out]
            ended = subprocess.run(command, capture_output=True, text=True)
            again.append(ended.stderr.splitlines()[-1])

    run_training(config, progress=False, on_step=begin_another)
    assert len(again) == 1
    assert f"is in use by another run, process {os.getpid()}: " in again[0]
    run_training(config, overwrite=True, progress=False)  # it has been let go of


def test_a_run_that_fails_lets_go(make_run_config: MakeConfig) -> None:
    def fail(trainer: Trainer, state: TrainState) -> None:
        raise RuntimeError("of the caller")

    config = make_run_config(total_images=64)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="of the caller"):
            run_training(config, progress=False, on_step=fail)
        assert not (Path(config.out) / LOCK).exists()


def test_checkpoints_that_came_between_the_look_and_the_lock(
    make_run_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_run_config(total_images=64)

    class Slow(Trainer):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            monkeypatch.setattr("k_diffusion.training.run.Trainer", Trainer)
            run_training(config, progress=False)

    monkeypatch.setattr("k_diffusion.training.run.Trainer", Slow)
    with pytest.raises(ConfigError, match="another run has written to out = .* meanwhile"):
        run_training(config, progress=False)


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> bool:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(lock, "_try_lock", refuse)
    said: list[str] = []
    (tmp_path / LOCK).write_text("1 elsewhere\n")
    refuse_busy(tmp_path)
    RunLock(tmp_path, said.append).release()
    assert said == [
        f"{tmp_path / LOCK} cannot be locked ({os.strerror(errno.ENOLCK)}): see to it that no "
        "other run writes there"
    ]


def test_what_the_file_says(tmp_path: Path) -> None:
    said: list[str] = []
    held = RunLock(tmp_path, said.append)
    assert (tmp_path / LOCK).read_text() == f"{os.getpid()} {platform.node()}\n"
    held.release()
    held.release()
    assert not said
    (tmp_path / LOCK).write_text("12 elsewhere and with a longer text than the next one has\n")
    held = RunLock(tmp_path, said.append)
    assert said.pop().endswith("from process 12 on elsewhere and with a longer text than the next "
                               "one has, which is gone")  # fmt: skip
    assert (tmp_path / LOCK).read_text() == f"{os.getpid()} {platform.node()}\n"
    held.release()


def test_the_lock_is_on_the_file_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that ends between the opening of its lock file and its locking takes the file away."""
    (tmp_path / LOCK).write_text("")
    real, calls = lock._try_lock, []

    def ends_meanwhile(file: Any, shared: bool) -> bool:
        if not calls:
            (tmp_path / LOCK).unlink()
        calls.append(shared)
        return real(file, shared)

    monkeypatch.setattr(lock, "_try_lock", ends_meanwhile)
    held = RunLock(tmp_path, print)
    assert len(calls) == 2
    assert held._file is not None
    assert os.path.samestat(os.fstat(held._file.fileno()), (tmp_path / LOCK).stat())
    held.release()


def test_a_folder_removed_in_mid_run_is_locked_again(
    make_run_config: MakeConfig,
) -> None:
    config = make_run_config(total_images=192, checkpoint_every_images=96)
    out, there = Path(config.out), []

    def remove(trainer: Trainer, state: TrainState) -> None:
        if state.step == 2:
            shutil.rmtree(out)
        there.append((out / LOCK).exists())

    run_training(config, progress=False, say=print, on_step=remove)
    assert there == [True, False, False, True, True, True]
    shutil.rmtree(out)

    def lose(trainer: Trainer, state: TrainState) -> None:
        if state.step == 2:
            shutil.rmtree(out)
            out.mkdir()
            process.append(stack.enter_context(another(out)).pid)

    process: list[int] = []
    with ExitStack() as stack:
        with pytest.raises(ConfigError, match="is in use by another run, process ") as caught:
            run_training(config, progress=False, on_step=lose)
        assert f"process {process[0]}:" in str(caught.value)
        assert (out / LOCK).exists()
        assert not list_checkpoints(out)
