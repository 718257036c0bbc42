"""The benchmark of training: its stopwatch, what it says, and that its dry parts run."""

import importlib
import itertools
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from training_bench import library, report
from training_bench.library import Laps, Setting, Stopwatch, make_images
from training_bench.peer_ours import Ours
from training_bench.worker import Answers


class Clock:
    """Goes on by what it is told to."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    found = Clock()
    monkeypatch.setattr(library, "time", found)
    return found


def test_the_stopwatch_tells_the_parts_of_each_step(clock):
    watch = Stopwatch()

    def wait(seconds):
        clock.now += seconds

    clip = watch.timed("clip", wait)
    clip(100.0)  # outside all steps
    batches = Laps((wait(0.5) or i for i in itertools.count()), watch)
    for i in range(3):
        assert next(batches) == i
        clip(1.0)
        clip(2.0 + i)
        wait(4.0)
    watch.stop()
    clip(100.0)
    assert watch.steps == [{"data": 0.5, "clip": 3.0 + i, "total": 7.5 + i} for i in range(3)]


def step(total, **parts):
    return {"total": total, "forward": 0.2, "backward": 0.3, **parts}


def test_what_a_row_says():
    turns = [
        [step(1.0, ema=0.1), step(0.8)],
        [step(9.0), step(9.0)],  # something else took the machine
        [step(0.9, ema=0.1), step(0.9, data=0.04)],
    ]
    row = report.row({"key": "ours"}, turns, 18)
    assert row["step, ms"] == pytest.approx(900)
    assert row["images/s"] == pytest.approx(20)
    assert row["outside, ms"] == pytest.approx(400)
    assert (row["forward, ms"], row["backward, ms"]) == (200, 300)
    assert row["ema, ms"] == pytest.approx(50)  # every second step: its mean
    assert row["other, ms"] == pytest.approx(350)


def results(outside, speed):
    rows = []
    for key, setting, out, rate in (
        ("ours", "every step", 9.0, 9.0), ("peer", "tenth", outside, speed),
        ("ours", "tenth", 1.0, 1.0), ("peer", "every step", 18.0, 9.0),
    ):  # fmt: skip
        rows.append(report.row({"key": key, "library": key, "setting": setting}, [[step(1.0)]], 1))
        rows[-1].update({"outside, ms": out, "images/s": rate, "a batch, ms": 7.0})
    about = {"seconds": 1, "processor": "any", "python": "3", "torch": "2", "batch": 8,
             "rounds": 1, "threads": 2, "workers": 2, "steps": 10, "skipped": 5,
             "network": "dim=8", "parameters": 8e6, "libraries": {"p": "1.0"}}  # fmt: skip
    return {"about": about, "rows": rows}


def test_which_goals_are_missed():
    assert [v for *_, v in report.goals(results(2.0, 1.0))] == ["met"] * 4
    found = report.goals(results(1.6, 1.25))
    assert [row[0].rpartition(", ")[2] for row in found] == [
        *["both averages tenth"] * 2, *["both averages every step"] * 2
    ]  # fmt: skip
    assert [row[2:] for row in found] == [
        ("0.625", "missed by 25.0%"),
        ("0.800", "missed by 20.0%"),
        ("0.500", "met"),
        ("1.000", "met"),
    ]
    page = report.page(results(2.0, 1.0))
    assert "| **ours** | tenth | 1.00 |" in page
    assert "8.00 million parameters" in page


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x, t):
        return self.layer(x) * t.reshape(-1, 1, 1, 1)


@pytest.fixture
def _undone(monkeypatch):
    """What the stopwatch puts in torch's place goes when the test does."""
    monkeypatch.setattr(torch.autograd, "backward", torch.autograd.backward)
    for name in ("get_total_norm", "clip_grads_with_norm_"):
        monkeypatch.setattr(nn.utils, name, getattr(nn.utils, name))


@pytest.mark.usefixtures("_undone")
def test_ours_is_measured(tmp_path):
    make_images(tmp_path / "images", 20)
    ours = []

    def make(setting):
        ours.append(Ours(Small(), setting))
        return ours[0]

    answers = Answers(make)
    setting = {"images": str(tmp_path / "images"), "batch": 4, "workers": 0, "network": {}}
    about = answers({"do": "begin", "threads": 1, "setting": setting})
    assert about["parameters"] == 84
    for _ in range(2):
        steps = answers({"do": "steps", "steps": 3, "skipped": 2, "ema_every": 1})
        assert len(steps) == 3
        for one in steps:
            assert set(one) == {
                "total", "data", "forward", "backward", "clip", "optimizer", "ema",
            }  # fmt: skip
            assert sum(one.values()) <= 2 * one["total"]
            assert min(one.values()) > 0
    assert answers({"do": "load", "batches": 2}) > 0
    made = ours[0].trainer.ema.updates
    answers({"do": "steps", "steps": 10, "skipped": 0, "ema_every": 10})
    assert ours[0].trainer.ema.updates == made + 10
    assert ours[0].trainer.ema.reached == 20 - 20 % 10
    answers({"do": "end"})


def test_images_are_what_both_read(tmp_path):
    make_images(tmp_path, 3)
    from k_diffusion.training import Folder

    source = Folder(tmp_path, 32)
    assert len(source) == 3
    assert source.shape == (3, 32, 32)
    assert 0.1 < source.std < 1


def test_the_gpu_script_s_dry_run(monkeypatch, tmp_path, capsys):
    script = importlib.import_module("on_gpu_training")
    out = tmp_path / "none.json"
    monkeypatch.setattr(sys, "argv", ["on_gpu_training.py", "--dry-run", "--out", str(out)])
    script.main()
    said = capsys.readouterr().out
    rows = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    assert [row["optimizer"] for row in rows] == ["adamw", "muon"]
    for row in rows:
        assert row["images/s"] * row["s a step"] == pytest.approx(4)
        assert 0 < row["data wait, ms"] < 1e3 * row["s a step"]
        assert row["share"] > 0
    assert "of a step spent waiting for data" in said
    assert not out.exists()


class Inline:
    """A worker in this process, whose clock is not looked at."""

    def __init__(self, module, name, folder):
        self.name, self.asked = name, []

    def ask(self, **order):
        order = json.loads(json.dumps(order))
        if order["do"] == "begin":
            Setting(**order["setting"])
            return {"name": self.name, "version": "1", "parameters": 8}
        if order["do"] == "load":
            return 0.003
        if order["do"] == "end":
            return None
        return [step(1.0 if self.name == "ours" else 2.0)] * order["steps"]

    def close(self):
        pass


def test_the_whole_benchmark_runs(monkeypatch, tmp_path, capsys):
    bench = importlib.import_module("training")
    monkeypatch.setattr(bench, "Worker", Inline)
    (tmp_path / "peers" / bench.PEER / "ema_pytorch").mkdir(parents=True)
    out = tmp_path / "training.json"
    argv = ["training.py", "--quick", "--peers", str(tmp_path / "peers"), "--out", str(out),
            "--docs", str(tmp_path)]  # fmt: skip
    monkeypatch.setattr(sys, "argv", argv)
    bench.main()
    rows = json.loads(out.read_text())["rows"]
    assert [r["outside, ms"] for r in rows] == [500, 1500, 500, 1500]
    every, tenth = "updated in every step", "updated every tenth step"
    assert [r["setting"] for r in rows] == [every, every, tenth, tenth]
    assert "| **ours** |" in (tmp_path / "benchmarks-training.md").read_text()
    assert "0.333, at most 0.5: met" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*argv[:3], str(tmp_path / "none")])
    with pytest.raises(SystemExit, match="not installed in .*: run `make bench`"):
        bench.main()
