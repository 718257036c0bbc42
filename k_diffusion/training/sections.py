"""The sections of a run's config: data, loss, optimiser, averages, spikes.

`config` puts them together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from k_diffusion.training.ema import average_name, exponent_of
from k_diffusion.training.loss import check_options

AUTO = "auto"

Count = Annotated[int, Field(ge=1)]
Amount = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Below1 = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]


class StrictConfig(BaseModel):
    """A table of the config: unknown keys and ill-typed values are refused."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_default=True
    )

    @model_validator(mode="before")
    @classmethod
    def _none(cls, data: Any) -> Any:
        """TOML has no null: "none" stands for it wherever a key takes none."""
        if not isinstance(data, Mapping):
            return data
        taking = {k for k, f in cls.model_fields.items() if type(None) in get_args(f.annotation)}
        return {k: None if v == "none" and k in taking else v for k, v in data.items()}


class DigitsConfig(StrictConfig):
    """The handwritten digits that come with scikit-learn: 1 x 8 x 8, ten classes."""

    source: Literal["digits"] = Field(default="digits", description="Which kind of data this is.")
    split: Literal["train", "test", "all"] = Field(
        default="train", description="Four fifths of each class, the other fifth, or all of them."
    )
    split_seed: Amount = Field(default=0, description="Decides which images are held out.")


def _from_list(value: Any) -> Any:
    """TOML and JSON have lists where we have tuples."""
    return tuple(value) if isinstance(value, list) else value


def _pair(value: Any) -> Any:
    one = isinstance(value, int) and not isinstance(value, bool)
    return (value, value) if one else _from_list(value)


class _PicturesConfig(StrictConfig):
    """What picture files have in common."""

    # First, as in every kind of data: it tells them apart.
    source: str = Field(default="", description="Which kind of data this is.")
    path: str = Field(description="The folder; or the zip or tar, or a folder of these.")
    size: Annotated[tuple[Count, Count], BeforeValidator(_pair)] = Field(
        description="Height and width in pixels that training sees; one number: a square."
    )
    channels: Literal[1, 3, 4] = Field(default=3, description="1: grey, 3: RGB, 4: RGB and alpha.")
    crop: Literal["center", "random"] = Field(
        default="center", description="Which part is taken of an image that is not of that shape."
    )
    flip: bool = Field(default=False, description="Mirror half of the images left to right.")
    classes: Literal["auto", "folders", "none"] = Field(
        default="auto",
        description="Whether folders are classes; auto: where there are any with images.",
    )
    max_pixels: Annotated[int, Field(ge=1, le=178_956_970)] = Field(
        default=89_478_485, description="Files with more pixels count as broken."
    )


class FolderConfig(_PicturesConfig):
    """A folder of images, or of one folder a class."""

    source: Literal["folder"] = Field(default="folder", description="Which kind of data this is.")


class ArchiveConfig(_PicturesConfig):
    """Images in a zip or an uncompressed tar, read where they lie; or a folder of such shards."""

    source: Literal["archive"] = Field(default="archive", description="Which kind of data this is.")


DataConfig = Annotated[DigitsConfig | FolderConfig | ArchiveConfig, Field(discriminator="source")]


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


class LossConfig(StrictConfig):
    """How errors at different noise levels are weighed, and how often each level comes."""

    weighting: str = Field(
        default=AUTO,
        description="A name in WEIGHTINGS; auto: uniform in what the network predicts.",
    )
    weighting_options: dict[str, float] = Field(
        default={}, description="Such as gamma for min_snr."
    )
    density: str = Field(
        default=AUTO,
        description="A name in DENSITIES, from which noise levels are drawn; auto: lognormal for "
        "edm, logit_normal for flow, else uniform_time.",
    )
    density_options: dict[str, float] = Field(
        default={}, description="Such as mean and std of lognormal."
    )
    stratified: bool = Field(
        default=True, description="Spread a batch's noise levels evenly over their density."
    )

    scales: NotNegative = Field(
        default=1.0,
        description="Octaves of spatial frequency that count each by itself, the lower the more; "
        "1: all frequencies alike; 0: all octaves.",
    )
    uncertainty: bool | Literal["auto"] = Field(
        default="auto",
        description="Learn the log of the expected loss at each noise level, by which levels are "
        "brought to equal say (EDM2); auto: where the model has has_uncertainty.",
    )
    variance: bool | Literal["auto"] = Field(
        default="auto",
        description="Learn the variance of the prediction's error, for models that tell it; auto: "
        "where the model has has_variance.",
    )
    extra: dict[str, dict[str, Any]] = Field(
        default={},
        description="Losses that are added, by their names: each has a weight (1) and options of "
        "its own.",
    )

    @field_validator("extra")
    @classmethod
    def _extra(cls, value: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for name, options in value.items():
            own = dict(options)
            weight = own.pop("weight", 1.0)
            if not is_number(weight) or not 0 < weight < math.inf:
                raise ValueError(f"{name}.weight = {weight!r}; give a number above 0")
            check_options("loss", name, own)
        return value

    @model_validator(mode="after")
    def _known(self) -> LossConfig:
        for kind in ("weighting", "density"):
            name, options = getattr(self, kind), getattr(self, f"{kind}_options")
            if name != AUTO:
                check_options(kind, name, options)
            elif options:
                raise ValueError(f"{kind}_options {options} are for a {kind} that is not named")
        if self.variance is True and self.uncertainty is True:
            raise ValueError("variance and uncertainty are both true; a loss has one of them")
        return self


COURSE_OPTIONS: dict[str, tuple[str, ...]] = {
    "constant": (),
    "cosine": ("final_share",),
    "inverse_sqrt": ("decay_images", "min_lr"),
    "inverse": ("decay_images", "power", "min_lr"),
    "exponential": ("decay_images", "decay", "min_lr"),
}
"""optimizer.schedule -> the options that it takes; see `learning_rate`."""


class OptimizerConfig(StrictConfig):
    """The optimiser, and the course of its learning rate, measured in images."""

    type: Literal["adamw", "muon"] = Field(
        default="adamw",
        description="muon: orthogonalised momentum for hidden weights, AdamW for the others.",
    )
    lr: Positive = Field(default=1e-3, description="Learning rate after the warm-up.")
    schedule: Literal["constant", "cosine", "inverse_sqrt", "inverse", "exponential"] = Field(
        default="constant",
        description="After the warm-up, n images into the run; cosine: falls to final_share of lr "
        "at its end; inverse_sqrt: lr / sqrt(max(n / decay_images, 1)); inverse: "
        "lr (1 + n / decay_images)^-power; exponential: lr decay^(n / decay_images).",
    )
    warmup_images: Amount = Field(default=0, description="Images over which lr rises from 0.")
    warmup_decay: Below1 = Field(
        default=0.0,
        description="In place of warmup_images: in step k, from 1, lr times 1 - warmup_decay^k.",
    )
    final_share: Share = Field(
        default=0.0, description="What is left of lr at the end, for cosine."
    )
    decay_images: Positive | None = Field(
        default=None, description="How long the fall takes, for inverse_sqrt, inverse, exponential."
    )
    power: Positive = Field(default=1.0, description="Exponent of the fall, for inverse.")
    decay: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.5, description="Factor of the fall in decay_images, for exponential."
    )
    min_lr: NotNegative = Field(
        default=0.0, description="The fall stops here, for inverse_sqrt, inverse and exponential."
    )
    betas: Annotated[tuple[Below1, Below1], BeforeValidator(_from_list)] = Field(
        default=(0.9, 0.999),
        description="Decay of AdamW's averages of the gradient and of its square.",
    )
    eps: Positive = Field(default=1e-8, description="AdamW's epsilon.")
    momentum: Below1 = Field(
        default=0.95, description="Decay of muon's average of the gradient, in hidden weights."
    )
    weight_decay: NotNegative = Field(
        default=0.0, description="Decoupled weight decay, of weights with two dimensions or more."
    )

    @model_validator(mode="after")
    def _used(self) -> OptimizerConfig:
        """Refuse what would be without effect, and a course without its length."""
        taken = COURSE_OPTIONS[self.schedule]
        for option in sorted({o for options in COURSE_OPTIONS.values() for o in options}):
            value = getattr(self, option)
            if option not in taken and value != type(self).model_fields[option].default:
                takers = [name for name, o in COURSE_OPTIONS.items() if option in o]
                raise ValueError(
                    f"{option} = {value} is for schedule = {' or '.join(map(repr, takers))}, not "
                    f"{self.schedule!r}: leave it out"
                )
        if "decay_images" in taken and self.decay_images is None:
            raise ValueError(f"decay_images is missing, which schedule = {self.schedule!r} needs")
        if self.min_lr > self.lr:
            raise ValueError(
                f"min_lr = {self.min_lr} is above lr = {self.lr}, so that nothing would fall: "
                "give at most lr"
            )
        if self.warmup_decay and self.warmup_images:
            raise ValueError(
                f"warmup_decay = {self.warmup_decay} takes the place of warmup_images = "
                f"{self.warmup_images}: give one of them"
            )
        if self.type != "muon" and self.momentum != 0.95:
            raise ValueError(f"momentum = {self.momentum} is for type = 'muon': leave it out")
        return self


class EmaConfig(StrictConfig):
    """The average of the weights that sampling uses, and others kept beside it."""

    max_decay: Share = Field(
        default=0.9999, description="The most that one update keeps of the average."
    )
    power: Positive = Field(default=0.75, description="Exponent of the warm-up 1 - (1 + n)^-power.")
    inv_gamma: Positive = Field(
        default=1.0, description="Stretches the warm-up: n is updates / inv_gamma."
    )
    update_every_steps: Count = Field(
        default=1,
        description="Steps between updates of all averages, skipped ones not counted; one keeps "
        "what the updates of all steps since the last would have kept. Between two, in checkpoints "
        "and at the run's end too, the averages are as the last one left them.",
    )
    profiles: Annotated[tuple[float, ...], BeforeValidator(_from_list)] = Field(
        default=(),
        description="Further averages, of power-function shape: the relative length sigma_rel of "
        "each, above 0 and below 0.2887, as in [0.05, 0.1].",
    )
    snapshot_every_images: Count | None = Field(
        default=None,
        description="Images between snapshots of these, from which k-diffusion ema makes averages "
        "of other lengths after the run; none: no snapshots.",
    )
    snapshot_dtype: Literal["float32", "float16"] = Field(
        default="float32", description="Of the averages in a snapshot."
    )

    @field_validator("profiles")
    @classmethod
    def _profiles(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        for sigma_rel in value:
            exponent_of(sigma_rel)
        names = [average_name(sigma_rel) for sigma_rel in value]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"{name.removeprefix('ema_')} stands twice")
        return value

    @model_validator(mode="after")
    def _something_to_keep(self) -> EmaConfig:
        if self.snapshot_every_images is not None and not self.profiles:
            raise ValueError(
                f"snapshot_every_images = {self.snapshot_every_images} has nothing to keep: give "
                "profiles as well, as in [0.05, 0.1]"
            )
        return self


class SpikesConfig(StrictConfig):
    """Losses far above the usual, and what follows where a run does not come back from them."""

    factor: Annotated[float, Field(gt=1)] | None = Field(
        default=None,
        description="A loss above so many times the usual one is told and logged; none: none is.",
    )
    window: Count = Field(
        default=100, description="The usual loss is the median of so many steps before."
    )
    patience: Annotated[int, Field(ge=2)] = Field(
        default=20,
        description="Steps from a first spike on; where most are spikes, the run has diverged.",
    )
    roll_back: bool = Field(
        default=False,
        description="A run that has diverged, or skipped max_skipped steps in a row, goes back to "
        "the newest checkpoint from before and passes over the batches of those steps.",
    )
    most_roll_backs: Count = Field(
        default=3, description="How often it may; after that it goes on, or ends, as it is."
    )
