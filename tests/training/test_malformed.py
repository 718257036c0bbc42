"""Configs that cannot be: each refused by the command line, in one line that names the key."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from k_diffusion.cli import main
from k_diffusion.cli.train import Train
from k_diffusion.training.config_file import override
from k_diffusion.utils.images import save_png

UNET: dict[str, Any] = {
    "type": "unet", "channels": 8, "channel_mults": [1], "blocks": 1, "attention": [False],
    "head_channels": 8, "prediction": "edm", "sigma_data": "auto",
}  # fmt: skip
GOOD: dict[str, Any] = {
    "model": UNET,
    "data": {"source": "digits"},
    "total_images": 16,
    "batch_size": 8,
}
FOLDER = {"source": "folder", "path": "images", "size": 8}
LOST = object()
RESUME = "--resume-from" if "resume_from" in Train.__dataclass_fields__ else "--resume"

KEYS: list[tuple[str, Any, str]] = [
    # Keys that are not there, at every depth.
    ("batchsize", 32, "batchsize = 32 is no known key; did you mean batch_size?"),
    ("total_image", 32, "did you mean total_images?"),
    ("optimiser", {"lr": 1}, "did you mean optimizer?"),
    ("out_folder", "x", "out_folder = 'x' is no known key"),
    ("optimizer.learning_rate", 0.1, "optimizer.learning_rate = 0.1 is no known key"),
    ("optimizer.beta", [0.9, 0.99], "did you mean optimizer.betas?"),
    ("loss.wieghting", "edm", "did you mean loss.weighting?"),
    ("ema.decay", 0.9, "did you mean ema.max_decay?"),
    ("data.splits", "all", "did you mean data.split?"),
    ("data", {**FOLDER, "sise": 8}, "did you mean data.size?"),
    ("model.chanels", 8, "model.chanels = 8 is no option of this model; did you mean channels?"),
    ("conditioner", {"type": "class", "num_class": 10}, "did you mean num_classes?"),
    (
        "conditioner",
        {"type": "composite", "parts": {"a": {"type": "class", "num_class": 10}}},
        "parts.a: num_class = 10 is no option of this conditioner; did you mean num_classes?",
    ),
    ("process", {"name": "cosine", "ofset": 0.1}, "did you mean 'offset'"),
    (
        "loss",
        {"weighting": "min_snr", "weighting_options": {"gama": 5}},
        "unknown option of weighting 'min_snr', 'gama'; did you mean 'gamma'",
    ),
    (
        "loss",
        {"density": "lognormal", "density_options": {"mena": 0}},
        "unknown option of density 'lognormal', 'mena'; did you mean 'mean'",
    ),
    # Names that are not there.
    ("model.type", "unett", "model: unknown model type 'unett'; did you mean 'unet'"),
    ("model.prediction", "epsilon", "unknown prediction 'epsilon'; did you mean 'eps'"),
    ("model.resampling", "stride", "unknown resampling 'stride'; did you mean 'strided'"),
    ("data.source", "digit", "data: unknown source 'digit'; did you mean 'digits'"),
    ("loss.weighting", "min-snr", "unknown weighting 'min-snr'; did you mean 'min_snr'"),
    ("loss.density", "log_normal", "unknown density 'log_normal'; did you mean 'lognormal'"),
    ("process", {"name": "cosin"}, "unknown scheduler 'cosin'; did you mean 'cosine'"),
    ("optimizer.schedule", "cosin", "optimizer.schedule = 'cosin' is not one of 'constant'"),
    ("optimizer.type", "adamww", "optimizer.type = 'adamww' is "),
    ("conditioner", {"type": "clas"}, "conditioner: unknown conditioner type 'clas'; did you mean"),
    ("precision", "bf-16", "precision = 'bf-16' is not one of 'no', 'bf16' or 'fp16'"),
    # Values of another type.
    ("total_images", "16", "total_images = '16': input should be a valid integer"),
    ("total_images", 16.0, "total_images = 16.0: input should be a valid integer"),
    ("batch_size", True, "batch_size = True: input should be a valid integer"),
    ("seed", None, "seed = None: input should be a valid integer"),
    ("optimizer.lr", "1e-3", "optimizer.lr = '1e-3': input should be a valid number"),
    ("optimizer.betas", 0.9, "optimizer.betas = 0.9: input should be a list"),
    ("optimizer.betas", [0.9], "optimizer.betas.1 is missing"),
    ("optimizer", [], "optimizer = []: input should be a table of keys"),
    ("loss", "edm", "loss = 'edm': input should be a table of keys"),
    ("loss.stratified", 1, "loss.stratified = 1: input should be a valid boolean"),
    ("loss.weighting_options", [], "loss.weighting_options = []: input should be a table"),
    (
        "loss",
        {"weighting": "min_snr", "weighting_options": {"gamma": "5"}},
        "loss.weighting_options.gamma = '5': input should be a valid number",
    ),
    ("ema", None, "ema = None: input should be a table of keys"),
    ("data", ["digits"], "data = ['digits']: input should be a table of keys"),
    ("model", "unet", "model = 'unet': input should be a table of keys"),
    ("model.channels", 8.5, "model.channels = 8.5 does not fit; give a whole number"),
    ("model.channels", "8", "model.channels = '8' does not fit; give a whole number"),
    ("model.attention", False, "model.attention = False does not fit; give a list of true or f"),
    ("model.sigma_data", "automatic", "model.sigma_data = 'automatic'; give a number above 0"),
    ("conditioner", "class", "conditioner = 'class': input should be a table of keys"),
    ("process", {"name": "cosine", "offset": "x"}, "process: offset must be a number, got 'x'"),
    ("micro_batch_size", "most", "micro_batch_size = 'most' does not fit; give whole number of at"),
    ("grad_clip", "no", "grad_clip = 'no': input should be a valid number"),
    ("out", 3, "out = 3: input should be a valid string"),
    # Values out of bounds.
    ("total_images", 0, "total_images = 0: input should be greater than or equal to 1"),
    ("batch_size", -8, "batch_size = -8"),
    ("seed", -1, "seed = -1"),
    ("seed", 2**63, "seed = 9223372036854775808"),
    ("workers", -1, "workers = -1"),
    ("condition_dropout", 1.5, "condition_dropout = 1.5"),
    ("optimizer.lr", 0.0, "optimizer.lr = 0.0: input should be greater than 0"),
    ("optimizer.betas", [0.9, 1.0], "optimizer.betas.1 = 1.0"),
    ("optimizer.weight_decay", -0.1, "optimizer.weight_decay = -0.1"),
    ("ema.max_decay", 1.1, "ema.max_decay = 1.1"),
    ("grad_clip", 0.0, "grad_clip = 0.0: input should be greater than 0"),
    ("data", {**FOLDER, "size": 0}, "data.size.0 = 0"),
    ("model.channels", 0, "model.channels = 0 is too small; give at least 1"),
    ("model.dropout", 1.0, "model.dropout = 1.0 is outside [0, 1)"),
    ("model.sigma_data", -1.0, "model.sigma_data = -1.0; give a number above 0"),
    ("model.blocks", 10**7, "blocks = 10000000 is too large"),
    # Keys that are missing.
    ("total_images", LOST, "total_images is missing"),
    ("model", LOST, "model is missing"),
    ("data", LOST, "data is missing"),
    ("model.type", LOST, "model: the model's type is missing"),
    ("data", {}, "data.source is missing; one of digits, folder"),
    ("data", {"source": "folder", "size": 8}, "data.path is missing"),
    ("process", {"offset": 0.1}, "process: the schedule's name is missing"),
    # Keys that do not go together.
    ("model.head_channels", 5, "model.head_channels = 5 does not divide the 8 channels"),
    ("model.attention", [True, False], "model.attention = (True, False) has 2 entries"),
    ("loss.weighting_options", {"gamma": 5.0}, "weighting_options {'gamma': 5.0} are for"),
    ("data.path", "images", "data.path = 'images' is no known key"),
    ("process", {"name": "simple"}, "process: 'simple' only lays levels"),
    # What would be code elsewhere.
    ("model", {"_target_": "os.system"}, "model: the model's type is missing"),
    ("model.type", "os.system", "model: unknown model type 'os.system'"),
    ("model.__class__", "os.system", "__class__ = 'os.system' is no option of this model"),
    ("optimizer.type", "torch.optim.SGD", "optimizer.type = 'torch.optim.SGD' is "),
    ("data.source", {"__reduce__": ["os.system", "true"]}, "data: unknown source"),
    ("!!python/object/apply:os", ["true"], "!!python/object/apply:os = ['true'] is no known key"),
]
NOT_JSON: list[tuple[str, Any, str]] = [
    ("optimizer.lr", "nan", "optimizer.lr = nan: input should be a finite number"),
    ("ema.power", "inf", "ema.power = inf: input should be a finite number"),
    ("model.dropout", "nan", "model.dropout = nan does not fit; give a number"),
    ("model.sigma_data", "-inf", "model.sigma_data = -inf; give a number above 0"),
]
FILES: list[tuple[str, bytes, str]] = [
    ("run.toml", b"", "model is missing (and 2 more)"),
    ("run.json", b"", "run.json is no valid JSON"),
    ("run.json", b"[1, 2]", "run.json holds a list, not keys with values"),
    ("run.json", b'{"seed": 1, "seed": 2}', "key 'seed' stands twice"),
    ("run.json", b'{"model": {"width": 1, "width": 2}}', "key 'width' stands twice"),
    ("run.json", b'{"seed": 1,}', "run.json is no valid JSON"),
    ("run.json", b"[" * 100_000, "run.json is no valid JSON"),
    ("run.json", b'{"seed": ' + b"9" * 5000 + b"}", "run.json is no valid JSON"),
    ("run.toml", b"seed = ", "run.toml is no valid TOML"),
    ("run.toml", b"seed = 1\nseed = 2\n", "run.toml is no valid TOML"),
    ("run.toml", b"[model]\n[model]\n", "run.toml is no valid TOML"),
    ("run.toml", b"\xff\xfes\x00", "run.toml is no text in UTF-8"),
    ("run.yaml", b"seed: 1\n", "ends in '.yaml'; give a .toml or .json file"),
    ("run.json", b"\x80\x04\x95.", "run.json is no text in UTF-8"),
    (
        "run.toml",
        b'total_images = 2026-01-01\n[model]\ntype = "unet"\n[data]\nsource = "digits"',
        "total_images = datetime.date(2026, 1, 1): input should be a valid integer",
    ),
]
OPTIONS: list[tuple[str, str]] = [
    ("optimizer.lr.x=3", "optimizer.lr.x: optimizer.lr is 0.5, which has no keys"),
    ("model.attention.0=true", "model.attention is [False], which has no keys: give the whole"),
    (".lr=3", "'.lr' is no key; give names joined by dots"),
    ("optimizer..lr=3", "'optimizer..lr' is no key"),
    ("model.attention=[true", "model.attention: [true is not as JSON has it"),
    ('process={"name":"cosine"', 'process: {"name":"cosine" is not as JSON has it'),
    ("seed=1,seed=2", "seed is given twice"),
    ("seed", "'seed' is not of the form name=value"),
    ("optimizer.lr=null", "optimizer.lr = None: input should be a valid number"),
    ("model.dims=4", "model.dims = 4 is no dimension this model has"),
    ('seed="3"', "seed = '3': input should be a valid integer"),
]
LATER: list[tuple[dict[str, Any], str]] = [
    ({"model.in_channels": 3}, "model.in_channels is 3, but the data has 1 channels"),
    ({"model.num_classes": 7}, "model.num_classes is 7, but the data has 10 classes"),
    ({"conditioner": {"type": "class", "num_classes": 10}}, "num_classes"),
    ({"data": {**FOLDER, "path": "nowhere"}}, "nowhere"),
    ({"data": {**FOLDER, "path": "empty"}}, "data folder empty holds no images"),
    ({"data": {**FOLDER, "path": "broken"}}, "data folder broken holds only broken images"),
    ({"data": {**FOLDER, "path": "flat"}}, "model.sigma_data is auto, but all values"),
    ({"data": {**FOLDER, "path": "flat", "classes": "folders"}}, "holds no class folders"),
    ({"out": "flat/a.png"}, "out = 'flat/a.png' is a file; give a folder"),
    ({"precision": "fp16"}, "precision = 'fp16' needs a GPU"),
]


def changed(key: str, value: Any) -> dict[str, Any]:
    """The good config with one dotted key set, or lost."""
    data = deepcopy(GOOD)
    if value is LOST:
        *above, last = key.split(".")
        table = data[above[0]] if above else data
        del table[last]
    else:
        override(data, key, value)
    return data


@pytest.fixture
def refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Any:
    """(file, its text, options) -> exit code and the one line said; nothing may be written."""
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "broken", "flat"):
        (tmp_path / name).mkdir()
    (tmp_path / "broken/a.png").write_bytes(b"\x89PNG")
    save_png(tmp_path / "flat/a.png", torch.zeros(3, 8, 8))

    def run(name: str, text: bytes, *options: str) -> tuple[int, str]:
        path = tmp_path / name
        path.write_bytes(text)
        before = sorted(tmp_path.rglob("*"))
        code = main(["train", "--config", str(path), *options])
        said = capsys.readouterr()
        assert sorted(tmp_path.rglob("*")) == before
        assert not said.out
        assert "Traceback" not in said.err
        assert "pydantic" not in said.err
        (line,) = said.err.splitlines()
        assert line.startswith("k-diffusion train: error: ")
        assert len(line) < 600
        return code, line

    return run


@pytest.mark.parametrize(("key", "value", "said"), KEYS)
def test_a_key_or_value_that_does_not_fit(refused: Any, key: str, value: Any, said: str) -> None:
    code, line = refused("run.json", json.dumps(changed(key, value)).encode())
    assert code == 2
    assert said in line
    assert key.split(".")[0] in line


@pytest.mark.parametrize(("key", "value", "said"), NOT_JSON)
def test_a_number_that_is_none(refused: Any, key: str, value: str, said: str) -> None:
    from k_diffusion.training.words import toml_tables

    data = changed(key, float(value))
    code, line = refused("run.toml", "\n".join(toml_tables(data)).encode())
    assert code == 2
    assert said in line


@pytest.mark.parametrize(("name", "text", "said"), FILES)
def test_a_file_that_is_no_config(refused: Any, name: str, text: bytes, said: str) -> None:
    code, line = refused(name, text)
    assert code == 2
    assert said in line


@pytest.mark.parametrize(("option", "said"), OPTIONS)
def test_an_option_that_does_not_fit(refused: Any, option: str, said: str) -> None:
    text = json.dumps(changed("optimizer.lr", 0.5)).encode()
    code, line = refused("run.json", text, "--set", option)
    assert code == 2
    assert said in line


@pytest.mark.parametrize(("keys", "said"), LATER)
def test_what_only_data_and_machine_can_tell(refused: Any, keys: dict[str, Any], said: str) -> None:
    data = deepcopy(GOOD)
    for key, value in keys.items():
        override(data, key, value)
    code, line = refused("run.json", json.dumps(data).encode())
    assert code == 1
    assert said in line


def test_they_are_75_and_more_and_all_different() -> None:
    """And the config from which they are made is a good one."""
    all_of_them = [
        *(json.dumps(changed(key, value)) for key, value, _ in KEYS),
        *(str(changed(key, float(value))) for key, value, _ in NOT_JSON),
        *(repr(one) for one in (*FILES, *OPTIONS, *LATER)),
    ]
    assert len(set(all_of_them)) == len(all_of_them) >= 75


def test_the_good_one_is_good_and_the_same_run_is_not_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.json").write_text(json.dumps({**GOOD, "out": "out"}))
    argv = ["train", "--config", "run.json"]
    assert main(argv) == 0
    (checkpoint,) = Path("out").glob("*.safetensors")
    before = sorted(path.read_bytes() for path in Path("out").iterdir())
    capsys.readouterr()
    for key, value in (("seed", 1), ("batch_size", 4), ("model.channels", 16)):
        more = [RESUME, str(checkpoint), "--set", f"{key}={value}"]
        assert main([*argv, *more]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert f"is of a run with {key} = " in line
    assert sorted(path.read_bytes() for path in Path("out").iterdir()) == before
