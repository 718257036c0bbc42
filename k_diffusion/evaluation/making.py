"""The pretrained extractors by their names."""

from __future__ import annotations

from pathlib import Path

import torch

from k_diffusion.evaluation.extractors import FeatureExtractor
from k_diffusion.evaluation.inception import FIDInception
from k_diffusion.evaluation.pretrained import CLIPFeatureExtractor, DINOv2FeatureExtractor
from k_diffusion.utils.maths import unknown

PRETRAINED = ("inception", "dinov2", "clip")


def make_extractor(
    name: str, *, weights: str | Path = "", device: torch.device | str = "cpu"
) -> FeatureExtractor:
    """A pretrained extractor by its name in `PRETRAINED`.

    Args:
        name: "inception" (the network and the input of FID), "dinov2" (ViT-L/14, features as they
            are, for FD-DINOv2) or "clip" (ViT-B/16).
        weights: a file of Inception's weights, a folder of DINOv2 or CLIP, or an id of these on the
            Hugging Face hub; "": the usual ones, fetched once.
        device: where it computes.

    Raises:
        ValueError: unknown name, or the weights cannot be had.
        ImportError: transformers is not installed, for "dinov2" and "clip".
    """
    if name == "inception":
        return FIDInception(device, weights=weights)
    if name == "dinov2":
        return DINOv2FeatureExtractor(device=device, weights=weights, scaled=False)
    if name == "clip":
        return CLIPFeatureExtractor(device=device, weights=weights)
    raise ValueError(unknown("extractor", name, PRETRAINED))
