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
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from k_diffusion.models.layers import Downsample, ResidualBlock, Upsample, norm_groups, zeroed
from k_diffusion.models.mapping import TIME_FEATURES, MappingNetwork, TimeFeatures
from k_diffusion.models.network import Network, NetworkConfig
from k_diffusion.models.registry import register_model
from k_diffusion.utils.maths import unknown
from k_diffusion.utils.scheduler import Scheduler


@dataclass(frozen=True, kw_only=True)
class UNetConfig(NetworkConfig):
    """What a UNet is built from, beside what every network is.

    Args:
        channels: channels of the finest level, times the first of channel_mults.
        channel_mults: one factor a level, the finest first; each level halves height and width.
        blocks: residual blocks a level, going down; as many go up.
        attention: for each level, whether its blocks have self-attention; the middle always has.
        head_channels: channels of one attention head.
        time_features: "sinusoidal" or "fourier".
        dropout: share of activations dropped in every block, in training.

    Raises:
        ValueError: a field of the wrong type, or a combination that cannot work; the message has
            the field, its value and the way out.
    """

    channels: int = 64
    channel_mults: tuple[int, ...] = (1, 2, 2)
    blocks: int = 2
    attention: tuple[bool, ...] = (False, False, True)
    head_channels: int = 32
    time_features: str = "sinusoidal"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(1, "channels", "blocks", "head_channels")
        self.check_shares("dropout")
        if self.time_features not in TIME_FEATURES:
            raise ValueError(unknown("time_features", self.time_features, TIME_FEATURES))
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
        self.check_checkpointing(levels)
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
class UNet(Network):
    """A UNet with adaptive group norm, attention, and classes or vectors as its condition.

    Its output is zero until it is trained.
    """

    Config = UNetConfig
    config: UNetConfig

    def __init__(
        self,
        config: UNetConfig | None = None,
        /,
        *,
        process: Scheduler | None = None,
        **options: Any,
    ) -> None:
        super().__init__(config, process=process, **options)
        config = self.config
        channels, blocks, widths = config.channels, config.blocks, config.widths
        embedding_width = 4 * channels
        # At least 16 frequencies, or a narrow network could not tell near times apart.
        features = TimeFeatures(config.time_features, max(16, channels // 2), self.time_convention)
        self.mapping = MappingNetwork(features, embedding_width, config.num_classes, config.vectors)

        def block(inputs: int, level: int, attends: bool) -> ResidualBlock:
            heads = config.head_channels if attends else None
            return ResidualBlock(inputs, widths[level], embedding_width, config.dropout, heads)

        levels = range(len(widths))
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.joined_channels, widths[0], 3, padding=1)
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
        self.conv_out = zeroed(nn.Conv2d(widths[0], config.predicted_channels, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor, **condition: Tensor | None) -> Tensor:
        """What the network predicts.

        Args:
            x: noisy data of about unit variance, shape (B, in_channels, H, W), H and W multiples of
                `config.factor`.
            t: time in the network's convention, shape (B,).
            condition: what the config's `conditions` lists; None or left out: absent.

        Returns:
            Shape (B, out_channels, H, W).

        Raises:
            ValueError: a shape or a dtype that does not fit. Values are not read, which would wait
                for the device: `check_condition` does that, once before a run.
        """
        h = self.join(x, t, condition)
        self._check_size(x)
        embedding = self.mapping(t, **condition)
        h = self.conv_in(h)
        skips = []
        last = len(self.down) - 1
        index = itertools.count()
        for level, blocks in enumerate(self.down):
            for block in blocks:  # type: ignore[attr-defined]
                h = self.checkpointing.run(block, h, embedding, index=next(index), level=level)
                skips.append(h)
            if level < last:
                h = self.downsample[level](h)
        for block in self.middle:
            h = self.checkpointing.run(block, h, embedding, index=next(index), level=last)
        for level, blocks in reversed(list(enumerate(self.up))):
            for block in blocks:  # type: ignore[attr-defined]
                h = self.checkpointing.run(
                    block, h, embedding, skips.pop(), index=next(index), level=level
                )
            if level > 0:
                h = self.upsample[level - 1](h)
        return self.conv_out(F.silu(self.norm_out(h)))

    def _check_size(self, x: Tensor) -> None:
        config = self.config
        if x.ndim != 4:
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
