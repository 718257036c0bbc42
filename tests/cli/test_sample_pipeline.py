"""`k-diffusion sample --model`: a pipeline's images, and their text that makes them again."""

from __future__ import annotations

import hashlib
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from k_diffusion.cli.app import main
from k_diffusion.external import PipelineSampler
from k_diffusion.utils.images import load_png, save_png
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
        (["--prompt", "cat", "--options", "to=latent"], "--options to"),
        (["--prompt", "cat", "--options", "clip_skp=1"], "unknown option"),
        (["--prompt", "cat", "--seed", "99999999999999999999"], "seed"),
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


# Ends for good in the middle of writing the second file.
KILLED = """
import os, signal, sys
from PIL.Image import Image
from k_diffusion.cli import main

save, saved = Image.save, []

def broken(self, name, **options):
    saved.append(name)
    if len(saved) == 2:
        name.write_bytes(b"half a file")
        os.kill(os.getpid(), signal.SIGKILL)
    return save(self, name, **options)

Image.save = broken
main(sys.argv[1:])
"""


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_after_kill_9_the_same_command_draws_what_is_missing(model, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    argv = ["sample", "--model", model, "--prompt", "a red fox", "--steps", "2", "-n", "3"]
    argv += ["--height", "16", "--width", "16", "--local", "--device", "cpu"]
    argv += ["--sampler", "euler_ancestral", "--batch-size", "1"]
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, *argv, "-o", str(out)],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    left = contents(out)
    assert len(left) == 2  # one image, and half a file under another name
    whole = [name for name in left if name.endswith(".png")]

    sample, seeds = PipelineSampler.sample, []

    def noted(self, *args, **options):
        seeds.extend(options["seeds"])
        return sample(self, *args, **options)

    monkeypatch.setattr(PipelineSampler, "sample", noted)
    assert main([*argv, "-o", str(out)]) == 0
    assert "3 images and grid.png" in (said := capsys.readouterr().out)
    assert "1 of them were there" in said
    assert seeds == [1, 2]
    unbroken = tmp_path / "unbroken"
    assert main([*argv, "-o", str(unbroken)]) == 0
    assert contents(out).keys() == contents(unbroken).keys() == {
        "grid.png", *(f"seed00000{seed}.png" for seed in range(3))
    }  # fmt: skip
    for name in contents(out):
        one, other = load_png(out / name), load_png(unbroken / name)
        assert torch.equal(one[0], other[0])
        assert one[1] == other[1]
    assert (out / whole[0]).read_bytes() == left[whole[0]]

    # Of other settings, or other weights, nothing is mixed in.
    assert main([*argv, "--steps", "3", "-o", str(out)]) == 2
    assert "drawn with steps 2, not 3" in capsys.readouterr().err
    other = tmp_path / "other"
    changed = tiny.tiny_sd()
    with torch.no_grad():
        changed.unet.conv_in.weight.mul_(1.01)
    changed.save_pretrained(other)
    argv[2] = str(other)
    assert main([*argv, "-o", str(out)]) == 2
    assert "drawn with model digest" in capsys.readouterr().err
    assert main([*argv, "--overwrite", "-o", str(out)]) == 0
    assert not torch.equal(load_png(out / whole[0])[0], load_png(unbroken / whole[0])[0])


def test_memory_that_does_not_hold_a_batch_gets_smaller_ones(model, tmp_path, monkeypatch):
    sample, sizes = PipelineSampler.sample, []

    def narrow(self, *args, **options):
        sizes.append(len(options["seeds"]))
        if sizes[-1] > 1:
            raise torch.OutOfMemoryError("full")
        return sample(self, *args, **options)

    monkeypatch.setattr(PipelineSampler, "sample", narrow)
    argv = ["sample", "--model", model, "--prompt", "cat", "--steps", "1", "-n", "3"]
    argv += ["--local", "--device", "cpu", "-o", str(tmp_path), "--height", "16", "--width", "16"]
    assert main([*argv, "--sampler", "euler"]) == 0
    assert sizes == [3, 1, 1, 1]
    assert len(list(tmp_path.iterdir())) == 4


def test_an_image_to_begin_from(model, tmp_path, capsys):
    image = tmp_path / "begin.png"
    save_png(image, torch.zeros(3, 16, 16))
    argv = ["sample", "--model", model, "--prompt", "cat", "--steps", "4", "--init", str(image)]
    argv += ["--strength", "0.5", "--local", "--device", "cpu", "-o", str(tmp_path / "out")]
    argv += ["--mask", str(image), "--options", "guidance_rescale=0.5", "--dtype", "float32"]
    assert main(argv) == 0
    text = load_png(tmp_path / "out" / "seed000000.png")[1]
    for option in ("--init", "--mask", "--options guidance_rescale=0.5", "--dtype float32"):
        assert option in text["command"]
    again = [*shlex.split(text["command"])[1:], "-o", str(tmp_path / "again"), "--device", "cpu"]
    assert main(again) == 0
    pictures = [load_png(tmp_path / name / "seed000000.png")[0] for name in ("out", "again")]
    assert torch.equal(*pictures)
    assert text["init sha256"] == hashlib.sha256(image.read_bytes()).hexdigest()
    assert "--strength 0.5" in text["command"]
    image.write_bytes(b"no image")
    assert main(argv) == 2
    assert "begin.png is no image that can be read" in capsys.readouterr().err
