"""Whether an extractor can be had, seen without loading it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from k_diffusion.evaluation.inception import URL, check_inception, usual_file
from k_diffusion.evaluation.pretrained import CLIP, DINOV2, NO_TRANSFORMERS, check_folder
from k_diffusion.evaluation.small import SmallExtractor
from k_diffusion.utils.maths import unknown

_OF_TRANSFORMERS = {
    "dinov2": ("Dinov2Model", DINOV2["vitl14"]),
    "clip": ("CLIPVisionModelWithProjection", CLIP["ViT-B/16"]),
}


def look_for_extractor(name: str, weights: str | Path, channels: int) -> str:
    """Where an extractor's weights come from, in words; no values of them are read.

    What lies on the hub is not asked for.

    Args:
        name, weights: as of `make_reference`.
        channels: of the images.

    Raises:
        ValueError: an unknown name, or weights that are missing, damaged or something else's.
        ImportError: transformers is not installed, for "dinov2" and "clip".
    """
    if name == "small":
        if not weights:
            return "which is trained on the data first"
        made_for = SmallExtractor.load(Path(weights), "meta").trained["channels"]
        if made_for != channels:
            raise ValueError(
                f"{weights} is for images of {made_for} channels, and these have {channels}: leave "
                "it out, and one is trained on the data"
            )
    elif name == "inception":
        place = Path(weights) if weights else usual_file()
        if not weights and not place.exists():
            return f"fetched from {URL} first"
        check_inception(place)
        weights = place
    elif name in _OF_TRANSFORMERS:
        if importlib.util.find_spec("transformers") is None:
            raise ImportError(NO_TRANSFORMERS)
        kind, usual = _OF_TRANSFORMERS[name]
        if not check_folder(kind, str(weights) or usual):
            return f"{weights or usual} on the Hugging Face hub, fetched first unless they are here"
    else:
        raise ValueError(unknown("extractor", name, ("small", "inception", *_OF_TRANSFORMERS)))
    return f"weights {weights}"
