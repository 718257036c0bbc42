"""`k-diffusion export`, and what the other commands make of its file."""

import json

import pytest
import torch

from k_diffusion.cli import main
from k_diffusion.training import read_info
from k_diffusion.training.checkpoint import read_checkpoint
from k_diffusion.utils.images import load_png


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_an_exported_file_is_sampled_like_its_checkpoint(trained, tmp_path, capsys, dtype) -> None:
    small = tmp_path / "model.safetensors"
    assert main(["export", str(trained), "-o", str(small), "--dtype", dtype]) == 0
    out = capsys.readouterr().out
    info = read_info(small)
    assert out == f"{small}: {small.stat().st_size:,} bytes, SHA-256 {info.sha256}\n"
    stored = {t.dtype for t in read_checkpoint(small, ["ema"])[1]["ema"].values()}
    assert stored == {getattr(torch, dtype)}
    images = {}
    for source in (trained, small):
        folder = tmp_path / source.stem
        argv = ["sample", str(source), "-n", "2", "--steps", "3", "--class-label", "4"]
        assert main([*argv, "--out", str(folder)]) == 0
        images[source] = [
            load_png(folder / f"seed{seed:06d}_class4.png")[0].int() for seed in range(2)
        ]
    most = max(int((a - b).abs().max()) for a, b in zip(*images.values(), strict=True))
    assert most <= {"float32": 0, "float16": 1, "bfloat16": 8}[dtype]  # of 256 grey values


def test_last_weights_and_the_words_of_its_maker(trained, tmp_path, capsys) -> None:
    small = tmp_path / "model.safetensors"
    argv = ["export", str(trained), "--out", str(small), "--weights", "last"]
    assert main([*argv, "--licence", "MIT", "--note", "Tiny *digits*."]) == 0
    card = read_info(small).card
    ours = read_checkpoint(small, ["ema"])[1]["ema"]
    theirs = read_checkpoint(trained, ["model"])[1]["model"]
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert "- licence: MIT\n" in card
    assert card.endswith("\nTiny *digits*.\n")
    capsys.readouterr()
    assert main(["info", str(small)]) == 0
    assert card in capsys.readouterr().out
    assert main(["info", str(small), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["card"] == card
    assert main(["info", str(trained), "--json"]) == 0
    assert "card" not in json.loads(capsys.readouterr().out)


def test_a_runs_folder_stands_for_its_newest_checkpoint(trained, tmp_path) -> None:
    small = tmp_path / "model.safetensors"
    assert main(["export", str(trained.parent), "-o", str(small)]) == 0
    assert read_info(trained).sha256 in read_info(small).card


def test_nothing_is_replaced_unasked(trained, tmp_path, capsys) -> None:
    small, before = tmp_path / "model.safetensors", trained.read_bytes()
    argv = ["export", str(trained), "-o", str(small)]
    assert main(argv) == 0
    whole = small.read_bytes()
    capsys.readouterr()
    for arguments, said in (
        (argv, f"--out {small} exists; give another name, or --overwrite"),
        (["export", str(trained), "-o", str(trained), "--overwrite"], "is the checkpoint itself"),
        (["export", str(trained), "-o", str(tmp_path)], "is no name of a .safetensors file"),
        (["export", str(trained), "-o", str(tmp_path / "a.pt")], "is no name of a .safetensors"),
        (["export", str(trained)], "-o is missing"),
        (["export", str(trained), "-o", "a.safetensors", "--dtype", "int8"], "int8"),
    ):
        assert main(arguments) == 2
        err = capsys.readouterr().err
        assert said in err
        assert err.count("\n") == 1
    assert small.read_bytes() == whole
    assert trained.read_bytes() == before
    assert main([*argv, "--overwrite", "--dtype", "float16"]) == 0
    assert small.stat().st_size < len(whole)


def test_a_checkpoint_that_is_none(trained, tmp_path, capsys) -> None:
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(trained.read_bytes()[:-1])
    assert main(["export", str(bad), "-o", str(tmp_path / "model.safetensors")]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"k-diffusion export: error: checkpoint {bad} is truncated")
    assert err.count("\n") == 1
    assert not (tmp_path / "model.safetensors").exists()
