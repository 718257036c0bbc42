"""`k-diffusion ema`, and the choice of an average in `sample` and `info`."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from k_diffusion.cli import main
from k_diffusion.training import load_denoiser, read_info


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, write_config) -> Path:
    """A run of 64 steps with 8 snapshots."""
    folder = tmp_path_factory.mktemp("averages")
    config = write_config(folder, total=512)
    keys = "ema.profiles=[0.05,0.1],ema.snapshot_every_images=64"
    assert main(["train", "--config", str(config), "--set", keys]) == 0
    return folder / "run"


def test_makes_a_file_to_sample_from(folder, tmp_path, capsys) -> None:
    capsys.readouterr()
    out = str(tmp_path / "model.safetensors")
    assert main(["ema", str(folder), "--sigma-rel", "0.08", "-o", out]) == 0
    said = capsys.readouterr().out
    assert said == (
        f"{out}: the average of relative length 0.08 at 512 images, from 8 snapshots; its profile "
        "is off by 1.08% of itself\n"
    )
    assert read_info(out).state["weights"]["average"] == "ema_0.08"
    assert main(["sample", out, "-n", "1", "--steps", "2", "--out", str(tmp_path / "s")]) == 0
    assert main(["ema", str(folder), "--sigma-rel", "0.08", "-o", out]) == 2
    assert "is there already" in capsys.readouterr().err
    at = ["--at", "256", "--tolerance", "0.1", "--overwrite", "--json"]
    assert main(["ema", str(folder), "--sigma-rel", "0.08", "-o", out, *at]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["sha256"] == read_info(out).sha256
    assert (facts["images seen"], facts["updates"], facts["snapshots"]) == (256, 32, 4)


def test_lists_what_there_is(folder, capsys) -> None:
    capsys.readouterr()
    assert main(["ema", str(folder), "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["images", "updates", "averages"]
    assert lines[1].split() == ["64", "8", "ema_0.05,", "ema_0.1"]
    assert lines[8].split()[:2] == ["512", "64"]
    errors = dict(line.split(maxsplit=1) for line in lines[11:])
    assert errors["0.05"] == errors["0.1"] == "0.000%"
    assert errors["0.08"] == "1.078%"
    assert errors["0.02"] == "24.525%  (refused)"
    assert main(["ema", str(folder), "--list", "--json", "--at", "256"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [snapshot["images_seen"] for snapshot in facts["snapshots"]] == list(range(64, 513, 64))
    assert facts["lengths"]["0.08"] > 0.0108


@pytest.mark.parametrize(
    ("more", "line", "code"),
    [
        ([], "--sigma-rel is missing", 2),
        (["--sigma-rel", "0.08"], "--out is missing: give a file, as in -o model.safetensors", 2),
        (["--sigma-rel", "0.08", "-o", "a.pt"], "--out a.pt: give a file", 2),
        (["--sigma-rel", "0.3", "-o", "{}"], "above 0 and below 0.2887", 2),
        (["--sigma-rel", "x", "-o", "{}"], "--sigma-rel", 2),
        (["--sigma-rel", "0.25", "-o", "{}"], "sigma_rel = 0.25 cannot be made of 8 snapshots", 2),
        (["--sigma-rel", "0.08", "--at", "100", "-o", "{}"], "--at 100 is no snapshot's time", 2),
    ],
)
def test_what_cannot_be_is_one_line(folder, tmp_path, capsys, more, line, code) -> None:
    capsys.readouterr()
    out = tmp_path / "a.safetensors"
    assert main(["ema", str(folder), *(word.format(out) for word in more)]) == code
    err = capsys.readouterr().err
    assert line in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_run_without_snapshots(trained, capsys) -> None:
    assert main(["ema", str(trained.parent), "--list"]) == 1
    assert "there are no snapshots" in capsys.readouterr().err


def test_an_average_is_chosen_by_name(folder, tmp_path, capsys) -> None:
    (checkpoint,) = folder.glob("*.safetensors")
    _, info = load_denoiser(checkpoint)
    assert info.averages == ["ema", "ema_0.05", "ema_0.1"]
    weights = {
        name: next(load_denoiser(checkpoint, name)[0].parameters())
        for name in ("ema", "last", "ema_0.05", "ema_0.1")
    }
    assert torch.equal(next(load_denoiser(checkpoint)[0].parameters()), weights["ema"])
    assert len({tuple(tensor.flatten().tolist()) for tensor in weights.values()}) == 4
    with pytest.raises(ValueError, match=r"holds no weights 'ema_0.2', .*: ask for 'ema_0\.\d'"):
        load_denoiser(checkpoint, "ema_0.2")
    for part in ("optimizer", "model"):
        with pytest.raises(ValueError, match=f"holds no weights '{part}', only ema, .*, last: ask"):
            load_denoiser(checkpoint, part)
    (first, *_) = sorted((folder / "ema").iterdir())
    with pytest.raises(ValueError, match=r"no weights 'ema', only ema_0.05, ema_0.1: ask for"):
        load_denoiser(first)

    argv = ["sample", str(folder), "-n", "1", "--steps", "2", "--out", str(tmp_path)]
    assert main([*argv, "--weights", "ema_0.1"]) == 0
    text = Image.open(tmp_path / "grid.png").text
    assert text["weights"] == "ema_0.1"
    assert text["command"].endswith(" --weights ema_0.1")
    one = (tmp_path / "grid.png").read_bytes()
    assert main([*argv, "--overwrite"]) == 0
    assert (tmp_path / "grid.png").read_bytes() != one
    capsys.readouterr()
    assert main([*argv, "--overwrite", "--weights", "ema_0.2"]) == 1
    assert "holds no weights 'ema_0.2'" in capsys.readouterr().err
    assert main(["info", str(folder)]) == 0
    assert "weights:        ema, ema_0.05, ema_0.1, last\n" in capsys.readouterr().out
