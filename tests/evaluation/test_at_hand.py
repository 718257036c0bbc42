"""Extractors looked for before they are needed: what is missing or wrong is named, and no values of
weights are read."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from k_diffusion.evaluation import DINOv2FeatureExtractor, train_small
from k_diffusion.evaluation.at_hand import look_for_extractor
from k_diffusion.evaluation.extractors import load_tensors
from k_diffusion.evaluation.inception import Inception
from k_diffusion.evaluation.small import SmallExtractor

CONFIG = {"dinov2": {"model_type": "dinov2"}, "clip": {"model_type": "clip"}}


@pytest.fixture(autouse=True)
def _no_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "whole.pth"
    torch.save(Inception().state_dict(), path)
    return path


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.safetensors"
    train_small(torch.rand(8, 1, 8, 8), None, "ab" * 32, images_seen=8).save(path)
    return path


def refused(match: str, *asked: Any, error: type[Exception] = ValueError) -> None:
    with pytest.raises(error, match=match) as found:
        look_for_extractor(*asked)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("layout", ["zip", "old", "safetensors"])
def test_outlines_have_names_and_shapes_but_no_values(tmp_path: Path, layout: str) -> None:
    tensors = {"a": torch.ones(3, 4), "b": torch.ones(2, dtype=torch.int64)}
    path = tmp_path / ("x.safetensors" if layout == "safetensors" else "x.pth")
    if layout == "safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=layout == "zip")
    assert torch.equal(load_tensors(path)["a"], tensors["a"])
    outlines = load_tensors(path, "meta")
    assert {name: tuple(t.shape) for name, t in outlines.items()} == {"a": (3, 4), "b": (2,)}
    assert all(t.is_meta for t in outlines.values())


def test_a_small_one(small: Path, tmp_path: Path) -> None:
    assert look_for_extractor("small", "", 1) == "which is trained on the data first"
    state = torch.get_rng_state()
    assert look_for_extractor("small", small, 1) == f"weights {small}"
    assert torch.equal(torch.get_rng_state(), state)  # nothing of a run changes by it
    assert next(SmallExtractor.load(small, "meta").parameters()).is_meta
    refused(r"small\.safetensors is for images of 1 channels, and these have 3", "small", small, 3)
    refused("none.safetensors is missing", "small", tmp_path / "none.safetensors", 1)
    save_file(load_file(small), tmp_path / "bare.safetensors")
    refused("bare.safetensors holds no small extractor", "small", tmp_path / "bare.safetensors", 1)
    small.write_bytes(small.read_bytes()[:-100])
    refused("small.safetensors cannot be read", "small", small, 1)


def test_inception(inception: Path, tmp_path: Path) -> None:
    said = look_for_extractor("inception", "", 3)
    assert said.startswith("fetched from https://")
    assert look_for_extractor("inception", inception, 3) == f"weights {inception}"
    # What the cache has is looked at as well.
    usual = tmp_path / "cache" / "k-diffusion" / "pt_inception-2015-12-05-6726825d.pth"
    usual.parent.mkdir(parents=True)
    usual.write_bytes(inception.read_bytes()[:1000])
    refused("6726825d.pth cannot be read", "inception", "", 3)
    usual.write_bytes(inception.read_bytes())
    assert look_for_extractor("inception", "", 3) == f"weights {usual}"
    state = dict(torch.load(inception, weights_only=True))
    changes: tuple[tuple[str, Callable[[dict[str, Any]], Any]], ...] = (
        (r"lacks fc\.bias \(1 of", lambda s: s.pop("fc.bias")),
        (r"also has fc\.more", lambda s: s.update({"fc.more": torch.zeros(1)})),
        (r"has another shape of fc\.bias", lambda s: s.update({"fc.bias": torch.zeros(7)})),
    )
    for match, change in changes:
        other = dict(state)
        change(other)
        torch.save(other, tmp_path / "other.pth")
        refused(match, "inception", tmp_path / "other.pth", 3)
    for name in [name for name in state if name.endswith("num_batches_tracked")]:
        del state[name]
    torch.save(state, tmp_path / "other.pth")  # as some copies are
    look_for_extractor("inception", tmp_path / "other.pth", 3)
    refused("none.pth is missing", "inception", tmp_path / "none.pth", 3)


@pytest.mark.parametrize("name", ["dinov2", "clip"])
def test_folders_of_transformers(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "weights"
    refused("weights is no folder: give one with config.json", name, folder, 3)
    folder.mkdir()
    refused(r"its config.json cannot be read", name, folder, 3)
    (folder / "config.json").write_text("[]")
    refused(r"its config.json cannot be read", name, folder, 3)
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    refused("are of a 'bert', not of a", name, folder, 3)
    (folder / "config.json").write_text(json.dumps(CONFIG[name]))
    refused("holds neither model.safetensors nor pytorch_model.bin", name, folder, 3)
    (folder / "model.safetensors").write_bytes(b"cut")
    refused("model.safetensors cannot be read", name, folder, 3)
    save_file({"a": torch.zeros(1)}, folder / "model.safetensors")
    assert look_for_extractor(name, folder, 3) == f"weights {folder}"
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text("{}")
    assert look_for_extractor(name, folder, 3) == f"weights {folder}"
    assert look_for_extractor(name, "owner/model", 3).startswith("owner/model on the Hugging Face")
    assert "on the Hugging Face hub, fetched first unless" in look_for_extractor(name, "", 3)
    monkeypatch.setitem(sys.modules, "transformers", None)
    refused(r"pip install 'k-diffusion\[diffusers\]'", name, folder, 3, error=ImportError)


def test_weights_of_another_network_are_not_loaded(tmp_path: Path) -> None:
    """transformers would begin with random weights, and only warn."""
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPVisionConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        image_size=32, patch_size=8, projection_dim=16,
    )  # fmt: skip
    transformers.CLIPVisionModelWithProjection(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="are of a 'clip_vision_model', not of a 'dinov2'"):
        DINOv2FeatureExtractor(weights=tmp_path)


def test_an_unknown_one() -> None:
    refused("unknown extractor 'incep'", "incep", "", 3)
