"""The config of a run: typed, documented, and refused by name where it is wrong.

`config_file` reads one from TOML or JSON.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, ValidationInfo, field_validator, model_validator

from k_diffusion.denoiser import DENOISERS
from k_diffusion.models import CONDITIONERS, make_model
from k_diffusion.models.registry import model_trait
from k_diffusion.training.sections import (
    AUTO,
    Amount,
    Below1,
    Count,
    DataConfig,
    EmaConfig,
    LossConfig,
    OptimizerConfig,
    Positive,
    Share,
    SpikesConfig,
    StrictConfig,
    is_number,
)
from k_diffusion.utils.maths import unknown
from k_diffusion.utils.scheduler import make_scheduler

_LARGEST_SEED = 2**63 - 1


class ConfigError(ValueError):
    """A config that cannot be used; its message is one line."""

    everywhere = True  # of several processes all meet it, so that one may speak for them


class TrainConfig(StrictConfig):
    """A whole training run."""

    model: dict[str, Any] = Field(
        description="The network: its type and its options, prediction, time_convention and "
        "sigma_data (a number, or auto: measured on the data) among them. in_channels may be "
        "left to the data."
    )
    data: DataConfig = Field(description="Where the images come from.")
    conditioner: dict[str, Any] | None = Field(
        default=None,
        description="What the network is told, made from raw inputs: its type and its options; "
        "none: the class, where the network knows classes.",
    )
    total_images: Count = Field(description="The run's length, in images seen.")
    process: dict[str, Any] | None = Field(
        default=None,
        description="The noise schedule that is learned: its name and options; none: the "
        "prediction's usual one.",
    )
    loss: LossConfig = Field(default=LossConfig(), description="Weighting and noise levels.")
    optimizer: OptimizerConfig = Field(
        default=OptimizerConfig(), description="Optimiser and learning rate."
    )
    ema: EmaConfig = Field(default=EmaConfig(), description="The averaged weights.")
    batch_size: Count = Field(
        default=128,
        description="Images a step, of all processes together; auto: the usual number, with "
        "micro_batch_size = auto.",
    )
    micro_batch_size: Count | Literal["auto"] | None = Field(
        default=None,
        description="The most images that a process computes at once, the rest of its share by "
        "accumulation; auto: the most that fit into memory; none: its whole share.",
    )
    parallel: Literal["ddp", "fsdp"] = Field(
        default="ddp",
        description="How several processes share the work; ddp: each holds the whole network; "
        "fsdp: each also holds only its share of weights, average and optimiser.",
    )
    seed: Annotated[int, Field(ge=0, le=_LARGEST_SEED)] = Field(
        default=0, description="Decides the first weights and everything random in every step."
    )
    init_from: str | None = Field(
        default=None,
        description="A checkpoint or file for sampling whose weights and average the run begins "
        "with; none: weights drawn by the seed. A resumed run has its own.",
    )
    condition_dropout: Share = Field(
        default=0.1, description="Share of images shown without their condition, for guidance."
    )
    grad_clip: Positive | None = Field(
        default=1.0, description="Largest norm of the gradient; none: any."
    )
    noise_scale_decay: Below1 | None = Field(
        default=None,
        description="Measure the gradient noise scale, the batch size beyond which larger ones "
        "bring little, by moving averages that keep this much a step, such as 0.99; none: do not.",
    )
    precision: Literal["no", "bf16", "fp16"] = Field(
        default="no",
        description="Mixed precision of the network's arithmetic; weights stay float32.",
    )
    compile: bool = Field(
        default=False,
        description="Compile the network by torch.compile: minutes at first, then faster steps.",
    )
    workers: Amount = Field(
        default=0, description="Processes that load images; 0: the main one does."
    )
    max_skipped: Count = Field(
        default=20,
        description="Steps in a row that may be skipped as not finite before the run ends.",
    )
    out: str = Field(default="runs/run", description="Folder for checkpoints and metrics.")
    checkpoint_every_images: Count | None = Field(
        default=None, description="Images between checkpoints; none: only at the end."
    )
    keep_checkpoints: Count = Field(
        default=2, description="How many of the newest checkpoints stay."
    )
    keep_every_images: Count | None = Field(
        default=None,
        description="Images between checkpoints that are written and stay for ever, beside the "
        "newest; none: no such.",
    )
    background_checkpoints: bool = Field(
        default=True,
        description="Write checkpoints while training goes on, from a copy in the host's memory.",
    )
    log_every_images: Count = Field(
        default=1000,
        description="Images between lines of the metrics file, to the next whole step.",
    )
    spikes: SpikesConfig = Field(
        default=SpikesConfig(), description="Losses far above the usual, and going back."
    )

    @model_validator(mode="before")
    @classmethod
    def _auto_batch(cls, data: Any) -> Any:
        """What a machine holds is not to decide what is learned: auto is the micro-batch's size."""
        if not isinstance(data, Mapping) or data.get("batch_size") != AUTO:
            return data
        micro = data.get("micro_batch_size", AUTO)
        if micro not in (AUTO, None, "none"):
            raise ValueError(
                f"batch_size = 'auto', but micro_batch_size = {micro!r}; give one of them a number "
                "and leave the other out"
            )
        rest = {key: value for key, value in data.items() if key != "batch_size"}
        return {**rest, "micro_batch_size": AUTO}

    @field_validator("process")
    @classmethod
    def _process(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is not None:
            if "name" not in value:
                raise ValueError("the schedule's name is missing, as in name = 'cosine'")
            _plainly(_make_process, **value)
        return value

    @field_validator("model")
    @classmethod
    def _model(cls, value: dict[str, Any]) -> dict[str, Any]:
        prediction = value.get("prediction")
        if prediction is not None and prediction not in DENOISERS:
            raise ValueError(unknown("prediction", prediction, DENOISERS))
        sigma_data = value.get("sigma_data", 1.0)
        if sigma_data != AUTO and not (is_number(sigma_data) and 0 < sigma_data < math.inf):
            raise ValueError(f"sigma_data = {sigma_data!r}; give a number above 0, or 'auto'")
        check_model(value)
        prediction = model_trait(settled(value), "prediction", "eps")
        if prediction not in DENOISERS:
            raise ValueError(unknown("prediction", prediction, DENOISERS))
        return value

    @field_validator("conditioner")
    @classmethod
    def _conditioner(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is not None:
            _plainly(CONDITIONERS.settings, value)
        return value

    @field_validator("spikes")
    @classmethod
    def _spikes(cls, value: SpikesConfig, info: ValidationInfo) -> SpikesConfig:
        if value.roll_back and info.data.get("checkpoint_every_images", 1) is None:
            raise ValueError(
                "roll_back = true has nothing to go back to: give checkpoint_every_images"
            )
        return value

    @model_validator(mode="after")
    def _parallel(self) -> TrainConfig:
        if self.parallel == "fsdp" and self.micro_batch_size == AUTO:
            raise ValueError(
                "micro_batch_size = 'auto' does not go with parallel = 'fsdp', whose processes "
                "must all compute in the same parts: give a number"
            )
        if self.parallel == "fsdp" and self.precision == "fp16":
            raise ValueError(
                "precision = 'fp16' does not go with parallel = 'fsdp', whose shards would each "
                "have a loss scale of their own: give 'bf16'"
            )
        if self.parallel == "fsdp" and self.compile:
            raise ValueError(
                "compile = true does not go with parallel = 'fsdp': leave one of them out"
            )
        return self

    @property
    def steps(self) -> int:
        """Optimiser steps of the run: total_images, to the next whole batch."""
        return -(-self.total_images // self.batch_size)

    @property
    def prediction(self) -> str:
        """What the network predicts."""
        return str(model_trait(settled(self.model), "prediction", "eps"))

    @property
    def weighting(self) -> str:
        """The loss weighting's name, "auto" resolved."""
        return self.prediction if self.loss.weighting == AUTO else self.loss.weighting

    @property
    def density(self) -> str:
        """The name of the density of noise levels, "auto" resolved."""
        usual = {"edm": "lognormal", "flow": "logit_normal"}.get(self.prediction, "uniform_time")
        return usual if self.loss.density == AUTO else self.loss.density

    def to_json(self) -> dict[str, Any]:
        """The config as plain JSON data: `make_config(config.to_json())` gives an equal one."""
        return self.model_dump(mode="json")


def check_model(model: Mapping[str, Any]) -> None:
    """Build the network without memory for its weights, to see whether its options are right.

    Raises:
        ValueError: the registry of models or the model itself refuses them.
    """
    with torch.device("meta"), suppress(NotImplementedError, RuntimeError):  # meta lacks some
        _plainly(make_model, settled(model))


def settled(model: Mapping[str, Any]) -> dict[str, Any]:
    """A model's config with a number where only the data can tell it."""
    return {**model, **({"sigma_data": 1.0} if model.get("sigma_data") == AUTO else {})}


def _make_process(**options: Any) -> None:
    made = make_scheduler(**options)
    if made.own_process is not made:
        raise ValueError(f"{options['name']!r} only lays levels over a process: give that process")


def _plainly(function: Any, *args: Any, **options: Any) -> None:
    """Call, with a TypeError (an ill-typed option) as the ValueError that a validator reports."""
    try:
        function(*args, **options)
    except TypeError as error:
        raise ValueError(str(error)) from None
