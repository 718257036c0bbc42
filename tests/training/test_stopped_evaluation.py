"""A stop in the midst of an evaluation: obeyed there, and the evaluation is made anew."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from k_diffusion.evaluation import train_small
from k_diffusion.models import MODELS
from k_diffusion.sampling.many import Many
from k_diffusion.training.checkpoint import read_checkpoint, read_info
from k_diffusion.training.config import TrainConfig
from k_diffusion.training.dataset import Digits
from k_diffusion.training.run import RunResult, run_training

MakeConfig = Callable[..., TrainConfig]
Launch = Callable[..., list[str]]
CHANGES: dict[str, Any] = {
    "evaluate": {
        "every_images": 256,
        "images": 24,
        "steps": 2,
        "batch_size": 10,
        "metrics": ["fid", "recall"],
    },
    "preview": {"every_images": 256, "count": 4, "steps": 2},
    "ema": {"profiles": [0.05], "snapshot_every_images": 256},
    "checkpoint_every_images": 320,
    "total_images": 512,
}


def quick(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        "k_diffusion.evaluation.measuring.train_small",
        lambda *a, **k: train_small(*a, images_seen=1438, **k),
    )


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)


_WHOLE: dict[str, Path] = {}


@pytest.fixture
def whole(
    make_run_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory, _quick: None
) -> Path:
    """What the run leaves that was never stopped; made once."""
    if not _WHOLE:
        folder = tmp_path_factory.mktemp("never") / "stopped"
        run(make_run_config(**CHANGES, out=str(folder)))
        _WHOLE["run"] = folder
    return _WHOLE["run"]


def send_at(patch: pytest.MonkeyPatch, what: Any, name: str, call: int, number: int) -> list[int]:
    """Have the so-many-th call of a method send a signal first; gives the count of calls."""
    calls, real = [0], getattr(what, name)

    def counted(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            os.kill(os.getpid(), number)
        return real(*args, **options)

    patch.setattr(what, name, counted)
    return calls


def lines(out: str | Path) -> list[dict[str, Any]]:
    found = map(json.loads, Path(out, "metrics.jsonl").read_text().splitlines())
    clocked = ("images_per_second", "seconds")
    return [{k: v for k, v in line.items() if k not in clocked} for line in found]


def contents(folder: str | Path) -> dict[str, Any]:
    """Everything that a run leaves, but what the clock and its place decide."""
    root = Path(folder)
    found: dict[str, Any] = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.suffix == ".png":
            found[name] = len(path.read_bytes()) > 0
        elif path.suffix == ".safetensors" and "evaluation" not in name:
            info, parts = read_checkpoint(path, ["model", "ema", "ema_0.05", "optimizer"]) if (
                "checkpoint" in name
            ) else (read_info(path), {})  # fmt: skip
            assert "owed" not in info.state.get("extra", {}), name
            found[name] = {f"{p}/{n}": t for p, named in parts.items() for n, t in named.items()}
        elif path.is_file() and path.name != "metrics.jsonl":
            found[name] = True
    return found


def assert_as_never_stopped(stopped: str | Path, whole: str | Path, there: int) -> None:
    """But for the checkpoint that the stop left."""
    one, other = contents(stopped), contents(whole)
    extra = f"checkpoint-{there:012d}.safetensors"
    if extra not in other:
        one.pop(extra, None)
    # An older one has made room for it.
    assert set(one) <= set(other)
    assert set(other) - set(one) <= {n for n in other if n.startswith("checkpoint-")}
    for name, tensors in one.items():
        if isinstance(tensors, dict):
            assert all(torch.equal(t, other[name][key]) for key, t in tensors.items()), name
    left, right = ([{**x, "config": 0, "sha256": 0} for x in lines(f)] for f in (stopped, whole))
    assert left == right


def run(config: TrainConfig, **options: Any) -> tuple[RunResult, list[str]]:
    said: list[str] = []
    return run_training(config, **{"progress": False, "say": said.append, **options}), said


@pytest.mark.parametrize(
    ("what", "name", "call", "at"),
    [
        (Digits, "batch", 3, 0),  # the data's hash
        (torch.optim.AdamW, "step", 3, 0),  # the small extractor's training
        (Many, "draw", 2, 256),  # samples on the way
        (Many, "draw", 5, 512),  # samples at the end
    ],
)
def test_it_is_obeyed_there_and_made_up_for(
    make_run_config: MakeConfig, whole: Path, what: Any, name: str, call: int, at: int
) -> None:
    config = make_run_config(**CHANGES)
    with pytest.MonkeyPatch.context() as patch:
        quick(patch)
        calls = send_at(patch, what, name, call, signal.SIGTERM)
        stopped, said = run(config)
    # Nothing of its kind was begun after it, but batches of the data are read ahead.
    assert call <= calls[0] <= call + (2 if name == "batch" else 0)
    assert stopped.stopped_by == signal.SIGTERM
    assert stopped.images_seen == at
    assert read_info(stopped.checkpoint).images_seen == at
    assert said[-1].startswith(f"stopped by SIGTERM at {at} of 512 images; checkpoint: ")
    assert lines(config.out)[-1]["event"] == "end"
    assert [x["images_seen"] for x in lines(config.out) if x["event"] == "evaluate"] == (
        [256] if at == 512 else []
    )
    drawn = {path.name[8:20] for path in Path(config.out, "previews").glob("*")}
    assert drawn == ({"000000000256"} if at == 512 else set())
    kept = {path.name[9:21] for path in Path(config.out, "ema").glob("*")}
    assert kept == {f"{n:012d}" for n in (256, 512) if n <= at}  # snapshots cannot wait
    ended, said = run(config, resume="auto")
    assert ended.resumed_from == stopped.checkpoint
    assert ended.images_seen == 512
    assert_as_never_stopped(config.out, whole, at)
    # And nothing is owed any more.
    again, said = run(config, resume="auto")
    assert not [line for line in said if line.startswith("evaluation at")]
    assert again.sha256 == ended.sha256


def test_what_is_not_begun_yet_is_not_begun(make_run_config: MakeConfig, whole: Path) -> None:
    """A signal in the step before an evaluation: that would take minutes."""
    config = make_run_config(**CHANGES)

    def on_step(trainer: Any, state: Any) -> None:
        if state.step == 8:
            os.kill(os.getpid(), signal.SIGINT)

    stopped, said = run(config, on_step=on_step)
    assert not [line for line in said if line.startswith("evaluation at")]
    assert read_info(stopped.checkpoint).images_seen == 256
    run(config, resume="auto")
    assert_as_never_stopped(config.out, whole, 256)


def test_a_statistics_batch_is_followed_by_a_look(make_run_config: MakeConfig) -> None:
    """With a small extractor at hand, the signal comes while features of the data are taken."""
    from k_diffusion.evaluation.small import SmallExtractor

    config = make_run_config(**CHANGES)
    with pytest.MonkeyPatch.context() as patch:
        quick(patch)
        calls = send_at(patch, SmallExtractor, "forward", 4, signal.SIGTERM)
        stopped, _ = run(config)
    assert calls[0] == 4
    assert stopped.images_seen == 0
    assert list(Path(config.out, "evaluation").glob("small-*"))
    assert not list(Path(config.out, "evaluation").glob("statistics-*"))


# ---------------------------------------------------------------- in two processes


def in_two(folder: Path) -> None:
    """The signal comes to one process alone: to the second while the first trains the extractor,
    while features of the data are taken, and while samples are drawn."""
    import conftest

    from k_diffusion.evaluation import gathering
    from k_diffusion.evaluation.small import SmallExtractor

    MODELS["tiny"], MODELS["blocks"] = conftest.Tiny, conftest.Blocks
    rank = int(os.environ["RANK"])
    for name, (what, method, call, who, at) in {
        "training": (gathering, "_first_says", 50, 1, 0),
        "statistics": (SmallExtractor, "forward", 3, 1, 0),
        "samples": (Many, "draw", 1, 1, 256),
        "first": (Many, "draw", 2, 0, 256),
    }.items():
        out = folder / name
        config = conftest.config_of(**{**CHANGES, "total_images": 256}, out=str(out))
        with pytest.MonkeyPatch.context() as patch:
            quick(patch)
            if rank == who:
                send_at(patch, what, method, call, signal.SIGTERM)
            stopped = run_training(config, progress=False, say=lambda line: None)
        torch.distributed.barrier()  # the first one gives the folder back last
        assert stopped.stopped_by == signal.SIGTERM, (name, rank)
        assert stopped.images_seen == at, (name, rank, stopped.images_seen)
        with pytest.MonkeyPatch.context() as patch:
            quick(patch)
            ended = run_training(config, progress=False, resume="auto", say=lambda line: None)
        torch.distributed.barrier()
        assert ended.images_seen == 256


def test_processes_stop_together(launch: Launch, tmp_path: Path) -> None:
    launch(__file__, "in_two")
    found = [
        [x["images_seen"] for x in lines(tmp_path / name) if x["event"] == "evaluate"]
        for name in ("training", "statistics", "samples", "first")
    ]
    assert found == [[256]] * 4
    figures = [
        [x["figures"] for x in lines(tmp_path / name) if x["event"] == "evaluate"]
        for name in ("training", "first")
    ]
    assert figures[0] == figures[1]
