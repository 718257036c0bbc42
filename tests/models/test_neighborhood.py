"""Neighbourhood attention against its definition, whichever way it is computed."""

from __future__ import annotations

import math
import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor

from k_diffusion.models import neighborhood
from k_diffusion.models.neighborhood import key_blocks, neighborhood_attention


def defined(q: Tensor, k: Tensor, v: Tensor, kernel_size: int, scale: float) -> Tensor:
    """The definition, one position at a time."""
    height, width = q.shape[1:3]
    out = torch.empty_like(v)
    for i in range(height):
        for j in range(width):
            top = min(max(i - kernel_size // 2, 0), height - kernel_size)
            left = min(max(j - kernel_size // 2, 0), width - kernel_size)
            window = (slice(None), slice(top, top + kernel_size), slice(left, left + kernel_size))
            near_k, near_v = k[window].flatten(1, 2), v[window].flatten(1, 2)
            weights = (scale * torch.einsum("bnd,blnd->bnl", q[:, i, j], near_k)).softmax(-1)
            out[:, i, j] = torch.einsum("bnl,blnd->bnd", weights, near_v)
    return out


def heads(height: int, width: int, batch: int = 2, dtype: Any = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (batch, height, width, 2, 8)
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for _ in range(3)]


@pytest.fixture
def natten(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A module with NATTEN's interface that computes the definition; what it was called with."""
    calls: list[dict[str, Any]] = []

    def na2d(query: Tensor, key: Tensor, value: Tensor, kernel_size: Any, **options: Any) -> Tensor:
        calls.append({"kernel_size": kernel_size, **options})
        assert query.is_contiguous()
        assert key.is_contiguous()
        assert value.is_contiguous()
        return defined(query, key, value, kernel_size, options["scale"])

    package, functional = types.ModuleType("natten"), types.ModuleType("natten.functional")
    functional.na2d = na2d  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "natten", package)
    monkeypatch.setitem(sys.modules, "natten.functional", functional)
    monkeypatch.setattr(neighborhood, "has_natten", lambda: True)
    return calls


SIZES = [
    # kernel, height, width
    (3, 3, 3),  # the image is the neighbourhood
    (5, 7, 12),  # one tile
    (7, 33, 20),  # several tiles, the last ones not whole
    (3, 24, 32),  # whole tiles only
    (3, 5, 70),  # tiles along one axis
    (17, 36, 36),  # a window that the usual tile is too small for, and still several tiles
    (1, 30, 9),  # nothing but itself
]


def gradients_here(backend: str) -> bool:
    """FlexAttention has none on the CPU."""
    return backend != "flex"


CASES = [
    (backend, *size)
    for size in SIZES
    for backend in ("tiles", "flex", "natten", "auto")
    if backend != "natten" or size[1] * size[2] < 1000  # it has no tiles: small ones tell the same
]


@pytest.mark.parametrize(("backend", "kernel", "height", "width"), CASES)
def test_every_backend_is_the_definition(
    backend: str, kernel: int, height: int, width: int, natten: list[dict[str, Any]]
) -> None:
    q, k, v = heads(height, width)
    wanted = defined(q, k, v, kernel, 0.7)
    with torch.set_grad_enabled(gradients_here(backend)):
        got = neighborhood_attention(q, k, v, kernel, scale=0.7, backend=backend)
    assert got.shape == v.shape
    assert (got - wanted).abs().max() < 1e-5
    assert natten == ([{"kernel_size": kernel, "scale": 0.7}] if backend == "natten" else [])
    if not gradients_here(backend):
        return
    weight = torch.randn(v.shape, generator=torch.Generator().manual_seed(1))
    for mine, true in zip(
        torch.autograd.grad((got * weight).sum(), (q, k, v)),
        torch.autograd.grad((wanted * weight).sum(), (q, k, v)),
        strict=True,
    ):
        assert (mine - true).abs().max() < 1e-4


@pytest.mark.parametrize("height", range(8, 43, 3))
def test_every_cut_of_an_axis(height: int) -> None:
    """Borders, and the last tile's, at every size that tiles can leave."""
    for kernel in (7, 17):
        q, k, v = (x.detach()[:, :, :, :1] for x in heads(height, 40, batch=1))
        if height < kernel:
            continue
        got = neighborhood_attention(q, k, v, kernel, scale=0.7, backend="tiles")
        with torch.no_grad():
            wanted = neighborhood_attention(q, k, v, kernel, scale=0.7, backend="flex")
        assert (got - wanted).abs().max() < 1e-5


@pytest.mark.parametrize("backend", ["tiles", "flex"])
def test_the_usual_scale(backend: str) -> None:
    q, k, v = (x.detach() for x in heads(6, 9))
    got = neighborhood_attention(q, k, v, 3, backend=backend)
    assert (got - defined(q, k, v, 3, 1 / math.sqrt(8))).abs().max() < 1e-5


@pytest.mark.parametrize(("height", "width"), [(4, 5), (4, 60)])
def test_gradcheck(height: int, width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (1, height, width, 1, 2)
    values = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3)]
    assert torch.autograd.gradcheck(
        lambda q, k, v: neighborhood_attention(q, k, v, 3, backend="tiles"),
        [value.requires_grad_() for value in values],
        fast_mode=True,
    )


def test_away_from_the_borders_it_moves_with_the_image() -> None:
    q, k, v = (x.detach() for x in heads(20, 40, dtype=torch.float64))
    whole = neighborhood_attention(q, k, v, 7)
    part = neighborhood_attention(*(x[:, :, 5:] for x in (q, k, v)), 7)
    assert (part[:, :, 3:] - whole[:, :, 8:]).abs().max() < 1e-12
    assert (part[:, :, :3] - whole[:, :, 5:8]).abs().max() > 1e-3  # there the windows differ


def test_flipped_and_turned_with_the_image() -> None:
    q, k, v = (x.detach() for x in heads(12, 23, dtype=torch.float64))
    whole = neighborhood_attention(q, k, v, 5)
    flipped = neighborhood_attention(*(x.flip(2) for x in (q, k, v)), 5)
    assert (flipped.flip(2) - whole).abs().max() < 1e-12
    turned = neighborhood_attention(*(x.transpose(1, 2) for x in (q, k, v)), 5)
    assert (turned.transpose(1, 2) - whole).abs().max() < 1e-12


@pytest.mark.parametrize(("kernel", "height", "width"), [*SIZES, (7, 64, 64), (9, 30, 300)])
def test_the_blocks_that_are_left_out_hold_nothing_seen(
    kernel: int, height: int, width: int
) -> None:
    ranges = key_blocks(height, width, kernel)
    block = neighborhood.BLOCK

    def near(n: int) -> Tensor:
        start = (torch.arange(n) - kernel // 2).clamp(0, n - kernel)[:, None]
        return (torch.arange(n) >= start) & (torch.arange(n) < start + kernel)

    seen = torch.kron(near(height).int(), near(width).int()).bool()
    assert len(ranges) == -(-height * width // block)
    for i, (first, stop) in enumerate(ranges):
        needed = seen[i * block : (i + 1) * block].any(0).nonzero()
        assert first * block <= needed.min()
        assert needed.max() < stop * block
        assert stop <= len(ranges)
    if (height, width) == (64, 64):
        assert sum(stop - first for first, stop in ranges) < 0.16 * len(ranges) ** 2


def test_tiles_keep_memory_in_proportion_to_the_image() -> None:
    def kept(side: int) -> int:
        q, k, v = heads(side, side, batch=1)
        sizes = {}

        def pack(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            neighborhood_attention(q, k, v, 7, backend="tiles")
        return sum(sizes.values())

    small, large = kept(32), kept(64)
    assert large <= 4.1 * small
    # The scores of all pairs would be that much alone.
    assert large < 64**4 * 4 / 4


def test_in_bf16() -> None:
    q, k, v = heads(20, 30)
    low = [x.detach().bfloat16() for x in (q, k, v)]
    plain = defined(q, k, v, 5, 0.3)
    for backend in ("tiles", "flex"):
        got = neighborhood_attention(*low, 5, scale=0.3, backend=backend)
        assert got.dtype == torch.bfloat16
        assert (got - plain).abs().max() < 0.05
        # As autocast leaves them: q and k after a norm, v after a matrix product.
        assert torch.equal(
            neighborhood_attention(
                low[0].float(), low[1].float(), low[2], 5, scale=0.3, backend=backend
            ),
            got,
        )


def test_which_backend_is_best(monkeypatch: pytest.MonkeyPatch) -> None:
    class Where:
        """As much of a tensor as the choice reads."""

        def __init__(self, device: str, dtype: torch.dtype = torch.float32, d: int = 64) -> None:
            self.device, self.dtype, self.shape = torch.device(device), dtype, (1, 9, 9, 2, d)

    def best(*args: Any) -> str:
        return neighborhood._best(Where(*args))  # type: ignore[arg-type]

    assert best("cpu") == "tiles"
    assert best("cuda") == "flex"
    assert best("cuda", torch.float64) == "tiles"
    assert best("cuda", torch.float32, 8) == "tiles"
    monkeypatch.setattr(neighborhood, "_NATTEN", True)
    assert best("cuda") == "natten"
    assert best("cpu") == "tiles"


@pytest.mark.parametrize(
    ("kernel", "options", "text"),
    [
        (4, {}, "kernel_size = 4 has no centre; give an odd number, such as 3 or 5"),
        (0, {}, "kernel_size = 0 has no centre; give an odd number, such as 1 or 3"),
        (-3, {}, "kernel_size = -3 has no centre; give an odd number, such as 1 or 3"),
        (9, {}, r"kernel_size = 9 is more than the height, 6 tokens: give at most 5"),
        (
            3,
            {"backend": "tile"},
            "unknown backend 'tile'; did you mean 'tiles'?",
        ),
        (3, {"backend": "flex"}, 'backend = "flex" has no gradient on the CPU; give "auto" or'),
        (
            3,
            {"backend": "natten"},
            'backend = "natten" asks for NATTEN, which is not installed; install natten, or give',
        ),
    ],
)
def test_refusals(kernel: int, options: dict[str, Any], text: str) -> None:
    if options.get("backend") == "natten" and neighborhood.has_natten():
        pytest.skip("NATTEN is here")
    q, k, v = heads(6, 9)
    with pytest.raises(ValueError, match=text):
        neighborhood_attention(q, k, v, kernel, **options)


def test_refused_where_it_is_wider_than_the_width() -> None:
    q, k, v = heads(9, 6)
    with pytest.raises(ValueError, match="more than the width, 6 tokens: give at most 5"):
        neighborhood_attention(q, k, v, 7)
