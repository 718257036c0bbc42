"""The data section: what a word of the command line means, what is kept, what is refused."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from k_diffusion.cli.app import main
from k_diffusion.config.run import load_run
from k_diffusion.training.config import ConfigError
from k_diffusion.training.config_file import make_config, make_data
from k_diffusion.training.data_sections import KINDS, guess_data
from k_diffusion.training.dataset import SOURCES, make_source


def test_every_kind_of_data_has_its_table() -> None:
    assert set(KINDS) == set(SOURCES)


def tar(path: Path, *names: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    Image.new("L", (8, 8)).save(content, "PNG")
    with tarfile.open(path, "w") as archive:
        for name in names:
            info = tarfile.TarInfo(name)
            data = b"1" if name.endswith("cls") else content.getvalue()
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def test_the_kind_is_guessed(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("x", "x")
    tar(tmp_path / "a.tar", "cat/1.png", "notes.txt")
    tar(tmp_path / "web.tar", "1.png", "1.cls")
    tar(tmp_path / "json.tar", "1.png", "1.json")
    tar(tmp_path / "shards/0.tar", "1.png")
    tar(tmp_path / "webs/0.tar", "1.png", "1.cls")
    for folder, name in (
        ("latents", "latents.json"), ("begun", "encode.json"), ("hf", "state.json"),
        ("hfs", "dataset_dict.json"), ("pictures", "1.png"), ("mixed", "1.png"),
    ):  # fmt: skip
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text("{}")
    tar(tmp_path / "mixed/0.tar", "1.png")
    (tmp_path / "empty").mkdir()
    wanted = {
        "a.zip": "archive", "a.tar": "archive", "web.tar": "webdataset", "json.tar": "webdataset",
        "shards": "archive", "webs": "webdataset", "{0..9}.tar": "webdataset", "x.npy": "arrays",
        "x.npz": "arrays", "latents": "latents", "begun": "latents", "hf": "huggingface",
        "hfs": "huggingface", "pictures": "folder", "mixed": "folder", "empty": "folder",
        "nowhere": "folder",
    }  # fmt: skip
    found = {name: guess_data(str(tmp_path / name)) for name in wanted}
    assert {name: one["source"] for name, one in found.items()} == wanted
    assert all(one["path"] == str(tmp_path / name) for name, one in found.items())
    assert guess_data("hf:someone/birds") == {"source": "huggingface", "path": "someone/birds"}
    assert guess_data("digits") == {"source": "digits"}


def test_a_config_s_own_keys_stay_where_they_have_a_meaning(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(
        'total_images = 64\n[model]\ntype = "unet"\nprediction = "edm"\n[data]\n'
        'source = "folder"\npath = "here"\nsize = 16\nflip = true\ncaptions = "files"\n'
    )

    def data(given: str, **more: Any) -> dict[str, Any]:
        return load_run(path, {"data.path": given, **more}).data.model_dump()

    shards = data("x/{0..3}.tar")
    assert (shards["source"], shards["path"]) == ("webdataset", "x/{0..3}.tar")
    assert (shards["size"], shards["flip"], shards["captions"]) == ((16, 16), True, "files")
    assert data("elsewhere")["flip"]
    array = data("x.npy")
    assert (array["source"], array["flip"]) == ("arrays", False)
    assert data("x.npy", **{"data.flip": True})["flip"]
    assert data("digits")["source"] == "digits"
    text = path.read_text().replace('"folder"', '"huggingface"')
    path.write_text(text + 'split = "test"\n')
    assert data("elsewhere")["source"] == "folder"  # which has no splits
    assert data("hf:a/b")["split"] == "test"
    assert data("hf:a/b")["path"] == "a/b"


def test_keys_that_are_not_of_a_kind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.crop = 'random' is no known key"):
        make_data({"source": "arrays", "path": "x.npy", "crop": "random"})
    with pytest.raises(ConfigError, match=r"data\.lables = 'x' is no known key; did you mean"):
        make_data({"source": "arrays", "path": "x.npy", "lables": "x", "label_key": "y"})
    with pytest.raises(ConfigError, match=r"data\.bits = 12 is not one of 8 or 16"):
        make_data({"source": "folder", "path": "x", "size": 8, "bits": 12})
    with pytest.raises(ConfigError, match=r"data\.buckets"):
        make_data({"source": "folder", "path": "x", "size": 8, "buckets": [[8, 0]]})
    made = make_data({"source": "folder", "path": "x", "size": 8, "buckets": [[8, 16]]})
    assert made["buckets"] == ((8, 16),)
    assert (
        make_data({"source": "arrays", "path": "x", "value_range": "none"})["value_range"] is None
    )


def test_a_section_comes_back_from_a_checkpoint_s_json() -> None:
    data = {
        "source": "webdataset", "path": "x", "size": [8, 16], "buckets": [[16, 8]],
        "class_names": ["a"],
    }  # fmt: skip
    whole = {"model": {"type": "unet", "prediction": "edm"}, "data": data, "total_images": 1}
    config = make_config(whole)
    assert make_config(config.to_json()) == config


def test_training_by_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.toml").write_text(
        'total_images = 4\nbatch_size = 4\n[model]\ntype = "unet"\nprediction = "edm"\n'
        "channels = 32\nchannel_mults = [1]\nblocks = 1\nattention = [false]\n"
        '[data]\nsource = "digits"\n'
    )
    np.save(tmp_path / "x.npy", np.zeros((4, 8, 8, 1), np.uint8))
    command = ["train", "--config", str(tmp_path / "run.toml"), "--out", str(tmp_path / "out")]
    assert main([*command, "--data", str(tmp_path / "x.npy")]) == 0
    assert "trained on 4 images" in capsys.readouterr().out
    web = tar(tmp_path / "web.tar", "1.png", "1.cls")
    command += ["--overwrite", "--data", str(web)]
    assert main(command) == 2
    assert "data.size is missing" in capsys.readouterr().err
    assert main([*command, "--set", "data.size=8,data.channels=1"]) == 0


@pytest.mark.parametrize("kind", sorted(SOURCES))
def test_every_kind_is_made_by_name(kind: str, tmp_path: Path) -> None:
    """With the defaults of its section: what is missing then is the data, not an argument."""
    options: dict[str, Any] = {"source": kind}
    fields = KINDS[kind].model_fields
    options |= {"path": str(tmp_path / "nothing")} if "path" in fields else {}
    options |= {"size": 8} if "size" in fields else {}
    made = make_data(options)
    if kind == "digits":
        assert len(make_source(**made)) == 1438
        return
    with pytest.raises(ValueError, match="nothing"):
        make_source(**made)
