"""A UNet that keeps magnitudes, of activations and of weights (EDM2).

    x, 1 -> conv -> [blocks] ---------------- skips ----------------> [blocks] -> conv, gain
                        `-> half -> [blocks] - skips -> [blocks] -> twice --'

It has neither biases nor norms with weights: a channel of ones beside x takes the place of the
former. Training has to call `after_step` after each step of the optimiser, as the trainer does.

Source: Karras et al. 2024, arXiv:2312.02696, config G, figure 21.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from k_diffusion.models.checks import check_axes, check_heads, check_levels
from k_diffusion.models.layers import channels_last
from k_diffusion.models.mp_layers import (
    DecoderBlock,
    EncoderBlock,
    MPBlock,
    MPConv,
    MPMapping,
    Uncertainty,
    UnitRows,
)
from k_diffusion.models.network import TIME_SCALES, Network, NetworkConfig
from k_diffusion.models.registry import register_model, register_preset
from k_diffusion.models.resampling import crop, pad_to_multiple
from k_diffusion.utils.scheduler import Scheduler

UNCERTAINTY_FEATURES = 128


@dataclass(frozen=True, kw_only=True)
class MPUNetConfig(NetworkConfig):
    """What a magnitude-preserving UNet is built from, beside what every network is.

    Args:
        channels: channels of the finest level, times the first of channel_mults.
        channel_mults: one factor a level, the finest first; each level halves height and width.
        blocks: residual blocks a level, going down; one more go up.
        attention: for each level, whether its blocks have self-attention; the middle always has.
        head_channels: channels of one attention head.
        dropout: share of activations dropped in every block, in training.
        has_uncertainty: whether it also learns the log variance of its error at each time, which
            training can weigh the levels by; see `MPUNet.uncertainty`.

    Raises:
        ValueError: a field of the wrong type, or a combination that cannot work; the message has
            the field, its value and the way out.
    """

    channels: int = 64
    channel_mults: tuple[int, ...] = (1, 2, 3)
    blocks: int = 2
    attention: tuple[bool, ...] = (False, False, True)
    head_channels: int = 64
    dropout: float = 0.0
    has_uncertainty: bool = False
    prediction: str = "edm"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(1, "channels", "blocks", "head_channels")
        self.check_shares("dropout")
        check_levels(self.channel_mults, attention=self.attention)
        levels = len(self.channel_mults)
        # One more a level going up, those that resample in both directions, and the middle's.
        every = levels * (2 * self.blocks + 1) + 2 * (levels - 1) + 2
        self.check_checkpointing(levels, every)
        # The middle, of the coarsest level, always attends.
        attends = (*self.attention[:-1], True)
        attending = list(itertools.compress(self.widths, attends))
        check_heads(self.head_channels, attending, "of a level with attention")

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, the finest first."""
        return tuple(self.channels * mult for mult in self.channel_mults)

    @property
    def factor(self) -> int:
        """What height and width are padded to multiples of."""
        return 2 ** (len(self.channel_mults) - 1)


@register_model("mp_unet")
class MPUNet(Network):
    """A magnitude-preserving UNet, with classes, vectors and images as its condition.

    Its output is zero until it is trained.
    """

    Config = MPUNetConfig
    config: MPUNetConfig

    def __init__(
        self,
        config: MPUNetConfig | None = None,
        /,
        *,
        process: Scheduler | None = None,
        **options: Any,
    ) -> None:
        super().__init__(config, process=process, **options)
        config = self.config
        widths, last = config.widths, len(config.widths) - 1
        embedding_width = max(widths)
        # Fourier's frequencies are laid for the span of log_sigma, about four.
        scale = TIME_SCALES[self.time_convention] / TIME_SCALES["log_sigma"]
        self.mapping = MPMapping(
            max(16, widths[0]), scale, embedding_width, config.num_classes, config.vectors
        )
        self.conv_in = MPConv(config.joined_channels + 1, widths[0], 3)
        outputs = [widths[0]]  # channels of all that goes across, in the order of the way down
        here = widths[0]

        def make(
            kind: type[MPBlock], channels: int, attends: bool, across: int = 0, **options: Any
        ) -> MPBlock:
            nonlocal here
            heads = config.head_channels if attends else None
            inputs, here = here + across, channels
            if kind is EncoderBlock:
                outputs.append(here)
            return kind(inputs, here, embedding_width, config.dropout, heads, **options)

        # A level reached by resampling begins with a block that does that, with the channels that
        # come, and without attention.
        self.down = nn.ModuleList()
        for i, width in enumerate(widths):
            entry = [make(EncoderBlock, here, False, resamples=True)] if i > 0 else []
            rest = [make(EncoderBlock, width, config.attention[i]) for _ in range(config.blocks)]
            self.down.append(nn.ModuleList(entry + rest))
        self.middle = nn.ModuleList(make(DecoderBlock, here, attends) for attends in (True, False))
        self.up = nn.ModuleList()  # the coarsest first
        for i, width in reversed(list(enumerate(widths))):
            entry = [make(DecoderBlock, here, False, resamples=True)] if i < last else []
            rest = [
                make(DecoderBlock, width, config.attention[i], outputs.pop())
                for _ in range(config.blocks + 1)
            ]
            self.up.append(nn.ModuleList(entry + rest))
        self.conv_out = MPConv(widths[0], config.predicted_channels, 3)
        self.gain_out = nn.Parameter(torch.zeros(()))
        self.log_variance = (
            Uncertainty(UNCERTAINTY_FEATURES, scale) if config.has_uncertainty else None
        )

    def forward(self, x: Tensor, t: Tensor, **condition: Tensor | None) -> Tensor:
        """What the network predicts.

        Args:
            x: noisy data of about unit variance, shape (B, in_channels, H, W); sizes that are no
                multiples of `config.factor` are padded to such, and the output is cropped.
            t: time in the network's convention, shape (B,).
            condition: what the config's `conditions` lists; None or left out: absent.

        Returns:
            Shape (B, out_channels, H, W), contiguous or channels_last as x is.

        Raises:
            ValueError: a shape or a dtype that does not fit. Values are not read, which would wait
                for the device: `check_condition` does that, once before a run.
        """
        check_axes(x, self.config.in_channels, ("height", "width"))
        h = pad_to_multiple(self.join(x, t, condition), self.config.factor)
        embedding = self.mapping(t, **condition)
        h = self._enter(h)
        skips = [h]
        last = len(self.down) - 1
        index = itertools.count()
        for level, blocks in enumerate(self.down):
            for block in blocks:  # type: ignore[attr-defined]
                h = self.checkpointing.run(block, h, embedding, index=next(index), level=level)
                skips.append(h)
        for block in self.middle:
            h = self.checkpointing.run(block, h, embedding, index=next(index), level=last)
        for i, blocks in enumerate(self.up):
            for block in blocks:  # type: ignore[attr-defined]
                mirrored = None if block.resamples else skips.pop()
                h = self.checkpointing.run(
                    block, h, embedding, mirrored, index=next(index), level=last - i
                )
        y = crop(self.conv_out(h) * self.gain_out, x.shape[2:])
        return y.contiguous() if x.is_contiguous() else y

    def _enter(self, x: Tensor) -> Tensor:
        """The first convolution, of x, image and ones, of unit magnitude whatever the image's."""
        h = self.conv_in(channels_last(torch.cat([x, torch.ones_like(x[:, :1])], 1)))
        if not self.config.image_channels:
            return h
        # As in `MPMapping`: an image of zeros takes nothing from x.
        own = self.config.in_channels
        square = x[:, own:].square().mean((1, 2, 3), keepdim=True)
        total = own + 1 + self.config.image_channels
        scale = (total / (own + 1 + self.config.image_channels * square)).sqrt()
        return h * scale.to(h.dtype)

    def uncertainty(self, t: Tensor) -> Tensor:
        """The log variance u that it expects of its weighted squared error, for training.

        With a loss of error / exp(u) + u the error of every level counts alike, however far
        training has come (eqs. 14 to 16 and 21); `training.loss.uncertainty_loss` is that.

        Args:
            t: times in the network's convention, shape (B,).

        Returns:
            Shape (B,), in the dtype of the weights.

        Raises:
            ValueError: the network was built without.
        """
        if self.log_variance is None:
            raise ValueError(
                "has_uncertainty = False: this model has no log variance; build it with "
                "has_uncertainty = true"
            )
        return self.log_variance(t)

    def after_step(self) -> None:
        """Put all weights back to unit mean square; for the training loop, after each step.

        Done here and not in forward, as the paper has it, which comes to the same weights in every
        forward pass but the writing: forward then changes no weight that the backward pass still
        needs (blocks run twice under checkpointing), and compiles to one graph.
        """
        for module in self.modules():
            if isinstance(module, UnitRows):
                module.force()


# The networks of the paper's table 1, for latents of an image of 512 pixels, or images of 64.
for _size, _channels in {"xs": 128, "s": 192, "m": 256, "l": 320, "xl": 384, "xxl": 448}.items():
    register_preset(
        f"edm2_{_size}",
        "mp_unet",
        channels=_channels,
        channel_mults=(1, 2, 3, 4),
        attention=(False, False, True, True),
        blocks=3,
    )
