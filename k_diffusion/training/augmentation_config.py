"""The section of a run's config that says how images are changed before they are learned."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, model_validator

from k_diffusion.models import MODELS
from k_diffusion.training.sections import Amount, NotNegative, Share, StrictConfig
from k_diffusion.utils.warp import CONDITION

Window = Annotated[float, Field(gt=0, le=1)]
HalfTurn = Annotated[float, Field(ge=0, le=0.5)]


class AugmentationConfig(StrictConfig):
    """Random changes of the images, in this order, done for the whole batch where the network is.

    What happens to an image is decided by the seed and its place in the run. All but warp leak:
    the network learns changed images as if they were the data's.
    """

    flip: Share = Field(
        default=0.0, description="Share of images mirrored left to right, of any kind of data."
    )
    shift: Amount = Field(
        default=0,
        description="Images are moved by up to so many pixels, up or down, left or right; what "
        "comes in is mirrored at the edge.",
    )
    crop: Window = Field(
        default=1.0,
        description="Of each image a window is enlarged to the whole, its side an even share from "
        "this to 1; 1: none.",
    )
    hue: HalfTurn = Field(
        default=0.0, description="Most turns of the colours about grey, either way; 0.5: any hue."
    )
    saturation: Share = Field(
        default=0.0, description="Colourfulness is multiplied by 1 - this to 1 + this."
    )
    greyscale: Share = Field(default=0.0, description="Share of images that lose their colours.")
    contrast: Share = Field(
        default=0.0, description="Values, from mid-grey, are multiplied by 1 - this to 1 + this."
    )
    brightness: NotNegative = Field(
        default=0.0, description="A value between -this and this is added; black is -1, white 1."
    )
    warp: Share = Field(
        default=0.0,
        description="The augmentation of Karras et al. (2022): mirrored by chance 1/2, and turned "
        "over, scaled, turned, stretched and moved by this chance each, such as 0.12; 0: none of "
        "it. The network is told by nine numbers, 0 in sampling, so that it does not leak: "
        "model.augmentation_dim is then 9.",
    )
    leaky: bool = Field(
        default=False, description="Do not tell the network of the warp: it draws warped images."
    )
    noise: NotNegative = Field(
        default=0.0, description="Standard deviation of Gaussian noise added to the images."
    )

    @model_validator(mode="after")
    def _used(self) -> AugmentationConfig:
        if self.leaky and not self.warp:
            raise ValueError("leaky = true is for a warp, and warp is 0: leave it out")
        return self

    @property
    def told(self) -> bool:
        """Whether the network is told what happened."""
        return self.warp > 0 and not self.leaky

    @property
    def chosen(self) -> dict[str, Any]:
        """What is done: the keys that are not as they are by default."""
        default = type(self)()
        return {k: v for k, v in self if v != getattr(default, k)}

    def __str__(self) -> str:
        """What is done, in words; nothing where nothing is."""
        said = {k: f"{k} {v}" for k, v in self.chosen.items() if k != "leaky"}
        if self.warp:
            said["warp"] += ", told to the network" if self.told else ", which leaks"
        return "; ".join(said.values())


def with_augmentation_dim(
    model: Mapping[str, Any], augmentation: AugmentationConfig
) -> dict[str, Any]:
    """A model's config whose network can be told of the warp, where one is asked for and the model
    has such an option."""
    Config = getattr(MODELS.find(model)[0], "Config", None)
    names = {f.name for f in dataclasses.fields(Config)} if dataclasses.is_dataclass(Config) else ()
    if augmentation.told and "augmentation_dim" in names and not model.get("augmentation_dim"):
        return {**model, "augmentation_dim": CONDITION}
    return dict(model)
