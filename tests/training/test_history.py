"""What is read of a run: lines that stand, events, and files that are damaged or none."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from k_diffusion.training.config import TrainConfig
from k_diffusion.training.dataset import ArraySource, Digits, Stream
from k_diffusion.training.history import History, HistoryError, Judge, read_history, series
from k_diffusion.training.lengths import average_lengths, main_age
from k_diffusion.training.run import run_training

from .made_runs import EDGES, course, line, start, write

MakeConfig = Callable[..., TrainConfig]


def roll_back(step: int) -> dict[str, object]:
    return {"event": "roll_back", "step": step, "images_seen": 32 * step, "passed_over": [1, 2]}


def test_lines_and_events(tmp_path: Path) -> None:
    spike = {"event": "spike", "step": 12, "images_seen": 384, "loss": 9.0, "median": 1.0}
    run = write(tmp_path, [start(parameters=7), line(10), spike, line(20, noise_scale=3.0)])
    history = read_history(run)
    assert history.path == tmp_path / "metrics.jsonl"
    assert history.start["parameters"] == 7
    assert history.band_edges == tuple(EDGES)
    assert history.batch_size == 32
    assert history.setting("optimizer.lr") == 1e-3
    assert history.setting("optimizer.rate", 5) == 5
    assert history.setting("grad_clip.more") is None
    assert [one.step for one in history.lines] == [10, 20]
    assert history.images_seen == 640
    assert history.lines[1].bands == pytest.approx([line(20)["loss"]] * 8)
    assert list(series(history.lines, "noise_scale")) == [(640, 3.0)]
    (event,) = history.events
    assert (event.kind, event.images_seen, event.stands) == ("spike", 384, True)
    assert event.facts == {"step": 12, "loss": 9.0, "median": 1.0}
    assert history.unreadable == 0
    assert read_history(history.path) == history


def test_of_two_lines_of_the_same_images_the_last_holds(tmp_path: Path) -> None:
    facts = [start(), line(10, loss=1.0), line(20, loss=2.0), line(20, loss=3.0), line(30)]
    history = read_history(write(tmp_path, facts))
    assert [one.step for one in history.lines] == [10, 20, 30]
    assert history.lines[1].loss == 3.0


def test_what_a_roll_back_gave_up_is_dropped(tmp_path: Path) -> None:
    """To step 15: of the lines at 10, 20, 30 the first stands; then 20 again and 40."""
    spike = {"event": "spike", "step": 25, "images_seen": 800, "loss": 9.0, "median": 1.0}
    early = {**spike, "images_seen": 480}
    facts = [start(), early, line(10), line(20, loss=5.0), spike, line(30), roll_back(15),
             line(20, loss=1.0), spike, line(40)]  # fmt: skip
    history = read_history(write(tmp_path, facts))
    assert [(one.step, one.loss) for one in history.lines if one.step < 40] == [
        (10, line(10)["loss"]), (20, 1.0)
    ]  # fmt: skip
    assert [one.step for one in history.lines] == [10, 20, 40]
    assert [(e.kind, e.stands) for e in history.events] == [
        ("spike", True), ("spike", False), ("roll_back", True), ("spike", True)
    ]  # fmt: skip
    # A second one, to before the first: that stays told.
    history = read_history(write(tmp_path, [*facts, roll_back(5)]))
    assert history.lines == ()
    assert [e.stands for e in history.of_kind("roll_back")] == [True, True]
    assert [e.stands for e in history.of_kind("spike")] == [False, False, False]
    # A third one, to after a spike that was given up: this stays so.
    history = read_history(write(tmp_path, [*facts, line(50), roll_back(45)]))
    assert [e.stands for e in history.of_kind("spike")] == [True, False, True]


def test_a_line_of_the_very_images_that_a_run_went_back_to_stands(tmp_path: Path) -> None:
    found = {"event": "evaluate", "step": 20, "images_seen": 640, "figures": {"fid": 1.0}}
    facts = [start(), line(10), line(20), found, line(30), roll_back(20)]
    history = read_history(write(tmp_path, facts))
    assert [one.step for one in history.lines] == [10, 20]
    assert [(e.kind, e.stands) for e in history.events] == [("evaluate", True), ("roll_back", True)]


def test_numbers_that_are_none_and_lines_out_of_order(tmp_path: Path) -> None:
    facts = [
        start(parameters=1), start(parameters=2), "[" * 100_000,
        '{"event": "train", "step": true, "images_seen": 32}',
        line(30), line(10, loss=math.nan, lr=True, terms={"a": math.inf, "b": 1}, bands=[math.inf]),
    ]  # fmt: skip
    folder = write(tmp_path, facts)
    (folder / "metrics.jsonl").write_bytes((folder / "metrics.jsonl").read_bytes() + b"\xff\xfe\n")
    history = read_history(folder)
    assert history.start["parameters"] == 1
    assert [one.step for one in history.lines] == [10, 30]
    first = history.lines[0]
    assert (first.loss, first.lr, first.terms, first.bands) == (None, None, {"b": 1.0}, (None,))
    assert history.unreadable == 3


def test_what_is_cut_or_foreign_is_passed_over(tmp_path: Path) -> None:
    facts = [start(), line(10), '{"event": "train", "step": 20, "imag', "[1, 2]", '{"a": 1}', "",
             '{"event": "train"}', '{"event": "train", "step": 2.5, "images_seen": 1}',
             '{"event": 3}', "\x00\xff", line(30, loss=None, bands=[None] * 8, lr="x")]  # fmt: skip
    history = read_history(write(tmp_path, facts))
    assert [one.step for one in history.lines] == [10, 30]
    assert history.lines[1].loss is None
    assert history.lines[1].lr is None
    assert history.lines[1].bands == (None,) * 8
    assert history.unreadable == 7


def test_an_older_run_tells_less(tmp_path: Path) -> None:
    old = {"event": "train", "step": 4, "images_seen": 128, "loss": 1.0}
    history = read_history(write(tmp_path, [old]))
    assert history.band_edges == ()
    assert history.config == {}
    assert history.data == {}
    assert history.batch_size == 32
    assert history.lines[0].bands == ()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "none", r"none is no run \(there is no such folder\)"),
        (lambda folder: folder, r"is no run \(it holds no metrics.jsonl\): give the folder"),
        (lambda folder: write(folder, []), "holds no line of a run: give the folder of one that"),
        (lambda folder: write(folder, ["a", '{"b": 1}']), "holds no line of a run"),
    ],
)
def test_no_run(tmp_path: Path, make: Callable[[Path], Path], message: str) -> None:
    with pytest.raises(HistoryError, match=message) as caught:
        read_history(make(tmp_path))
    assert "\n" not in str(caught.value)


def test_of_a_real_run_that_went_back(make_run_config: MakeConfig) -> None:
    """As in test_recovery: steps 10 to 12 are spikes, and it goes back to step 8."""
    config = make_run_config(
        model={"type": "tiny", "num_classes": 10, "prediction": "flow", "time_convention": "unit"},
        spikes={"factor": 3.0, "window": 4, "patience": 3, "roll_back": True},
        checkpoint_every_images=128,
        log_every_images=96,
    )
    digits = Digits()
    stream, images = Stream(digits, 32, seed=3), digits.images.clone()
    for step in (9, 10, 11):
        images[stream[step].indices] *= 30.0
    source = ArraySource(images, digits.labels, digits.class_names)
    result = run_training(config, source=source, progress=False, say=lambda line: None)
    history = read_history(config.out)
    told = [json.loads(text) for text in result.metrics.read_text().splitlines()]
    assert [f["step"] for f in told if f["event"] == "train"] == [3, 6, 9, 12, 9, 15, 18, 20]
    assert [one.step for one in history.lines] == [3, 6, 9, 15, 18, 20]
    assert history.lines[2].loss == [f["loss"] for f in told if f.get("step") == 9][-1]
    assert [(e.kind, e.stands) for e in history.events] == [
        ("spike", False), ("spike", False), ("spike", False), ("diverged", False),
        ("roll_back", True), ("end", True),
    ]  # fmt: skip
    assert history.config == config.to_json() | {"model": history.config["model"]}
    assert history.data["images"] == len(digits)
    assert len(history.band_edges) == 7


def test_it_is_read_without_torch(tmp_path: Path) -> None:
    run = write(tmp_path, course())
    code = (
        "import sys, k_diffusion; before = set(sys.modules)\n"
        "from k_diffusion.training.history import read_history\n"
        "from k_diffusion.training.doctor import told\n"
        f"assert len(read_history({str(run)!r}).lines) == 60\n"
        "roots = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print('brought', sorted({'torch', 'numpy', 'pydantic', 'accelerate'} & roots))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "brought []\n", done.stdout + done.stderr


# ---------------------------------------------------------------- lengths of the averages


def by_hand(decays: list[float]) -> tuple[float, float]:
    """Mean and standard deviation of the ages in an average whose updates keep these shares."""
    weights, ages = [1.0], [0.0]
    for decay in decays:
        weights = [decay * weight for weight in weights] + [1 - decay]
        ages = [age + 1 for age in ages] + [0.0]
    mean = sum(w * a for w, a in zip(weights, ages, strict=True))
    square = sum(w * a * a for w, a in zip(weights, ages, strict=True))
    return mean, math.sqrt(square - mean * mean)


def test_lengths_of_averages(tmp_path: Path) -> None:
    config = {"ema": {"profiles": [0.05, 0.1]}}
    decays = {10: 0.5, 20: 0.9, 60: 0.95, 64: 1.0}  # the last step was skipped
    facts = [start(config), *(line(step, ema_decay=decay) for step, decay in decays.items())]
    found = average_lengths(read_history(write(tmp_path, facts)))
    assert set(found) == {"ema", "ema_0.05", "ema_0.1"}
    assert found["ema_0.05"] == [(32 * step, 0.05 * 32 * step) for step in decays]
    each = [0.5] * 10 + [0.9] * 10 + [0.95] * 40 + [0.95] * 4
    for (images, length), step in zip(found["ema"], decays, strict=True):
        assert images == 32 * step
        assert length == pytest.approx(32 * by_hand(each[:step])[1], rel=1e-9)
    age = main_age(read_history(tmp_path))
    assert age == pytest.approx(32 * by_hand(each)[0], rel=1e-9)


def test_a_long_average_of_constant_decay_is_geometric(tmp_path: Path) -> None:
    facts = [start(), line(100_000, ema_decay=0.99)]
    ((_, length),) = average_lengths(read_history(write(tmp_path, facts)))["ema"]
    assert length == pytest.approx(32 * math.sqrt(0.99) / 0.01, rel=1e-9)


def test_none_where_nothing_is_told(tmp_path: Path) -> None:
    empty = History(tmp_path, {}, (), ())
    assert average_lengths(empty) == {}
    assert main_age(empty) is None


def test_figures_that_stand(tmp_path: Path) -> None:
    """Those of steps given up, and the earlier of two of one time, are left out."""

    def said(step: int, extractor: str = "a", samples: int = 10, **figures: Any) -> dict[str, Any]:
        told = {"extractor": extractor, "samples": samples, "figures": figures or None}
        return {"event": "evaluate", "step": step, "images_seen": 32 * step, **told}

    found = read_history(
        write(
            tmp_path,
            [
                *course(),
                said(10, fid=9.0, kid=1.0),
                said(20, fid=8.0),
                said(30, fid=7.0),
                {"event": "roll_back", "step": 20, "images_seen": 640, "passed_over": [21, 22]},
                said(40, fid=6.0),
                said(40, fid=5.0, kid=True),
                said(50),
                said(60, extractor="b", fid=4.0),
                said(70, samples=11, fid=3.0),
                said(80, fid=2.0),
            ],
        )
    ).figures()
    assert found == {
        Judge("a", 10): {
            "fid": [(320, 9.0), (640, 8.0), (1280, 5.0), (2560, 2.0)],
            "kid": [(320, 1.0)],
        },
        Judge("b", 10): {"fid": [(1920, 4.0)]},
        Judge("a", 11): {"fid": [(2240, 3.0)]},
    }
