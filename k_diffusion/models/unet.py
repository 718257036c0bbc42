"""A UNet for images and latents: down through levels of half the size each, and up again.

    x -> conv -> [blocks] ---------------------- skips ----------------------> [blocks] -> conv
                     `-> half -> [blocks] ------ skips ------> [blocks] -> twice --'
                                     `-> half -> [blocks, middle, blocks] -> twice --'

Every block going up reads, beside its input, what its mirror image put out on the way down.

Source: Ronneberger et al. 2015, arXiv:1505.04597; Ho et al. 2020, arXiv:2006.11239; adaptive
norms and attention at several levels: Dhariwal and Nichol 2021, arXiv:2105.05233.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from k_diffusion.models.layers import (
    TIME_SCALES,
    Conditioning,
    Downsample,
    ResidualBlock,
    Upsample,
    norm_groups,
    zeroed,
)
from k_diffusion.models.registry import check_types, known_fields, register_model
from k_diffusion.utils.maths import unknown
from k_diffusion.utils.scheduler import Scheduler

PREDICTIONS = ("eps", "v", "x0", "flow", "edm")
USUAL_TIMES = {"edm": "log_sigma", "flow": "unit"}
"""The time convention of a prediction where it is not "timestep"."""


@dataclass(frozen=True)
class UNetConfig:
    """What a UNet is built from: see UNet for the meaning of each field.

    Raises:
        ValueError: a field of the wrong type, or a combination that cannot work; the message has
            the field, its value and the way out.
    """

    in_channels: int = 3
    out_channels: int | None = None
    channels: int = 64
    channel_mults: tuple[int, ...] = (1, 2, 2)
    blocks: int = 2
    attention: tuple[bool, ...] = (False, False, True)
    head_channels: int = 32
    num_classes: int = 0
    embedding_dim: int = 0
    dropout: float = 0.0
    prediction: str = "eps"
    time_convention: str | None = None
    sigma_data: float = 0.5
    checkpointing: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("in_channels", "out_channels", "channels", "blocks", "head_channels"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} = {value} is too small; give at least 1")
        for name in ("num_classes", "embedding_dim"):
            if (value := getattr(self, name)) < 0:
                raise ValueError(f"{name} = {value} is negative; give 0 for none")
        if not self.channel_mults or min(self.channel_mults) < 1:
            raise ValueError(
                f"channel_mults = {self.channel_mults} has no level, or one without channels; give "
                "one factor of at least 1 a level, such as (1, 2)"
            )
        levels = len(self.channel_mults)
        if len(self.attention) != levels:
            raise ValueError(
                f"attention = {self.attention} has {len(self.attention)} entries, but "
                f"channel_mults = {self.channel_mults} makes {levels} levels; give true or false "
                f"for each, such as {(*[False] * (levels - 1), True)}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout = {self.dropout} is outside [0, 1); give 0 for none")
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
        # The middle, of the coarsest level, always attends.
        attending = [w for w, a in zip(self.widths, self.attention, strict=True) if a]
        attending = attending if self.attention[-1] else [*attending, self.widths[-1]]
        for channels in attending:
            if channels % self.head_channels:
                most = min(self.head_channels, common := math.gcd(*attending))
                fitting = next(n for n in range(most, 0, -1) if common % n == 0)
                raise ValueError(
                    f"head_channels = {self.head_channels} does not divide the {channels} channels "
                    f"of a level with attention; head_channels = {fitting} works"
                )

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, the finest first."""
        return tuple(self.channels * mult for mult in self.channel_mults)

    @property
    def factor(self) -> int:
        """What height and width must be multiples of."""
        return 2 ** (len(self.channel_mults) - 1)


@register_model("unet")
class UNet(nn.Module):
    """A UNet with adaptive group norm, attention, and classes or vectors as its condition.

    It carries what turns it into a Denoiser: `prediction`, `time_convention`, `sigma_data`,
    `process`. Its output is zero until it is trained.

    Args:
        in_channels: channels of x.
        out_channels: channels of the output; None: those of x.
        channels: channels of the finest level, times the first of channel_mults.
        channel_mults: one factor a level, the finest first; each level halves height and width.
        blocks: residual blocks a level, going down; as many go up.
        attention: for each level, whether its blocks have self-attention; the middle always has.
        head_channels: channels of one attention head.
        num_classes: classes that class_label chooses from; 0: no labels.
        embedding_dim: width of embedding vectors; 0: none.
        dropout: share of activations dropped in every block, in training.
        prediction: what the output means: "eps", "v", "x0", "flow" or "edm".
        time_convention: what t is: "timestep" (0 to the process's timesteps), "unit" (0 to 1) or
            "log_sigma" (ln(sigma / alpha) / 4); None: "log_sigma" for edm, "unit" for flow,
            "timestep" for the others.
        sigma_data: standard deviation of the clean data, in data units; only edm uses it.
        checkpointing: keep only the blocks' inputs for the backward pass and compute each block
            twice: less memory, more time, the same gradients.
        process: the schedule that the network is trained on; None: its prediction's usual one.

    Raises:
        ValueError: an option that cannot work.
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int | None = None,
        channels: int = 64,
        channel_mults: Sequence[int] = (1, 2, 2),
        blocks: int = 2,
        attention: Sequence[bool] = (False, False, True),
        head_channels: int = 32,
        num_classes: int = 0,
        embedding_dim: int = 0,
        dropout: float = 0.0,
        prediction: str = "eps",
        time_convention: str | None = None,
        sigma_data: float = 0.5,
        checkpointing: bool = False,
        process: Scheduler | None = None,
    ) -> None:
        super().__init__()
        if process is not None and not isinstance(process, Scheduler):
            raise ValueError(
                f"process = {process!r} is no Scheduler; make one with make_scheduler, or leave it "
                "out for the prediction's usual one"
            )
        self.config = config = UNetConfig(
            in_channels=in_channels,
            out_channels=out_channels,
            channels=channels,
            channel_mults=channel_mults,  # type: ignore[arg-type]  # a list becomes a tuple
            blocks=blocks,
            attention=attention,  # type: ignore[arg-type]
            head_channels=head_channels,
            num_classes=num_classes,
            embedding_dim=embedding_dim,
            dropout=dropout,
            prediction=prediction,
            time_convention=time_convention,
            sigma_data=sigma_data,
            checkpointing=checkpointing,
        )
        self.prediction = prediction
        self.time_convention = str(config.time_convention)
        self.sigma_data = float(sigma_data)
        self.num_classes = num_classes
        self.embedding_dim = embedding_dim
        self.process = process

        widths = config.widths
        embedding_width = 4 * channels
        # At least 16 frequencies, or a narrow network could not tell near times apart.
        self.conditioning = Conditioning(
            max(16, channels // 2),
            embedding_width,
            TIME_SCALES[self.time_convention],
            num_classes,
            embedding_dim,
        )

        def block(inputs: int, level: int, attends: bool) -> ResidualBlock:
            heads = head_channels if attends else None
            return ResidualBlock(inputs, widths[level], embedding_width, dropout, heads)

        levels = range(len(widths))
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.down = nn.ModuleList(
            nn.ModuleList(block(widths[i], i, config.attention[i]) for _ in range(blocks))
            for i in levels
        )
        self.downsample = nn.ModuleList(
            Downsample(fine, coarse) for fine, coarse in itertools.pairwise(widths)
        )
        self.middle = nn.ModuleList(block(widths[last], last, attends) for attends in (True, False))
        self.up = nn.ModuleList(
            nn.ModuleList(block(2 * widths[i], i, config.attention[i]) for _ in range(blocks))
            for i in levels
        )
        self.upsample = nn.ModuleList(
            Upsample(coarse, fine) for fine, coarse in itertools.pairwise(widths)
        )
        self.norm_out = nn.GroupNorm(norm_groups(widths[0]), widths[0])
        self.conv_out = zeroed(nn.Conv2d(widths[0], out_channels or in_channels, 3, padding=1))

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> UNet:
        """A UNet from plain data, such as JSON.

        Args:
            config: any of UNetConfig's fields.

        Raises:
            ValueError: an unknown key (the nearest is offered) or a value that does not fit.
        """
        return cls(**known_fields(UNetConfig, config))

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        class_label: Tensor | None = None,
        embedding: Tensor | None = None,
    ) -> Tensor:
        """What the network predicts.

        Args:
            x: noisy data of about unit variance, shape (B, in_channels, H, W), H and W multiples of
                `config.factor`.
            t: time in the network's convention, shape (B,).
            class_label: classes, integers of shape (B,) from 0 to num_classes - 1, or num_classes
                for "no label"; None: no label for any sample.
            embedding: vectors, shape (B, embedding_dim); None: the learned null for every sample.

        Returns:
            Shape (B, out_channels, H, W).

        Raises:
            ValueError: a shape or a dtype that does not fit. Values are not read, which would wait
                for the device: `check_condition` does that, once before a run.
        """
        self._check_shapes(x, t)
        self.conditioning.check_shapes(x.shape[0], class_label, embedding)
        condition = self.conditioning(t, class_label, embedding)
        h = self.conv_in(x)
        skips = []
        last = len(self.down) - 1
        for level, blocks in enumerate(self.down):
            for block in blocks:  # type: ignore[attr-defined]
                h = self._run(block, h, condition)
                skips.append(h)
            if level < last:
                h = self.downsample[level](h)
        for block in self.middle:
            h = self._run(block, h, condition)
        for level, blocks in reversed(list(enumerate(self.up))):
            for block in blocks:  # type: ignore[attr-defined]
                h = self._run(block, h, condition, skips.pop())
            if level > 0:
                h = self.upsample[level - 1](h)
        return self.conv_out(F.silu(self.norm_out(h)))

    def check_condition(self, batch: int, **condition: Any) -> None:
        """Refuse by name what `forward` cannot take as its condition; done once before a run.

        Args:
            batch: samples, B.
            condition: class_label, embedding, or neither.

        Raises:
            ValueError: an unknown name, a wrong shape, or a value out of range.
        """
        self.conditioning.check(batch, condition)

    def _run(
        self, block: nn.Module, x: Tensor, condition: Tensor, mirrored: Tensor | None = None
    ) -> Tensor:
        if self.config.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, condition, mirrored, use_reentrant=False)
        return block(x, condition, mirrored)

    def _check_shapes(self, x: Tensor, t: Tensor) -> None:
        config = self.config
        if x.ndim != 4 or x.shape[1] != config.in_channels:
            raise ValueError(
                f"x has shape {tuple(x.shape)}; this model takes (batch, {config.in_channels}, "
                "height, width)"
            )
        factor = config.factor
        for name, size in (("height", x.shape[2]), ("width", x.shape[3])):
            if size % factor or size == 0:
                near = [n for n in (size // factor * factor, -(-size // factor) * factor) if n]
                works = " or ".join(str(n) for n in dict.fromkeys(near or [factor]))
                raise ValueError(
                    f"x has {name} {size}, which {len(config.channel_mults)} levels cannot halve "
                    f"to whole numbers; the nearest that works: {works} (a multiple of {factor})"
                )
        if t.shape != x.shape[:1]:
            raise ValueError(
                f"t has shape {tuple(t.shape)}; give one time a sample, shape ({x.shape[0]},)"
            )
