"""What all networks of this folder share: a config, what they predict, what they can be told.

A network is built from a frozen dataclass, or from its fields by keyword, and carries what turns it
into a Denoiser (`prediction`, `time_convention`, `sigma_data`, `process`):

    @dataclass(frozen=True, kw_only=True)
    class MineConfig(NetworkConfig):
        width: int = 64

    @register_model("mine")
    class Mine(Network):
        Config = MineConfig

        def __init__(self, config=None, /, *, process=None, **options):
            super().__init__(config, process=process, **options)
            self.layer = nn.Conv2d(self.config.joined_channels, ...)

        def forward(self, x, t, **condition):
            x = self.join(x, t, condition)
            ...
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from k_diffusion.models.conditions import (
    ClassLabel,
    Condition,
    Image,
    Tokens,
    Vector,
    check_conditions,
    drop_conditions,
)
from k_diffusion.models.recompute import Checkpointing, Policy, check_policy
from k_diffusion.models.registry import check_types, known_fields
from k_diffusion.utils.maths import unknown
from k_diffusion.utils.scheduler import Scheduler

PREDICTIONS = ("eps", "v", "x0", "flow", "edm")
USUAL_TIMES = {"edm": "log_sigma", "flow": "unit"}
"""The time convention of a prediction where it is not "timestep"."""

TIME_SCALES = {
    "timestep": 1.0,
    # A unit time seen a thousandfold has the angles of a network that counts a thousand timesteps.
    "unit": 1000.0,
    # ln(sigma / alpha) / 4 lies in about [-2, 2]: sigma / alpha from e^-8 to e^8 holds every
    # schedule in use. The sinusoids are laid for times that span a thousand; on a span of four all
    # but the fastest few would be constants, and near levels would look alike. So it is stretched.
    "log_sigma": 250.0,
}
"""Time convention -> the factor that makes a network's time span about a thousand."""


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """What every network can be built with.

    Args:
        in_channels: channels of x.
        out_channels: channels of the output; None: those of x.
        num_classes: classes that `class_label` chooses from; 0: no labels.
        embedding_dim: width of `embedding`, a vector a sample; 0: none.
        augmentation_dim: width of `augmentation`, a vector that says how the sample was augmented
            (zeros: not at all), as of Karras et al. 2022, arXiv:2206.00364, appendix F.2; 0: none.
        image_channels: channels of `image`, which are joined to those of x; 0: none.
        prediction: what the output means: "eps", "v", "x0", "flow" or "edm".
        time_convention: what t is: "timestep" (0 to the process's timesteps), "unit" (0 to 1) or
            "log_sigma" (ln(sigma / alpha) / 4); None: "log_sigma" for edm, "unit" for flow,
            "timestep" for the others.
        sigma_data: standard deviation of the clean data, in data units; only edm uses it.
        checkpointing: which blocks keep only their inputs for the backward pass and are computed
            twice, for less memory, more time and the same gradients: true for all, n for every
            n-th, a list for all of these levels (the finest is 0).

    Raises:
        ValueError: a field of the wrong type, or a combination that cannot work; the message has
            the field, its value and the way out.
    """

    in_channels: int = 3
    out_channels: int | None = None
    num_classes: int = 0
    embedding_dim: int = 0
    augmentation_dim: int = 0
    image_channels: int = 0
    prediction: str = "eps"
    time_convention: str | None = None
    sigma_data: float = 0.5
    checkpointing: Policy = False

    def __post_init__(self) -> None:
        check_types(self)
        self.at_least(1, "in_channels", "out_channels")
        self.none_negative("num_classes", "embedding_dim", "augmentation_dim", "image_channels")
        if not self.sigma_data > 0:
            raise ValueError(
                f"sigma_data = {self.sigma_data} is no standard deviation; give a number above 0"
            )
        if self.prediction not in PREDICTIONS:
            raise ValueError(unknown("prediction", self.prediction, PREDICTIONS))
        if self.time_convention is None:
            usual = USUAL_TIMES.get(self.prediction, "timestep")
            object.__setattr__(self, "time_convention", usual)
        if self.time_convention not in TIME_SCALES:
            raise ValueError(unknown("time_convention", self.time_convention, TIME_SCALES))

    def at_least(self, least: int, *names: str) -> None:
        """Refuse fields that are smaller; None passes."""
        for name in names:
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"{name} = {value} is too small; give at least {least}")

    def none_negative(self, *names: str) -> None:
        """Refuse negative fields, of those where 0 means none."""
        for name in names:
            if (value := getattr(self, name)) < 0:
                raise ValueError(f"{name} = {value} is negative; give 0 for none")

    def check_shares(self, *names: str) -> None:
        """Refuse fields outside [0, 1)."""
        for name in names:
            if not 0 <= (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} = {value} is outside [0, 1); give 0 for none")

    def check_checkpointing(self, levels: int, blocks: int) -> None:
        """Refuse a policy that chooses nothing of a model of so many levels, and blocks in all."""
        check_policy(self.checkpointing, levels, blocks)

    @property
    def joined_channels(self) -> int:
        """Channels of x and image together."""
        return self.in_channels + self.image_channels

    @property
    def predicted_channels(self) -> int:
        """Channels of the output."""
        return self.out_channels or self.in_channels

    @property
    def vectors(self) -> dict[str, int]:
        """Name -> width of the vectors that it can be told."""
        widths = {"embedding": self.embedding_dim, "augmentation": self.augmentation_dim}
        return {name: width for name, width in widths.items() if width}

    def conditions(self) -> tuple[Condition, ...]:
        """All that a network of this config can be told, beside the time."""
        width = getattr(self, "context_dim", 0)
        every = (
            ClassLabel("class_label", self.num_classes),
            Vector("embedding", self.embedding_dim),
            Vector("augmentation", self.augmentation_dim),
            Tokens("context", width),
            Image("image", self.image_channels),
        )
        sizes = (
            self.num_classes, self.embedding_dim, self.augmentation_dim, width, self.image_channels,
        )  # fmt: skip
        return tuple(kind for kind, size in zip(every, sizes, strict=True) if size)


class Network(nn.Module):
    """A network with a config; abstract.

    Args:
        config: what to build; None: from the options.
        process: the schedule that the network is trained on; None: its prediction's usual one.
        options: fields of the config.

    Raises:
        ValueError: an unknown option (the nearest is offered), or one that cannot work.
    """

    Config: ClassVar[type[NetworkConfig]]

    def __init__(
        self, config: Any = None, /, *, process: Scheduler | None = None, **options: Any
    ) -> None:
        super().__init__()
        if process is not None and not isinstance(process, Scheduler):
            raise ValueError(
                f"process = {process!r} is no Scheduler; make one with make_scheduler, or leave it "
                "out for the prediction's usual one"
            )
        if config is None:
            config = self.Config(**known_fields(self.Config, options))
        elif not isinstance(config, self.Config) or options:
            raise ValueError(
                f"{type(self).__name__} is built from a {self.Config.__name__}, or from its "
                f"fields by keyword, got {config!r}{' and options' if options else ''}"
            )
        self.config = config
        self.prediction: str = config.prediction
        self.time_convention = str(config.time_convention)
        self.sigma_data = float(config.sigma_data)
        self.num_classes: int = config.num_classes
        self.process = process
        self.conditions = config.conditions()
        self.checkpointing = Checkpointing(config.checkpointing)

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "Config" in vars(cls):
            # What help() and editors show: the fields, which **options hides.
            shown = list(inspect.signature(cls.Config).parameters.values())
            process = inspect.Parameter("process", inspect.Parameter.KEYWORD_ONLY, default=None)
            cls.__signature__ = inspect.Signature([*shown, process])  # type: ignore[attr-defined]

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Any:
        """A network from plain data, such as JSON.

        Args:
            config: any of the config's fields.

        Raises:
            ValueError: an unknown key (the nearest is offered) or a value that does not fit.
        """
        return cls(cls.Config(**known_fields(cls.Config, config)))

    def check_condition(self, batch: int, **condition: Any) -> None:
        """Refuse by name what `forward` cannot take as its condition; done once before a run.

        Args:
            batch: samples, B.
            condition: keyword arguments of `forward`, without the time; None: not given.

        Raises:
            ValueError: an unknown name, a wrong shape, or a value out of range.
        """
        check_conditions(self.conditions, batch, None, condition, values=True)

    def drop_condition(self, condition: Mapping[str, Any], hidden: Tensor) -> dict[str, Any]:
        """The condition, hidden from some samples, for which the network then is unconditional.

        Args:
            condition: keyword arguments of `forward`, without the time.
            hidden: for which samples, booleans of shape (B,).
        """
        return drop_conditions(self.conditions, condition, hidden)

    def join(self, x: Tensor, t: Tensor, condition: Mapping[str, Any]) -> Tensor:
        """x with the image that conditions it, once all shapes are seen to fit.

        Args:
            x: noisy data, shape (B, in_channels, ...).
            t: times, shape (B,).
            condition: keyword arguments of `forward`, without the time. No value is read, which
                would wait for the device.

        Returns:
            Shape (B, in_channels + image_channels, ...).

        Raises:
            ValueError: a shape or a dtype that does not fit.
        """
        if x.shape[1:2] != (self.config.in_channels,):
            raise ValueError(
                f"x has shape {tuple(x.shape)}; this model takes (batch, "
                f"{self.config.in_channels}, ...)"
            )
        if x.shape[0] == 0:
            raise ValueError(f"x has shape {tuple(x.shape)}, without a sample; give at least one")
        if t.shape != x.shape[:1]:
            raise ValueError(
                f"t has shape {tuple(t.shape)}; give one time a sample, shape ({x.shape[0]},)"
            )
        check_conditions(self.conditions, x.shape[0], x.shape[2:], condition, values=False)
        if not self.config.image_channels:
            return x
        image = condition.get("image")
        if image is None:
            image = x.new_zeros(x.shape[0], self.config.image_channels, *x.shape[2:])
        return torch.cat([x, image.to(x.dtype)], 1)
