"""What a run says when it begins, and when the micro-batch becomes another."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from k_diffusion.training.between import crowding
from k_diffusion.training.checkpoint import CheckpointError
from k_diffusion.training.config import TrainConfig
from k_diffusion.training.opening import opening_lines
from k_diffusion.training.run import RunResult, run_training
from k_diffusion.training.trainer import Trainer, TrainState

MakeConfig = Callable[..., TrainConfig]
FLOW = {"type": "tiny", "num_classes": 10, "prediction": "flow", "time_convention": "unit"}
TINY = "training tiny, 257 parameters, 1 process on cpu in float32, 32 images"
UNSAFE = (
    "a kill or a power cut will lose this session: checkpoint_every_images is none, so there is a "
    "checkpoint only at the end, or at Ctrl-C or SIGTERM"
)


@pytest.fixture
def opening_unsaid() -> None:
    """Here it is said."""


def run(config: TrainConfig, **options: Any) -> tuple[RunResult, list[str]]:
    said: list[str] = []
    return run_training(config, progress=False, say=said.append, **options), said


def stop(trainer: Trainer, state: TrainState) -> None:
    if state.step == 7:
        signal.raise_signal(signal.SIGINT)


def test_where_it_begins(make_run_config: MakeConfig, tmp_path: Path) -> None:
    config = make_run_config()
    stopped, said = run(config, on_step=stop)
    assert said[:-1] == [f"{TINY} a step; from the beginning, 640 images", UNSAFE]
    _, said = run(config, resume="auto")
    assert said == [f"{TINY} a step; from {stopped.checkpoint} at 224 of 640 images", UNSAFE]
    _, said = run(config, resume="auto")  # nothing is left to be lost
    assert len(said) == 1
    assert "at 640 of 640 images" in said[0]
    elsewhere = make_run_config(out=str(tmp_path / "mistyped"), checkpoint_every_images=320)
    _, said = run(elsewhere, resume="auto")
    assert said == [f"{TINY} a step; no checkpoint in {elsewhere.out}: from the beginning"]
    often = make_run_config(out=str(tmp_path / "kept"), keep_every_images=320)
    assert UNSAFE not in run(often)[1]


def test_how_the_batch_is_cut(make_run_config: MakeConfig) -> None:
    for size, words in ((None, ""), (8, ", 8 at once,"), ("auto", ", in parts yet to be found,")):
        trainer = Trainer(make_run_config(micro_batch_size=size, precision="bf16"))
        line = opening_lines(trainer, None, looked=False)[0]
        assert f"on cpu in bfloat16, 32 images{words} a step; from" in line


def test_an_average_left_out_is_told(make_run_config: MakeConfig) -> None:
    stopped, _ = run(make_run_config(ema={"profiles": [0.05, 0.1]}), on_step=stop)
    _, said = run(make_run_config(ema={"profiles": [0.1]}), resume="auto")
    assert said[1] == (
        f"the average ema_0.05 of {stopped.checkpoint} is left out, as ema.profiles has it no "
        "more: it cannot be taken up again later"
    )
    assert said[2:] == [UNSAFE]


def test_a_resume_that_is_exact_to_rounding_only_is_told(
    make_run_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_run_config()
    run(config, on_step=stop)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    _, said = run(config, resume="auto")
    assert said[1] == (
        "the run goes on to rounding, not bit for bit, as threads 1 before and 7 now: sums are "
        "done in another order there"
    )


class Limited(nn.Module):
    """Refuses more than so many samples at once, as a device does."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.limit = inner, 10**6
        for name in ("num_classes", "prediction", "time_convention", "sigma_data", "config"):
            setattr(self, name, getattr(inner, name))

    def forward(self, x: Tensor, t: Tensor, **conditions: Tensor) -> Tensor:
        if len(x) > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.inner(x, t, **conditions)


def limited(tiny: Any) -> Limited:
    return Limited(tiny(num_classes=10, prediction="flow", time_convention="unit"))


def events(result: RunResult) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in result.metrics.read_text().splitlines()]
    return [line for line in found if line["event"] == "micro_batch"]


def test_memory_that_runs_out_is_told(make_run_config: MakeConfig, tiny: Any) -> None:
    def fill(trainer: Trainer, state: TrainState) -> None:
        trainer.network.limit = {5: 9, 9: 4}.get(state.step, trainer.network.limit)

    config = make_run_config(model=FLOW, checkpoint_every_images=320)
    result, said = run(config, network=limited(tiny), on_step=fill)
    assert said[1:] == [
        "out of memory with 32 images at once: going on with 8",
        "out of memory with 8 images at once: going on with 4",
    ]
    assert events(result) == [
        {"event": "micro_batch", "step": 6, "images_seen": 192, "before": 32, "now": 8},
        {"event": "micro_batch", "step": 10, "images_seen": 320, "before": 8, "now": 4},
    ]


def test_what_auto_found_is_told(make_run_config: MakeConfig, tiny: Any) -> None:
    network = limited(tiny)
    network.limit = 20
    config = make_run_config(model=FLOW, micro_batch_size="auto", checkpoint_every_images=320)
    result, said = run(config, network=network)
    assert said[1:] == ["memory holds 20 images at once on each process: micro_batch_size = 20"]
    assert events(result) == [
        {"event": "micro_batch", "step": 1, "images_seen": 32, "before": None, "now": 20}
    ]


def test_the_loop_alone_knows_no_auto(make_run_config: MakeConfig) -> None:
    with pytest.raises(CheckpointError, match=r"give a checkpoint, such as latest_checkpoint\("):
        Trainer(make_run_config(), resume="auto")


def test_more_loaders_than_cores_are_told_once_and_in_the_house_s_words(
    make_run_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    assert crowding(2, 1) == crowding(0, 8) == ""
    assert crowding(3, 1) == "workers = 3 on 2 cores: more than cores load no faster"
    assert crowding(2, 4).startswith("workers = 2 for each of 4 processes on 2 cores")
    # pytest makes an error of torch's own warning
    said = run(make_run_config(workers=3, total_images=64))[1]
    assert said[1:] == [crowding(3, 1), UNSAFE]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    trainer = Trainer(make_run_config(workers=2))
    assert crowding(2, 2) in opening_lines(trainer, None, False)
