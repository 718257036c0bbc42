"""The established model types against recorded outputs of theirs, from the checkpoint's own keys.

Each file holds a small model: its config, its weights, inputs and outputs. The environment variable
K_DIFFUSION_ORACLE may name a folder with more of them.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import k_diffusion as K

HERE = Path(__file__).parents[1] / "fixtures" / "established"
MORE = os.environ.get("K_DIFFUSION_ORACLE")
FILES = {path.stem: path for path in sorted(HERE.glob("*.safetensors"))}
FILES |= {path.stem: path for path in sorted(Path(MORE).glob("*.safetensors"))} if MORE else {}
PLAIN = ("x", "sigma", "noise")


def part(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {k.removeprefix(name): v for k, v in tensors.items() if k.startswith(name)}


def test_the_folder_is_there() -> None:
    assert len(FILES) >= 3
    if MORE:
        assert len(FILES) > 3, f"K_DIFFUSION_ORACLE = {MORE} holds no .safetensors"


@pytest.mark.parametrize("name", FILES)
def test_same_keys_and_same_outputs(name: str, record_property: Any) -> None:
    tensors = load_file(FILES[name])
    config = K.config.load_config(FILES[name])
    model = K.config.make_model(config)
    weights, given, wanted = (part(tensors, kind) for kind in ("weights/", "input/", "output/"))
    shapes = {key: (value.shape, value.dtype) for key, value in model.state_dict().items()}
    assert shapes == {key: (value.shape, value.dtype) for key, value in weights.items()}
    model.load_state_dict(weights, strict=True)
    denoiser = K.config.make_denoiser_wrapper(config)(model).eval()

    x, sigma, noise = (given.pop(key) for key in PLAIN)
    with torch.no_grad():
        got = {
            "raw": model(x, sigma, **given),
            "denoised": denoiser(x * sigma[:, None, None, None], sigma, **given),
            "loss": denoiser.loss(x, noise, sigma, **given),
        }
        if config["model"]["has_variance"]:
            got["logvar"] = model(x, sigma, return_variance=True, **given)[1]
    assert got.keys() == wanted.keys()
    errors = {key: float((got[key] - wanted[key]).abs().max()) for key in wanted}
    record_property("errors", errors)
    assert max(errors.values()) <= 1e-5, errors
    assert wanted["raw"].abs().max() > 0.1  # it does speak
