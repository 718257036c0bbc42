"""The residual block of the UNets.

Letters in shapes: B samples, C channels, E the width of the embedding, L tokens, D their width;
`...` are one to three dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from k_diffusion.models.attention import CrossAttention, SelfAttention
from k_diffusion.models.fused import normed_convolution
from k_diffusion.models.layers import AdaptiveGroupNorm, GroupNorm, Pointwise, convolution, zeroed


class ResidualBlock(nn.Module):
    """Two convolutions beside a skip, then attention where it is asked for.

    At first it passes its input (through a linear layer where the channels change).

    Args:
        dims: dimensions, 1 to 3.
        in_channels: C of the input.
        out_channels: C of the output.
        width: E.
        dropout: share of activations dropped before the second convolution, in training.
        head_channels: channels of an attention head.
        attention: whether positions attend to each other.
        context_dim: D of the tokens that they attend to; 0: to none.
    """

    def __init__(
        self,
        dims: int,
        in_channels: int,
        out_channels: int,
        width: int,
        *,
        dropout: float = 0.0,
        head_channels: int = 32,
        attention: bool = False,
        context_dim: int = 0,
    ) -> None:
        super().__init__()
        changes = in_channels != out_channels
        self.norm1 = GroupNorm(in_channels)
        self.conv1 = convolution(dims, in_channels, out_channels)
        self.norm2 = AdaptiveGroupNorm(out_channels, width)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zeroed(convolution(dims, out_channels, out_channels))
        self.skip = Pointwise(in_channels, out_channels) if changes else None
        self.attention = SelfAttention(out_channels, head_channels) if attention else None
        self.cross_attention = (
            CrossAttention(out_channels, head_channels, context_dim) if context_dim else None
        )

    def forward(
        self,
        x: Tensor,
        embedding: Tensor,
        mirrored: Tensor | None = None,
        context: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Shape (B, out_channels, ...).

        Args:
            x: shape (B, C, ...).
            embedding: shape (B, E).
            mirrored: joined to x; both together have in_channels. (Joined here, so that under
                checkpointing the copy of both does not outlive the block.)
            context, mask: see `CrossAttention`; no context: nothing is attended to.
        """
        if mirrored is not None:
            x = torch.cat([x, mirrored], 1)
        h = normed_convolution(self.norm1, self.conv1, x)
        # The skip before the second convolution: under checkpointing that one then ends what is
        # computed again, and is left out.
        kept = x if self.skip is None else self.skip(x)
        h = kept + normed_convolution(self.norm2, self.conv2, h, embedding, dropout=self.dropout)
        if self.attention is not None:
            h = self.attention(h)
        if self.cross_attention is not None and context is not None:
            h = self.cross_attention(h, context, mask)
        return h
