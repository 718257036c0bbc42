"""Files for sampling: one set of weights in any dtype, a card, and no parts without a name."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from k_diffusion.models import CONDITIONERS, ClassConditioner
from k_diffusion.training import (
    CheckpointError,
    load_conditioner,
    load_denoiser,
    read_info,
    run_training,
    save_inference,
)
from k_diffusion.training.card import SAMPLING
from k_diffusion.training.checkpoint import read_checkpoint
from k_diffusion.training.config import TrainConfig

MakeConfig = Callable[..., TrainConfig]
FLOATS = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""dtype -> largest relative error of rounding to it."""


@pytest.fixture
def trained(make_run_config: MakeConfig) -> Path:
    return run_training(make_run_config(total_images=96), progress=False).checkpoint


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("weights", ["ema", "last"])
def test_weights_come_back_in_float32(
    trained: Path, tmp_path: Path, dtype: torch.dtype, weights: str
) -> None:
    small = tmp_path / "small.safetensors"
    sha256 = save_inference(trained, small, weights=weights, dtype=dtype)
    info, parts = read_checkpoint(small, ["ema"])
    assert info.sha256 == sha256
    assert set(parts["ema"]) == {name.partition("/")[2] for name in info.tensors}
    assert parts["ema"]["calls"].dtype is torch.int64
    stored = {t.dtype for t in parts["ema"].values() if t.is_floating_point()}
    assert stored == {dtype}
    denoiser, _ = load_denoiser(small)
    whole, _ = load_denoiser(trained, weights)
    for name, tensor in whole.network.state_dict().items():
        got = denoiser.network.state_dict()[name]
        assert got.dtype == tensor.dtype
        assert float((got - tensor).abs().max()) <= FLOATS[dtype] * float(tensor.abs().max())
        if dtype is not torch.float32 and tensor.is_floating_point():
            assert torch.equal(got, tensor.to(dtype).float())
    assert small.stat().st_size < trained.stat().st_size / 2


def test_what_sampling_needs_is_in_it(trained: Path, tmp_path: Path) -> None:
    small, again = tmp_path / "small.safetensors", tmp_path / "again.safetensors"
    save_inference(trained, small, weights="last", dtype=torch.float16)
    info, whole = read_info(small), read_info(trained)
    assert (info.config, info.data, info.images_seen) == (
        whole.config,
        whole.data,
        whole.images_seen,
    )
    assert {"mean", "std", "shape", "class_names"} <= set(info.data)
    assert isinstance(load_conditioner(info), ClassConditioner)
    # From an inference file another one can be made; it still says whose weights they are.
    save_inference(small, again)
    assert read_checkpoint(again, ["ema"])[1]["ema"]["enter.weight"].dtype is torch.float16
    assert "those after the last step, stored as float16" in read_info(again).card
    with pytest.raises(CheckpointError, match="holds weights for sampling only"):
        run_training(
            TrainConfig.model_validate(whole.config | {"out": str(tmp_path / "new")}, strict=False),
            resume=small,
            progress=False,
        )


def test_the_card_says_what_it_is(trained: Path, tmp_path: Path) -> None:
    small = tmp_path / "small.safetensors"
    assert read_info(trained).card == ""
    save_inference(trained, small, licence="CC-BY-4.0", note="Digits,\n**not** faces.\n")
    info, whole = read_info(small), read_info(trained)
    lines = info.card.splitlines()
    assert lines[0] == "# Diffusion model: tiny, edm"
    assert lines[-2:] == ["Digits,", "**not** faces."]
    facts = dict(re.fullmatch(r"- ([a-z ]+): (.+)", line).groups() for line in lines[2:-3])  # type: ignore[union-attr]
    mean, std = whole.data["mean"], whole.data["std"]
    assert facts["network"] == f"tiny, {whole.parameters:,} parameters and buffers"
    assert facts["prediction"] == "edm"
    assert facts["makes"] == "data of shape 1 x 8 x 8"
    assert facts["is told"].startswith("one of 10 classes: ")
    assert facts["trained on"] == (
        f"1,438 images (digits), mean {mean:.4g}, standard deviation {std:.4g}"
    )
    assert facts["training"] == "96 images seen, in 3 steps"
    assert facts["weights"].startswith("moving average (")
    assert "max_decay = 0.9999" in facts["weights"]
    assert facts["weights"].endswith(", stored as float32")
    assert whole.sha256 in facts["made from"]
    assert facts["made with"].startswith("k-diffusion 0.")
    assert facts["licence"] == "CC-BY-4.0"
    assert "--sampler dpmpp_2m --scheduler karras --steps 20" in facts["sampling"]
    save_inference(trained, small)
    assert "- licence: none is stated" in read_info(small).card


def test_the_card_names_the_defaults_of_sampling() -> None:
    from k_diffusion.cli.sample import Sample

    options = Sample("file")
    assert {name: getattr(options, name) for name in SAMPLING} == dict(SAMPLING)


def test_the_folder_of_the_data_is_its_owners_matter(
    make_run_config: MakeConfig, tmp_path: Path
) -> None:
    from PIL import Image

    folder = tmp_path / "alice"
    folder.mkdir()
    for i in range(3):
        Image.new("L", (8, 8), 50 * i).save(folder / f"{i}.png")
    config = make_run_config(
        data={"source": "folder", "path": str(folder), "size": 8, "channels": 1},
        model={"type": "tiny", "prediction": "flow", "time_convention": "unit"},
        process={"name": "flow"},
        total_images=32,
    )
    small = tmp_path / "small.safetensors"
    save_inference(run_training(config, progress=False).checkpoint, small)
    card = read_info(small).card
    assert "alice" not in card
    assert "- trained on: 3 images (folder), " in card
    assert "- is told: nothing\n" in card
    assert "- noise schedule: flow\n" in card


# ---------------------------------------------------------------- what cannot be rebuilt


def refused(source: Path, **options: Any) -> str:
    target = source.with_name("small.safetensors")
    with pytest.raises(CheckpointError) as caught:
        save_inference(source, target, **options)
    assert not target.exists()
    line = str(caught.value)
    assert str(source) in line
    assert "\n" not in line
    return line


def test_a_network_without_a_type(make_run_config: MakeConfig, tiny: Any) -> None:
    class Mine(tiny):  # type: ignore[misc]
        pass

    config = make_run_config(total_images=32)
    options = {**config.model, "sigma_data": 0.5}
    network = Mine(**{key: value for key, value in options.items() if key != "type"})
    result = run_training(config, network=network, progress=False)
    assert "holds a Mine, but its config names 'tiny', a Tiny: register the class" in refused(
        result.checkpoint
    )


def test_a_network_of_another_shape(make_run_config: MakeConfig, tiny: Any) -> None:
    config = make_run_config(total_images=32)
    options = {**config.model, "sigma_data": 0.5, "width": 9}
    network = tiny(**{key: value for key, value in options.items() if key != "type"})
    object.__setattr__(network, "config", None)  # so that nobody knows of the width
    result = run_training(config, network=network, progress=False)
    assert "does not fit Tiny: enter.weight has shape (9, 1, 3, 3)" in refused(result.checkpoint)


def test_a_type_that_is_not_known_here(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from k_diffusion.models import MODELS

    monkeypatch.delitem(MODELS, "tiny")
    assert "not known here (unknown model type 'tiny'" in refused(trained)
    assert "--plugin FILE.py" in refused(trained)


def test_a_conditioner_without_a_type(make_run_config: MakeConfig) -> None:
    class Own(ClassConditioner):
        pass

    config = make_run_config(total_images=32)
    given = run_training(config, conditioner=Own(num_classes=10), progress=False)
    assert "trained with the conditioner Own, which has no type" in refused(given.checkpoint)
    known = run_training(
        config, conditioner=ClassConditioner(num_classes=10), overwrite=True, progress=False
    )
    small = known.checkpoint.with_name("small.safetensors")
    save_inference(known.checkpoint, small)
    assert "- is told: what the conditioner class makes\n" in read_info(small).card
    assert "class" in CONDITIONERS


def test_a_value_beyond_the_dtype(make_run_config: MakeConfig, tiny: Any) -> None:
    config = make_run_config(total_images=32)
    options = {**config.model, "sigma_data": 0.5}
    network = tiny(**{key: value for key, value in options.items() if key != "type"})
    with torch.no_grad():
        nn.init.constant_(network.classes.weight, 1e5)
    result = run_training(config, network=network, progress=False)
    line = refused(result.checkpoint, dtype=torch.float16)
    assert "has the value 1e+05 in classes.weight, beyond float16: give bfloat16 or float32" in line
    save_inference(
        result.checkpoint, result.checkpoint.with_name("b.safetensors"), dtype=torch.bfloat16
    )


def test_damage_and_absence(trained: Path) -> None:
    assert "does not exist" in refused(trained.with_name("none.safetensors"))
    trained.write_bytes(trained.read_bytes()[:-1])
    assert "is truncated" in refused(trained)
