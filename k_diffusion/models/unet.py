"""A UNet for sequences, images and volumes: down through levels of half the size, and up again.

    x -> conv -> [blocks] ---------------------- skips ----------------------> [blocks] -> conv
                     `-> half -> [blocks] ------ skips ------> [blocks] -> twice --'
                                     `-> half -> [blocks, middle, blocks] -> twice --'

Every block going up reads, beside its input, what its mirror image put out on the way down.

Letters in shapes: B samples, L tokens; `size` is (length,), (height, width) or (depth, height,
width).

Source: Ronneberger et al. 2015, arXiv:1505.04597; Ho et al. 2020, arXiv:2006.11239; adaptive
norms and attention at several levels: Dhariwal and Nichol 2021, arXiv:2105.05233.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from k_diffusion.models.attention import hide_masked
from k_diffusion.models.blocks import ResidualBlock
from k_diffusion.models.checks import check_axes, check_heads, check_levels
from k_diffusion.models.fused import normed_convolution
from k_diffusion.models.layers import GroupNorm, channels_last, convolution, zeroed
from k_diffusion.models.mapping import TIME_FEATURES, MappingNetwork, TimeFeatures
from k_diffusion.models.network import Network, NetworkConfig
from k_diffusion.models.registry import register_model, register_preset
from k_diffusion.models.resampling import RESAMPLING, crop, pad_to_multiple
from k_diffusion.utils.maths import unknown
from k_diffusion.utils.scheduler import Scheduler

AXES = {1: ("length",), 2: ("height", "width"), 3: ("depth", "height", "width")}
"""Dimensions -> what x has beside batch and channels."""


@dataclass(frozen=True, kw_only=True)
class UNetConfig(NetworkConfig):
    """What a UNet is built from, beside what every network is.

    Args:
        dims: dimensions of the data: 1 (sound), 2 (images, latents) or 3 (video, volumes).
        channels: channels of the finest level, times the first of channel_mults.
        channel_mults: one factor a level, the finest first; each level halves every size.
        blocks: residual blocks a level, going down; as many go up.
        attention: for each level, whether its blocks have self-attention; the middle always has.
        head_channels: channels of one attention head.
        context_dim: width of the tokens of `context`, a sequence of any length a sample; 0: none.
        cross_attention: for each level, whether its blocks attend to the context; the middle does,
            if there is one. None: where the self-attention is.
        resampling: between levels: "strided" (a convolution of stride 2; values repeated) or
            "antialiased" (a blur before every second value is taken; linear interpolation), which
            follows small movements of the input more smoothly.
        time_features: "sinusoidal" or "fourier".
        dropout: share of activations dropped in every block, in training.

    Raises:
        ValueError: a field of the wrong type, or a combination that cannot work; the message has
            the field, its value and the way out.
    """

    dims: int = 2
    channels: int = 64
    channel_mults: tuple[int, ...] = (1, 2, 2)
    blocks: int = 2
    attention: tuple[bool, ...] = (False, False, True)
    head_channels: int = 32
    context_dim: int = 0
    cross_attention: tuple[bool, ...] | None = None
    resampling: str = "strided"
    time_features: str = "sinusoidal"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(1, "channels", "blocks", "head_channels")
        self.none_negative("context_dim")
        self.check_shares("dropout")
        if self.dims not in AXES:
            raise ValueError(
                f"dims = {self.dims} is no dimension this model has; give 1 for sequences, 2 for "
                "images, 3 for volumes"
            )
        if self.resampling not in RESAMPLING:
            raise ValueError(unknown("resampling", self.resampling, RESAMPLING))
        if self.time_features not in TIME_FEATURES:
            raise ValueError(unknown("time_features", self.time_features, TIME_FEATURES))
        check_levels(
            self.channel_mults, attention=self.attention, cross_attention=self.cross_attention
        )
        if any(self.cross_attention or ()) and not self.context_dim:
            raise ValueError(
                f"cross_attention = {self.cross_attention} has nothing to attend to; give "
                "context_dim, the width of the context's tokens, or leave cross_attention out"
            )
        levels = len(self.channel_mults)
        self.check_checkpointing(levels, 2 * self.blocks * levels + 2)
        # The middle, of the coarsest level, always attends.
        attends = (a or c for a, c in zip(self.attention, self.attended_contexts, strict=True))
        attending = [*itertools.compress(self.widths, attends), self.widths[-1]]
        check_heads(self.head_channels, attending, "of a level with attention")

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, the finest first."""
        return tuple(self.channels * mult for mult in self.channel_mults)

    @property
    def attended_contexts(self) -> tuple[bool, ...]:
        """For each level, whether its blocks attend to the context."""
        if not self.context_dim:
            return (False,) * len(self.channel_mults)
        return self.attention if self.cross_attention is None else self.cross_attention

    @property
    def factor(self) -> int:
        """What sizes are padded to multiples of."""
        return 2 ** (len(self.channel_mults) - 1)


@register_model("unet")
class UNet(Network):
    """A UNet with adaptive group norm and attention, told whatever its config names.

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
        dims, blocks, widths = config.dims, config.blocks, config.widths
        embedding_width = 4 * config.channels
        # At least 16 frequencies, or a narrow network could not tell near times apart.
        count = max(16, config.channels // 2)
        features = TimeFeatures(config.time_features, count, self.time_convention)
        self.mapping = MappingNetwork(features, embedding_width, config.num_classes, config.vectors)

        def block(inputs: int, level: int, attention: bool, context: bool) -> ResidualBlock:
            return ResidualBlock(
                dims,
                inputs,
                widths[level],
                embedding_width,
                dropout=config.dropout,
                head_channels=config.head_channels,
                attention=attention,
                context_dim=config.context_dim if context else 0,
            )

        def path(joined: int) -> nn.ModuleList:
            return nn.ModuleList(
                nn.ModuleList(block(joined * widths[i], i, *attends) for _ in range(blocks))
                for i, attends in enumerate(
                    zip(config.attention, config.attended_contexts, strict=True)
                )
            )

        half, twice = RESAMPLING[config.resampling]
        last = len(widths) - 1
        self.conv_in = convolution(dims, config.joined_channels, widths[0])
        self.down = path(1)
        self.downsample = nn.ModuleList(half(dims, a, b) for a, b in itertools.pairwise(widths))
        self.middle = nn.ModuleList(
            block(widths[last], last, attends, attends) for attends in (True, False)
        )
        self.up = path(2)
        self.upsample = nn.ModuleList(twice(dims, b, a) for a, b in itertools.pairwise(widths))
        self.norm_out = GroupNorm(widths[0])
        self.conv_out = zeroed(convolution(dims, widths[0], config.predicted_channels))

    def forward(self, x: Tensor, t: Tensor, **condition: Tensor | None) -> Tensor:
        """What the network predicts.

        Args:
            x: noisy data of about unit variance, shape (B, in_channels, *size); sizes that are no
                multiples of `config.factor` are padded to such, and the output is cropped.
            t: time in the network's convention, shape (B,).
            condition: what the config's `conditions` lists; None or left out: absent.

        Returns:
            Shape (B, out_channels, *size), contiguous or channels_last as x is.

        Raises:
            ValueError: a shape or a dtype that does not fit. Values are not read, which would wait
                for the device: `check_condition` does that, once before a run.
        """
        check_axes(x, self.config.in_channels, AXES[self.config.dims])
        h = pad_to_multiple(self.join(x, t, condition), self.config.factor)
        mask = condition.get("context_mask")
        context = hide_masked(condition.get("context"), mask, x.dtype)
        embedding = self.mapping(t, **condition)
        index = itertools.count()

        def run(block: nn.Module, h: Tensor, mirrored: Tensor | None, level: int) -> Tensor:
            told = (embedding, mirrored, context, mask)
            return self.checkpointing.run(block, h, *told, index=next(index), level=level)

        h = self.conv_in(channels_last(h))
        skips = []
        last = len(self.down) - 1
        for level, blocks in enumerate(self.down):
            for block in blocks:  # type: ignore[attr-defined]
                h = run(block, h, None, level)
                skips.append(h)
            if level < last:
                h = self.downsample[level](h)
        for block in self.middle:
            h = run(block, h, None, last)
        for level, blocks in reversed(list(enumerate(self.up))):
            for block in blocks:  # type: ignore[attr-defined]
                h = run(block, h, skips.pop(), level)
            if level > 0:
                h = self.upsample[level - 1](h)
        y = crop(normed_convolution(self.norm_out, self.conv_out, h), x.shape[2:])
        return y.contiguous() if x.is_contiguous() else y


# For a first try; for small images; for images of 64 and up, and latents. Trained weights do not
# depend on what they are: every field lies beside them, whatever name they were asked for by.
register_preset(
    "unet_tiny", "unet", channels=32, channel_mults=(1, 2), attention=(False, True), blocks=1
)
register_preset("unet_small", "unet", channels=96, blocks=1)
register_preset(
    "unet_base",
    "unet",
    channels=128,
    channel_mults=(1, 2, 3, 4),
    attention=(False, False, True, True),
    blocks=3,
    head_channels=64,
)
