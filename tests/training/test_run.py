"""A run in a folder: what it leaves, how it stops, and how it goes on."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from k_diffusion.training.checkpoint import CheckpointError, read_checkpoint, read_info
from k_diffusion.training.config import ConfigError, TrainConfig
from k_diffusion.training.dataset import ArraySource, Digits
from k_diffusion.training.retention import latest_checkpoint, list_checkpoints
from k_diffusion.training.run import RunResult, run_training, stop_signals
from k_diffusion.training.trainer import Trainer, TrainState

MakeConfig = Callable[..., TrainConfig]


def run(config: TrainConfig, **options: Any) -> tuple[RunResult, list[str]]:
    said: list[str] = []
    result = run_training(config, **{"progress": False, "say": said.append, **options})
    return result, said


def lines(result: RunResult) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.metrics.read_text().splitlines()]


def train_lines(result: RunResult) -> list[dict[str, Any]]:
    kept = [line for line in lines(result) if line["event"] == "train"]
    for line in kept:
        assert line.pop("images_per_second") > 0  # of the clock, so never the same
    return kept


def send(number: int, at_step: int) -> Callable[[Trainer, TrainState], None]:
    def on_step(trainer: Trainer, state: TrainState) -> None:
        if state.step == at_step:
            os.kill(os.getpid(), number)

    return on_step


def weights(path: Path) -> dict[str, Tensor]:
    _, parts = read_checkpoint(path, ["model", "ema", "optimizer"])
    return {f"{part}/{n}": t for part, named in parts.items() for n, t in named.items()}


def test_what_a_run_leaves(make_run_config: MakeConfig) -> None:
    seen: list[TrainState] = []
    config = make_run_config()
    result, said = run(config, on_step=lambda trainer, state: seen.append(state))
    out = Path(config.out)
    assert sorted(p.name for p in out.iterdir()) == [
        "checkpoint-000000000640.safetensors",
        "metrics.jsonl",
    ]
    assert result.checkpoint == out / "checkpoint-000000000640.safetensors"
    assert result.sha256 == read_info(result.checkpoint).sha256
    assert (result.images_seen, result.skipped_steps, result.bad_files) == (640, 0, {})
    assert (result.stopped_by, result.resumed_from) == (None, None)
    assert abs(result.loss - sum(s.loss for s in seen) / 20) < 1e-12
    assert not said
    start, *train, end = lines(result)
    assert start["event"] == "start"
    assert start["config"] == read_info(result.checkpoint).config
    assert start["data"]["images"] == 1438
    assert start["parameters"] == 257
    assert set(start["versions"]) == {"k-diffusion", "torch", "accelerate"}
    # Every 96 images, and at the end.
    assert [line["images_seen"] for line in train] == [96, 192, 288, 384, 480, 576, 640]
    for i, line in enumerate(train):
        steps = seen[3 * i : 3 * i + 3]
        assert abs(line["loss"] - sum(s.loss for s in steps) / len(steps)) < 1e-12
        assert abs(line["grad_norm"] - sum(s.grad_norm for s in steps) / len(steps)) < 1e-9
        assert (line["step"], line["lr"]) == (steps[-1].step, steps[-1].lr)
    assert end["event"] == "end"
    assert end["checkpoint"] == result.checkpoint.name
    assert end["sha256"] == result.sha256


def test_checkpoints_on_the_way_and_the_newest_stay(make_run_config: MakeConfig) -> None:
    written: list[list[str]] = []

    def look(trainer: Trainer, state: TrainState) -> None:
        written.append([p.name[-18:-12] for p in list_checkpoints(trainer.config.out)])

    config = make_run_config(
        checkpoint_every_images=100, keep_checkpoints=2, background_checkpoints=False
    )
    run(config, on_step=look)
    everything = sorted({name for names in written for name in names})
    # The step that reaches each hundred: 128, 224, 320, 416, 512, 608; and the end.
    assert everything == [f"{n:06d}" for n in (128, 224, 320, 416, 512, 608)]
    assert max(map(len, written)) == 2
    names = [p.name for p in list_checkpoints(config.out)]
    assert names == ["checkpoint-000000000608.safetensors", "checkpoint-000000000640.safetensors"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_signal_leaves_a_checkpoint_and_the_run_goes_on_bitwise(
    make_run_config: MakeConfig, tmp_path: Path, number: int, workers: int
) -> None:
    whole, _ = run(make_run_config())
    config = make_run_config(workers=workers, out=str(tmp_path / "stopped"))
    before = signal.getsignal(number)
    stopped, said = run(config, on_step=send(number, 7))
    assert signal.getsignal(number) == before
    assert stopped.stopped_by == number
    assert stopped.images_seen == 224
    name = signal.Signals(number).name
    assert said == [f"stopped by {name} at 224 of 640 images; checkpoint: {stopped.checkpoint}"]
    assert read_info(stopped.checkpoint).images_seen == 224
    assert lines(stopped)[-1]["stopped_by"] == number
    ended, said = run(config, resume="auto")
    assert ended.resumed_from == stopped.checkpoint
    assert not said
    one, other = weights(whole.checkpoint), weights(ended.checkpoint)
    assert set(one) == set(other)
    for key, tensor in one.items():
        assert torch.equal(tensor, other[key]), key
    # 224 lies between two lines: what they had added up went on too.
    assert train_lines(ended) == train_lines(whole)
    assert [line["event"] for line in lines(ended)].count("start") == 1


def test_a_second_signal_acts_as_before(make_run_config: MakeConfig) -> None:
    def twice(trainer: Trainer, state: TrainState) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(make_run_config(), on_step=twice)


def test_signals_outside_the_main_thread(make_run_config: MakeConfig) -> None:
    results = []

    def work() -> None:
        with stop_signals() as request:
            results.append(request.signal)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert results == [None]


def test_killed_run_goes_on_from_its_last_checkpoint(
    make_run_config: MakeConfig, tmp_path: Path
) -> None:
    """What a kill leaves: metrics beyond the checkpoint, half a line, a half-written file."""
    whole, _ = run(make_run_config())

    class Kill(BaseException):
        pass

    def kill(trainer: Trainer, state: TrainState) -> None:
        if state.step == 17:
            raise Kill

    config = make_run_config(checkpoint_every_images=300, out=str(tmp_path / "killed"))
    with pytest.raises(Kill):
        run(config, on_step=kill)
    out = Path(config.out)
    half = out / ".checkpoint-000000000640.safetensors.123.tmp"
    half.write_bytes(b"half")
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"event": "train", "ima')
    ended, _ = run(config, resume="auto")
    assert ended.resumed_from == out / "checkpoint-000000000320.safetensors"
    assert train_lines(ended) == train_lines(whole)
    assert not half.exists()
    for key, tensor in weights(whole.checkpoint).items():
        assert torch.equal(tensor, weights(ended.checkpoint)[key])


def test_resume_of_an_ended_run_changes_nothing(make_run_config: MakeConfig) -> None:
    first, _ = run(make_run_config())
    before = train_lines(first)
    again, said = run(make_run_config(), resume="auto")
    assert (again.checkpoint, again.sha256) == (first.checkpoint, first.sha256)
    assert again.images_seen == 640
    assert train_lines(again) == before
    assert not said


def test_resume_auto_begins_where_there_is_nothing(make_run_config: MakeConfig) -> None:
    result, _ = run(make_run_config(), resume="auto")
    assert result.resumed_from is None
    assert result.images_seen == 640


def test_resume_auto_passes_over_damaged_checkpoints(make_run_config: MakeConfig) -> None:
    config = make_run_config(checkpoint_every_images=320)
    result, _ = run(config)
    data = bytearray(result.checkpoint.read_bytes())
    data[-3] ^= 4
    result.checkpoint.write_bytes(data)
    again, said = run(config, resume="auto")
    assert again.resumed_from == Path(config.out) / "checkpoint-000000000320.safetensors"
    assert said[0].startswith(f"passing over checkpoint {result.checkpoint} is damaged")
    assert said[1:] == [f"removing {result.checkpoint}, which the resumed run has not reached"]
    assert again.sha256 == result.sha256
    for path in list_checkpoints(config.out):
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="all 2 checkpoints in .* are damaged"):
        latest_checkpoint(config.out)


def test_resume_from_a_named_checkpoint(make_run_config: MakeConfig, tmp_path: Path) -> None:
    first, _ = run(make_run_config(total_images=320))
    config = make_run_config(out=str(tmp_path / "elsewhere"))
    second, _ = run(config, resume=first.checkpoint)
    assert second.resumed_from == first.checkpoint
    assert second.images_seen == 640
    assert second.checkpoint.parent == tmp_path / "elsewhere"
    with pytest.raises(CheckpointError, match=r"nowhere\.safetensors does not exist"):
        run(config, resume=tmp_path / "nowhere.safetensors")


def test_resume_from_an_earlier_checkpoint_gives_up_the_later(make_run_config: MakeConfig) -> None:
    config = make_run_config(checkpoint_every_images=96, keep_checkpoints=9)
    run(config)
    early, late = list_checkpoints(config.out)[1], list_checkpoints(config.out)[-1]
    stopped, said = run(config, resume=early, on_step=send(signal.SIGINT, 8))
    assert list_checkpoints(config.out)[-1] == stopped.checkpoint
    assert f"removing {late}, which the resumed run has not reached" in said
    assert max(line["images_seen"] for line in train_lines(stopped)) == 192


def test_a_kill_before_the_first_checkpoint_of_a_resumed_run(
    make_run_config: MakeConfig, tmp_path: Path
) -> None:
    """A resume from step 4 of one that had come to 17 gives up what lies after, once and for all:
    killed at 6, it goes on from 4 again, and leaves what a run that was never stopped does."""
    options = {
        "ema": {"profiles": [0.05, 0.1], "snapshot_every_images": 64},
        "checkpoint_every_images": 128,
        "keep_checkpoints": 99,
        "log_every_images": 32,
    }
    config = make_run_config(**options)
    whole, _ = run(make_run_config(**options, out=str(tmp_path / "whole")))

    class Kill(BaseException):
        pass

    def kill(at: int) -> Callable[[Trainer, TrainState], None]:
        def on_step(trainer: Trainer, state: TrainState) -> None:
            if state.step == at:
                raise Kill

        return on_step

    with pytest.raises(Kill):
        run(config, on_step=kill(17))
    early = list_checkpoints(config.out)[0]
    with pytest.raises(Kill):
        run(config, on_step=kill(6), resume=early)
    assert list_checkpoints(config.out) == [early]
    ended, _ = run(config, resume="auto")
    assert ended.resumed_from == early
    assert train_lines(ended) == train_lines(whole)
    for pattern in ("ema/*", ".*", "*"):
        left, right = (
            sorted(p.name for p in Path(folder).glob(pattern))
            for folder in (config.out, tmp_path / "whole")
        )
        assert left == right


def test_a_run_from_elsewhere_is_not_put_into_another(
    make_run_config: MakeConfig, tmp_path: Path
) -> None:
    other = {"ema": {"profiles": [0.05], "snapshot_every_images": 64}, "seed": 4}
    first, _ = run(make_run_config(total_images=128, out=str(tmp_path / "first")))
    second, _ = run(make_run_config(**other, out=str(tmp_path / "second")))
    before = second.metrics.read_text()
    config = make_run_config(total_images=256, out=str(tmp_path / "second"))
    for found in ("checkpoint-000000000640", "snapshot-000000000640"):
        with pytest.raises(ConfigError, match=rf"second' holds a run already \({found}"):
            run(config, resume=first.checkpoint)
        assert second.metrics.read_text() == before
        if found.startswith("checkpoint"):
            second.checkpoint.rename(tmp_path / "kept.safetensors")
    (tmp_path / "kept.safetensors").rename(second.checkpoint)
    third, _ = run(config, resume=first.checkpoint, overwrite=True)
    assert third.resumed_from == first.checkpoint
    assert list_checkpoints(config.out) == [third.checkpoint]
    assert not list(Path(config.out).glob("ema/*"))
    assert lines(third)[0]["config"]["seed"] == 3
    assert train_lines(third)[0]["images_seen"] > 128
    # A folder by another name is the same one.
    (tmp_path / "link").symlink_to(tmp_path / "second")
    again, _ = run(config, resume=tmp_path / "link" / third.checkpoint.name)
    assert train_lines(again) == train_lines(third)


def test_a_run_is_not_overwritten_unasked(make_run_config: MakeConfig) -> None:
    first, _ = run(make_run_config(checkpoint_every_images=320))
    with pytest.raises(ConfigError, match=r"holds a run already \(checkpoint-000000000640"):
        run(make_run_config())
    assert read_info(first.checkpoint).sha256 == first.sha256
    second, said = run(make_run_config(total_images=320), overwrite=True)
    assert not said  # the old run went before the new one began, not as one given up
    assert list_checkpoints(first.checkpoint.parent) == [second.checkpoint]
    assert len([line for line in lines(second) if line["event"] == "start"]) == 1


def test_a_config_that_does_not_fit_loses_nothing(make_run_config: MakeConfig) -> None:
    first, _ = run(make_run_config())
    before = first.metrics.read_text()
    with pytest.raises(ConfigError, match="11, but the data has 10 classes"):
        run(make_run_config(model={"type": "tiny", "num_classes": 11}), overwrite=True)
    assert read_info(first.checkpoint).sha256 == first.sha256
    assert first.metrics.read_text() == before


def test_out_that_is_a_file(make_run_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file' is a file; give a folder"):
        run(make_run_config(out=str(tmp_path / "file")))


def test_broken_images_and_skipped_steps_are_told(
    make_run_config: MakeConfig, tmp_path: Path
) -> None:
    from PIL import Image

    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(5):
        Image.new("L", (8, 8), 50 * i).save(folder / f"{i}.png")
    (folder / "x.png").write_bytes(b"junk")
    config = make_run_config(
        data={"source": "folder", "path": str(folder), "size": 8, "channels": 1},
        model={"type": "tiny", "prediction": "v"},
        total_images=64,
    )
    result, said = run(config)
    assert list(result.bad_files) == [str(folder / "x.png")]
    assert len(said) == 1
    assert said[0].startswith(f"skipping broken image {folder / 'x.png'}: cannot identify")
    assert lines(result)[-1]["bad_files"] == result.bad_files


def test_lines_of_skipped_steps_hold_no_nan(make_run_config: MakeConfig) -> None:
    digits = Digits()
    images = digits.images.clone()
    model = {"type": "tiny", "num_classes": 10, "prediction": "flow", "time_convention": "unit"}
    config = make_run_config(model=model, log_every_images=1, total_images=96)
    images[Trainer(config).stream[1].indices[0]] = torch.nan
    result, said = run(config, source=ArraySource(images, digits.labels, digits.class_names))
    (line,) = said
    name = int(Trainer(config).stream[1].indices[0])
    assert line.startswith("step 2 skipped as not finite: loss nan, gradient norm nan, from image")
    assert f"image {name}, at sigma" in line
    assert line.endswith("first not finite: the data")
    assert "NaN" not in result.metrics.read_text()
    assert [line["loss"] is None for line in train_lines(result)] == [False, True, False]
    assert result.skipped_steps == 1
    assert result.loss == result.loss


def test_live_progress(make_run_config: MakeConfig, capfd: pytest.CaptureFixture[str]) -> None:
    run(make_run_config(), progress=True)
    shown = capfd.readouterr().err
    assert re.search(r"100% .* of 640 images \| .* images/s, loss \d\.\d{4} \| 00:00 left", shown)


def test_news_go_to_stderr(make_run_config: MakeConfig, capfd: pytest.CaptureFixture[str]) -> None:
    for progress in (False, True):
        config = make_run_config(out=str(make_run_config().out) + str(progress))
        run_training(config, progress=progress, on_step=send(signal.SIGINT, 2))
        captured = capfd.readouterr()
        assert "stopped by SIGINT at 64 of 640 images; checkpoint: " in captured.err
        assert not captured.out
