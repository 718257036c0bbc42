"""The line of live progress, by a clock of the test's own."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from k_diffusion.training.config import TrainConfig
from k_diffusion.training.progress import Progress, progress_line
from k_diffusion.training.run import run_training
from k_diffusion.training.trainer import Trainer, TrainState

MakeConfig = Callable[..., TrainConfig]


@pytest.fixture(autouse=True)
def columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "101")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def state(images_seen: int = 310, speed: float = 52.34, left: float = 13.2) -> TrainState:
    return TrainState(
        step=images_seen // 10, images_seen=images_seen, total_images=1000, loss=1.0,
        grad_norm=1.0, lr=1e-3, ema_decay=0.5, skipped=False, skipped_steps=0,
        images_per_second=speed, seconds_left=left,
    )  # fmt: skip


def test_what_is_not_a_step_is_left_too() -> None:
    shown = Terminal()
    Progress(stream=shown, clock=Clock()).show(state(left=50.0), 1.0, besides=100.0)
    assert shown.getvalue().endswith("| 02:30 left")
    listed = io.StringIO()
    Progress(stream=listed, clock=Clock()).show(state(left=50.0), 1.0, True, 100.0)
    assert listed.getvalue().endswith("| 02:30 left\n")


def test_evaluations_to_come_are_left_too(
    make_run_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the second on: how long one takes is told by the first. At the end none is left."""
    told: list[tuple[int, float]] = []
    real = Progress.show

    def show(self: Progress, state: TrainState, loss: float, last: bool, besides: float) -> None:
        told.append((state.images_seen, besides))
        real(self, state, loss, last, besides)

    monkeypatch.setattr(Progress, "show", show)
    preview = {"every_images": 256, "count": 1, "steps": 2}
    run_training(make_run_config(preview=preview), progress=False, say=lambda line: None)
    found = dict(told)
    assert [found[at] for at in range(32, 257, 32)] == [0.0] * 8
    assert found[288] == found[480] > 0.0
    assert found[640] == 0.0


def test_what_the_line_says() -> None:
    assert progress_line(state(), 0.43117) == (
        " 31% ######.............. 310 of 1,000 images | 52.3 images/s, loss 0.4312 | 00:13 left"
    )
    for speed, shown in ((0.0312, "0.03"), (9.5, "9.50"), (1234.5, "1,234")):
        assert f"| {shown} images/s" in progress_line(state(speed=speed), 1)
    for seconds, shown in (
        (0, "00:00"), (-3, "00:00"), (59.6, "01:00"), (3599, "59:59"), (3600, "1:00:00"),
        (86399, "23:59:59"), (90061, "1 d 01:01:01"), (math.inf, "?"), (math.nan, "?"),
    ):  # fmt: skip
        assert progress_line(state(left=seconds), 1).endswith(f"| {shown} left")
    assert progress_line(state(999), 1).startswith(" 99% ###################. 999")
    assert progress_line(state(1000), 1).startswith("100% #################### 1,000")


def test_a_terminal_has_one_line_that_lives() -> None:
    stream, clock = Terminal(), Clock()
    progress = Progress(stream=stream, clock=clock)
    progress.show(state(310), 0.5)
    first = progress_line(state(310), 0.5)
    assert stream.getvalue() == "\r" + first
    clock.now += 0.1
    progress.show(state(320), 0.5)  # too soon
    assert stream.getvalue() == "\r" + first
    clock.now += 0.11
    progress.show(state(330, left=5e5), 0.5)
    longer = progress_line(state(330, left=5e5), 0.5)
    assert stream.getvalue().endswith("\r" + longer)
    clock.now += 1
    progress.show(state(340), 0.5)
    last = progress_line(state(340), 0.5)
    assert stream.getvalue().endswith("\r" + last + " " * (len(longer) - len(last)))
    progress.say("news")
    assert stream.getvalue().endswith(f"\r{' ' * len(last)}\rnews\n\r{last}")
    progress.show(state(350), 0.5, last=True)  # at once
    progress.close()
    assert stream.getvalue().endswith(progress_line(state(350), 0.5) + "\n")
    length = len(stream.getvalue())
    progress.close()
    assert len(stream.getvalue()) == length


def test_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for columns, start in (
        (80, "\r 31% ###......... 310 of"), (70, "\r 31% 310 of"), (21, "\r 31% 310 of 1,000 i")
    ):  # fmt: skip
        monkeypatch.setenv("COLUMNS", str(columns))
        stream = Terminal()
        Progress(stream=stream).show(state(), 0.5)
        assert stream.getvalue().startswith(start)
        assert len(stream.getvalue()) <= columns
        assert stream.getvalue().endswith("| 00:13 left") == (columns > 21)


def test_a_file_has_a_line_now_and_then() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = Progress(stream=stream, clock=clock)
    for second in range(100):
        clock.now = 1000.0 + second
        progress.show(state(second), 0.5)
        progress.say("news") if second == 50 else None
    progress.show(state(100), 0.5, last=True)
    progress.close()
    expected = [progress_line(state(n), 0.5) for n in (30, 60, 90, 100)]
    expected.insert(1, "news")
    assert stream.getvalue() == "".join(line + "\n" for line in expected)


def test_a_clock_that_goes_backwards_does_not_silence_it() -> None:
    stream, clock = Terminal(), Clock()
    progress = Progress(stream=stream, clock=clock)
    progress.show(state(310), 0.5)
    clock.now -= 1e6
    progress.show(state(320), 0.5)
    assert stream.getvalue().endswith(progress_line(state(320), 0.5))


def test_no_progress_is_news_alone() -> None:
    stream = Terminal()
    progress = Progress(shown=False, stream=stream)
    progress.show(state(), 0.5, last=True)
    progress.say("news")
    progress.say("image a\x1b[2J\nb\udc80.png of Ångström")  # a file's name may be anything
    progress.close()
    assert stream.getvalue() == "news\nimage a\\x1b[2J\\nb\\udc80.png of Ångström\n"


def test_a_stream_that_cannot_be_written_ends_nothing() -> None:
    class Full(Terminal):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    for stream in (Full(), Terminal()):
        progress = Progress(stream=stream)
        if type(stream) is Terminal:
            stream.close()
        progress.show(state(), 0.5)
        progress.say("news")
        progress.close()


def ticking(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Each look of the loop at the clock is so many seconds later than the one before."""
    now = 0.0

    def look() -> float:
        nonlocal now
        now += seconds
        return now

    # Of the loop alone: what else is in the process may look at the clock in a step, too.
    monkeypatch.setattr("k_diffusion.training.state.time", SimpleNamespace(perf_counter=look))


def test_time_left_is_right_after_a_resume(
    make_run_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """16 of 20 steps at one second each, then the rest at two: two seconds a step are left."""
    shown: list[TrainState] = []
    options: dict[str, Any] = {"progress": False, "on_step": lambda t, state: shown.append(state)}
    ticking(monkeypatch, 1.0)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_batches", first_batches(16))
        half = make_run_config(checkpoint_every_images=512)
        run_training(half, **options)
    assert [(s.images_per_second, s.seconds_left) for s in shown] == [
        (32.0, 20.0 - step) for step in range(1, 17)
    ]
    ticking(monkeypatch, 2.0)
    shown.clear()
    path = Path(half.out) / "checkpoint-000000000512.safetensors"
    run_training(make_run_config(), resume=path, **options)
    assert [(s.images_per_second, s.seconds_left) for s in shown] == [
        (16.0, 6.0), (16.0, 4.0), (16.0, 2.0), (16.0, 0.0)
    ]  # fmt: skip
    ticking(monkeypatch, -1.0)
    shown.clear()
    run_training(make_run_config(), overwrite=True, **options)
    assert all(s.images_per_second > 0 and math.isfinite(s.seconds_left) for s in shown)


def first_batches(count: int) -> Any:
    real = Trainer._batches

    def batches(self: Trainer) -> Any:
        for step, batch in enumerate(real(self)):
            if step == count:
                return
            yield batch

    return batches
