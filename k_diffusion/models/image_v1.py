"""The established model type "image_v1": a UNet whose levels blur as they halve.

Each level has its own number of residual blocks, each followed by attention to itself and to a
sequence where the config says so; adaptive group norms stand before every activation. A patch of
pixels may count as one position of many channels.

`ImageV1` is the network in this library's terms. `ImageDenoiserModelV1` is the same, with the same
state dict, called as it always was: with sigma itself, and with the conditions' established names.

Source: Karras et al. 2022, arXiv:2206.00364 (the time's features, the augmentation's condition);
Dhariwal and Nichol 2021, arXiv:2105.05233 (the blocks); Zhang 2019, arXiv:1904.11486 (the blur).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from k_diffusion.models.checks import check_axes, check_sides
from k_diffusion.models.conditions import Condition, Image, Tokens, Vector
from k_diffusion.models.established_conditions import check_established
from k_diffusion.models.established_layers import FourierFeatures, UNet
from k_diffusion.models.image_v1_blocks import (
    GROUP_SIZE,
    HEAD_SIZE,
    DBlock,
    MappingNet,
    ResConvBlock,
    UBlock,
    orthogonal_,
)
from k_diffusion.models.layers import zeroed
from k_diffusion.models.network import TIME_SCALES, Network, NetworkConfig
from k_diffusion.models.registry import register_model
from k_diffusion.utils.scheduler import Scheduler

__all__ = [
    "DBlock",
    "ImageDenoiserModelV1",
    "ImageV1",
    "ImageV1Config",
    "MappingNet",
    "ResConvBlock",
    "UBlock",
    "orthogonal_",
]


@dataclass(frozen=True, kw_only=True)
class ImageV1Config(NetworkConfig):
    """What an ImageV1 is built from, beside what every network is.

    Args:
        context_dim: width of the tokens of `context`; 0: none.
        mapping_width: width of the embedding; even.
        depths: residual blocks a level, going down, the finest first; as many go up.
        channels: channels of each level; each level halves height and width.
        self_attention: for each level, whether each of its blocks is followed by self-attention.
        cross_attention: the same for attention to `context`; None: as self_attention, if there is
            context.
        patch_size: height and width, in pixels, of what the finest level takes for one position.
        dropout: share of channels (after the convolutions) and of attention weights dropped.
        skip_stages: how many of the finest levels are there but left out, for training that begins
            with small images.
        has_variance: whether it also tells the log variance of its error, see `forward`.

    Raises:
        ValueError: a field of the wrong type, or a combination that cannot work; the message has
            the field, its value and the way out.
    """

    prediction: str = "edm"
    context_dim: int = 0
    mapping_width: int = 256
    depths: tuple[int, ...] = (2, 2, 2)
    channels: tuple[int, ...] = (64, 128, 256)
    self_attention: tuple[bool, ...] = (False, True, True)
    cross_attention: tuple[bool, ...] | None = None
    patch_size: int = 1
    dropout: float = 0.0
    skip_stages: int = 0
    has_variance: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(1, "patch_size")
        self.none_negative("context_dim", "skip_stages")
        self.check_shares("dropout")
        if self.out_channels not in (None, self.in_channels):
            raise ValueError(
                f"out_channels = {self.out_channels} differs from in_channels = "
                f"{self.in_channels}; leave it out"
            )
        if self.mapping_width < 2 or self.mapping_width % 2:
            raise ValueError(
                f"mapping_width = {self.mapping_width} is no number of cosines and sines; give an "
                "even one"
            )
        levels = len(self.channels)
        if not levels or min(self.channels) < 1:
            raise ValueError(
                f"channels = {self.channels} has no level, or one without channels; give at least "
                "1 a level, such as (64, 128)"
            )
        for name in ("depths", "self_attention", "cross_attention"):
            given = getattr(self, name)
            if given is not None and len(given) != levels:
                raise ValueError(
                    f"{name} = {given} has {len(given)} entries, but channels = {self.channels} "
                    f"makes {levels} levels; give one a level"
                )
        if min(self.depths) < 1:
            raise ValueError(f"depths = {self.depths} has a level without blocks; give at least 1")
        if self.cross_attention is None:
            asked = self.self_attention if self.context_dim else (False,) * levels
            object.__setattr__(self, "cross_attention", asked)
        if any(self.crossing) != bool(self.context_dim):
            raise ValueError(
                f"cross_attention = {self.cross_attention}, but context_dim = {self.context_dim}; "
                "give both, or neither"
            )
        if self.skip_stages >= levels:
            raise ValueError(
                f"skip_stages = {self.skip_stages} leaves none of {levels} levels; give at most "
                f"{levels - 1}"
            )
        attends = zip(self.self_attention, self.crossing, strict=True)
        # Going up, the last block of a level has the channels of the next finer one.
        headed = [k for i, a in enumerate(attends) if any(a) for k in (i, max(0, i - 1))]
        self._check_parts(self.channels, GROUP_SIZE, "groups")
        self._check_parts([self.channels[k] for k in headed], HEAD_SIZE, "heads")
        counts = zip(self.depths, self.self_attention, self.crossing, strict=True)
        self.check_checkpointing(levels, 2 * sum(n * (1 + a + c) for n, a, c in counts))

    def _check_parts(self, widths: Iterable[int], size: int, what: str) -> None:
        for width in widths:
            if width % (parts := max(1, width // size)):
                raise ValueError(
                    f"channels = {self.channels}: {width} do not divide into {parts} {what}; give "
                    f"multiples of {size}, or less than {2 * size}"
                )

    @property
    def crossing(self) -> tuple[bool, ...]:
        """`cross_attention`, once the object is made."""
        return self.cross_attention or ()

    @property
    def vector_width(self) -> int:
        """Width of what is known of a sample as a whole: `augmentation`, then `embedding`."""
        return self.augmentation_dim + self.embedding_dim

    @property
    def factor(self) -> int:
        """What height and width must be multiples of."""
        return self.patch_size * 2 ** (len(self.channels) - 1 - self.skip_stages)


@register_model("image_v1")
class ImageV1(Network):
    """The established UNet; its output is zero until it is trained."""

    Config = ImageV1Config
    config: ImageV1Config

    def __init__(
        self,
        config: ImageV1Config | None = None,
        /,
        *,
        process: Scheduler | None = None,
        **options: Any,
    ) -> None:
        super().__init__(config, process=process, **options)
        config = self.config
        width, channels, depths = config.mapping_width, config.channels, config.depths
        self.timestep_embed = FourierFeatures(1, width)
        if config.vector_width:
            self.mapping_cond = nn.Linear(config.vector_width, width, bias=False)
        if config.num_classes:  # the established model has none; the last row is no class
            self.class_emb = nn.Embedding(config.num_classes + 1, width)
        self.mapping = MappingNet(width, width)
        self._set_ends()
        down: list[DBlock | UBlock] = []
        up: list[DBlock | UBlock] = []
        for i, (depth, own) in enumerate(zip(depths, channels, strict=True)):
            outer = channels[max(0, i - 1)]
            options = {
                "dropout_rate": config.dropout,
                "self_attn": config.self_attention[i],
                "cross_attn": config.crossing[i],
                "c_enc": config.context_dim,
            }
            resamples = i > config.skip_stages
            joined = own if i == len(channels) - 1 else 2 * own
            down.append(DBlock(depth, width, outer, own, own, downsample=resamples, **options))
            up.append(UBlock(depth, width, joined, own, outer, upsample=resamples, **options))
        index = 0
        for level, stage in [*enumerate(down), *reversed(list(enumerate(up)))]:
            stage.level, stage.first, stage.checkpointing = level, index, self.checkpointing
            index += len(stage) - 1  # without what resamples
        self.u_net = UNet(down, reversed(up), config.skip_stages)

    def _set_ends(self) -> None:
        """New projections of pixels (patches of them) to features, and back."""
        config = self.config
        width, area = config.channels[max(0, config.skip_stages - 1)], config.patch_size**2
        self.proj_in = nn.Conv2d(config.joined_channels * area, width, 1)
        self.proj_out = zeroed(
            nn.Conv2d(width, config.in_channels * area + int(config.has_variance), 1)
        )

    def forward(
        self, x: Tensor, t: Tensor, *, return_variance: bool = False, **condition: Tensor | None
    ) -> Any:
        """What the network predicts.

        Args:
            x: noisy data of about unit variance, shape (B, in_channels, H, W), H and W multiples of
                `config.factor`.
            t: time in the network's convention, shape (B,).
            return_variance: whether to return the log variance of the prediction's error, too.
            condition: what the config's `conditions` lists; None or left out: absent.

        Returns:
            Shape (B, in_channels, H, W); with `return_variance` a pair of it and of shape (B,).

        Raises:
            ValueError: a shape or a dtype that does not fit.
        """
        self._check_size(x)
        joined = self.join(x, t, condition)
        vectors = []
        for name, width in (
            ("augmentation", self.config.augmentation_dim),
            ("embedding", self.config.embedding_dim),
        ):
            if width:
                given = condition.get(name)
                vectors.append(x.new_zeros(len(x), width) if given is None else given)
        vector = torch.cat([v.to(x.dtype) for v in vectors], 1) if vectors else None
        mask = condition.get("context_mask")
        padding = None if mask is None else ~mask
        label = condition.get("class_label")
        if label is None and self.num_classes:
            label = t.new_full(t.shape, self.num_classes)
        tokens = condition.get("context")
        return self._predict(joined, t, vector, tokens, padding, return_variance, label)

    def _predict(
        self,
        x: Tensor,
        t: Tensor,
        vector: Tensor | None,
        tokens: Tensor | None,
        padding: Tensor | None,
        return_variance: bool,
        label: Tensor | None = None,
    ) -> Any:
        config = self.config
        if return_variance and not config.has_variance:
            raise ValueError(
                "return_variance = True, but this model has no such output; build it with "
                "has_variance, or leave this out"
            )
        dtype = self.proj_in.weight.dtype
        # As in `TimeFeatures`: the frequencies are laid for a span of about four.
        time = t[:, None] * (TIME_SCALES[self.time_convention] / TIME_SCALES["log_sigma"])
        hidden = self.timestep_embed(time).to(dtype)
        if vector is not None:
            hidden = hidden + self.mapping_cond(vector.to(dtype))
        if label is not None:
            hidden = hidden + self.class_emb(label.long())
        cond = {"cond": self.mapping(hidden)}
        if config.context_dim:
            if tokens is None:  # one that does not count
                tokens = x.new_zeros(len(x), 1, config.context_dim)
                padding = x.new_ones(len(x), 1)
            cond["cross"] = tokens.to(dtype)
            if padding is not None:
                cond["cross_padding"] = padding
        h = self.proj_in(F.pixel_unshuffle(x, config.patch_size))
        h = self.proj_out(self.u_net(h, cond))
        prediction = F.pixel_shuffle(h[:, : h.shape[1] - config.has_variance], config.patch_size)
        return (prediction, h[:, -1].flatten(1).mean(1)) if return_variance else prediction

    def _check_size(self, x: Tensor) -> None:
        check_axes(x, self.config.in_channels, ("height", "width"))
        factor = self.config.factor
        # What is blurred is reflected at its border, and must have something to reflect.
        least = factor if factor == self.config.patch_size else 2 * factor
        check_sides(x, [(factor, least)] * 2, "its patches and levels cannot share out")


class ImageDenoiserModelV1(ImageV1):
    """`ImageV1` as it always was made and called.

    Args:
        c_in: channels of the image.
        feats_in: width of the embedding.
        depths, channels: see `ImageV1Config`.
        self_attn_depths, cross_attn_depths: for each level, whether it attends.
        mapping_cond_dim, unet_cond_dim, cross_cond_dim: widths of `mapping_cond`, `unet_cond`
            (channels) and `cross_cond` (of a token); 0: none.
        dropout_rate, patch_size, skip_stages, has_variance: see `ImageV1Config`.
    """

    def __init__(
        self,
        c_in: int,
        feats_in: int,
        depths: Sequence[int],
        channels: Sequence[int],
        self_attn_depths: Sequence[bool],
        cross_attn_depths: Sequence[bool] | None = None,
        mapping_cond_dim: int = 0,
        unet_cond_dim: int = 0,
        cross_cond_dim: int = 0,
        dropout_rate: float = 0.0,
        patch_size: int = 1,
        skip_stages: int = 0,
        has_variance: bool = False,
    ) -> None:
        super().__init__(
            in_channels=c_in,
            mapping_width=feats_in,
            depths=tuple(depths),
            channels=tuple(channels),
            self_attention=tuple(map(bool, self_attn_depths)),
            # Without tokens it has always had none, whatever the list says.
            cross_attention=tuple(map(bool, cross_attn_depths or ())) if cross_cond_dim else None,
            embedding_dim=mapping_cond_dim,
            image_channels=unet_cond_dim,
            context_dim=cross_cond_dim,
            dropout=dropout_rate,
            patch_size=patch_size,
            skip_stages=skip_stages,
            has_variance=has_variance,
        )
        # It takes sigma, not a time: the established wrappers make it a Denoiser, these marks not.
        self.prediction = None  # type: ignore[assignment]
        self.c_in = c_in
        self.channels = list(channels)
        self.mapping_cond_dim = mapping_cond_dim
        self.unet_cond_dim = unet_cond_dim
        self.cross_cond_dim = cross_cond_dim
        self.patch_size = patch_size
        self.has_variance = has_variance

    def forward(  # type: ignore[override]
        self,
        input: Tensor,
        sigma: Tensor,
        mapping_cond: Tensor | None = None,
        unet_cond: Tensor | None = None,
        cross_cond: Tensor | None = None,
        cross_cond_padding: Tensor | None = None,
        return_variance: bool = False,
    ) -> Any:
        """What the network predicts.

        Args:
            input: noisy data of about unit variance, shape (B, c_in, H, W).
            sigma: noise standard deviations in data units, above 0, shape (B,).
            mapping_cond: shape (B, mapping_cond_dim); None: zeros.
            unet_cond: shape (B, unet_cond_dim, H, W); None: zeros.
            cross_cond: shape (B, L, cross_cond_dim); None: no token.
            cross_cond_padding: shape (B, L), not 0 where a token does not count; None: all do.
            return_variance: see `ImageV1.forward`.

        Raises:
            ValueError: a condition that it was not built for, or a shape that does not fit.
        """
        check_established(
            self._established(),
            len(input),
            input.shape[2:],
            {"mapping_cond": mapping_cond, "unet_cond": unet_cond, "cross_cond": cross_cond},
            values=False,
        )
        if cross_cond_padding is not None and (
            cross_cond is None or cross_cond_padding.shape != cross_cond.shape[:2]
        ):
            raise ValueError(
                f"cross_cond_padding has shape {tuple(cross_cond_padding.shape)}; it goes with "
                "cross_cond, one number a token"
            )
        self._check_size(input)
        x = self.join(input, sigma, {"image": unet_cond})
        # Below float32 the logarithm would be too coarse for the features' frequencies.
        time = sigma.to(torch.promote_types(sigma.dtype, torch.float32)).log() / 4
        return self._predict(x, time, mapping_cond, cross_cond, cross_cond_padding, return_variance)

    def check_condition(self, batch: int, **condition: Any) -> None:
        """See `Network.check_condition`; under the established names."""
        condition.pop("cross_cond_padding", None)  # any numbers will do: `forward` sees the shape
        check_established(self._established(), batch, None, condition, values=True)

    def _established(self) -> dict[Condition, int]:
        return {
            Vector("mapping_cond", self.mapping_cond_dim): self.mapping_cond_dim,
            Tokens("cross_cond", self.cross_cond_dim): self.cross_cond_dim,
            Image("unet_cond", self.unet_cond_dim): self.unet_cond_dim,
        }

    def param_groups(self, base_lr: float = 2e-4) -> list[dict[str, Any]]:
        """Groups for an optimizer: weights of the mapping and the UNet decay, nothing else does."""
        decays: list[nn.Parameter] = []
        stays: list[nn.Parameter] = []
        for name, parameter in self.named_parameters():
            inner = name.startswith(("mapping", "u_net")) and name.endswith(".weight")
            (decays if inner else stays).append(parameter)
        return [
            {"params": decays, "lr": base_lr},
            {"params": stays, "lr": base_lr, "weight_decay": 0.0},
        ]

    def set_skip_stages(self, skip_stages: int) -> ImageDenoiserModelV1:
        """Leave out that many of the finest levels; the projections of pixels begin anew."""
        self.config = replace(self.config, skip_stages=skip_stages)
        self._set_ends()
        self.u_net.skip_stages = skip_stages
        for i, stage in enumerate(self.u_net.d_blocks):
            stage.set_downsample(i > skip_stages)  # type: ignore[operator]
        for i, stage in enumerate(reversed(list(self.u_net.u_blocks))):
            stage.set_upsample(i > skip_stages)  # type: ignore[operator]
        return self

    def set_patch_size(self, patch_size: int) -> None:
        """Take patches of another size; the projections of pixels begin anew."""
        self.config = replace(self.config, patch_size=patch_size)
        self.patch_size = patch_size
        self._set_ends()


_made = inspect.signature(ImageDenoiserModelV1.__init__)
ImageDenoiserModelV1.__signature__ = _made.replace(  # type: ignore[attr-defined]
    parameters=list(_made.parameters.values())[1:], return_annotation=inspect.Signature.empty
)
