"""`k-diffusion config`, and what of `k-diffusion train` reads configs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from k_diffusion.cli import main
from k_diffusion.cli.train import Train
from k_diffusion.cli.values import joined, settings
from k_diffusion.config.run import load_run


def said(capsys: Any, *argv: str) -> str:
    assert main(["config", *argv]) == 0
    out = capsys.readouterr()
    assert not out.err
    return out.out


def test_explain_all_and_a_part(capsys: Any) -> None:
    whole = said(capsys, "--explain")
    for part in ("\nbatch_size = 128\n", "\noptimizer.lr = 0.001\n", "\n== model.unet: "):
        assert part in whole
    part = said(capsys, "--explain", "optimizer.lr", "model.unet")
    assert part.startswith("== optimizer: ")
    assert "optimizer.lr = 0.001\n" in part
    assert "optimizer.eps" not in part
    assert "model.channels = 64\n" in part
    assert len(part) < len(whole) / 3
    listed = json.loads(said(capsys, "--explain", "seed", "--format", "json"))
    assert listed[0]["entries"][0]["key"] == "seed"


def test_a_template_can_be_trained_from(capsys: Any, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(said(capsys, "--template"))
    assert load_run(path).model["type"] == "unet"
    path.write_text(said(capsys, "--template", "hourglass"))
    assert load_run(path, {"total_images": 5}).total_images == 5


def test_a_config_in_full(capsys: Any, tmp_path: Path, write_config: Any) -> None:
    config = str(write_config(tmp_path))
    text = said(capsys, config, "--set", "optimizer.lr=0.5", "--set", "seed=7,model.blocks=2")
    again = tmp_path / "again.toml"
    again.write_text(text)
    made = load_run(again)
    assert (made.optimizer.lr, made.seed, made.model["blocks"]) == (0.5, 7, 2)
    assert said(capsys, str(again)) == text
    js = json.loads(said(capsys, config, "--format", "json"))
    assert js["optimizer"]["betas"] == [0.9, 0.999]


def test_a_null_that_toml_cannot_say(capsys: Any, tmp_path: Path, monkeypatch: Any) -> None:
    from dataclasses import dataclass

    from torch import nn

    from k_diffusion.models import MODELS

    @dataclass(frozen=True)
    class MineConfig:
        width: int | None = 3
        prediction: str = "eps"

    class Mine(nn.Module):
        Config = MineConfig

        def __init__(self, config: Any) -> None:
            super().__init__()

    monkeypatch.setitem(MODELS, "mine", Mine)
    path = tmp_path / "run.json"
    data = {"source": "digits"}
    model = {"type": "mine", "width": None}
    path.write_text(json.dumps({"model": model, "data": data, "total_images": 5}))
    assert main(["config", str(path)]) == 2
    assert "holds a null where leaving the key out means another" in capsys.readouterr().err
    assert json.loads(said(capsys, str(path), "--format", "json"))["model"]["width"] is None


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ([], "give a config's file; or --explain for the keys, --template for a first file"),
        (["a.toml", "b.toml"], "give one config, not a.toml and b.toml; or"),
        (["nowhere.toml"], "config nowhere.toml does not exist"),
        (["--explain", "optimiser"], "unknown key 'optimiser'; did you mean 'optimizer"),
        (["--explain", "--template"], "--explain and --template are two things"),
        (["--explain", "--set", "a=1"], "--set changes a config, which --explain"),
        (["--explain", "--format", "toml"], "--explain has no TOML"),
        (["--template", "unett"], "unknown model 'unett'"),
        (["--template", "--format", "json"], "--template has comments, which JSON has not"),
        (["--template", "unet", "dit"], "--template takes one model, got unet and dit"),
        (["--format", "yaml"], "yaml"),
    ],
)
def test_what_cannot_be_shown(capsys: Any, argv: list[str], line: str) -> None:
    assert main(["config", *argv]) == 2
    err = capsys.readouterr().err
    assert line in err
    assert err.count("\n") == 1


def test_piped_into_a_program_that_stops_reading() -> None:
    program = f"{sys.executable} -m k_diffusion.cli config --explain | head -n 1"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {program}"], capture_output=True, text=True
    )
    assert done.stdout.startswith("== A whole training run.")
    assert not done.stderr
    assert done.returncode == 0


# ---------------------------------------------------------------- --set


@pytest.mark.parametrize(
    ("word", "found"),
    [
        ('process={"name":"cosine","offset":0.01},seed=3',
         {"process": {"name": "cosine", "offset": 0.01}, "seed": 3}),
        ("a=[[1,2],[3]],b=null", {"a": [[1, 2], [3]], "b": None}),
        ('out="a,b",c=x y', {"out": "a,b", "c": "x y"}),
        ('a="say \\"hi, you\\"",b=1', {"a": 'say "hi, you"', "b": 1}),
        ("a=b=c", {"a": "b=c"}),
        ("out=runs/x-1,optimizer.lr=3e-4", {"out": "runs/x-1", "optimizer.lr": 3e-4}),
    ],
)  # fmt: skip
def test_settings_hold_tables_lists_and_quotes(word: str, found: dict[str, Any]) -> None:
    assert settings(word) == found


def test_settings_are_joined_and_none_is_lost(tmp_path: Path, write_config: Any) -> None:
    assert joined(({"a": 1}, {"b": 2})) == {"a": 1, "b": 2}
    with pytest.raises(ValueError, match="a is given twice"):
        joined(({"a": 1}, {"a": 2}))
    given = Train(write_config(tmp_path), set=({"seed": 4}, {"ema.power": 0.5}))._overrides()
    config = load_run(tmp_path / "tiny.toml", given)
    assert (config.seed, config.ema.power) == (4, 0.5)


def test_an_auto_batch_keeps_the_files_own_size(tmp_path: Path, write_config: Any) -> None:
    path = write_config(tmp_path)
    for train in (Train(path, batch_size="auto"), Train(path, set=({"batch_size": "auto"},))):
        config = load_run(tmp_path / "tiny.toml", train._overrides())
        assert (config.batch_size, config.micro_batch_size) == (8, "auto")
    given = Train(path, batch_size="auto", set=({"micro_batch_size": 4},))._overrides()
    with pytest.raises(ValueError, match="batch_size = 'auto', but micro_batch_size = 4; give one"):
        load_run(tmp_path / "tiny.toml", given)
