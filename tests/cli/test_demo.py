"""The demo, made small: what it leaves, and that a second run is quick."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from k_diffusion.utils.images import load_png

DEMO = Path(__file__).parents[2] / "examples/demo.py"


@pytest.fixture
def demo(monkeypatch):
    spec = importlib.util.spec_from_file_location("demo", DEMO)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    train = module.train_classifier
    monkeypatch.setattr(module, "train_classifier", lambda *data, epochs: train(*data, epochs=1))
    monkeypatch.setattr(module, "SAMPLERS", {"dpmpp_2m": 2, "heun": 2})
    return module


def test_trains_measures_and_draws_then_does_not_train_again(
    demo, tmp_path, write_config, capsys
) -> None:
    out = tmp_path / "out"
    config = write_config(tmp_path)
    argv = ["--config", str(config), "--out", str(out), "--samples", "20"]
    assert demo.main(argv) == 0
    said = capsys.readouterr().out
    lies = dict(re.findall(r"^(checkpoint|grid|metrics): +(.+)$", said, re.MULTILINE)[-3:])
    assert lies.keys() == {"checkpoint", "grid", "metrics"}
    checkpoint = Path(lies["checkpoint"])
    trained = checkpoint.stat().st_mtime_ns
    figures = json.loads(Path(lies["metrics"]).read_text())
    assert figures["samplers"].keys() == {"dpmpp_2m", "heun"}
    best = figures["samplers"]["dpmpp_2m"]
    assert best.keys() == {
        "steps",
        "samples",
        "share of the asked class",
        "frechet ratio",
        "memorised share",
    }
    assert best["frechet ratio"] > 1  # four steps of training
    grid, text = load_png(lies["grid"])
    assert text["checkpoint sha256"] == figures["checkpoint sha256"]

    assert demo.main(argv) == 0
    assert "is trained already" in capsys.readouterr().out
    assert checkpoint.stat().st_mtime_ns == trained
    assert (load_png(lies["grid"])[0] == grid).all()
    again = json.loads(Path(lies["metrics"]).read_text())
    assert again["samplers"] == figures["samplers"]

    assert demo.main([*argv, "--fresh"]) == 0
    assert checkpoint.stat().st_mtime_ns > trained
    config.write_text(config.read_text().replace("channels = 8\n", "channels = 16\n"))
    capsys.readouterr()
    assert demo.main(argv) == 0
    assert "was trained with other settings" in capsys.readouterr().out


def test_the_settings_that_ship_are_valid() -> None:
    from k_diffusion.training import load_config

    config = load_config(DEMO.with_name("digits.toml"))
    assert config.model["num_classes"] == 10
