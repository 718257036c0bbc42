"""Going back from a divergence: bitwise the run that passed over its steps from the beginning."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from k_diffusion.training.checkpoint import read_checkpoint, read_info
from k_diffusion.training.config import TrainConfig
from k_diffusion.training.dataset import ArraySource, Digits, Stream
from k_diffusion.training.retention import list_checkpoints
from k_diffusion.training.run import RunResult, run_training
from k_diffusion.training.snapshots import list_snapshots
from k_diffusion.training.trainer import Trainer, TrainingError, TrainState

MakeConfig = Callable[..., TrainConfig]

FLOW = {"type": "tiny", "num_classes": 10, "prediction": "flow", "time_convention": "unit",
        "dropout": 0.2}  # fmt: skip
SPIKES = {"factor": 3.0, "window": 4, "patience": 3, "roll_back": True}
WATCHED = {
    "model": FLOW,
    "spikes": SPIKES,
    "max_skipped": 3,
    "checkpoint_every_images": 128,  # after steps 4, 8, 12...
    "log_every_images": 96,
}


def planted(steps: Iterable[int], value: float = 30.0) -> ArraySource:
    """Digits of which those that these steps (from 1) see are multiplied."""
    digits = Digits()
    stream, images = Stream(digits, 32, seed=3), digits.images.clone()
    for step in steps:
        images[stream[step - 1].indices] *= value
    return ArraySource(images, digits.labels, digits.class_names)


def run(config: TrainConfig, **options: Any) -> tuple[RunResult, list[str]]:
    said: list[str] = []
    return run_training(config, **{"progress": False, "say": said.append, **options}), said


def passing_over(config: TrainConfig, folder: Path, *ranges: tuple[int, int]) -> Path:
    """The checkpoint of a run of clean data that leaves some steps (from 1) out."""
    trainer = Trainer(config)
    trainer.passed_over = [(first - 1, last) for first, last in ranges]
    done = [state.step for state in trainer]
    left_out = {step for first, last in ranges for step in range(first, last + 1)}
    assert done == [step for step in range(1, 21) if step not in left_out]
    assert trainer.step == 20
    trainer.save(folder / "passing.safetensors")
    return folder / "passing.safetensors"


def tensors(path: Path) -> dict[str, Tensor]:
    _, parts = read_checkpoint(path, ["model", "ema", "optimizer"])
    return {f"{part}/{n}": t for part, named in parts.items() for n, t in named.items()}


def assert_bitwise(one: Path, other: Path) -> None:
    left, right = tensors(one), tensors(other)
    assert set(left) == set(right)
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


def events(result: RunResult, *kinds: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in result.metrics.read_text().splitlines()]
    for line in found:
        for key in ("images_per_second", "seconds", "config", "sha256", "stopped_by"):
            line.pop(key, None)
    return [line for line in found if not kinds or line["event"] in kinds]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_planted_spike_is_passed_over(
    make_run_config: MakeConfig, tmp_path: Path, workers: int
) -> None:
    config = make_run_config(**WATCHED, workers=workers)
    done: list[int] = []
    result, said = run(
        config, source=planted([10, 11, 12]), on_step=lambda t, state: done.append(state.step)
    )
    assert done == [*range(1, 13), 9, *range(13, 21)]
    back = Path(config.out) / "checkpoint-000000000256.safetensors"
    assert [line.split(": ")[0] for line in said[:3]] == [
        f"step {n} is a spike" for n in (10, 11, 12)
    ]
    assert said[3:] == [
        "diverged from step 10 on (3 of 3 losses were spikes): back to "
        f"{back}, and passing over steps 10 to 12"
    ]
    marked = events(result, "spike", "diverged", "roll_back")
    assert [line["event"] for line in marked] == [*["spike"] * 3, "diverged", "roll_back"]
    assert [line["step"] for line in marked] == [10, 11, 12, 12, 8]
    assert marked[0]["loss"] > 3 * marked[0]["median"] > 0
    assert marked[3]["first_step"] == 10
    assert marked[4] == {
        "event": "roll_back", "step": 8, "images_seen": 256, "passed_over": [10, 12]
    }  # fmt: skip
    assert result.images_seen == 640
    info = read_info(result.checkpoint)
    assert info.state["passed_over"] == [[9, 12]]
    # Of the steps passed over neither run has seen the images: the other's are clean.
    assert_bitwise(result.checkpoint, passing_over(config, tmp_path, (10, 12)))
    # The means of metrics went back too: 9 and 13, 14, 15 make up the line at step 15.
    train = [line["step"] for line in events(result, "train")]
    assert train == [3, 6, 9, 12, 9, 15, 18, 20]
    assert result.loss < marked[0]["median"] * 3


class Kill(BaseException):
    pass


@pytest.mark.parametrize("killed_at", range(9, 17))
@pytest.mark.parametrize("how", ["kill", "SIGTERM"])
def test_a_stop_anywhere_on_the_way_changes_nothing(
    make_run_config: MakeConfig, tmp_path: Path, killed_at: int, how: str
) -> None:
    """The spike lies in a checkpoint's step too: steps 8 to 10, told at 10, back to 4."""
    source = planted([8, 9, 10])
    whole, _ = run(make_run_config(**WATCHED, out=str(tmp_path / "whole")), source=source)
    calls: list[int] = []

    def stop(trainer: Trainer, state: TrainState) -> None:
        calls.append(state.step)
        if len(calls) == killed_at:
            if how == "kill":
                raise Kill
            os.kill(os.getpid(), signal.SIGTERM)

    config = make_run_config(**WATCHED)
    if how == "kill":
        with pytest.raises(Kill):
            run(config, source=source, on_step=stop)
    else:
        stopped, _ = run(config, source=source, on_step=stop)
        assert stopped.stopped_by == signal.SIGTERM
    result, _ = run(config, source=source, resume="auto")
    assert_bitwise(result.checkpoint, whole.checkpoint)
    assert read_info(result.checkpoint).state == read_info(whole.checkpoint).state
    assert events(result) == events(whole)
    names = [path.name for path in list_checkpoints(config.out)]
    assert names == [path.name for path in list_checkpoints(tmp_path / "whole")]


def test_steps_that_are_not_finite_are_passed_over(
    make_run_config: MakeConfig, tmp_path: Path
) -> None:
    options = {**WATCHED, "spikes": {"roll_back": True}}
    source = planted([10, 11, 12], float("nan"))
    result, said = run(make_run_config(**options), source=source)
    assert "diverged from step 10 on (3 steps in a row were not finite): back to" in said[-1]
    assert result.skipped_steps == 0  # of the run that stands
    assert len(events(result, "skipped")) == 3
    assert_bitwise(result.checkpoint, passing_over(make_run_config(**options), tmp_path, (10, 12)))
    options["spikes"] = {"factor": 3.0}
    with pytest.raises(TrainingError, match="3 steps in a row were not finite"):
        run(make_run_config(**options), source=source, overwrite=True)


def test_the_last_steps_may_be_passed_over(make_run_config: MakeConfig, tmp_path: Path) -> None:
    config = make_run_config(**WATCHED)
    result, _ = run(config, source=planted([18, 19, 20]))
    assert (result.images_seen, result.checkpoint.name) == (
        640,
        "checkpoint-000000000640.safetensors",
    )
    assert_bitwise(result.checkpoint, passing_over(config, tmp_path, (18, 20)))
    assert events(result)[-1]["event"] == "end"
    again, said = run(config, resume="auto", source=planted([18, 19, 20]))
    assert again.sha256 == result.sha256
    assert not said


@pytest.mark.parametrize("stopped", [False, True])
def test_an_end_that_is_passed_over_is_a_run_s_end(
    make_run_config: MakeConfig, stopped: bool
) -> None:
    """Snapshot, line and checkpoint of the last moment; where nothing is left of a resume, too."""
    averages = {"profiles": [0.1], "snapshot_every_images": 320}
    changes = {**WATCHED, "checkpoint_every_images": 32, "ema": averages}
    config, source = make_run_config(**changes), planted([18, 19, 20])

    def stop(trainer: Trainer, state: TrainState) -> None:
        if stopped and state.step == 20:
            os.kill(os.getpid(), signal.SIGTERM)

    result, _ = run(config, source=source, on_step=stop)
    if stopped:
        assert result.checkpoint.name == "checkpoint-000000000544.safetensors"  # after step 17
        result, _ = run(config, resume="auto", source=source)
    assert result.checkpoint.name == "checkpoint-000000000640.safetensors"
    assert result.checkpoint in list_checkpoints(config.out)
    assert [s.images_seen for s in list_snapshots(config.out)] == [320, 640]
    snapshot = read_checkpoint(list_snapshots(config.out)[-1].path, ["ema_0.1"])[1]["ema_0.1"]
    end = read_checkpoint(result.checkpoint, ["ema_0.1"])[1]["ema_0.1"]
    assert all(torch.equal(snapshot[name], end[name]) for name in end)
    first, last = [x for x in events(result, "train") if x["images_seen"] == 640]
    assert first["loss"] > 10 > last["loss"]  # of the steps that diverged; of those that stand
    assert (last["step"], last["skipped_steps"], last["ema_decay"]) == (20, 0, 1.0)
    assert last["lr"] == config.optimizer.lr


def test_two_spikes_and_one_roll_back(make_run_config: MakeConfig, tmp_path: Path) -> None:
    source = planted([6, 7, 8, 13, 14, 15])
    config = make_run_config(**WATCHED)
    result, said = run(config, source=source)
    assert read_info(result.checkpoint).state["passed_over"] == [[5, 8], [12, 15]]
    assert_bitwise(result.checkpoint, passing_over(config, tmp_path, (6, 8), (13, 15)))
    one = {**WATCHED, "spikes": {**SPIKES, "most_roll_backs": 1}}
    result, said = run(make_run_config(**one), source=source, overwrite=True)
    assert said[-1] == (
        "diverged from step 13 on (3 of 3 losses were spikes): spikes.most_roll_backs = 1 is used "
        "up"
    )
    assert read_info(result.checkpoint).state["passed_over"] == [[5, 8]]
    assert result.images_seen == 640


def test_a_spike_alone_is_told_and_nothing_else(make_run_config: MakeConfig) -> None:
    config = make_run_config(**{**WATCHED, "spikes": {**SPIKES, "roll_back": False}})
    plain = make_run_config(**{**WATCHED, "spikes": {}}, out=config.out + "-plain")
    for steps in ([10], [10, 11, 12]):
        source = planted(steps)
        result, said = run(config, source=source, overwrite=True)
        unwatched, silence = run(plain, source=source, overwrite=True)
        assert not silence
        assert_bitwise(result.checkpoint, unwatched.checkpoint)
        assert len(events(result, "spike")) == len(steps)
        assert events(result, "train") == events(unwatched, "train")
        assert "spikes" not in read_info(unwatched.checkpoint).state["extra"]
    assert said[-1] == (
        "diverged from step 10 on (3 of 3 losses were spikes): spikes.roll_back is off, so it goes "
        "on as it is"
    )


def test_no_checkpoint_from_before(make_run_config: MakeConfig) -> None:
    config = make_run_config(**{**WATCHED, "checkpoint_every_images": 320})
    result, said = run(config, source=planted([6, 7, 8]))
    assert "there is no checkpoint from before to go back to" in said[-1]
    assert result.images_seen == 640


@pytest.mark.parametrize(("factor", "value"), [(3.0, 30.0), (None, float("nan"))])
def test_checkpoints_stay_while_they_may_be_needed(
    make_run_config: MakeConfig, tmp_path: Path, factor: float | None, value: float
) -> None:
    """One is written after each step and one is kept, but none is removed from step 10 to 12."""
    frequent = {
        "checkpoint_every_images": 32,
        "keep_checkpoints": 1,
        "background_checkpoints": False,
    }
    config = make_run_config(**{**WATCHED, **frequent, "spikes": {**SPIKES, "factor": factor}})
    there: list[list[int]] = []

    def look(trainer: Trainer, state: TrainState) -> None:
        there.append([read_info(path).step for path in list_checkpoints(config.out)])

    result, said = run(config, source=planted([10, 11, 12], value), on_step=look)
    assert f"{9 * 32:012d}.safetensors, and passing over steps 10 to 12" in said[3]
    assert there[8:15] == [[8], [9], [9, 10], [9, 10, 11], [9, 10, 11], [13], [14]]
    assert_bitwise(result.checkpoint, passing_over(config, tmp_path, (10, 12)))


def test_a_damaged_checkpoint_is_passed_over_on_the_way_back(
    make_run_config: MakeConfig, tmp_path: Path
) -> None:
    # Not in the background: that of step 8 must be there when the newest is damaged.
    config = make_run_config(**{**WATCHED, "background_checkpoints": False})

    def damage(trainer: Trainer, state: TrainState) -> None:
        if state.step == 12:
            newest = list_checkpoints(config.out)[-1]
            newest.write_bytes(newest.read_bytes()[:-1])

    result, said = run(config, source=planted([10, 11, 12]), on_step=damage)
    assert said[3].startswith("passing over checkpoint ")
    assert "checkpoint-000000000128.safetensors, and passing over steps 10 to 12" in said[4]
    assert_bitwise(result.checkpoint, passing_over(config, tmp_path, (10, 12)))


def test_speed_counts_what_was_computed(
    make_run_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = iter(range(10**6))
    clock = SimpleNamespace(perf_counter=lambda: float(next(seconds)))
    monkeypatch.setattr("k_diffusion.training.state.time", clock)
    trainer = Trainer(make_run_config())
    trainer.passed_over = [(3, 12)]
    assert {state.images_per_second for state in trainer} == {32.0}


FREQUENT = {"checkpoint_every_images": 64, "keep_checkpoints": 2, "background_checkpoints": False}


def test_what_diverged_takes_no_place_among_those_that_stay(make_run_config: MakeConfig) -> None:
    """One after every second step; that of step 10 is of the line that was given up at 12."""
    for every in (None, 320):
        config = make_run_config(**{**WATCHED, **FREQUENT, "keep_every_images": every})
        there: list[list[int]] = []

        def look(trainer: Trainer, state: TrainState, there: list[list[int]] = there) -> None:
            there.append([read_info(path).step for path in list_checkpoints(trainer.config.out)])

        _, said = run(config, source=planted([10, 11, 12]), on_step=look, overwrite=True)
        # 1 to 12, then 9, 13, 14 and, with the checkpoint of 14 there, 15; the end sees [18, 20].
        assert there[12:16] == [[6, 8, 10], [6, 8, 10], [6, 8, 10], [8, 14]]
        assert there[-1] == [16, 18]
        removed = [line for line in said if line.startswith("removing ")]
        assert len(removed) == 1
        assert "000000000320.safetensors: the run has gone back" in removed[0]


def test_a_second_way_back_leads_not_into_what_diverged(
    make_run_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_run_config(**{**WATCHED, **FREQUENT})
    result, said = run(config, source=planted(range(10, 16)))
    ways = [line.split("checkpoint-")[1] for line in said if line.startswith("diverged")]
    assert ways == [
        f"{8 * 32:012d}.safetensors, and passing over steps {first} to {last}"
        for first, last in ((10, 12), (13, 15))
    ]
    assert read_info(result.checkpoint).state["passed_over"] == [[9, 12], [12, 15]]
    assert_bitwise(result.checkpoint, passing_over(config, tmp_path, (10, 12), (13, 15)))
