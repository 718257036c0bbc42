"""The model that comes with the library: small, told what it is by its card, and good at digits."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from PIL import Image

from k_diffusion.cli import main
from k_diffusion.cli.values import WEIGHTS, newest_in
from k_diffusion.evaluation import train_small
from k_diffusion.sampling import KSampler, unit_noise
from k_diffusion.training import Digits, load_denoiser, read_info

DIGITS = WEIGHTS / "digits.safetensors"


def test_it_is_small_and_says_what_it_is() -> None:
    assert DIGITS.stat().st_size < 5 * 10**6
    info = read_info(DIGITS)
    assert info.weights == ["ema"]
    assert "MIT" in info.card
    assert "scikit-learn" in info.card


def test_pictures_without_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("digits", "drawn"):  # a folder of its name changes nothing
        assert main(["sample", "-n", "2", "--steps", "3", "--out", name]) == 0
    assert sorted(os.listdir("drawn")) == [
        "grid.png", "seed000000_class0.png", "seed000001_class1.png"
    ]  # fmt: skip
    with Image.open("drawn/seed000000_class0.png") as picture:
        assert picture.size == (8, 8)
    assert main(["info", "k-diffusion:digits"]) == 0
    assert "1,305,841" in capsys.readouterr().out


def test_a_name_leads_nowhere_else(capsys: pytest.CaptureFixture[str]) -> None:
    assert newest_in("k-diffusion:digits") == str(DIGITS)
    assert newest_in("digits") == "digits"
    for name in ("digit", "../weights/digits", ""):
        assert main(["info", f"k-diffusion:{name}"]) == 2
        line = capsys.readouterr().err
        assert "unknown model that comes with the library" in line
        assert "digits" in line


def test_it_draws_the_digit_that_it_is_asked_for() -> None:
    """By the nearest of the real classes' means, which finds nine of ten held-out digits."""
    real, held_out = Digits(), Digits("test")
    labels = torch.arange(100) % 10

    def share(images: torch.Tensor, wanted: torch.Tensor) -> float:
        flat = real.images.float().flatten(1)
        means = torch.stack([flat[real.labels == k].mean(0) for k in range(10)])
        found = torch.cdist(images.float().flatten(1), means).argmin(1)
        return (found == wanted).float().mean().item()

    denoiser, _ = load_denoiser(newest_in("k-diffusion:digits"))
    noise = unit_noise((100, 1, 8, 8)[1:], list(range(100)))
    drawn = KSampler(denoiser, "karras", "dpmpp_2m").sample(noise, 20, labels)
    assert share(held_out.images, held_out.labels) > 0.85
    assert share(drawn, labels) > 0.85


def test_measuring_it_writes_nothing_into_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    train_small(Digits().images, Digits().labels, "ab" * 32, images_seen=500).save(
        Path("small.safetensors")
    )
    words = [
        "--n",
        "10",
        "--steps",
        "2",
        "--metrics",
        "fid",
        "--extractor-weights",
        "small.safetensors",
    ]
    before = sorted(os.listdir(WEIGHTS))
    assert main(["evaluate", "k-diffusion:digits", *words, "--out", "found/a.json"]) == 0
    assert sorted(os.listdir(WEIGHTS)) == before
    assert list(Path("found/evaluation").iterdir())
