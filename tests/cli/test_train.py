"""`k-diffusion train`."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from k_diffusion.cli import main
from k_diffusion.cli.problems import Stopped
from k_diffusion.cli.train import Train
from k_diffusion.training import ConfigError, read_info
from k_diffusion.utils.images import save_png


def last_line(capsys) -> str:
    return capsys.readouterr().err.splitlines()[-1]


def test_trains_and_says_where_everything_lies(tmp_path, write_config, capsys) -> None:
    config = write_config(tmp_path)
    assert main(["train", "--config", str(config), "--seed", "5", "--batch-size", "16"]) == 0
    out = capsys.readouterr().out
    checkpoint = tmp_path / "run/checkpoint-000000000032.safetensors"
    assert f"checkpoint: {checkpoint}\n" in out
    assert f"metrics:    {tmp_path / 'run/metrics.jsonl'}\n" in out
    info = read_info(checkpoint)
    assert (info.images_seen, info.step) == (32, 2)
    assert info.config["seed"] == 5


def test_a_run_in_the_folder_is_neither_lost_nor_taken_for_done(
    tmp_path, write_config, capsys
) -> None:
    argv = ["train", "--config", str(write_config(tmp_path))]
    assert main(argv) == 0
    (checkpoint,) = (tmp_path / "run").glob("*.safetensors")
    before = checkpoint.read_bytes()
    capsys.readouterr()
    assert main(argv) == 1
    assert "holds a run already" in last_line(capsys)
    assert checkpoint.read_bytes() == before
    assert main([*argv, "--resume"]) == 0
    assert checkpoint.read_bytes() == before
    assert main([*argv, "--seed", "9", "--overwrite"]) == 0
    assert read_info(checkpoint).config["seed"] == 9
    assert main([*argv, "--resume", str(tmp_path / "run/checkpoint-x.safetensors")]) == 1
    assert "did you mean" in last_line(capsys)


def test_ways_to_resume(tmp_path, write_config, capsys) -> None:
    argv = ["train", "--config", str(write_config(tmp_path))]
    assert main([*argv, "--resume", "auto"]) == 0  # there is nothing yet
    first = tmp_path / "run/checkpoint-000000000032.safetensors"
    before = first.read_bytes()
    for words in (["--resume"], ["--resume", "auto"], ["--resume=auto"], ["--resume", str(first)]):
        assert main([*argv, *words, "--seed", "0"]) == 0, words
        assert first.read_bytes() == before
    capsys.readouterr()
    assert main([*argv, "--resume", "auto", str(first)]) == 2
    assert "--resume: " in (said := last_line(capsys))
    assert "is one value too many: give one checkpoint, or auto" in said
    first.write_bytes(before[:-1])
    assert main([*argv, "--resume", "auto"]) == 1
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith(f"passing over checkpoint {first} is")
    assert "all 1 checkpoints in" in said[-1]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--batch-size", "0"], "batch_size = 0"),
        (["--total-images", "-5"], "total_images = -5"),
        (["--total-images", "many"], "--total-images: 'many' is not a whole number"),
        (["--seed", "-1"], "seed = -1"),
        (["--set", "optimizer.lrr=3"], "optimizer.lrr = 3 is no known key; did you mean"),
        (["--set", "model.chanels=3"], "chanels"),
        (["--set", "model.prediction=noise"], "unknown prediction 'noise'"),
        (["--set", "optimizer"], "'optimizer' is not of the form name=value"),
        (["--data", "pictures"], "data.size is missing"),
        (["--data", "digits", "--set", "data.split=rain"], "data.split = 'rain' is not one of"),
    ],
)
def test_a_value_that_does_not_fit_is_named(tmp_path, write_config, capsys, more, said) -> None:
    assert main(["train", "--config", str(write_config(tmp_path)), *more]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_config_that_is_none(tmp_path, capsys) -> None:
    (tmp_path / "bad.toml").write_text("total_images = = 3")
    (tmp_path / "key.toml").write_text('totl_images = 3\n[data]\nsource = "digits"\n')
    for name, said in (
        ("gone.toml", "gone.toml does not exist"),
        ("bad.toml", "bad.toml is no valid TOML"),
        ("key.toml", "totl_images = 3 is no known key; did you mean total_images?"),
    ):
        assert main(["train", "--config", str(tmp_path / name)]) == 2
        err = capsys.readouterr().err
        assert said in err
        assert err.count("\n") == 1
    assert main(["train"]) == 2
    assert capsys.readouterr().err == "k-diffusion train: error: --config is missing\n"


def test_overrides() -> None:
    given = Train(Path("c.toml"), data="faces", out="o", seed=0, set=({"optimizer.lr": 1e-3},))
    assert given._overrides() == {
        "data.path": "faces",
        "out": "o",
        "seed": 0,
        "optimizer.lr": 1e-3,
    }
    assert Train(Path("c.toml"), data="digits")._overrides() == {"data": {"source": "digits"}}


@pytest.fixture
def folder_config(tmp_path, write_config) -> Path:
    config = write_config(tmp_path)
    text = config.read_text().replace("num_classes = 10", "")
    pictures = str(tmp_path / "pictures")
    text = text.replace(
        'source = "digits"', f'source = "folder"\npath = {pictures!r}\nsize = 8\nchannels = 1'
    )
    config.write_text(text)
    (tmp_path / "pictures").mkdir()
    return config


def test_a_folder_takes_the_place_of_other_data(tmp_path, write_config, folder_config) -> None:
    other = tmp_path / "other"
    for index in range(2):
        (other / f"class{index}").mkdir(parents=True)
        save_png(other / f"class{index}/a.png", torch.full((1, 8, 8), index / 2))
    more = ["--data", str(other), "--batch-size", "32", "--overwrite"]
    checkpoint = tmp_path / "run/checkpoint-000000000032.safetensors"
    assert main(["train", "--config", str(folder_config), *more]) == 0
    assert read_info(checkpoint).data["class_names"] == ["class0", "class1"]
    assert read_info(checkpoint).data["shape"] == [1, 8, 8]  # size and channels are the config's
    digits = ["train", "--config", str(write_config(tmp_path)), *more]
    sets = "data.size=6,data.channels=3,model.num_classes=2"
    assert main([*digits, "--set", sets]) == 0
    assert read_info(checkpoint).data["shape"] == [3, 6, 6]


def test_an_empty_folder_is_named(tmp_path, folder_config, capsys) -> None:
    assert main(["train", "--config", str(folder_config)]) == 1
    err = capsys.readouterr().err
    assert str(tmp_path / "pictures") in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_one_broken_file_is_named_and_the_others_are_used(tmp_path, folder_config, capsys) -> None:
    for index in range(3):
        save_png(tmp_path / f"pictures/{index}.png", torch.full((1, 8, 8), index / 3))
    whole = (tmp_path / "pictures/0.png").read_bytes()
    (tmp_path / "pictures/cut.png").write_bytes(whole[: len(whole) // 2])
    assert main(["train", "--config", str(folder_config)]) == 0
    assert "cut.png" in capsys.readouterr().err
    end = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert [Path(name).name for name in end["bad_files"]] == ["cut.png"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_a_checkpoint_that_can_be_resumed(
    tmp_path, write_config, number, code
) -> None:
    argv = [sys.executable, "-m", "k_diffusion.cli", "train"]
    argv += ["--config", str(write_config(tmp_path, total=10**7))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    metrics = tmp_path / "run/metrics.jsonl"
    with subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as program:
        try:
            while program.poll() is None and (
                not metrics.exists() or '"train"' not in metrics.read_text()
            ):
                time.sleep(0.05)
            program.send_signal(number)
            out, err = program.communicate(timeout=60)
        finally:
            program.kill()
    assert program.returncode == code, err
    assert not out
    (checkpoint,) = (tmp_path / "run").glob("*.safetensors")
    last = err.splitlines()[-1]
    assert last.startswith("k-diffusion train: stopped at ")
    assert str(checkpoint) in last
    assert "--resume" in last
    assert "Traceback" not in err
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        checkpoint.name,
        "metrics.jsonl",
    ]
    info = read_info(checkpoint)
    assert 0 < info.images_seen < 10**7
    assert json.loads(metrics.read_text().splitlines()[-1])["stopped_by"] == number
    more = ["--resume", "--total-images", str(info.images_seen + 8)]
    assert main(["train", "--config", str(tmp_path / "tiny.toml"), *more]) == 0
    newest = max((tmp_path / "run").glob("*.safetensors"))
    assert read_info(newest).images_seen == info.images_seen + 8


def test_a_pickle_is_not_resumed_from(tmp_path, write_config, capsys) -> None:
    weights = tmp_path / "old.ckpt"
    weights.write_bytes(pickle.dumps({"w": 1}))
    argv = ["train", "--config", str(write_config(tmp_path)), "--resume", str(weights)]
    assert main(argv) == 1
    assert "is a pickle" in last_line(capsys)


POISONED = """
import math
from k_diffusion.training import dataset, folder

class Poisoned(folder.Folder):
    def batch(self, indices, seeds=None):
        batch = super().batch(indices, seeds)
        images = batch.images.float() / 127.5 - 1
        for place, index in enumerate(batch.indices.tolist()):
            if self.files[index].name == "0.png":
                images[place] = math.nan
        return batch._replace(images=images)

dataset.SOURCES["folder"] = Poisoned
"""


def test_a_nan_in_the_data_names_the_file(
    tmp_path, folder_config, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    from k_diffusion.training import dataset

    monkeypatch.setitem(dataset.SOURCES, "folder", dataset.SOURCES["folder"])  # it comes back
    for index in range(12):
        save_png(tmp_path / f"pictures/{index}.png", torch.full((1, 8, 8), index / 12))
    (tmp_path / "poisoned.py").write_text(POISONED)
    argv = ["train", "--config", str(folder_config), "--plugin", str(tmp_path / "poisoned.py")]
    assert main(argv) == 0
    captured = capsys.readouterr()
    skipped = [line for line in captured.err.splitlines() if " skipped as not finite: " in line]
    end = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-2])
    assert end["skipped_steps"] == len(skipped) > 0
    for line in skipped:
        assert f"from {tmp_path / 'pictures/0.png'}, at sigma " in line
        assert line.endswith("first not finite: the data")
    assert main([*argv, "--overwrite", "--set", "max_skipped=1"]) == 1
    last = last_line(capsys)
    assert "1 steps in a row were not finite" in last
    assert str(tmp_path / "pictures/0.png") in last


@pytest.mark.parametrize(
    ("error", "left"),
    [
        (None, True),
        (Stopped(signal.SIGTERM, "stopped"), True),
        (ConfigError("of all processes alike"), True),
        (RuntimeError("of this one alone"), False),
    ],
)
def test_the_processes_part_at_the_end(tmp_path, write_config, monkeypatch, error, left) -> None:
    """Left to the interpreter's end, a group of processes aborts it now and then."""
    from torch import distributed

    from k_diffusion import training

    def joined(*args, **options) -> training.RunResult:
        where = f"file://{tmp_path / 'group'}"
        distributed.init_process_group("gloo", init_method=where, rank=0, world_size=1)
        if error is not None:
            raise error
        return training.RunResult(tmp_path, "", tmp_path, 0, 0.0, 0.0, 0, {}, None, None)

    monkeypatch.setattr(training, "run_training", joined)
    try:
        main(["train", "--config", str(write_config(tmp_path))])
        assert distributed.is_initialized() is not left
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


def test_begins_with_given_weights(tmp_path, write_config, capsys) -> None:
    argv = ["train", "--config", str(write_config(tmp_path))]
    assert main(argv) == 0
    first = tmp_path / "run/checkpoint-000000000032.safetensors"
    capsys.readouterr()
    assert main([*argv, "--resume", str(first), "--seed", "9"]) == 1
    assert f"or begin a new run from its weights by init_from = '{first}'" in last_line(capsys)
    argv += ["--seed", "9", "--init-from", str(first), "--out", str(tmp_path / "next")]
    assert main(argv) == 0
    found = read_info(tmp_path / "next/checkpoint-000000000032.safetensors")
    assert found.config["init_from"] == str(first)


def test_names_of_files_cannot_move_the_cursor(tmp_path, write_config, capsys) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for k in range(9):
        save_png(pictures / f"{k}.png", torch.full((1, 8, 8), k / 8))
    (pictures / "bad\x1b[2J.png").write_bytes(b"no picture")
    config = tmp_path / "run.toml"
    config.write_text(
        f'out = "{tmp_path / "run"}"\ntotal_images = 32\nbatch_size = 16\n'
        f'[data]\nsource = "folder"\npath = "{pictures}"\nsize = 8\nchannels = 1\n'
        '[model]\ntype = "unet"\nchannels = 8\nchannel_mults = [1]\nblocks = 1\n'
        "attention = [false]\nhead_channels = 8\n"
    )
    for more in (["--check"], []):
        assert main(["train", "--config", str(config), *more]) == 0
        out, err = capsys.readouterr()
        assert "bad\\x1b[2J.png" in out + err
        assert "\x1b[2J" not in out + err
