"""Neighbourhood attention: every position attends to the window of positions centred on it.

The window of kernel_size x kernel_size keeps its size at the borders, where it is moved inwards:
along an axis of n positions, the one of position i begins at min(max(i - K // 2, 0), n - K).

Source: Hassani et al. 2023, arXiv:2204.07143, section 3.

The same sum can be had in three ways, named in `BACKENDS`: FlexAttention, which CUDA fuses; tiles
of plain `scaled_dot_product_attention`, which run anywhere; NATTEN's own kernels.

Letters in shapes: B samples, H height, W width, N heads, D channels of a head.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from k_diffusion.models.attention import weighted
from k_diffusion.utils.maths import unknown

BACKENDS = ("auto", "flex", "tiles", "natten")

TILE = 8
"""Side of a tile of queries. Measured for kernels of 7 on images of side 32 and 64: of 4, 8 and 16
the fastest, forward and backward."""

SMALL = 2
"""An image is one tile where this spares less than this factor of keys: to gather costs, too."""


def check_kernel(kernel_size: int) -> None:
    """Refuse a window that has no centre.

    Raises:
        ValueError: kernel_size is even, or not positive.
    """
    if kernel_size < 1 or kernel_size % 2 == 0:
        odd = max(1, kernel_size - 1)
        raise ValueError(
            f"kernel_size = {kernel_size} has no centre; give an odd number, such as {odd} or "
            f"{odd + 2}"
        )


def check_backend(backend: str, name: str = "backend") -> None:
    """Refuse a backend that is not known, or not here.

    Args:
        backend: one of `BACKENDS`.
        name: what whoever gave it knows it as.

    Raises:
        ValueError: names the backend and the way out.
    """
    if backend not in BACKENDS:
        raise ValueError(unknown(name, backend, BACKENDS))
    if backend == "natten" and not has_natten():
        raise ValueError(
            f'{name} = "natten" asks for NATTEN, which is not installed; install natten, or give '
            '"auto" for the best that is here'
        )


def has_natten() -> bool:
    """Whether NATTEN is installed; it is not imported for that."""
    return importlib.util.find_spec("natten") is not None


def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: int,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of every position to its neighbourhood, the heads apart from each other.

    Args:
        q, k, v: shape (B, H, W, N, D).
        kernel_size: side of the neighbourhood, odd, at most H and W.
        scale: the factor of q·k; None: 1 / sqrt(D).
        backend: "flex", "tiles" or "natten"; "auto": on CUDA NATTEN where it is installed, or else
            FlexAttention, tiles elsewhere.

    Returns:
        Shape (B, H, W, N, D), in v's dtype.

    Raises:
        ValueError: a kernel size or a backend that cannot work.
    """
    check_kernel(kernel_size)
    _, height, width, _, channels = q.shape
    for name, side in (("height", height), ("width", width)):
        if kernel_size > side:
            odd = side - 1 + side % 2
            raise ValueError(
                f"kernel_size = {kernel_size} is more than the {name}, {side} tokens: give at most "
                f"{odd}, a larger image, or global attention here"
            )
    if scale is None:
        scale = 1 / math.sqrt(channels)
    if backend == "auto":
        backend = _best(v)
    # Under autocast q and k come from a norm in float32; custom kernels want one dtype.
    q, k = q.to(v.dtype), k.to(v.dtype)
    return _function(backend)(q, k, v, kernel_size, scale)


def _best(v: Tensor) -> str:
    if v.device.type != "cuda" or v.dtype == torch.float64 or v.shape[-1] < 16:
        return "tiles"  # FlexAttention's kernels take neither float64 nor very narrow heads
    return "natten" if _NATTEN else "flex"


def _function(backend: str) -> Any:
    if backend == "flex":
        return flex
    if backend == "tiles":
        return tiles
    check_backend(backend)
    return natten


_NATTEN = has_natten()

BLOCK = 128
"""Tokens of a block, of those that FlexAttention takes or leaves as a whole; its own default."""


# ---------------------------------------------------------------- tiles


def tiles(q: Tensor, k: Tensor, v: Tensor, kernel_size: int, scale: float) -> Tensor:
    """Tiles of queries, each with the keys that any of them sees, and a mask for the rest.

    A tile of side T needs keys of side T + kernel_size - 1. The work and the memory grow with the
    image as they should, by H·W, where one mask over the whole image makes them (H·W)².
    """
    heads = q.shape[3]
    height, width = q.shape[1:3]
    tile = max(TILE, kernel_size // 2 + 1)
    if height * width <= SMALL * (tile + kernel_size - 1) ** 2:
        tile = max(height, width)
    rows, columns = _Axis(height, tile, kernel_size), _Axis(width, tile, kernel_size)
    mask = rows.mask(q.device)[:, None, :, None, :, None] & columns.mask(q.device)[:, None, :, None]
    # (row tiles, column tiles, rows, columns, key rows, key columns) -> one mask a tile, for all
    # samples and heads, which lie behind the tiles.
    mask = mask.flatten(4, 5).flatten(2, 3).flatten(0, 1)[:, None]
    q = _fold(columns.cut(rows.cut(q, 1), 3))
    k = _fold(columns.cut_seen(rows.cut_seen(k, 1), 3))
    v = _fold(columns.cut_seen(rows.cut_seen(v, 1), 3))
    out = weighted(q, k, v, mask, scale=scale)
    out = out.unflatten(2, (rows.tile, columns.tile)).unflatten(1, (-1, heads))
    out = out.unflatten(0, (rows.count, columns.count)).permute(2, 0, 4, 1, 5, 3, 6)
    return out.flatten(3, 4).flatten(1, 2)[:, :height, :width]


def _fold(x: Tensor) -> Tensor:
    """(B, row tiles, rows, column tiles, columns, N, D) -> (tiles, B·N, tokens, D)."""
    x = x.permute(1, 3, 0, 5, 2, 4, 6)
    return x.flatten(4, 5).flatten(2, 3).flatten(0, 1)


class _Axis:
    """How one axis is cut.

    Args:
        size: positions.
        tile: positions of a tile, at least; one of at least `size` holds the whole axis.
        kernel: positions of a window; at most twice a tile.
    """

    def __init__(self, size: int, tile: int, kernel: int) -> None:
        self.size, self.kernel = size, kernel
        # The keys of a tile reach half a window beyond it. The last window, moved inwards, lies
        # among them if the last tile holds the other half.
        self.tile = next(n for n in range(min(tile, size), size + 1) if -size % n <= n - kernel / 2)
        self.count = -(-size // self.tile)
        self.seen = size if self.count == 1 else self.tile + kernel - 1
        self.before = 0 if self.count == 1 else kernel // 2

    def mask(self, device: torch.device) -> Tensor:
        """What a position of a tile attends to, shape (count, tile, seen)."""
        place = torch.arange(self.count * self.tile, device=device).clamp(max=self.size - 1)
        start = (place - self.kernel // 2).clamp(0, self.size - self.kernel)
        first = torch.arange(self.count, device=device) * self.tile - self.before
        key = first[:, None, None] + torch.arange(self.seen, device=device)
        ahead = key - start.view(self.count, self.tile, 1)
        return (ahead >= 0) & (ahead < self.kernel)

    def cut(self, x: Tensor, axis: int) -> Tensor:
        """The axis in tiles: (count, tile) in its place."""
        return _pad(x, axis, 0, self.count * self.tile).unflatten(axis, (self.count, self.tile))

    def cut_seen(self, x: Tensor, axis: int) -> Tensor:
        """What each tile sees: (count, seen) in the axis's place.

        Whole tiles side by side, each shifted by one, are views, and so are their gradients.
        """
        if self.count == 1:
            return x.unsqueeze(axis)
        reach = -(-self.seen // self.tile)
        x = _pad(x, axis, self.before, (self.count + reach - 1) * self.tile)
        parts = []
        for i in range(reach):
            part = x.narrow(axis, i * self.tile, self.count * self.tile)
            part = part.unflatten(axis, (self.count, self.tile))
            parts.append(part.narrow(axis + 1, 0, min(self.tile, self.seen - i * self.tile)))
        return torch.cat(parts, axis + 1)


def _pad(x: Tensor, axis: int, before: int, size: int) -> Tensor:
    after = size - before - x.shape[axis]
    if not before and not after:
        return x
    return F.pad(x, (*[0, 0] * (x.ndim - 1 - axis), before, after))


# ---------------------------------------------------------------- FlexAttention and NATTEN


def flex(q: Tensor, k: Tensor, v: Tensor, kernel_size: int, scale: float) -> Tensor:
    """FlexAttention, with blocks of keys skipped that no query of a block sees.

    Fused on CUDA. On the CPU it runs as written, with one score for every pair of positions, and
    without gradients: for comparison, not for use.

    Raises:
        ValueError: a gradient is wanted on the CPU.
    """
    height, width = q.shape[1:3]
    if q.device.type == "cpu":
        if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
            raise ValueError(
                'backend = "flex" has no gradient on the CPU; give "auto" or "tiles", or call it '
                "under torch.no_grad()"
            )
        q, k, v = q.detach(), k.detach(), v.detach()  # or it asks for gradients that nobody wants
    make = _block_mask if torch.compiler.is_compiling() else _cached_block_mask
    block_mask = make(height, width, kernel_size, q.device)
    fused = q.device.type == "cuda" and not torch.compiler.is_compiling()
    function = _fused_flex() if fused else _plain_flex
    q, k, v = (x.flatten(1, 2).transpose(1, 2) for x in (q, k, v))
    out = function(q, k, v, block_mask=block_mask, scale=scale)
    return out.transpose(1, 2).unflatten(1, (height, width))


def _plain_flex(*args: Tensor, **options: Any) -> Any:
    function: Any = flex_attention  # its overloads know no *args
    if torch.compiler.is_compiling():
        return function(*args, **options)
    with warnings.catch_warnings():
        # It says that it is not fused, as the docstring of `flex` does.
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
        return function(*args, **options)


@functools.cache
def _fused_flex() -> Any:
    return torch.compile(flex_attention)


def _block_mask(height: int, width: int, kernel: int, device: torch.device) -> Any:
    """The blocks of keys that each block of queries sees, and which of a block's keys."""

    def near(place: Tensor, key: Tensor, size: int) -> Tensor:
        ahead = key - (place - kernel // 2).clamp(0, size - kernel)
        return (ahead >= 0) & (ahead < kernel)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return near(query // width, key // width, height) & near(query % width, key % width, width)

    ranges = key_blocks(height, width, kernel)
    # A block's list holds all blocks; those that it sees come first, and only they count.
    lists = [sorted(range(len(ranges)), key=lambda j: not a <= j < b) for a, b in ranges]
    return BlockMask.from_kv_blocks(
        torch.tensor([[[b - a for a, b in ranges]]], dtype=torch.int32, device=device),
        torch.tensor([[lists]], dtype=torch.int32, device=device),
        BLOCK_SIZE=BLOCK,
        mask_mod=sees,
        seq_lengths=(height * width, height * width),
    )


_cached_block_mask = functools.lru_cache(maxsize=64)(_block_mask)


def key_blocks(height: int, width: int, kernel: int) -> list[tuple[int, int]]:
    """For each block of queries, the first block of keys that it may see and the end of the last.

    From the rows alone: a block of the usual 128 tokens holds whole rows, or much of one.
    """

    def first(row: int) -> int:
        return min(max(row - kernel // 2, 0), height - kernel)

    ranges = []
    for start in range(0, height * width, BLOCK):
        stop = min(start + BLOCK, height * width)
        keys = first(start // width) * width, (first((stop - 1) // width) + kernel) * width
        ranges.append((keys[0] // BLOCK, -(-keys[1] // BLOCK)))
    return ranges


def natten(q: Tensor, k: Tensor, v: Tensor, kernel_size: int, scale: float) -> Tensor:
    """NATTEN's kernels, which share this module's layout."""
    na2d: Any = importlib.import_module("natten.functional").na2d
    return na2d(q.contiguous(), k.contiguous(), v.contiguous(), kernel_size, scale=scale)
