"""More broken data than allowed stops a run, by name; less is skipped, counted and named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from k_diffusion.training import Trainer, run_training
from k_diffusion.training.broken import BrokenDataError, check_bad_share
from k_diffusion.training.checkpoint import read_checkpoint, read_info
from k_diffusion.training.dataset import ArraySource, DataError, Digits
from k_diffusion.training.doctor.told import broken_files, broken_off
from k_diffusion.training.folder import Folder
from k_diffusion.training.history import read_history
from k_diffusion.training.opening import opening_lines
from k_diffusion.training.retention import list_checkpoints
from k_diffusion.training.trainer import TrainingError


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """16 good ones, one that the scan finds broken, three that their decoding does."""
    root = tmp_path / "pictures"
    root.mkdir()
    for i in range(16):
        Image.new("L", (8, 8), 10 * i).save(root / f"{i:02}.png")
    (root / "scan.png").write_bytes(b"no picture")
    noise = torch.randint(256, (64, 64), dtype=torch.uint8, generator=torch.Generator())
    Image.fromarray(noise.numpy()).save(root / "whole.jpg")
    content = (root / "whole.jpg").read_bytes()
    (root / "whole.jpg").unlink()
    for i in range(3):
        (root / f"cut{i}.jpg").write_bytes(content[: len(content) // 2])
    return root


def config(make_run_config: Any, root: Path, **changes: Any) -> Any:
    model = {"type": "tiny", "prediction": "edm", "time_convention": "log_sigma"}
    data = {"source": "folder", "path": str(root), "size": 8, "channels": 1}
    return make_run_config(
        **{"model": model, "data": data, "batch_size": 8, "total_images": 80, **changes}
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_stops_by_name_once_it_is_too_much(
    pictures: Path, make_run_config: Any, workers: int
) -> None:
    settings = config(make_run_config, pictures, max_bad_share=0.12, workers=workers)
    lines: list[str] = []
    words = r"4 of 20 images are broken, .* max_bad_share = 0\.12 allows: .*scan\.png \(cannot"
    with pytest.raises(BrokenDataError, match=words) as caught:
        run_training(settings, progress=False, say=lines.append)
    assert "\n" not in str(caught.value)
    assert caught.value.everywhere
    assert sum("ing broken image" in line for line in lines) == 4


@pytest.mark.parametrize("background", [False, True])
def test_what_such_a_stop_leaves(
    pictures: Path, make_run_config: Any, tmp_path: Path, background: bool
) -> None:
    """Every broken file in the log, a report, and a checkpoint from which a run that allows more
    goes on as if it had from the beginning."""
    options: dict[str, Any] = {"log_every_images": 8, "background_checkpoints": background}
    said: list[str] = []
    settings = config(make_run_config, pictures, max_bad_share=0.12, **options)
    with pytest.raises(BrokenDataError) as caught:
        run_training(settings, progress=False, say=said.append)
    out = Path(settings.out)
    *_, last, end = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    assert end["event"] == "end"
    assert end["reason"] == str(caught.value)
    assert len(end["bad_files"]) == 4
    for file, reason in end["bad_files"].items():
        assert sum(f"broken image {file}: {reason}" in line for line in said) == 1
    assert (end["stopped_by"], end["images_seen"]) == (None, last["images_seen"])
    (checkpoint,) = list_checkpoints(out)
    info = read_info(checkpoint)
    assert (end["checkpoint"], end["sha256"]) == (checkpoint.name, info.sha256)
    assert 0 < info.images_seen == end["images_seen"] < 80
    history = read_history(out)
    assert broken_files(history).figures["broken"] == 4  # type: ignore[union-attr]
    assert broken_off(history).figures["checkpoint"] == checkpoint.name  # type: ignore[union-attr]

    allowing = config(make_run_config, pictures, max_bad_share=0.5, **options)
    ended = run_training(allowing, progress=False, resume="auto", say=said.append)
    whole = run_training(
        allowing.model_copy(update={"out": str(tmp_path / "whole")}), progress=False, say=print
    )
    (_, one), (_, other) = (read_checkpoint(r.checkpoint, ["ema"]) for r in (ended, whole))
    assert all(torch.equal(t, other["ema"][name]) for name, t in one["ema"].items())
    losses = [[line.loss for line in read_history(r.metrics).lines] for r in (ended, whole)]
    assert losses[0] == losses[1]
    assert broken_off(read_history(out)) is None


def test_other_errors_leave_a_report_and_no_checkpoint(make_run_config: Any) -> None:
    """Nor does a kill leave any."""
    settings = make_run_config(checkpoint_every_images=96, log_every_images=32)

    def fail(trainer: Any, state: Any) -> None:
        if state.step == 5:
            trainer.source.bad_files["late.png"] = "cut short"
            raise RuntimeError("the card is gone\nfor good")

    said: list[str] = []
    with pytest.raises(RuntimeError):
        run_training(settings, progress=False, on_step=fail, say=said.append)
    assert said.count("replacing broken image late.png: cut short") == 1
    end = json.loads(Path(settings.out, "metrics.jsonl").read_text().splitlines()[-1])
    assert (end["event"], end["images_seen"]) == ("end", 160)
    assert end["reason"] == "the card is gone for good"
    assert end["bad_files"] == {"late.png": "cut short"}
    assert end["checkpoint"] == "checkpoint-000000000096.safetensors"
    assert [path.name for path in list_checkpoints(settings.out)] == [end["checkpoint"]]

    class Kill(BaseException):
        pass

    def kill(trainer: Any, state: Any) -> None:
        raise Kill

    with pytest.raises(Kill):
        run_training(settings, progress=False, on_step=kill, resume="auto")
    events = [e.kind for e in read_history(settings.out).events]
    assert events == []


def test_data_that_vanish_leave_a_checkpoint(pictures: Path, make_run_config: Any) -> None:
    settings = config(make_run_config, pictures, max_bad_share=0.2)
    unbroken = run_training(settings, progress=False, say=lambda line: None)
    gone, said = pictures.with_name("gone"), list[str]()

    def vanish(trainer: Any, state: Any) -> None:
        if state.step == 5:
            pictures.rename(gone)

    with pytest.raises(DataError, match="none of its 19 images can be decoded"):
        run_training(settings, progress=False, on_step=vanish, say=said.append, overwrite=True)
    (path,) = list_checkpoints(settings.out)
    assert said[-1] == f"checkpoint: {path}; --resume goes on from it once the data can be read"
    gone.rename(pictures)
    again = run_training(settings, progress=False, say=said.append, resume="auto")
    for part in ("model", "ema", "optimizer"):
        one, other = (read_checkpoint(r.checkpoint, [part])[1][part] for r in (again, unbroken))
        assert all(torch.equal(one[name], other[name]) for name in other), part


def test_too_many_skipped_steps_leave_a_report(make_run_config: Any) -> None:
    digits = Digits()
    source = ArraySource(
        torch.full_like(digits.images, torch.nan), digits.labels, list("0123456789")
    )
    model = {**make_run_config().model, "sigma_data": 0.5}
    settings = make_run_config(max_skipped=3, model=model)
    with pytest.raises(TrainingError, match="3 steps in a row"):
        run_training(settings, progress=False, source=source, say=lambda line: None)
    end = json.loads(Path(settings.out, "metrics.jsonl").read_text().splitlines()[-1])
    assert end["reason"].startswith("3 steps in a row were not finite")
    assert (end["checkpoint"], end["sha256"], list_checkpoints(settings.out)) == (None, None, [])


def test_a_run_with_as_many_as_allowed_names_them_in_its_report(
    pictures: Path, make_run_config: Any
) -> None:
    settings = config(make_run_config, pictures, max_bad_share=0.2)
    result = run_training(settings, progress=False, say=lambda line: None)
    names = {"scan.png", "cut0.jpg", "cut1.jpg", "cut2.jpg"}
    assert {Path(file).name for file in result.bad_files} == names
    end = json.loads(result.metrics.read_text().splitlines()[-1])
    assert {Path(file).name for file in end["bad_files"]} == names
    assert end["bad_files"] == result.bad_files


def test_it_is_seen_before_the_first_step(pictures: Path, make_run_config: Any) -> None:
    with pytest.raises(BrokenDataError, match="1 of 20 images are broken"):
        Trainer(config(make_run_config, pictures, max_bad_share=0.04))
    trainer = Trainer(config(make_run_config, pictures, max_bad_share=0.05))
    source = trainer.source
    assert any("1 of 20 images are broken, and not learned from" in line
               for line in opening_lines(trainer, None, looked=False))  # fmt: skip
    check_bad_share(source, 0.05)
    with pytest.raises(BrokenDataError):
        check_bad_share(source, 0.0499)


def test_more_than_three_are_counted(pictures: Path) -> None:
    source = Folder(pictures, 8)
    source.report(source.batch(torch.arange(len(source))).bad)
    with pytest.raises(BrokenDataError, match=r"4 of 20 .*, 1 more; mend them"):
        check_bad_share(source, 0.1)
