"""The hourglass diffusion transformer: attention on pixels, near at hand where there are many.

    x -> patches -> [blocks] ------------------ skips ------------------> [blocks] -> pixels
                        `-> merge -> [blocks] - skips -> [blocks] -> split --'
                                         `-> merge -> [blocks] -> split --'

The fine levels attend to a neighbourhood, or to windows, the coarsest to all; so the cost grows
with the number of pixels, and not with its square.

Source: Crowson et al. 2024, arXiv:2401.11605.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from k_diffusion.models.checks import check_axes, check_sides
from k_diffusion.models.layers import zeroed
from k_diffusion.models.mapping import FourierFeatures
from k_diffusion.models.neighborhood import check_backend, check_kernel, neighborhood_attention
from k_diffusion.models.network import TIME_SCALES, Network, NetworkConfig
from k_diffusion.models.recompute import Checkpointing
from k_diffusion.models.registry import register_model, register_preset
from k_diffusion.models.transformer import (
    FeedForward,
    Mapping,
    Mix,
    RMSNorm,
    SelfAttention,
    TokenMerge,
    TokenSplit,
    TokenSplitOnto,
    TransformerBlock,
    axial_positions,
    global_attention,
)
from k_diffusion.models.windows import window_attention
from k_diffusion.utils.maths import unknown
from k_diffusion.utils.scheduler import Scheduler

ATTENTIONS = ("global", "neighborhood", "shifted_window", "none")


@dataclass(frozen=True, kw_only=True)
class HourglassConfig(NetworkConfig):
    """What an hourglass is built from, beside what every network is.

    A setting of a level is one value for all levels, or a list with one a level, the finest first.

    Args:
        patch_size: side of a patch of pixels that makes a token; a list: its height and width.
        widths: width of the tokens of each level, the finest first; each level halves both sides.
        depths: blocks of each level, going down, and as many going up; the coarsest has them once.
        attention: of each level: "global", "neighborhood", "shifted_window" or "none"; None:
            "neighborhood", but "global" at the coarsest.
        head_channels: of a level: channels of one head, a multiple of 8.
        kernel_size: of a level: side of the neighbourhood, in tokens; odd.
        window_size: of a level: side of the windows, in tokens.
        ff_widths: of a level: width between the layers of a feed-forward; None: 3 times its width.
        dropout: of a level: share of activations dropped in its blocks, in training.
        mapping_width: width of the vector that conditions every layer; even.
        mapping_depth: blocks of the mapping.
        mapping_ff_width: width between the layers of a block; None: 3 times mapping_width.
        mapping_dropout: share of activations dropped there, in training.
        neighborhood_backend: see `neighborhood.neighborhood_attention`.

    Raises:
        ValueError: a field of the wrong type, or a combination that cannot work; the message has
            the field, its value and the way out.
    """

    patch_size: int | tuple[int, ...] = 4
    widths: tuple[int, ...] = (128, 256)
    depths: tuple[int, ...] = (2, 4)
    attention: str | tuple[str, ...] | None = None
    head_channels: int | tuple[int, ...] = 64
    kernel_size: int | tuple[int, ...] = 7
    window_size: int | tuple[int, ...] = 8
    ff_widths: int | tuple[int, ...] | None = None
    dropout: float | tuple[float, ...] = 0.0
    mapping_width: int = 256
    mapping_depth: int = 2
    mapping_ff_width: int | None = None
    mapping_dropout: float = 0.0
    neighborhood_backend: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        levels = len(self.widths)
        if not levels or min(self.widths) < 1:
            raise ValueError(
                f"widths = {self.widths} has no level, or one without channels; give one width of "
                "at least 1 a level, such as (128, 256)"
            )
        if len(self.depths) != levels or min(self.depths) < 0:
            raise ValueError(
                f"depths = {self.depths} must give a number of blocks, 0 or more, for each of the "
                f"{levels} levels of widths = {self.widths}, such as {(2,) * levels}"
            )
        if isinstance(self.patch_size, tuple) and len(self.patch_size) != 2:
            raise ValueError(
                f"patch_size = {self.patch_size} has {len(self.patch_size)} sides; give one number "
                "or height and width"
            )
        if min(self.patch) < 1:
            raise ValueError(f"patch_size = {self.patch_size} is too small; give at least 1")
        names = ("attention", "head_channels", "kernel_size", "window_size", "ff_widths", "dropout")
        for name in names:
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != levels:
                raise ValueError(
                    f"{name} = {value} has {len(value)} entries for the {levels} levels of widths "
                    f"= {self.widths}; give one for each, or one value for all"
                )
        for i in range(levels):
            self._check_level(i)
        self.at_least(1, "mapping_width", "mapping_ff_width")
        if self.mapping_width % 2:
            raise ValueError(
                f"mapping_width = {self.mapping_width} is odd, but cosines and sines share it; "
                f"give {self.mapping_width + 1}"
            )
        self.none_negative("mapping_depth")
        self.check_shares("mapping_dropout")
        check_backend(self.neighborhood_backend, "neighborhood_backend")
        self.check_checkpointing(levels, 2 * sum(self.depths[:-1]) + self.depths[-1])

    def _check_level(self, i: int) -> None:
        kind, width, head = self.kind(i), self.widths[i], self.of("head_channels", i)
        if kind not in ATTENTIONS:
            raise ValueError(unknown("attention", kind, ATTENTIONS))
        if not 0 <= self.of("dropout", i) < 1:
            raise ValueError(f"dropout = {self.dropout} is outside [0, 1); give 0 for none")
        if self.ff_width(i) < 1:
            raise ValueError(f"ff_widths = {self.ff_widths} is too small; give at least 1")
        if kind == "none":
            return
        if head < 8 or head % 8 or width % head:
            fitting = [n for n in range(8, width + 1, 8) if width % n == 0]
            way = (
                f"{min(fitting, key=lambda n: abs(n - head))} works"
                if fitting
                else f"widths must be multiples of 8, such as {-(-width // 8) * 8}"
            )
            raise ValueError(
                f"head_channels = {head} must be a multiple of 8 that divides the width of its "
                f"level, {width}; {way}"
            )
        if kind == "neighborhood":
            check_kernel(self.of("kernel_size", i))
        if kind == "shifted_window" and self.of("window_size", i) < 2:
            raise ValueError(
                f"window_size = {self.of('window_size', i)} is too small to be shifted by half; "
                "give at least 2"
            )

    def of(self, name: str, level: int) -> Any:
        """A setting of a level."""
        value = getattr(self, name)
        return value[level] if isinstance(value, tuple) else value

    def kind(self, level: int) -> str:
        """The attention of a level."""
        usual = "global" if level == len(self.widths) - 1 else "neighborhood"
        return self.of("attention", level) or usual

    def ff_width(self, level: int) -> int:
        """Width between the layers of the feed-forwards of a level."""
        given = self.of("ff_widths", level)
        return 3 * self.widths[level] if given is None else given

    @property
    def patch(self) -> tuple[int, int]:
        """Height and width of a patch, in pixels."""
        size = self.patch_size
        return (size, size) if isinstance(size, int) else (size[0], size[1])

    def sides(self, axis: int) -> tuple[int, int]:
        """What the height (axis 0) or the width (1) must be a multiple of, and at least, in pixels.

        Patches, merges and windows must come out even, and neighbourhoods must fit.
        """
        patch = self.patch[axis]
        factor = patch * 2 ** (len(self.widths) - 1)
        least = factor
        for i in range(len(self.widths)):
            if self.kind(i) == "shifted_window":
                factor = math.lcm(factor, patch * 2**i * self.of("window_size", i))
            if self.kind(i) == "neighborhood":
                least = max(least, patch * 2**i * self.of("kernel_size", i))
        return factor, -(-least // factor) * factor


class HourglassLayers(nn.Module):
    """The layers of an hourglass and the way through them; abstract.

    What it is called with, and under which names, is left to the classes made from it.
    """

    hourglass: HourglassConfig

    def add_layers(self, config: HourglassConfig) -> None:
        """Give the module its layers."""
        self.hourglass = config
        widths, mapping_width = config.widths, config.mapping_width
        self.patch_in = TokenMerge(config.joined_channels, widths[0], config.patch)
        self.time_emb = FourierFeatures(1, mapping_width // 2)
        self.time_in_proj = nn.Linear(mapping_width, mapping_width, bias=False)
        if config.augmentation_dim:
            self.aug_emb = FourierFeatures(config.augmentation_dim, mapping_width // 2)
            self.aug_in_proj = nn.Linear(mapping_width, mapping_width, bias=False)
        if config.num_classes:
            self.class_emb = nn.Embedding(config.num_classes + 1, mapping_width)
        if config.embedding_dim:
            self.mapping_cond_in_proj = nn.Linear(config.embedding_dim, mapping_width, bias=False)
        self.mapping = Mapping(
            config.mapping_depth,
            mapping_width,
            config.mapping_ff_width or 3 * mapping_width,
            config.mapping_dropout,
        )
        *fine, middle = range(len(widths))
        self.down_levels = nn.ModuleList(_blocks(config, i) for i in fine)
        self.up_levels = nn.ModuleList(_blocks(config, i) for i in fine)
        self.mid_level = _blocks(config, middle)
        pairs = list(itertools.pairwise(widths))
        self.merges = nn.ModuleList(TokenMerge(high, low) for high, low in pairs)
        self.splits = nn.ModuleList(TokenSplitOnto(low, high) for high, low in pairs)
        self.out_norm = RMSNorm(widths[0])
        self.patch_out = TokenSplit(widths[0], config.predicted_channels, config.patch)
        zeroed(self.patch_out.proj)

    def embed(
        self,
        time: Tensor,
        class_label: Tensor | None,
        embedding: Tensor | None,
        augmentation: Tensor | None,
    ) -> Tensor:
        """The vector that conditions every layer, shape (B, mapping_width).

        Args:
            time: of a span of about four, shape (B,).
            class_label, embedding, augmentation: see `conditions`; None: absent.
        """
        config, dtype = self.hourglass, self.time_in_proj.weight.dtype
        # Waves of amplitude 1; those of FourierFeatures have unit mean square.
        half = math.sqrt(0.5)
        hidden = self.time_in_proj((half * self.time_emb(time[:, None])).to(dtype))
        if config.augmentation_dim:
            if augmentation is None:
                augmentation = time.new_zeros(len(time), config.augmentation_dim)
            waves = (half * self.aug_emb(augmentation)).to(dtype)
            hidden = hidden + self.aug_in_proj(waves)
        if config.num_classes:
            if class_label is None:
                hidden = hidden + self.class_emb.weight[config.num_classes]
            else:
                hidden = hidden + self.class_emb(class_label.long())
        if config.embedding_dim and embedding is not None:
            hidden = hidden + self.mapping_cond_in_proj(embedding.to(dtype))
        return self.mapping(hidden)

    def run(self, x: Tensor, mapping: Tensor, checkpointing: Checkpointing) -> Tensor:
        """From pixels (B, C, height, width) and a mapping (B, mapping_width) to pixels.

        Args:
            checkpointing: see `Checkpointing`.

        Raises:
            ValueError: a height or width that patches, merges, windows or neighbourhoods refuse.
        """
        self._check_size(x)
        h = self.patch_in(x.permute(0, 2, 3, 1))
        index = itertools.count()

        def blocks(h: Tensor, level: Any, number: int) -> Tensor:
            positions = axial_positions(h)
            for block in level:
                h = checkpointing.run(block, h, mapping, positions, index=next(index), level=number)
            return h

        skips = []
        for i, (level, merge) in enumerate(zip(self.down_levels, self.merges, strict=True)):
            h = blocks(h, level, i)
            skips.append(h)
            h = merge(h)
        h = blocks(h, self.mid_level, len(skips))
        for i in reversed(range(len(skips))):
            h = self.splits[i](h, skips.pop())
            h = blocks(h, self.up_levels[i], i)
        return self.patch_out(self.out_norm(h)).permute(0, 3, 1, 2).contiguous()

    def _check_size(self, x: Tensor) -> None:
        config = self.hourglass
        check_axes(x, config.in_channels, ("height", "width"))
        check_sides(
            x,
            [config.sides(axis) for axis in (0, 1)],
            "patches, merges and windows cannot share out or a neighbourhood is larger than",
        )


def _blocks(config: HourglassConfig, level: int) -> nn.ModuleList:
    width, mapping_width = config.widths[level], config.mapping_width
    dropout = config.of("dropout", level)
    blocks = []
    for i in range(config.depths[level]):
        ff = FeedForward(width, config.ff_width(level), mapping_width, dropout)
        attention = None
        if config.kind(level) != "none":
            head_channels = config.of("head_channels", level)
            mix = _mix(config, level, i)
            attention = SelfAttention(width, head_channels, mapping_width, mix, dropout)
        blocks.append(TransformerBlock(attention, ff))
    return nn.ModuleList(blocks)


def _mix(config: HourglassConfig, level: int, block: int) -> Mix:
    """The attention of a block; every second one of a level shifts its windows."""
    kind = config.kind(level)
    if kind == "neighborhood":
        kernel_size = config.of("kernel_size", level)
        backend = config.neighborhood_backend
        return functools.partial(
            neighborhood_attention, kernel_size=kernel_size, scale=1.0, backend=backend
        )
    if kind == "shifted_window":
        window = config.of("window_size", level)
        shift = window // 2 if block % 2 else 0
        return functools.partial(window_attention, window_size=window, shift=shift, scale=1.0)
    return global_attention


@register_model("hourglass")
class Hourglass(Network, HourglassLayers):
    """An hourglass transformer, with classes, vectors and images as its condition.

    Its output is zero until it is trained.
    """

    Config = HourglassConfig
    config: HourglassConfig

    def __init__(
        self,
        config: HourglassConfig | None = None,
        /,
        *,
        process: Scheduler | None = None,
        **options: Any,
    ) -> None:
        super().__init__(config, process=process, **options)
        self.add_layers(self.config)
        # Fourier's frequencies are laid for a span of about four: TIME_SCALES makes it a thousand.
        self.time_scale = TIME_SCALES[self.time_convention] / TIME_SCALES["log_sigma"]

    def forward(self, x: Tensor, t: Tensor, **condition: Tensor | None) -> Tensor:
        """What the network predicts.

        Args:
            x: noisy data of about unit variance, shape (B, in_channels, height, width); sides as
                `config.sides` says.
            t: time in the network's convention, shape (B,).
            condition: what the config's `conditions` lists; None or left out: absent.

        Returns:
            Shape (B, out_channels, height, width).

        Raises:
            ValueError: a shape or a dtype that does not fit. Values are not read, which would wait
                for the device: `check_condition` does that, once before a run.
        """
        check_axes(x, self.config.in_channels, ("height", "width"))
        h = self.join(x, t, condition)
        names = ("class_label", "embedding", "augmentation")
        mapping = self.embed(t * self.time_scale, *(condition.get(name) for name in names))
        return self.run(h, mapping, self.checkpointing)


# For small images, and for images of 64 pixels and up.
register_preset(
    "hourglass_tiny", "hourglass", patch_size=2, widths=(64, 128), depths=(1, 2), head_channels=32
)
register_preset(
    "hourglass_small", "hourglass", patch_size=4, widths=(128, 256, 512), depths=(2, 2, 6)
)
