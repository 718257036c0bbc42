"""The blocks and levels of the established model type "image_v1", under their established names.

Source: Dhariwal and Nichol 2021, arXiv:2105.05233 (the blocks); Zhang 2019, arXiv:1904.11486 (the
blur between levels).
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from k_diffusion.models.established_layers import (
    AdaGN,
    Cond,
    ConditionedResidualBlock,
    ConditionedSequential,
    CrossAttention2d,
    Downsample2d,
    SelfAttention2d,
    Upsample2d,
    run,
)
from k_diffusion.models.layers import zeroed
from k_diffusion.models.recompute import Checkpointing

GROUP_SIZE = 32
HEAD_SIZE = 64
"""Channels of a norm's group, and of a head of attention, at least."""


def orthogonal_(module: Any) -> Any:
    """The module with orthogonal weights."""
    nn.init.orthogonal_(module.weight)
    return module


def _norm(feats_in: int, channels: int, group_size: int) -> AdaGN:
    return AdaGN(feats_in, channels, max(1, channels // group_size))


class ResConvBlock(ConditionedResidualBlock):
    """Two convolutions beside a skip; at first it passes its input (projected where C changes).

    Args:
        feats_in: width of the embedding.
        c_in, c_mid, c_out: channels before, between and after the convolutions.
        group_size: channels of a norm's group, at least.
        dropout_rate: share of channels dropped after each convolution, in training.
    """

    def __init__(
        self,
        feats_in: int,
        c_in: int,
        c_mid: int,
        c_out: int,
        group_size: int = GROUP_SIZE,
        dropout_rate: float = 0.0,
    ) -> None:
        skip = None if c_in == c_out else orthogonal_(nn.Conv2d(c_in, c_out, 1, bias=False))
        super().__init__(
            _norm(feats_in, c_in, group_size),
            nn.GELU(),
            nn.Conv2d(c_in, c_mid, 3, padding=1),
            nn.Dropout2d(dropout_rate),
            _norm(feats_in, c_mid, group_size),
            nn.GELU(),
            zeroed(nn.Conv2d(c_mid, c_out, 3, padding=1)),
            nn.Dropout2d(dropout_rate),
            skip=skip,
        )


class _Stage(ConditionedSequential):
    """What both directions share: blocks, each with its attention, run as a policy says."""

    level = 0
    first = 0
    checkpointing = Checkpointing(False)

    def forward(  # type: ignore[override]
        self, input: Tensor, cond: Cond, skip: Tensor | None = None
    ) -> Tensor:
        """The last module's output; the first one reads the skip, too."""
        index = itertools.count(self.first)
        for i, module in enumerate(self):
            beside = skip if i == 0 else None
            if isinstance(module, (nn.Identity, Downsample2d, Upsample2d)):
                input = module(input)
                continue
            input = self.checkpointing.run(
                _joined, module, input, cond, beside, index=next(index), level=self.level
            )
        return input


def _joined(module: nn.Module, input: Tensor, cond: Cond, skip: Tensor | None) -> Tensor:
    # Joined here, so that under checkpointing the copy of both does not outlive the block.
    return run(module, input if skip is None else torch.cat([input, skip], 1), cond)


def _blocks(
    n_layers: int,
    feats_in: int,
    c_in: int,
    c_mid: int,
    c_out: int,
    group_size: int,
    head_size: int,
    dropout_rate: float,
    self_attn: bool,
    cross_attn: bool,
    c_enc: int,
) -> list[nn.Module]:
    modules: list[nn.Module] = []
    for i in range(n_layers):
        before = c_in if i == 0 else c_mid
        after = c_out if i == n_layers - 1 else c_mid
        heads = max(1, after // head_size)

        def norm(channels: int) -> AdaGN:
            return _norm(feats_in, channels, group_size)

        modules.append(ResConvBlock(feats_in, before, c_mid, after, group_size, dropout_rate))
        if self_attn:
            modules.append(SelfAttention2d(after, heads, norm, dropout_rate))
        if cross_attn:
            modules.append(CrossAttention2d(after, c_enc, heads, norm, dropout_rate))
    return modules


class DBlock(_Stage):
    """A level going down: half the size where `downsample` says so, then its blocks.

    Args:
        n_layers: residual blocks.
        feats_in: width of the embedding.
        c_in, c_mid, c_out: channels that come in, those within, and those that go out.
        group_size, head_size: channels of a norm's group and of an attention's head, at least.
        dropout_rate: see `ImageV1Config`.
        downsample: whether it begins with half the size.
        self_attn, cross_attn: whether each block is followed by attention.
        c_enc: width of the tokens.
    """

    def __init__(
        self,
        n_layers: int,
        feats_in: int,
        c_in: int,
        c_mid: int,
        c_out: int,
        group_size: int = GROUP_SIZE,
        head_size: int = HEAD_SIZE,
        dropout_rate: float = 0.0,
        downsample: bool = False,
        self_attn: bool = False,
        cross_attn: bool = False,
        c_enc: int = 0,
    ) -> None:
        widths = (c_in, c_mid, c_out, group_size, head_size)
        modules = _blocks(n_layers, feats_in, *widths, dropout_rate, self_attn, cross_attn, c_enc)
        super().__init__(nn.Identity(), *modules)
        self.set_downsample(downsample)

    def set_downsample(self, downsample: bool) -> DBlock:
        """Begin with half the size, or not."""
        self[0] = Downsample2d() if downsample else nn.Identity()
        return self


class UBlock(_Stage):
    """A level going up: its blocks, then twice the size where `upsample` says so; see `DBlock`."""

    def __init__(
        self,
        n_layers: int,
        feats_in: int,
        c_in: int,
        c_mid: int,
        c_out: int,
        group_size: int = GROUP_SIZE,
        head_size: int = HEAD_SIZE,
        dropout_rate: float = 0.0,
        upsample: bool = False,
        self_attn: bool = False,
        cross_attn: bool = False,
        c_enc: int = 0,
    ) -> None:
        widths = (c_in, c_mid, c_out, group_size, head_size)
        modules = _blocks(n_layers, feats_in, *widths, dropout_rate, self_attn, cross_attn, c_enc)
        super().__init__(*modules, nn.Identity())
        self.set_upsample(upsample)

    def set_upsample(self, upsample: bool) -> UBlock:
        """End with twice the size, or not."""
        self[-1] = Upsample2d() if upsample else nn.Identity()
        return self


class MappingNet(nn.Sequential):
    """From the sum of what is known of a sample to its embedding."""

    def __init__(self, feats_in: int, feats_out: int, n_layers: int = 2) -> None:
        widths = [feats_in, *[feats_out] * n_layers]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [orthogonal_(nn.Linear(before, after)), nn.GELU()]
        super().__init__(*layers)
