"""DINOv2 and CLIP as feature extractors, by transformers.

Only weights are read, in safetensors or without running code, and no code that comes with them.
"""

from __future__ import annotations

import json
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from k_diffusion.evaluation.extractors import (
    FeatureExtractor,
    antialiased,
    as_rgb,
    load_tensors,
    normalised,
)
from k_diffusion.utils.maths import unknown
from k_diffusion.utils.words import reason_of

DINOV2 = {
    "vits14": "facebook/dinov2-small",
    "vitb14": "facebook/dinov2-base",
    "vitl14": "facebook/dinov2-large",
    "vitg14": "facebook/dinov2-giant",
}
"""The established names, and where their weights lie on the Hugging Face hub."""
CLIP = {
    "ViT-B/32": "openai/clip-vit-base-patch32",
    "ViT-B/16": "openai/clip-vit-base-patch16",
    "ViT-L/14": "openai/clip-vit-large-patch14",
    "ViT-L/14@336px": "openai/clip-vit-large-patch14-336",
}


class DINOv2FeatureExtractor(FeatureExtractor):
    """The class token of DINOv2 after its last norm.

    Images are resized to 224 x 224, bicubic and antialiased.

    Args:
        name: one of `available_models()`.
        device: where it computes.
        weights: a folder with config.json and weights, or an id on the Hugging Face hub, in place
            of the usual id; nothing is fetched for a folder.
        scaled: bring each row to the length sqrt(features), as the established class does; False:
            features as they are, of which FD-DINOv2 is made.
        network: a `Dinov2Model` to take instead of loading one.

    Raises:
        ValueError: an unknown name, or the weights cannot be had.

    Source: Oquab et al. 2023, arXiv:2304.07193; as a measure: Stein et al. 2023, arXiv:2306.04675.
    """

    size = (224, 224)
    mean = (0.485, 0.456, 0.406)
    std = (0.229, 0.224, 0.225)

    def __init__(
        self,
        name: str = "vitl14",
        device: torch.device | str = "cpu",
        *,
        weights: str | Path = "",
        scaled: bool = True,
        network: nn.Module | None = None,
    ) -> None:
        super().__init__()
        _check(name, DINOV2)
        self.name = f"dinov2_{Path(weights).name or name}"
        self.scaled = scaled
        self.input = "RGB, antialiased bicubic to 224 x 224, ImageNet's mean and deviation" + (
            "; features of length sqrt(d)" * scaled
        )
        self.network = network or _load("Dinov2Model", str(weights) or DINOV2[name])
        self.frozen(device)

    @classmethod
    def available_models(cls) -> list[str]:
        """The names that there are."""
        return list(DINOV2)

    def forward(self, images: Tensor) -> Tensor:
        x = antialiased(as_rgb(images).float(), self.size)
        features = self.network(normalised(x, self.mean, self.std)).pooler_output.float()
        return _at_length(features) if self.scaled else features


class CLIPFeatureExtractor(FeatureExtractor):
    """CLIP's image embedding, each row at the length sqrt(features), as the established class.

    Images are resized to the network's size (224 x 224, mostly), bicubic and antialiased.

    Args:
        name: one of `available_models()`.
        device: where it computes.
        weights: see `DINOv2FeatureExtractor`.
        network: a `CLIPVisionModelWithProjection` to take instead of loading one.

    Raises:
        ValueError: an unknown name, or the weights cannot be had.

    Source: Radford et al. 2021, arXiv:2103.00020.
    """

    mean = (0.48145466, 0.4578275, 0.40821073)
    std = (0.26862954, 0.26130258, 0.27577711)

    def __init__(
        self,
        name: str = "ViT-B/16",
        device: torch.device | str = "cpu",
        *,
        weights: str | Path = "",
        network: nn.Module | None = None,
    ) -> None:
        super().__init__()
        _check(name, CLIP)
        self.name = f"clip_{Path(weights).name or name}"
        loaded: Any = network or _load("CLIPVisionModelWithProjection", str(weights) or CLIP[name])
        self.network = loaded
        self.size = (loaded.config.image_size, loaded.config.image_size)
        self.input = (
            f"RGB, antialiased bicubic to {self.size[0]} x {self.size[1]}, CLIP's mean and "
            "deviation; features of length sqrt(d)"
        )
        self.frozen(device)

    @classmethod
    def available_models(cls) -> list[str]:
        """The names that there are: CLIP's transformers."""
        return list(CLIP)

    def forward(self, images: Tensor) -> Tensor:
        x = antialiased(as_rgb(images).float(), self.size)  # type: ignore[arg-type]
        return _at_length(self.network(normalised(x, self.mean, self.std)).image_embeds.float())


def _at_length(features: Tensor) -> Tensor:
    return functional.normalize(features) * features.shape[-1] ** 0.5


def _check(name: str, known: dict[str, str]) -> None:
    if name not in known:
        raise ValueError(unknown("model", name, known))


NO_TRANSFORMERS = (
    "DINOv2 and CLIP are loaded by transformers, which cannot be imported: pip install "
    "'k-diffusion[diffusers]' brings it; inception and small need none"
)
KINDS = {
    "Dinov2Model": ("dinov2",),
    "CLIPVisionModelWithProjection": ("clip", "clip_vision_model"),
}
"""Class of transformers -> what a config.json of its weights calls itself."""
_FILES = ("model.safetensors", "pytorch_model.bin")


def check_folder(kind: str, place: str) -> bool:
    """Refuse a folder that does not hold weights of a kind, without reading them.

    Args:
        kind: in KINDS.
        place: a folder, or an id on the hub.

    Returns:
        Whether it is a folder.

    Raises:
        ValueError: it is a path, but no such folder.
    """
    folder = Path(place)
    only_path = place.startswith((".", "/", "~")) or place.count("/") > 1 or folder.exists()
    if not only_path:
        return False
    way = "give one with config.json and model.safetensors, or an id on the Hugging Face hub"
    if not folder.is_dir():
        raise ValueError(f"weights {place} is no folder: {way}")
    try:
        own = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = reason_of(error)
        raise ValueError(
            f"weights {place}: its config.json cannot be read ({reason}): {way}"
        ) from None
    if own not in KINDS[kind]:
        raise ValueError(f"weights {place} are of a {own!r}, not of a {KINDS[kind][0]!r}: {way}")
    if not any(
        (folder / f"{file}{index}").is_file() for file in _FILES for index in ("", ".index.json")
    ):
        raise ValueError(f"weights {place} holds neither {' nor '.join(_FILES)}: {way}")
    if (file := folder / _FILES[0]).is_file():
        load_tensors(file, "meta")
    return True


def _load(kind: str, place: str) -> Any:
    """A network of transformers, from a folder or the hub."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f"{NO_TRANSFORMERS} ({error})") from None

    check_folder(kind, place)
    folder = Path(place)
    try:
        return _whole(getattr(transformers, kind), place, folder.is_dir())
    except Exception as error:  # of a foreign package and of files that may hold anything
        reason = reason_of(error)[:250]
        if isinstance(error, UnpicklingError):  # whose message tells how to run what it holds
            reason = "they hold more than tensors, or are damaged"
        raise ValueError(
            f"weights {place!r} cannot be loaded ({reason}): give a folder with config.json and "
            "model.safetensors, or the id of one on the Hugging Face hub that can be reached"
        ) from None


def _whole(network: Any, place: str, local: bool) -> Any:
    """A network all of whose weights are there: what is missing, or of another kind of network,
    would be drawn at random, with no more than a warning."""
    kinds = KINDS[network.__name__]
    told, _ = network.config_class.get_config_dict(place, local_files_only=local)
    if told.get("model_type") not in kinds:
        raise ValueError(f"they are of a {told.get('model_type')!r}, not of a {kinds[0]!r}")
    config = network.config_class.from_pretrained(place, local_files_only=local)
    if "vision_config" in told:  # of texts and images together, which have one embedding
        config.projection_dim = told.get("projection_dim", config.projection_dim)
    loaded, report = network.from_pretrained(
        place,
        config=config,
        local_files_only=local,
        trust_remote_code=False,
        weights_only=True,
        output_loading_info=True,
    )
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"they lack {missing[0]} and {len(missing) - 1} more")
    return loaded.float()
