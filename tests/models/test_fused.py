"""Norm and SiLU as one function: the same as torch's operations, where it runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from k_diffusion.models import fused, recompute
from k_diffusion.models.fused import NormSiLU, normed_convolution
from k_diffusion.models.layers import AdaptiveGroupNorm, GroupNorm, channels_last, convolution


@pytest.fixture(autouse=True)
def _at_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recompute, "SMALL", 0)


def layers(
    size: tuple[int, ...], dtype: torch.dtype, adaptive: bool = False, mean: float = 1.0
) -> tuple[Any, Any, list[Tensor]]:
    """A norm, a convolution, and x and embedding; 24 channels in 6 groups, 10 out."""
    torch.manual_seed(0)
    norm = AdaptiveGroupNorm(24, 5) if adaptive else GroupNorm(24)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    x = channels_last(2 * torch.randn(3, 24, *size, dtype=dtype) + mean)
    given = [x, torch.randn(3, 5, dtype=dtype)] if adaptive else [x]
    return norm.to(dtype), convolution(len(size), 24, 10).to(dtype), given


def plainly(norm: Any, convolve: Any, x: Tensor, *embedding: Tensor) -> Tensor:
    return convolve(F.silu(norm(x, *embedding)))


def both(function: Any, norm: Any, convolve: Any, given: list[Tensor]) -> list[Tensor]:
    """The output, and the gradients of everything that it depends on."""
    given = [tensor.detach().clone().requires_grad_() for tensor in given]
    y = function(norm, convolve, *given)
    wanted = [*given, *norm.parameters(), *convolve.parameters()]
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [y, *torch.autograd.grad(y, wanted, weights.to(y.dtype))]


def is_own(y: Tensor) -> bool:
    """Whether the convolution's input came from the function with its own gradient."""
    assert y.grad_fn is not None
    return any(type(node).__name__ == "NormSiLUBackward" for node, _ in y.grad_fn.next_functions)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("size", [(7, 5), (1, 1), (8, 16), (3, 4, 5)])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_output_and_gradients_are_those_of_torch(
    size: tuple[int, ...], adaptive: bool, dtype: torch.dtype, error: float
) -> None:
    norm, convolve, given = layers(size, dtype, adaptive)
    found = both(normed_convolution, norm, convolve, given)
    assert is_own(found[0])
    for a, b in zip(found, both(plainly, norm, convolve, given), strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() < error * max(1, b.abs().max().item())


@pytest.mark.parametrize("adaptive", [False, True])
def test_a_large_mean_costs_no_more_than_its_rounding(adaptive: bool) -> None:
    """Of 1000 deviations: squares that are not centred would be wrong by a tenth and more."""
    norm, convolve, given = layers((16, 16), torch.float32, adaptive, mean=2000.0)
    found = both(normed_convolution, norm, convolve, given)
    exact = both(plainly, norm.double(), convolve.double(), [tensor.double() for tensor in given])
    for a, b in zip(found, exact, strict=True):
        assert (a - b).abs().max() < 1e-3 * b.abs().max()


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch's own
@pytest.mark.parametrize("dims", [2, 3])
def test_first_and_second_derivatives(dims: int) -> None:
    torch.manual_seed(0)
    x = channels_last(torch.randn(2, 8, *[2] * dims, dtype=torch.float64))
    given = [x, *torch.randn(2, 2, 8, dtype=torch.float64)]
    given = [tensor.requires_grad_() for tensor in given]

    def function(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return NormSiLU.apply(x, scale, shift, 2, 1e-5)

    assert torch.autograd.gradcheck(function, given)
    assert torch.autograd.gradgradcheck(function, given)


@pytest.mark.parametrize("frozen", ["norm", "convolution", "data"])
def test_only_what_is_asked_for(frozen: str) -> None:
    norm, convolve, (x,) = layers((4, 4), torch.float64)
    x.requires_grad_(frozen != "data")
    norm.requires_grad_(frozen not in ("norm", "data"))
    convolve.requires_grad_(frozen != "convolution")
    every = [x, *norm.parameters(), *convolve.parameters()]
    wanted = [tensor for tensor in every if tensor.requires_grad]
    results = []
    for function in (normed_convolution, plainly):
        y = function(norm, convolve, x)
        # Where nothing before it has a gradient, it leaves no trace.
        assert is_own(y) == (function is normed_convolution and frozen != "data")
        results.append(torch.autograd.grad(y.square().sum(), wanted))
    for a, b in zip(*results, strict=True):
        assert (a - b).abs().max() < 1e-12 * max(1, b.abs().max().item())


def test_what_is_kept() -> None:
    """x, the convolution's input, and of each of 3 samples 24 scales and shifts, 6 m and r."""
    norm, convolve, (x,) = layers((16, 16), torch.float32, adaptive=False)
    x.requires_grad_()
    own = {p.data_ptr() for p in (*norm.parameters(), *convolve.parameters())}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own:
            kept[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        normed_convolution(norm, convolve, x)
    assert x.data_ptr() in kept
    numbers = sum(tensor.numel() for tensor in kept.values())
    assert numbers <= 2 * x.numel() + 2 * 3 * 24 + 2 * 3 * 6


def test_where_torch_is_left_to_it() -> None:
    norm, convolve, (x,) = layers((4, 4), torch.float32)
    assert is_own(normed_convolution(norm, convolve, x))

    def runs(x: Tensor = x, dropout: float = 0.0) -> bool:
        y = normed_convolution(norm, convolve, x, dropout=nn.Dropout(dropout))
        return y.grad_fn is not None and is_own(y)

    assert runs()
    assert not runs(x.contiguous())
    assert not runs(dropout=0.5)
    with torch.no_grad():
        assert not runs()
        assert not fused.fits(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert not runs()
    norm.bfloat16()
    convolve.bfloat16()
    assert not runs(x.bfloat16())


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch's own
def test_under_transforms_and_forward_derivatives() -> None:
    norm, convolve, (x,) = layers((4, 4), torch.float64)
    along = torch.randn_like(x)

    def function(x: Tensor) -> Tensor:
        return normed_convolution(norm, convolve, x)

    with torch.no_grad():
        expected = (function(x + 1e-6 * along) - function(x - 1e-6 * along)) / 2e-6
    _, found = torch.func.jvp(function, (x,), (along,))  # type: ignore[misc]
    assert (found - expected).abs().max() < 1e-7
    with torch.autograd.forward_ad.dual_level():
        assert not fused.fits(x)
