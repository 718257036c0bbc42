"""`k-diffusion evaluate`: figures of a checkpoint and of a folder, and what the file says."""

from __future__ import annotations

import json
import shlex
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from k_diffusion.cli import main
from k_diffusion.evaluation import frechet_distance, memorised_share, train_small
from k_diffusion.evaluation.small import SmallExtractor
from k_diffusion.evaluation.statistics import as_seen
from k_diffusion.training import Digits, run_training
from k_diffusion.training.config_file import make_config
from k_diffusion.utils.images import load_png, save_png


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small extractor of seconds."""
    path = tmp_path_factory.mktemp("extractor") / "small.safetensors"
    train_small(Digits().images, Digits().labels, "ab" * 32, images_seen=2000).save(path)
    return path


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def evaluate(*words: Any, code: int = 0) -> None:
    assert main(["evaluate", *map(str, words)]) == code


def test_figures_of_a_checkpoint(
    trained: Path, weights: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "found" / "one.json"
    words = (trained, "--n", 40, "--steps", 3, "--seed", 7, "--extractor-weights", weights,
             "--cache", cache, "--pairs", 4, "--device", "cpu")  # fmt: skip
    evaluate(*words, "--out", out, "--batch-size", 16)
    found = json.loads(out.read_text())
    # The same images, by `k-diffusion sample`: their classes are the data's, in its shares.
    counts = found["sampling"]["classes in the shares of"]
    assert counts == Digits().labels.bincount().tolist()
    folder = tmp_path / "drawn"
    assert main(["sample", str(trained), "-n", "40", "--steps", "3", "--seed", "7",
                 "--class-label", "0,0,0,0,1,1,1,1,2,2,2,2,3,3,3,3,4,4,4,4,5,5,5,5,6,6,6,6,7,7,7,7,"
                 "8,8,8,8,9,9,9,9", "--out", str(folder), "--device", "cpu"]) == 0  # fmt: skip
    names = sorted(p.name for p in folder.glob("seed*.png"))
    images = as_seen(torch.stack([load_png(folder / name)[0] for name in names]))
    extractor = SmallExtractor.load(weights)
    real, made = extractor(as_seen(Digits().images)), extractor(images)
    assert abs(found["figures"]["fid"] - frechet_distance(real, made)) < 1e-3
    assert found["figures"]["memorised"] == memorised_share(made, real)
    held = extractor(as_seen(Digits("test").images))
    assert abs(found["held-out figures"]["fid"] - frechet_distance(real, held)) < 1e-6
    assert found["held out"]["source"] == "digits:test"
    assert found["number"] == 40
    assert found["extractor"]["name"] == "small-abababababab"
    assert found["checkpoint"]["path"] == str(trained)
    assert len(found["checkpoint"]["sha256"]) == len(found["data"]["sha256"]) == 64
    assert found["data"]["images"] == 1438
    assert found["sampling"]["seed"] == 7
    said = capsys.readouterr().out
    assert "40 samples, features of small-abababababab, 1438 real images" in said
    assert "note: fid: 40 samples do not fill 96 features" in said
    # Three rows of four: samples, the real images nearest to them, and those' nearest.
    picture = Path(found["nearest"]["picture"])
    assert picture == tmp_path / "found" / "one.nearest.png"
    assert load_png(picture)[0].shape[2] > 4 * 64
    assert found["nearest"]["ratios"] == sorted(found["nearest"]["ratios"])
    # The folder of these images, and the command that the file says, give the same again.
    evaluate("--samples", folder, "--data", "digits", "--held-out", "digits:test", "--out",
             tmp_path / "two.json", "--extractor-weights", weights, "--cache", cache, "--device",
             "cpu", "--pairs", 0)  # fmt: skip
    again = json.loads((tmp_path / "two.json").read_text())
    assert again["held-out figures"] == found["held-out figures"]
    assert "sampling" not in again
    assert "nearest" not in again
    for name, value in found["figures"].items():
        assert abs(again["figures"][name] - value) < 1e-4, name
    repeated = shlex.split(found["command"])
    assert repeated[:2] == ["k-diffusion", "evaluate"]
    evaluate(*repeated[2:], "--overwrite")
    assert json.loads(out.read_text())["figures"] == found["figures"]


def test_some_metrics_and_options(
    trained: Path, weights: Path, cache: Path, tmp_path: Path
) -> None:
    fixed = (trained, "--n", 12, "--steps", 2, "--extractor-weights", weights, "--cache", cache,
             "--metrics", "kid,recall", "--device", "cpu")  # fmt: skip
    evaluate(*fixed, "--out", tmp_path / "a.json")
    found = json.loads((tmp_path / "a.json").read_text())
    assert list(found["figures"]) == ["kid", "kid_error", "recall"]
    assert not (tmp_path / "a.nearest.png").exists()
    for i, words in enumerate((
        ("--seed", 5), ("--guidance", 2), ("--condition", 3), ("--weights", "last"), ("--steps", 3),
        ("--sampler", "euler_ancestral", "--sampler-options", "eta=0.3"),
    )):  # fmt: skip
        evaluate(*fixed, *words, "--out", tmp_path / f"{i}.json")
        other = json.loads((tmp_path / f"{i}.json").read_text())
        assert other["figures"]["kid"] != found["figures"]["kid"], words
    assert other["sampling"]["sampler_options"] == {"eta": 0.3}


def test_what_is_trained_on_the_data_is_kept_beside_the_checkpoint(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = "k_diffusion.evaluation.measuring.train_small"
    monkeypatch.setattr(quick, lambda *a, **k: train_small(*a, images_seen=200, **k))
    checkpoint = tmp_path / trained.name
    checkpoint.write_bytes(trained.read_bytes())
    evaluate(tmp_path, "--n", 10, "--steps", 1, "--metrics", "fid", "--out", tmp_path / "a.json")
    kept = sorted(p.name for p in (tmp_path / "evaluation").iterdir())
    assert [name.partition("-")[0] for name in kept] == ["small", "statistics", "statistics"]
    name = json.loads((tmp_path / "a.json").read_text())["extractor"]["name"]
    assert kept[0] == f"{name}.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "images"
    path.mkdir()
    for i, image in enumerate(Digits("test").images[:12]):
        save_png(path / f"{i}.png", image)
    return path


def test_folders_that_cannot_be_measured(
    folder: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a.json"
    fixed = ("--samples", folder, "--data", "digits", "--extractor-weights", weights, "--out", out)
    save_png(folder / "grid.png", torch.zeros(1, 90, 90))  # of `k-diffusion sample`: left out
    evaluate(*fixed, "--cache", tmp_path / "cache")
    assert json.loads(out.read_text())["number"] == 12
    for change, said in (
        (lambda: save_png(folder / "z.png", torch.zeros(1, 8, 9)), "z.png has 9 x 8 pixels"),
        (lambda: (folder / "z.png").write_bytes(b"no"), "z.png is broken"),
        (lambda: [(folder / f"{i}.png").unlink() for i in range(3)], "holds 9 images; give at"),
    ):
        (folder / "z.png").unlink(missing_ok=True)
        change()
        evaluate(*fixed, "--overwrite", code=2)
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "there is nothing to measure: give a CHECKPOINT, or --samples FOLDER"),
        (("--samples", "x"), "--samples alone names no real images to compare with: give --data"),
        (("run", "--metrics", "fdi"), "unknown metric 'fdi'"),
        (("run", "--extractor", "smal"), "unknown extractor 'smal'"),
        (("run", "--n", "3"), "--number is 3; give a whole number of at least 10"),
        (("run", "--steps", "0"), "--steps is 0"),
        (("run", "--samples", "x", "--steps", "9"), "--steps says how samples are drawn, but"),
        (("run", "--out", "."), "--out . is a folder"),
        (("none.safetensors",), "none.safetensors"),
    ],
)
def test_refused_before_anything_is_done(
    words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", *words]) in (1, 2)
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def test_refusals_of_what_is_there(
    trained: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a.json"
    out.write_text("mine")
    evaluate(trained, "--out", out, code=2)
    assert "is there already; give another, or --overwrite" in capsys.readouterr().err
    assert out.read_text() == "mine"
    evaluate(trained, "--data", tmp_path / "none", "--out", tmp_path / "b.json", code=2)
    assert "none is missing" in capsys.readouterr().err
    evaluate(trained, "--extractor", "inception", "--extractor-weights", weights, "--out",
             tmp_path / "b.json", "--cache", tmp_path, code=2)  # fmt: skip
    assert "are not Inception's of 2015-12-05: the file lacks" in capsys.readouterr().err


def test_a_broken_first_sample_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "0.png").write_bytes(b"no picture")
    assert main(["evaluate", "--samples", str(tmp_path), "--data", "digits"]) == 2
    line = capsys.readouterr().err
    assert f"--samples {tmp_path}: 0.png is no image that can be read" in line
    assert line.count("\n") == 1


@pytest.mark.parametrize("kind", ["folder", "archive"])
def test_a_run_on_pictures_is_measured_beside_what_it_was_trained_on(
    kind: str, tmp_path: Path, weights: Path
) -> None:
    images = Digits().images[:40]
    folder = tmp_path / "pictures"
    for k, image in enumerate(images):
        path = folder / f"class{k % 2}" / f"{k:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_png(path, image)
    data = folder
    if kind == "archive":
        data = tmp_path / "pictures.zip"
        with zipfile.ZipFile(data, "w") as file:
            for path in sorted(folder.rglob("*.png")):
                file.write(path, path.relative_to(folder))
    config = make_config(
        {"out": str(tmp_path / "run"), "total_images": 32, "batch_size": 16,
         "data": {"source": kind, "path": str(data), "size": 8, "channels": 1},
         "model": {"type": "unet", "channels": 8, "channel_mults": [1], "blocks": 1,
                   "attention": [False], "head_channels": 8, "num_classes": 2}}
    )  # fmt: skip
    run_training(config, progress=False, say=lambda line: None)
    out, words = tmp_path / "found.json", ("--n", 10, "--steps", 2, "--extractor-weights", weights)
    evaluate(tmp_path / "run", *words, "--metrics", "fid", "--device", "cpu", "--out", out)
    found = json.loads(out.read_text())
    assert found["data"]["images"] == 40
    assert found["sampling"]["classes in the shares of"] == [20, 20]


def test_a_sample_cut_behind_its_header_is_named(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only its decoding tells; in training another picture would take its place."""
    noise = np.random.default_rng(0)
    for i in range(12):
        pixels = noise.integers(0, 255, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i:02}.png")
    file = tmp_path / "05x.jpg"
    Image.fromarray(pixels).save(file, quality=100)
    file.write_bytes(file.read_bytes()[:-30])
    evaluate("--samples", tmp_path, "--data", "digits", "--metrics", "fid", "--cache", tmp_path,
             "--extractor-weights", weights, code=2)  # fmt: skip
    line = capsys.readouterr().err.splitlines()[-1]
    assert "05x.jpg is broken (image file is truncated" in line
    assert line.endswith("take it out, or draw it anew")
