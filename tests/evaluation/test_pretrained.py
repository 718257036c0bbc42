"""DINOv2 and CLIP by transformers: tiny ones with random weights."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

from k_diffusion.evaluation import CLIPFeatureExtractor, DINOv2FeatureExtractor, make_extractor

transformers = pytest.importorskip("transformers")
IMAGES = torch.rand(3, 3, 20, 30, generator=torch.Generator().manual_seed(0)) * 2 - 1
IMAGENET = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
OPENAI = torch.tensor([[0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]])[
    ..., None, None
]


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    options = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.Dinov2Config(**options, image_size=518, patch_size=14)
    folder = tmp_path_factory.mktemp("weights") / "tiny-dino"
    transformers.Dinov2Model(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    options = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.CLIPVisionConfig(
        **options, intermediate_size=64, image_size=32, patch_size=8, projection_dim=16
    )
    folder = tmp_path_factory.mktemp("weights") / "tiny-clip"
    transformers.CLIPVisionModelWithProjection(config).save_pretrained(folder)
    return folder


def resized(size: int) -> torch.Tensor:
    return functional.interpolate(IMAGES, (size, size), mode="bicubic", antialias=True) / 2 + 0.5


def test_dinov2(dino: Path) -> None:
    extractor = DINOv2FeatureExtractor(weights=dino, scaled=False)
    network = transformers.Dinov2Model.from_pretrained(dino).eval()
    pixels = (resized(224) - IMAGENET[0]) / IMAGENET[1]
    with torch.no_grad():
        wanted = network(pixels).last_hidden_state[:, 0]  # the class token, after the last norm
    plain = extractor(IMAGES)
    assert plain.shape == (3, 32)
    assert (plain - wanted).abs().max() < 1e-5
    assert (make_extractor("dinov2", weights=dino)(IMAGES) - wanted).abs().max() < 1e-5
    scaled = DINOv2FeatureExtractor(weights=dino)(IMAGES)
    lengths = wanted.norm(dim=1, keepdim=True)
    assert (scaled - wanted / lengths * 32**0.5).abs().max() < 1e-5
    facts = extractor.facts()
    assert facts["name"] == "dinov2_tiny-dino"
    assert "of length" not in facts["input"]


def test_clip(clip: Path) -> None:
    extractor = CLIPFeatureExtractor(weights=clip)
    network = transformers.CLIPVisionModelWithProjection.from_pretrained(clip).eval()
    with torch.no_grad():
        pooled = network.vision_model((resized(32) - OPENAI[0]) / OPENAI[1]).pooler_output
        embedding = network.visual_projection(pooled)
    wanted = embedding / embedding.norm(dim=1, keepdim=True) * 4
    found = extractor(IMAGES)
    assert (found - wanted).abs().max() < 1e-5
    assert make_extractor("clip", weights=clip).name == "clip_tiny-clip"
    grey = extractor(IMAGES[:, :1])
    assert torch.equal(grey, extractor(IMAGES[:, :1].expand(-1, 3, -1, -1)))


def test_clip_with_its_texts(tmp_path: Path) -> None:
    """As it is published: images and texts in one file, the embedding's size told once for both."""
    options = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    text = {**options, "vocab_size": 99, "max_position_embeddings": 7}
    image = {**options, "intermediate_size": 64, "image_size": 32, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=text, vision_config=image, projection_dim=16)
    whole = transformers.CLIPModel(config).eval()
    whole.half().save_pretrained(tmp_path)
    with torch.no_grad():
        pooled = whole.float().vision_model((resized(32) - OPENAI[0]) / OPENAI[1]).pooler_output
        wanted = functional.normalize(whole.visual_projection(pooled)) * 4
    found = CLIPFeatureExtractor(weights=tmp_path)(IMAGES)
    assert found.dtype == torch.float32
    assert (found - wanted).abs().max() < 1e-5


def test_nothing_is_left_to_chance(dino: Path, clip: Path, tmp_path: Path) -> None:
    """transformers draws what is missing at random, with a warning."""
    with pytest.raises(ValueError, match=r"are of (a )?'clip_vision_model', not of"):
        DINOv2FeatureExtractor(weights=clip)
    with pytest.raises(ValueError, match=r"are of (a )?'dinov2', not of (a )?'clip"):
        CLIPFeatureExtractor(weights=dino)
    shutil.copytree(dino, tmp_path / "cut")
    file = tmp_path / "cut" / "model.safetensors"
    tensors = load_file(file)
    del tensors["layernorm.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"\(they lack layernorm\.weight and 0 more\)"):
        DINOv2FeatureExtractor(weights=tmp_path / "cut")


class Harm:
    """Pickled, it says what to run."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


def test_pickles_are_not_run(dino: Path, tmp_path: Path) -> None:
    folder, harm = tmp_path / "pickled", tmp_path / "harm"
    shutil.copytree(dino, folder)
    (folder / "model.safetensors").unlink()
    network = transformers.Dinov2Model.from_pretrained(dino)
    torch.save(network.state_dict(), folder / "pytorch_model.bin")  # the older format
    assert torch.equal(
        DINOv2FeatureExtractor(weights=folder)(IMAGES), DINOv2FeatureExtractor(weights=dino)(IMAGES)
    )
    torch.save({"layernorm.weight": Harm(harm)}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="they hold more than tensors, or are damaged") as error:
        DINOv2FeatureExtractor(weights=folder)
    assert "\n" not in str(error.value)
    assert not harm.exists()


def test_established_names() -> None:
    assert DINOv2FeatureExtractor.available_models() == ["vits14", "vitb14", "vitl14", "vitg14"]
    assert CLIPFeatureExtractor.available_models()[1] == "ViT-B/16"
    with pytest.raises(ValueError, match="vitl15"):
        DINOv2FeatureExtractor("vitl15")
    with pytest.raises(ValueError, match="RN50"):
        CLIPFeatureExtractor("RN50")


def test_weights_that_cannot_be_had(dino: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no folder: give one with"):
        DINOv2FeatureExtractor(weights=tmp_path / "none")
    with pytest.raises(ValueError, match="'owner/no-such-model' cannot be loaded"):
        CLIPFeatureExtractor(weights="owner/no-such-model")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="its config.json cannot be read .*: give one with"):
        DINOv2FeatureExtractor(weights=tmp_path / "empty")


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'k-diffusion\[diffusers\]' brings it"):
        DINOv2FeatureExtractor()
