"""Attention within windows, and within windows moved by half of one.

The image is cut into windows; every position attends to those of its own. Where a layer's windows
are shifted, information crosses the cuts of the layer before. The shifted cut wraps around: what
comes together from opposite sides of the image is masked.

Source: Liu et al. 2021, arXiv:2103.14030, section 3.2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from k_diffusion.models.attention import weighted


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window_size: int,
    shift: int = 0,
    *,
    scale: float | None = None,
) -> Tensor:
    """Attention of every position to the window that it lies in, the heads apart from each other.

    Args:
        q, k, v: shape (B, H, W, N, D): B samples, N heads of D channels.
        window_size: side of a window; divides H and W.
        shift: how far the windows are moved along both axes, from 0 to window_size - 1.
        scale: the factor of q·k; None: 1 / sqrt(D).

    Returns:
        Shape (B, H, W, N, D).

    Raises:
        ValueError: window_size does not divide a side.
    """
    batch, height, width, heads, _ = q.shape
    for name, side in (("height", height), ("width", width)):
        if window_size < 1 or side % window_size:
            fitting = max(n for n in range(1, max(2, window_size)) if side % n == 0)
            raise ValueError(
                f"window_size = {window_size} does not divide the {name}, {side} tokens: give "
                f"{fitting}, or an image of another size"
            )
    rows, columns = height // window_size, width // window_size

    def cut(x: Tensor) -> Tensor:
        """(B, H, W, N, D) -> (windows, B·N, tokens of a window, D)."""
        if shift:
            x = x.roll((-shift, -shift), (1, 2))
        x = x.reshape(batch, rows, window_size, columns, window_size, heads, -1)
        return x.permute(1, 3, 0, 5, 2, 4, 6).flatten(4, 5).flatten(2, 3).flatten(0, 1)

    mask = _mask(rows, columns, window_size, shift, q.device) if shift else None
    out = weighted(cut(q), cut(k), cut(v), mask, scale=scale)
    out = out.view(rows, columns, batch, heads, window_size, window_size, -1)
    out = out.permute(2, 0, 4, 1, 5, 3, 6).reshape(batch, height, width, heads, -1)
    return out.roll((shift, shift), (1, 2)) if shift else out


def _mask(rows: int, columns: int, window: int, shift: int, device: torch.device) -> Tensor:
    """Who of a window may see whom, shape (windows, 1, tokens, tokens)."""

    def together(count: int) -> Tensor:
        """Positions of one axis that were neighbours before the shift, (count, window, window)."""
        place = torch.arange(count * window, device=device).view(count, window)
        wrapped = (place + shift) // (count * window)  # 1 where the shift brought the other side
        return wrapped[:, :, None] == wrapped[:, None, :]

    mask = together(rows)[:, None, :, None, :, None] & together(columns)[:, None, :, None]
    return mask.flatten(4, 5).flatten(2, 3).flatten(0, 1)[:, None]
