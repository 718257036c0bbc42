"""The real run's script: its settings are ones that a run takes, and its dry run ends well."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from k_diffusion.config.run import load_run
from k_diffusion.models import make_model

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "examples" / "colour.toml"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("on_gpu_colour")


@pytest.fixture
def pictures(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for k in range(60):
        path = tmp_path / "data" / f"class{k % 10}" / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(256, (32, 32, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(path)
    return tmp_path / "data"


def test_the_weights_fit_into_the_package(script):
    config = load_run(CONFIG, {})
    with torch.device("meta"):
        network = make_model({**config.model, "in_channels": 3, "sigma_data": 0.5,
                              "augmentation_dim": 9})  # fmt: skip
    count = sum(weight.numel() for weight in network.parameters())
    assert 9e6 < count < 0.99 * script.MOST / 2


def test_the_dry_run_s_settings_are_of_the_config(script):
    settings = {key: None if value == "none" else value for key, value in script.DRY.items()}
    config = load_run(CONFIG, {**settings, "compile": False, "data.path": "x.zip"})
    assert config.model["channels"] == 16
    assert config.evaluate.every_images is None


def test_the_speed_is_that_of_the_last_line(script, tmp_path):
    lines = [{"event": "train", "images_per_second": 1.0}, {"event": "train",
             "images_per_second": 250.0}, {"event": "end"}]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert script.rate(tmp_path / "metrics.jsonl") == 250


@pytest.mark.slow
def test_the_dry_run_trains_measures_and_draws(script, monkeypatch, tmp_path, pictures):
    monkeypatch.chdir(tmp_path)
    argv = ["on_gpu_colour.py", "--data", str(pictures), "--held-out", str(pictures), "--dry-run",
            "--run", "runs/colour", "--out", "found.json"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", argv)
    script.main()
    found = json.loads(Path("found.json").read_text())
    assert found["failed"] == []
    assert found["images_seen"] == found["about"]["total_images"] == 1024
    assert found["fit into the package"]
    assert set(found["evaluation"]["figures"]) >= {"fid", "precision", "recall"}
    assert "held-out figures" in found["evaluation"]
    assert Path("runs/colour/plot.png").exists()
