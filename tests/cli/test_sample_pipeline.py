"""`k-diffusion sample --model`: a pipeline's images, and their text that makes them again."""

from __future__ import annotations

import shlex

import pytest
import torch

from k_diffusion.cli.app import main
from k_diffusion.utils.images import load_png
from tests.external import tiny_pipelines as tiny

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument:UserWarning"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline") / "sd"
    tiny.tiny_sd().save_pretrained(folder)
    return str(folder)


def test_images_and_the_command_that_makes_one_again(model, tmp_path, capsys):
    out = tmp_path / "out"
    argv = ["sample", "--model", model, "--prompt", "a red fox", "--prompt", "blue cat"]
    argv += ["--negative", "green", "--guidance", "4", "--sampler", "dpmpp_2m_sde"]
    argv += ["--scheduler", "karras", "--steps", "3", "--seed", "7", "-n", "2", "-o", str(out)]
    argv += ["--height", "16", "--width", "16", "--batch-size", "3", "--local", "--device", "cpu"]
    assert main(argv) == 0
    assert "4 images and grid.png" in capsys.readouterr().out
    names = sorted(file.name for file in out.iterdir())
    assert names == ["grid.png", *(f"seed00000{seed}.png" for seed in (7, 8, 9)), "seed000010.png"]
    image, text = load_png(out / "seed000009.png")
    assert text["prompt"] == "blue cat"
    assert text["seed"] == "9"
    command = shlex.split(text["command"])
    assert command[:2] == ["k-diffusion", "sample"]
    again = tmp_path / "again"
    assert main([*command[1:], "--out", str(again), "--device", "cpu"]) == 0
    same, _ = load_png(again / "seed000009.png")
    assert (same.float() - image.float()).abs().max() <= 1  # batches of another size
    grid = shlex.split(load_png(out / "grid.png")[1]["command"])
    assert main([*grid[1:], "--out", str(tmp_path / "all"), "--device", "cpu"]) == 0
    whole, _ = load_png(tmp_path / "all" / "seed000010.png")
    known, _ = load_png(out / "seed000010.png")
    assert (whole.float() - known.float()).abs().max() <= 1
    assert not torch.equal(known, image)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--prompt", "cat", "--steps", "0"], "--steps is 0"),
        (["--promt", "cat"], "did you mean --prompt?"),
        (["--prompt", "cat", "--class-label", "3"], "one of them"),
        (["--prompt", "cat", "--scheduler-options", "rho=5"], "--scheduler"),
        (["--prompt", "cat", "--dtype", "int8"], "--dtype int8"),
        (["--prompt", "cat", "--init", "none.png"], "--init none.png does not exist"),
        (["--prompt", "cat", "--sampler", "eulr"], "unknown sampler 'eulr'"),
        (["--prompt", "cat", "--height", "17"], "height 17"),
        (["--steps", "2"], "needs a prompt"),
    ],
)
def test_wrong_options(model, tmp_path, capsys, argv, words):
    out = ["--out", str(tmp_path / "out"), "--device", "cpu", "--local"]
    assert main(["sample", "--model", model, *out, *argv]) == 2
    said = capsys.readouterr().err
    assert words in said.splitlines()[-1]


def test_a_model_that_is_not_there(tmp_path, capsys):
    assert main(["sample", "--model", str(tmp_path / "no"), "--prompt", "cat"]) == 2
    assert "does not exist" in capsys.readouterr().err
