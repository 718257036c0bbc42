"""Configs: each mistake is one line with the key's path, its value and the way out."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from k_diffusion.models import MODELS
from k_diffusion.training import sections
from k_diffusion.training.config import ConfigError, TrainConfig
from k_diffusion.training.config_file import load_config, make_config, override

GOOD: dict[str, Any] = {
    "model": {"type": "tiny", "prediction": "edm", "sigma_data": "auto"},
    "data": {"source": "digits"},
    "total_images": 1000,
}
FOLDER = {"source": "folder", "path": "images", "size": 32}


def change(key: str, value: Any, base: dict[str, Any] = GOOD) -> dict[str, Any]:
    """A copy with one dotted key set."""
    data = json.loads(json.dumps(base))
    override(data, key, value)
    return data


MISTAKES = [
    ("batchsize", 32, "batchsize = 32 is no known key; did you mean batch_size?"),
    ("optimizer.lrr", 0.1, "optimizer.lrr = 0.1 is no known key; did you mean optimizer.lr?"),
    ("loss.gamma", 5, "loss.gamma = 5 is no known key; known: weighting, "),
    ("ema.max_deccay", 0.9, "did you mean ema.max_decay?"),
    ("data.spilt", "all", "data.spilt = 'all' is no known key; did you mean data.split?"),
    ("data.path", "x", "data.path = 'x' is no known key; known: source, split, split_seed"),
    ("data.split", "tests", "data.split = 'tests' is not one of 'train', 'test' or 'all'"),
    ("data.source", "digit", "data: unknown source 'digit'; did you mean 'digits'"),
    ("data", {}, "data.source is missing; one of digits, folder, archive"),
    ("data", {"source": "folder", "size": 8}, "data.path is missing"),
    ("data", {**FOLDER, "size": 0}, "data.size.0 = 0: input should be greater than"),
    ("data", {**FOLDER, "size": [32, "x"]}, "data.size.1 = 'x': input should be a valid integer"),
    ("data", {**FOLDER, "size": "x"}, "data.size = 'x': input should be a list"),
    ("data", {**FOLDER, "size": True}, "data.size = True: input should be a list"),
    ("data", {**FOLDER, "channels": 2}, "data.channels = 2 is not one of 1, 3 or 4"),
    ("data", {**FOLDER, "chanels": 1}, "data.chanels = 1 is no known key; did you mean data.cha"),
    ("batch_size", "x", "batch_size = 'x': input should be a valid integer"),
    ("batch_size", "32", "batch_size = '32': input should be a valid integer"),
    ("batch_size", 32.0, "batch_size = 32.0: input should be a valid integer"),
    ("batch_size", True, "batch_size = True: input should be a valid integer"),
    ("batch_size", 0, "batch_size = 0: input should be greater than or equal to 1"),
    ("total_images", -5, "total_images = -5"),
    ("seed", 2**63, "seed = 9223372036854775808"),
    ("optimizer.lr", math.nan, "optimizer.lr = nan: input should be a finite number"),
    ("optimizer.lr", 0, "optimizer.lr = 0: input should be greater than 0"),
    ("optimizer.lr", "1e-3", "optimizer.lr = '1e-3': input should be a valid number"),
    ("optimizer.betas", [0.9, 1.0], "optimizer.betas.1 = 1.0: input should be less than 1"),
    ("optimizer", 3, "optimizer = 3"),
    ("optimizer.schedule", "linear", "is not one of 'constant', 'cosine'"),
    ("condition_dropout", 1.5, "condition_dropout = 1.5"),
    ("label_dropout", 0.1, "label_dropout = 0.1 is no known key; did you mean condition_dropout?"),
    ("conditioner", {"type": "clas"}, "conditioner: unknown conditioner type 'clas'; did you mean"),
    ("conditioner", {"type": "class"}, "conditioner.num_classes = 0 and class_names is empty"),
    ("precision", "bf-16", "precision = 'bf-16' is not one of 'no', 'bf16' or 'fp16'"),
    ("loss.weighting", "min-snr", "unknown weighting 'min-snr'; did you mean 'min_snr'"),
    ("loss.weighting_options", {"gamma": 5}, "weighting_options {'gamma': 5.0} are for"),
    ("loss", {"density": "lognormal", "density_options": {"men": 0}}, "did you mean 'mean'"),
    ("process", {"name": "cosin"}, "unknown scheduler 'cosin'; did you mean 'cosine'"),
    ("process", {"offset": 0.1}, "the schedule's name is missing"),
    ("process", {"name": "cosine", "ofset": 0.1}, "did you mean 'offset'"),
    ("process", {"name": "cosine", "offset": "x"}, "process: offset must be a number, got 'x'"),
    ("model.prediction", "epsilon", "unknown prediction 'epsilon'; did you mean 'eps'"),
    ("model.sigma_data", -1, "model.sigma_data = -1; give a number above 0, or 'auto'"),
    ("model.sigma_data", "automatic", "model.sigma_data = 'automatic'; give a number"),
    ("model.widht", 3, "model.widht = 3 is no option of this model; did you mean width?"),
    ("model", "tiny", "model = 'tiny': input should be a table of keys"),
]


@pytest.mark.parametrize(("key", "value", "message"), MISTAKES)
def test_mistakes_are_one_line_that_names_the_key(key: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        make_config(change(key, value), "config run.toml")
    line = str(caught.value)
    assert line.startswith("config run.toml: ")
    assert key.split(".")[0] in line
    assert "\n" not in line
    assert "pydantic" not in line


def test_missing_keys_and_several_mistakes() -> None:
    with pytest.raises(ConfigError, match="total_images is missing$"):
        make_config({"model": GOOD["model"], "data": GOOD["data"]})
    with pytest.raises(ConfigError, match=r"did you mean total_images\? \(and 1 more\)"):
        make_config({"model": GOOD["model"], "data": GOOD["data"], "total_image": 5})


def test_good_configs_and_what_auto_means() -> None:
    config = make_config(GOOD)
    assert (config.weighting, config.density) == ("edm", "lognormal")
    assert config.steps == 8  # of 128 images: the last batch is a whole one
    for prediction, density in (("flow", "logit_normal"), ("v", "uniform_time")):
        other = make_config(change("model.prediction", prediction))
        assert (other.weighting, other.density) == (prediction, density)
    named = make_config(change("loss", {"weighting": "min_snr", "weighting_options": {"gamma": 4}}))
    assert named.weighting == "min_snr"
    for size, parsed in ((32, (32, 32)), ([32, 48], (32, 48))):
        assert make_config(change("data", {**FOLDER, "size": size})).data.size == parsed  # type: ignore[union-attr]


def test_json_round_trip_gives_an_equal_config() -> None:
    data = change("data", {**FOLDER, "size": [32, 48]})
    data = change("process", {"name": "cosine", "offset": 0.01}, data)
    config = make_config(change("loss", {"density": "loguniform"}, data))
    again = make_config(json.loads(json.dumps(config.to_json())))
    assert again == config
    assert again.to_json() == config.to_json()


def test_config_is_frozen() -> None:
    config = make_config(GOOD)
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3  # type: ignore[misc]


def test_every_key_is_described() -> None:
    def keys(kind: type[BaseModel]) -> None:
        for name, field in kind.model_fields.items():
            assert field.description, f"{kind.__name__}.{name}"

    keys(TrainConfig)
    kinds = (
        "ArchiveConfig",
        "DigitsConfig",
        "FolderConfig",
        "LossConfig",
        "EmaConfig",
        "SpikesConfig",
    )
    for kind in (*kinds, "OptimizerConfig"):
        keys(getattr(sections, kind))


TOML = """
total_images = 1_000
[model]
type = "tiny"
prediction = "edm"
sigma_data = "auto"
[data]
source = "digits"
[optimizer]
betas = [0.9, 0.99]
"""


def test_files(tmp_path: Path) -> None:
    toml, js = tmp_path / "run.toml", tmp_path / "run.json"
    toml.write_text(TOML)
    js.write_text(json.dumps(change("optimizer.betas", [0.9, 0.99])))
    assert load_config(toml) == load_config(js)
    changed = load_config(toml, {"optimizer.lr": 0.5, "seed": 9})
    assert (changed.optimizer.lr, changed.seed) == (0.5, 9)
    assert changed.optimizer.betas == (0.9, 0.99)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("run.toml", "a = ", "run.toml is no valid TOML: "),
        ("run.toml", "seed = 1\nseed = 2", "run.toml is no valid TOML: "),
        ("run.json", "{", "run.json is no valid JSON: "),
        ("run.json", '{"seed": 1, "seed": 2}', "key 'seed' stands twice"),
        ("run.json", "[1]", "run.json holds a list, not keys"),
        ("run.json", "[" * 100000, "run.json is no valid JSON: "),
        ("run.yaml", "seed: 1", "ends in '.yaml'; give a .toml or .json file"),
        ("run.toml", b"\xff\xfe", "is no text in UTF-8"),
        ("run.toml", TOML + "[optimiser]\nlr = 1", "did you mean optimizer?"),
    ],
)
def test_unreadable_files(tmp_path: Path, name: str, text: str | bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        load_config(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file_and_override_below_a_value(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.toml does not exist"):
        load_config(tmp_path / "nowhere.toml")
    path = tmp_path / "run.toml"
    path.write_text(TOML)
    with pytest.raises(ConfigError, match="total_images is 1000, which has no keys"):
        load_config(path, {"total_images.x": 1})


def test_checking_the_model_costs_no_memory(monkeypatch: pytest.MonkeyPatch, tiny: Any) -> None:
    """The network is built on the meta device to see whether its options are right."""
    built = []

    class Watched(tiny):  # type: ignore[misc]
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            built.append({p.device.type for p in self.parameters()})

    monkeypatch.setitem(MODELS, "watched", Watched)
    make_config(change("model.type", "watched"))
    assert built == [{"meta"}]
