"""A diffusion transformer: patches as tokens, and blocks that the embedding scales, shifts, gates.

    x -> patches + position -> [self-attention, (cross-attention,) MLP] x depth -> patches

Source: Peebles and Xie 2023 (DiT), arXiv:2212.09748, with adaLN-zero; cross-attention to a sequence
as in its section 3.2 and in Chen et al. 2024 (PixArt), arXiv:2310.00426, section 2.3.

Letters in shapes: B samples, C channels, H height, W width, E the width of all tokens and of the
embedding, N = (H / patch_size) (W / patch_size) tokens, L tokens of the context.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from k_diffusion.models.attention import MixesPositions, attend, hide_masked
from k_diffusion.models.checks import check_axes, check_heads, check_sides
from k_diffusion.models.layers import zeroed
from k_diffusion.models.mapping import TIME_FEATURES, MappingNetwork, TimeFeatures, sinusoids
from k_diffusion.models.network import Network, NetworkConfig
from k_diffusion.models.registry import register_model, register_preset
from k_diffusion.models.transformer import RMSNorm
from k_diffusion.utils.maths import unknown
from k_diffusion.utils.scheduler import Scheduler

TIME_COUNT = 128
"""Frequencies of the time's features."""


@dataclass(frozen=True, kw_only=True)
class DiTConfig(NetworkConfig):
    """What a DiT is built from, beside what every network is.

    Args:
        patch_size: height and width of the patch of x that one token holds.
        width: width of a token, E.
        depth: blocks.
        head_channels: channels of one attention head.
        mlp_ratio: width of an MLP's hidden layer over that of a token.
        context_dim: width of the tokens of `context`, which every block attends to; 0: none.
        qk_norm: whether queries and keys are scaled to unit mean square before they meet, which
            keeps attention from overflowing in long training (Dehghani et al. 2023,
            arXiv:2302.05442, section 2).
        time_features: "sinusoidal" or "fourier".
        dropout: share of the values dropped from what attention and MLP add, in training.

    Raises:
        ValueError: a field of the wrong type, or a combination that cannot work; the message has
            the field, its value and the way out.
    """

    patch_size: int = 2
    width: int = 384
    depth: int = 12
    head_channels: int = 64
    mlp_ratio: float = 4.0
    context_dim: int = 0
    qk_norm: bool = False
    time_features: str = "sinusoidal"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(1, "patch_size", "width", "depth", "head_channels")
        self.none_negative("context_dim")
        self.check_shares("dropout")
        self.check_checkpointing(1, self.depth)
        if self.time_features not in TIME_FEATURES:
            raise ValueError(unknown("time_features", self.time_features, TIME_FEATURES))
        if self.width % 4:
            raise ValueError(
                f"width = {self.width} has no room for sine and cosine of rows and columns; give a "
                f"multiple of 4, such as {-(-self.width // 4) * 4}"
            )
        check_heads(self.head_channels, [self.width], "of its width")
        if self.hidden < 1:
            raise ValueError(
                f"mlp_ratio = {self.mlp_ratio} leaves MLPs no hidden layer; give a number such as 4"
            )

    @property
    def hidden(self) -> int:
        """Width of the MLPs' hidden layers."""
        return int(self.width * self.mlp_ratio)


def grid_positions(height: int, width: int, channels: int, like: Tensor) -> Tensor:
    """Where each patch is: sines and cosines of its row in one half, of its column in the other.

    Args:
        height, width: in patches.
        channels: E, a multiple of 4.
        like: a tensor of the device and dtype that the outcome is to have.

    Returns:
        Shape (height · width, E), of unit mean square.

    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.5; for two dimensions Dosovitskiy et
    al. 2021, arXiv:2010.11929, appendix D.4.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    rows, columns = (
        sinusoids(torch.arange(n, device=like.device, dtype=dtype), channels // 4)
        for n in (height, width)
    )
    halves = [
        rows[:, None].expand(height, width, -1),
        columns[None].expand(height, width, -1),
    ]
    return torch.cat(halves, 2).flatten(0, 1).to(like.dtype)


def linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer that begins as the paper's do: Xavier's uniform weights, and no bias."""
    layer = nn.Linear(inputs, outputs)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def modulate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """x (B, N, E) normalised token by token, scaled and shifted by the sample's (B, E)."""
    normed = F.layer_norm(x, x.shape[-1:], eps=1e-6)
    return normed * (1 + scale[:, None]) + shift[:, None]


class Attention(MixesPositions):
    """Multi-head attention; what it gives is still to be added to its input.

    Args:
        width: E.
        head_channels: channels of one head; divides E.
        qk_norm: whether queries and keys are scaled to unit mean square.
        context_dim: width of the tokens attended to; None: x's own.
    """

    def __init__(
        self, width: int, head_channels: int, qk_norm: bool = False, context_dim: int | None = None
    ) -> None:
        super().__init__()
        self.head_channels = head_channels
        self.q = linear(width, width)
        self.kv = linear(width if context_dim is None else context_dim, 2 * width)
        self.out = linear(width, width)
        self.norm_q = RMSNorm(head_channels) if qk_norm else nn.Identity()
        self.norm_k = RMSNorm(head_channels) if qk_norm else nn.Identity()

    def forward(
        self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Shape (B, N, E) of x (B, N, E).

        Args:
            context: attended to, shape (B, L, context_dim); None: x.
            mask: which of its tokens count, booleans (B, L); None: all.
        """
        k, v = self.kv(x if context is None else context).chunk(2, -1)
        if self.identity and context is None:
            return self.out(v)
        q, k = self._normed(self.norm_q, self.q(x)), self._normed(self.norm_k, k)
        return self.out(attend(q, k, v, self.head_channels, mask))

    def _normed(self, norm: nn.Module, x: Tensor) -> Tensor:
        return norm(x.unflatten(2, (-1, self.head_channels))).flatten(2)


class CrossAttention(nn.Module):
    """Attention of every token to those of a context, added to its input; at first nothing.

    To a sample all of whose tokens are masked it adds nothing ever.

    Args:
        width: E.
        head_channels: channels of one head; divides E.
        context_dim: width of the context's tokens.
        qk_norm: whether queries and keys are scaled to unit mean square.
    """

    def __init__(self, width: int, head_channels: int, context_dim: int, qk_norm: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.attention = Attention(width, head_channels, qk_norm, context_dim)
        # Without a bias, which would be added where there is no context, too.
        self.attention.out = zeroed(nn.Linear(width, width, bias=False))

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """Shape (B, N, E) of x (B, N, E), a context (B, L, context_dim) and its mask (B, L)."""
        return x + self.attention(self.norm(x), context, mask)


class DiTBlock(nn.Module):
    """Self-attention and MLP, each scaled, shifted and gated by the embedding (adaLN-zero, figure
    3), with cross-attention between them where there is a context.

    At first it passes its input.

    Args:
        config: the model's.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width, heads = config.width, config.head_channels
        self.modulation = zeroed(nn.Linear(width, 6 * width))
        self.attention = Attention(width, heads, config.qk_norm)
        self.mlp = nn.Sequential(
            linear(width, config.hidden),
            nn.GELU("tanh"),
            linear(config.hidden, width),
        )
        self.cross = (
            CrossAttention(width, heads, config.context_dim, config.qk_norm)
            if config.context_dim
            else None
        )
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        embedding: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Shape (B, N, E) of x (B, N, E), the embedding (B, E), context and mask (see DiT)."""
        scale1, shift1, gate1, scale2, shift2, gate2 = self.modulation(embedding).chunk(6, 1)
        x = x + gate1[:, None] * self.dropout(self.attention(modulate(x, scale1, shift1)))
        if self.cross is not None and context is not None:
            x = self.cross(x, context, mask)
        return x + gate2[:, None] * self.dropout(self.mlp(modulate(x, scale2, shift2)))


@register_model("dit")
class DiT(Network):
    """A transformer over patches, with classes, vectors, images and a sequence as its condition.

    Its output is zero until it is trained. It takes images of any height and width that patches
    fill, whatever it was trained on.
    """

    Config = DiTConfig
    config: DiTConfig

    def __init__(
        self,
        config: DiTConfig | None = None,
        /,
        *,
        process: Scheduler | None = None,
        **options: Any,
    ) -> None:
        super().__init__(config, process=process, **options)
        config = self.config
        width, area = config.width, config.patch_size**2
        features = TimeFeatures(config.time_features, TIME_COUNT, self.time_convention)
        self.mapping = MappingNetwork(features, width, config.num_classes, config.vectors)
        self.patch_in = linear(config.joined_channels * area, width)
        self.blocks = nn.ModuleList(DiTBlock(config) for _ in range(config.depth))
        self.modulation_out = zeroed(nn.Linear(width, 2 * width))
        self.patch_out = zeroed(nn.Linear(width, config.predicted_channels * area))

    def forward(self, x: Tensor, t: Tensor, **condition: Tensor | None) -> Tensor:
        """What the network predicts.

        Args:
            x: noisy data of about unit variance, shape (B, in_channels, H, W), H and W multiples of
                patch_size.
            t: time in the network's convention, shape (B,).
            condition: what the config's `conditions` lists; None or left out: absent. Tokens of
                `context` that `context_mask` hides have no influence, whatever they hold.

        Returns:
            Shape (B, out_channels, H, W).

        Raises:
            ValueError: a shape or a dtype that does not fit. Values are not read, which would wait
                for the device: `check_condition` does that, once before a run.
        """
        self._check_size(x)
        joined = self.join(x, t, condition)
        mask = condition.get("context_mask")
        context = hide_masked(condition.get("context"), mask, x.dtype)
        embedding = self.mapping(t, **condition)
        size = self.config.patch_size
        patches = F.pixel_unshuffle(joined, size)
        height, width = patches.shape[2:]
        h = self.patch_in(patches.flatten(2).transpose(1, 2))
        h = h + grid_positions(height, width, h.shape[2], h)
        for index, block in enumerate(self.blocks):
            h = self.checkpointing.run(block, h, embedding, context, mask, index=index)
        scale, shift = self.modulation_out(embedding).chunk(2, 1)
        h = self.patch_out(modulate(h, scale, shift))
        return F.pixel_shuffle(h.transpose(1, 2).unflatten(2, (height, width)), size)

    def _check_size(self, x: Tensor) -> None:
        size = self.config.patch_size
        check_axes(x, self.config.in_channels, ("height", "width"))
        check_sides(x, [(size, size)] * 2, f"patches of {size} do not fill")


# The networks of the paper's table 1, for latents of an image of 256 or 512 pixels.
for _name, _width, _depth, _head_channels in (
    ("dit_s", 384, 12, 64),
    ("dit_b", 768, 12, 64),
    ("dit_l", 1024, 24, 64),
    ("dit_xl", 1152, 28, 72),
):
    register_preset(
        _name, "dit", width=_width, depth=_depth, head_channels=_head_channels, patch_size=2
    )
