"""A user's own model and conditioner, from the command line alone."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from k_diffusion.cli import main, plugins
from k_diffusion.models import CONDITIONERS, MODELS
from k_diffusion.training import load_denoiser, read_info, run_training
from k_diffusion.utils.images import load_png, save_png

PLUGIN = """
from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from k_diffusion.models import Conditioner, register_conditioner, register_model


@dataclass
class Settings:
    width: int
    num_classes: int = 0
    told: int = 0
    norm: Literal["none", "layer"] = "none"


@register_model("mine")
class Mine(nn.Module):
    Config = Settings
    prediction = "flow"
    time_convention = "unit"

    def __init__(self, config):
        super().__init__()
        self.width = config.width
        self.layer = nn.Conv2d(1, 1, 3, padding=1)
        self.classes = nn.Embedding(config.num_classes + 1, 1)
        self.vector = nn.Linear(config.told, 1) if config.told else None

    def forward(self, x, t, class_label=None, embedding=None):
        h = self.layer(x) + t[:, None, None, None]
        if class_label is not None:
            h = h + self.classes(class_label)[..., None, None]
        if embedding is not None:
            h = h + self.vector(embedding)[..., None, None]
        return h


@dataclass(frozen=True, kw_only=True)
class InkSettings:
    reads: str = "clean"


@register_conditioner("ink")
class Ink(Conditioner):
    Config = InkSettings
    keywords = ("embedding",)

    def forward(self, raw):
        return {"embedding": torch.as_tensor(raw, dtype=torch.float32)[:, None]}

    def null(self, batch, like=None):
        return {"embedding": torch.full((batch, 1), -9.0)}

    def from_batch(self, raws, seeds):
        return self(self.find(raws).mean((1, 2, 3)))

    def read(self, word):
        return [float(word)]
"""

CONFIG = """
total_images = 32
batch_size = 8
out = {out!r}
{more}
[model]
type = "mine"
width = 3
{model}

[data]
source = "digits"
"""


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    """Plugins stay imported for the life of a process: here, of a test."""
    tables = (MODELS, CONDITIONERS, plugins._LOADED)
    before = [dict(table) for table in tables]
    path, modules = list(sys.path), set(sys.modules)
    yield
    for table, kept in zip(tables, before, strict=True):
        table.clear()
        table.update(kept)
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if "plugin" in name:
            del sys.modules[name]


@pytest.fixture
def plugin(tmp_path: Path) -> str:
    path = tmp_path / "mine.py"
    path.write_text(PLUGIN)
    return str(path)


def write(folder: Path, model: str = "num_classes = 10", more: str = "") -> str:
    path = folder / "config.toml"
    path.write_text(CONFIG.format(out=str(folder / "run"), model=model, more=more))
    return str(path)


def error(capsys: pytest.CaptureFixture[str]) -> str:
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    return err


def test_a_model_of_ones_own_is_trained_resumed_told_of_and_sampled(
    tmp_path: Path, plugin: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write(tmp_path)
    assert main(["train", "--config", config]) == 2
    assert "unknown model type 'mine'" in (said := error(capsys))
    assert "by --plugin FILE.py" in said

    assert main(["train", "--config", config, "--plugin", plugin]) == 0
    more = ["--resume", "--total-images", "40", "--plugin", plugin]
    assert main(["train", "--config", config, *more]) == 0
    (*_, checkpoint) = sorted((tmp_path / "run").glob("*.safetensors"))
    info = read_info(checkpoint)
    assert (info.images_seen, info.config["model"]["type"]) == (40, "mine")

    capsys.readouterr()
    assert main(["info", str(checkpoint), "--json", "--plugin", plugin]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["model"], facts["known here"], facts["prediction"]) == ("mine", True, "flow")

    out = tmp_path / "drawn"
    argv = ["sample", str(checkpoint), "-n", "3", "--steps", "2", "--out", str(out)]
    assert main([*argv, "--scheduler", "flow", "--plugin", plugin]) == 0
    image, text = load_png(out / "seed000001_class1.png")
    assert image.shape == (1, 8, 8)
    assert f"--plugin {plugin}" in text["command"]
    others, _ = load_png(out / "seed000000_class0.png")
    assert not torch.equal(image, others)


def test_what_it_predicts_decides_how_it_is_trained(tmp_path: Path, plugin: str) -> None:
    """The config says nothing of it: the class does."""
    from k_diffusion.training import load_config

    plugins.load_plugins([plugin])
    config = load_config(write(tmp_path))
    assert (config.prediction, config.weighting, config.density) == ("flow", "flow", "logit_normal")


def test_without_its_file_a_checkpoint_says_what_is_missing(
    tmp_path: Path, plugin: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--config", write(tmp_path), "--plugin", plugin]) == 0
    del MODELS["mine"]
    capsys.readouterr()
    assert main(["sample", str(tmp_path / "run")]) == 1
    said = error(capsys)
    assert "holds a network that cannot be built here (unknown model type 'mine'" in said
    assert "--plugin FILE.py" in said
    assert main(["info", str(tmp_path / "run"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["known here"] is False


def test_classes_are_seen_and_hidden_in_training(
    tmp_path: Path, plugin: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The network has no `num_classes` of its own, only its config, and no drop_condition."""
    from k_diffusion.training import load_config

    plugins.load_plugins([plugin])
    seen: list[torch.Tensor] = []
    forward = MODELS["mine"].forward

    def spy(self, x, t, class_label=None, **more):  # type: ignore[no-untyped-def]
        seen.append(class_label)
        return forward(self, x, t, class_label, **more)

    monkeypatch.setattr(MODELS["mine"], "forward", spy)
    more = {"condition_dropout": 0.5, "total_images": 400, "batch_size": 100}
    run_training(load_config(write(tmp_path), more), progress=False)
    labels = torch.cat([one for one in seen if one.device.type != "meta"])
    assert len(labels) == 400
    hidden = labels == 10
    assert 0.4 < hidden.double().mean() < 0.6
    assert set(labels[~hidden].tolist()) == set(range(10))


@pytest.mark.parametrize("drop", [0.0, 1.0])
def test_a_conditioner_of_ones_own(
    tmp_path: Path, plugin: str, capsys: pytest.CaptureFixture[str], drop: float
) -> None:
    more = f'condition_dropout = {drop}\nconditioner = {{type = "ink"}}'
    config = write(tmp_path, "told = 1", more)
    assert main(["train", "--config", config, "--plugin", plugin]) == 0
    argv = ["sample", str(tmp_path / "run"), "-n", "2", "--steps", "2", "--plugin", plugin]

    def drawn(name: str, *said: str) -> torch.Tensor:
        out = tmp_path / name
        assert main([*argv, *said, "--scheduler", "flow", "--out", str(out)]) == 0
        return load_png(out / "seed000001.png")[0]

    one = drawn("one", "--condition", "0.5")
    assert not torch.equal(one, drawn("other", "--condition", "0.9"))
    # Not told is the null condition, which here is -9.
    assert torch.equal(drawn("none"), drawn("null", "--condition=-9"))
    assert load_png(tmp_path / "one/seed000001.png")[1]["condition"] == "0.5"
    capsys.readouterr()
    assert main([*argv, "--condition", "much", "--out", str(tmp_path / "no")]) == 2
    assert "--condition much: could not convert string to float: 'much'" in error(capsys)
    assert main([*argv, "--condition", "1", "--condition", "2", "--out", str(tmp_path / "no")]) == 2
    assert "--condition is given 2 times, but this model is told one thing" in error(capsys)


def test_hidden_conditions_are_the_conditioners_null(
    tmp_path: Path, plugin: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from k_diffusion.training import load_config

    plugins.load_plugins([plugin])
    seen: list[torch.Tensor] = []
    forward = MODELS["mine"].forward

    def spy(self, x, t, embedding=None):  # type: ignore[no-untyped-def]
        seen.append(embedding)
        return forward(self, x, t, embedding=embedding)

    monkeypatch.setattr(MODELS["mine"], "forward", spy)
    config = load_config(write(tmp_path, "told = 1", 'conditioner = {type = "ink"}'))
    config = config.model_copy(update={"condition_dropout": 0.5, "batch_size": 100})
    run_training(config, progress=False)
    told = torch.cat([one for one in seen if one.device.type != "meta"])
    assert 0.3 < (told == -9).double().mean() < 0.7
    assert ((told == -9) | ((told > -1) & (told < 1))).all()


def test_a_plugin_is_imported_once_and_may_lie_beside_others(
    tmp_path: Path, plugin: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "plugin_helper.py").write_text("NAME = 'other'")
    (tmp_path / "two.py").write_text(
        "import mine_too, plugin_helper\nassert plugin_helper.NAME == 'other'"
    )
    (tmp_path / "mine_too.py").write_text("LOADED = []\nLOADED.append(1)")
    plugins.load_plugins([plugin, plugin, str(tmp_path / "two.py")])
    plugins.load_plugins([str(tmp_path / "." / "mine.py")])
    assert "mine" in MODELS


def test_a_module_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my_plugin").mkdir()
    (tmp_path / "my_plugin/parts.py").write_text(PLUGIN)
    monkeypatch.chdir(tmp_path)
    argv = ["train", "--config", write(tmp_path), "--plugin"]
    assert main([*argv, "my_plugin.parts"]) == 0
    capsys.readouterr()
    assert main([*argv, "my_plugin.part"]) == 2
    assert "--plugin my_plugin.part: there is no module my_plugin.part; a file" in error(capsys)
    assert main([*argv, "nothing_there"]) == 2
    assert "--plugin nothing_there: there is no module nothing_there" in error(capsys)


@pytest.mark.parametrize("file_first", [True, False])
def test_the_same_plugin_as_a_file_and_as_a_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file_first: bool
) -> None:
    (tmp_path / "plugin_twice.py").write_text(PLUGIN)
    monkeypatch.chdir(tmp_path)
    names = ["plugin_twice", "plugin_twice.py"]
    plugins.load_plugins(names[::-1] if file_first else names)
    plugins.load_plugins(names)
    assert MODELS["mine"].__module__ in sys.modules
    assert sys.modules["plugin_twice"].Mine is MODELS["mine"]


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("x = 1\ny = z\n", "NameError: name 'z' is not defined (FILE, line 2)"),
        ("x = (\n", "'(' was never closed (FILE, line 1)"),
        ("import not_there\n", "ModuleNotFoundError: No module named 'not_there' (FILE, line 1)"),
        ("import sys\n\nsys.exit(3)\n", "SystemExit: 3 (FILE, line 3)"),
        ("open('/no/file')\n", "No such file or directory: '/no/file' (FILE, line 1)"),
    ],
)
@pytest.mark.parametrize("command", ["train", "sample", "info"])
def test_a_plugin_that_fails_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], code: str, said: str, command: str
) -> None:
    path = tmp_path / "bad.py"
    path.write_text(code)
    first = ["--config", write(tmp_path)] if command == "train" else [str(tmp_path)]
    assert main([command, *first, "--plugin", str(path)]) == 2
    err = error(capsys)
    assert f"--plugin {path}: it cannot be imported: " in err
    assert said.replace("FILE", str(path)) in err
    gone = str(tmp_path / "gone.py")
    assert main([command, *first, "--plugin", gone]) == 2
    assert f"--plugin {gone} does not exist: give a file of Python" in error(capsys)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("bare_folder", "--plugin bare_folder is a folder; give a file in it"),
        ("", "--plugin '' is no module's name; a file is given as FILE.py"),
        (".mine", "--plugin '.mine' is no module's name"),
    ],
)
def test_what_names_neither_file_nor_module(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    said: str,
) -> None:
    (tmp_path / "bare_folder").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--config", write(tmp_path), "--plugin", name]) == 2
    assert said in error(capsys)


def test_a_config_or_a_checkpoint_names_no_code(
    tmp_path: Path, plugin: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for line in (f"plugin = [{plugin!r}]", f"plugin = {plugin!r}"):
        config = write(tmp_path, more=line)
        assert main(["train", "--config", config]) == 2
        assert "plugin = " in (said := error(capsys))
        assert "is no known key" in said
    assert "mine" not in MODELS


def test_a_picture_as_the_condition(
    tmp_path: Path, write_config, capsys: pytest.CaptureFixture[str]
) -> None:
    """The project's own kinds, by names in the config alone."""
    config = write_config(tmp_path)
    text = config.read_text().replace("num_classes = 10", "num_classes = 10\nimage_channels = 1")
    text += '[conditioner]\ntype = "composite"\nparts.picture = {type = "low_resolution", '
    text += 'channels = 1, factor = 2}\nparts.kind = {type = "class", num_classes = 10}\n'
    config.write_text(text)
    assert main(["train", "--config", str(config)]) == 0
    small = tmp_path / "small.png"
    save_png(small, torch.rand(1, 4, 4) * 2 - 1)
    argv = ["sample", str(tmp_path / "run"), "-n", "2", "--steps", "2", "--condition", "kind=3"]
    out = str(tmp_path / "out")
    assert main([*argv, "--condition", f"picture={small}", "--out", out]) == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "grid.png", "seed000000.png", "seed000001.png",
    ]  # fmt: skip
    with_class = [*argv[:-2], "--class-label", "3", "--condition", f"picture={small}"]
    assert main([*with_class, "--out", str(tmp_path / "same")]) == 0
    one, same = tmp_path / "out/seed000000.png", tmp_path / "same/seed000000_class3.png"
    assert torch.equal(load_png(one)[0], load_png(same)[0])
    capsys.readouterr()
    assert main([*argv, "--out", str(tmp_path / "no")]) == 2
    assert "needs the size of x: give `size` in its config" in error(capsys)
    assert main([*argv, "--condition", "picture=gone.png", "--out", str(tmp_path / "no")]) == 1
    assert "gone.png: No such file" in error(capsys)


def test_a_condition_for_a_model_that_takes_none(
    trained: Path, tmp_path: Path, write_config, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    argv = ["sample", str(trained), "-n", "2", "--steps", "2", "--out", out]
    assert main([*argv, "--condition", "7"]) == 0  # its classes, by name
    by_name, _ = load_png(tmp_path / "out/seed000000.png")
    assert main([*argv, "--class-label", "7", "--overwrite"]) == 0
    assert torch.equal(load_png(tmp_path / "out/seed000000_class7.png")[0], by_name)
    capsys.readouterr()
    assert main([*argv, "--class-label", "3", "--condition", "7", "--overwrite"]) == 2
    assert "--class-label is 3, but --condition tells class 7; leave one" in error(capsys)
    config = write_config(tmp_path)
    config.write_text(config.read_text().replace("num_classes = 10", ""))
    assert main(["train", "--config", str(config)]) == 0
    capsys.readouterr()
    assert main(["sample", str(tmp_path / "run"), "--condition", "a cat"]) == 2
    assert "--condition is 'a cat', but" in (said := error(capsys))
    assert "was trained without any; leave the option away" in said


def test_latents_and_sounds_are_not_written_as_images(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], write_config
) -> None:
    from k_diffusion.models import SmallAutoencoder
    from k_diffusion.training import Digits, LatentSource, load_config

    autoencoder = SmallAutoencoder(in_channels=1, latent_channels=2, channels=4, halvings=1)
    config = load_config(write_config(tmp_path), {"out": str(tmp_path / "latent")})
    run_training(config, source=LatentSource(Digits(), autoencoder), progress=False)
    assert load_denoiser(next((tmp_path / "latent").glob("*.safetensors")))
    capsys.readouterr()
    assert main(["sample", str(tmp_path / "latent"), "--out", str(tmp_path / "out")]) == 2
    assert "makes latents of the autoencoder" in error(capsys)
    assert not (tmp_path / "out").exists()
