"""The UNet's memory: what it keeps for the backward pass, and what is computed again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from k_diffusion.models import UNet, fused, make_model, recompute


def tiny(**options: Any) -> UNet:
    """A small UNet; what starts at zero is set to random values, so that it does speak."""
    torch.manual_seed(0)
    small: dict[str, Any] = {
        "in_channels": 2,
        "channels": 16,
        "channel_mults": (1, 2),
        "blocks": 1,
        "attention": (False, True),
        "head_channels": 16,
    }
    model = UNet(**{**small, **options})
    for parameter in model.parameters():
        if not parameter.detach().any():
            nn.init.normal_(parameter, std=0.2)
    return model


def inputs() -> tuple[Tensor, Tensor]:
    x = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    return x, torch.linspace(3, 950, 3)


class Operations(TorchDispatchMode):
    """The names of all operations that run, in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.names.append(function._schema.name.removeprefix("aten::"))
        return function(*args, **(kwargs or {}))


def saved_bytes(model: UNet, x: Tensor, t: Tensor) -> int:
    """Bytes kept for the backward pass, parameters left out."""
    storages = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held = []  # or a freed one's address would be given to the next

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        held.append(model(x, t))
    return sum(storages.values())


@pytest.mark.parametrize("resampling", ["strided", "antialiased"])
def test_bytes_at_the_size_that_is_benchmarked(resampling: str) -> None:
    """Plainly 3.5 MB per GFLOP of the forward pass; and full checkpointing in 0.32 of it."""
    x, t = torch.randn(8, 3, 32, 32), torch.linspace(0, 900, 8)
    model = make_model({"type": "unet_small", "resampling": resampling})
    assert isinstance(model, UNet)
    plain = saved_bytes(model, x, t)
    model.checkpointing = recompute.Checkpointing(True)
    assert saved_bytes(model, x, t) < 0.4 * plain
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x, t)
    assert plain / counter.get_total_flops() < 3.6e6 / 1e9


@pytest.mark.parametrize("own", [False, True])
def test_what_is_computed_again_gives_the_same_gradient(
    monkeypatch: pytest.MonkeyPatch, own: bool
) -> None:
    """Bitwise by torch's operations; own: the function with its own gradient, to rounding."""
    x, t = inputs()
    if not own:
        monkeypatch.setattr(fused, "fits", lambda _: False)
    results = []
    for small in (2**60, 0):
        monkeypatch.setattr(recompute, "SMALL", small)
        model = tiny(dropout=0.0 if own else 0.3, attention=(False, False))
        torch.manual_seed(5)
        kept = saved_bytes(model, x, t)
        torch.manual_seed(5)
        model(x, t).square().mean().backward()
        results.append((kept, [p.grad for p in model.parameters()]))
    (plain, gradients), (lean, again) = results
    assert lean < (0.65 if own else 0.6) * plain
    for a, b in zip(gradients, again, strict=True):
        assert a is not None
        assert b is not None
        assert (a - b).abs().max() <= (1e-5 * max(1, a.abs().max().item()) if own else 0)


@pytest.mark.parametrize("own", [False, True])
def test_no_convolution_is_computed_again_by_default(
    monkeypatch: pytest.MonkeyPatch, own: bool
) -> None:
    """Norms are, own: by the function with its own gradient; and under checkpointing, one
    convolution of two."""
    if not own:
        monkeypatch.setattr(fused, "fits", lambda _: False)
    monkeypatch.setattr(recompute, "SMALL", 0)
    x, t = inputs()
    for policy, again in ((False, 0), (True, 6)):
        model = tiny(channel_mults=(1, 1), attention=(False, False), checkpointing=policy)
        loss = model(x, t).sum()
        with Operations() as operations:
            loss.backward()
        # Six blocks; that of the middle with attention computes both of its convolutions again.
        assert operations.names.count("convolution") == again + (again > 0)
        # Two norms a block and the one at the end, and that of the attention, which is torch's.
        made = "addcmul" if own else "native_group_norm"
        assert operations.names.count(made) >= 13
        assert operations.names.count("native_group_norm_backward") == (1 if own else 14)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch's own
def test_transforms_of_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recompute, "SMALL", 0)
    model = tiny().double()
    x, t = inputs()
    x, along = x.double(), torch.randn(3, 2, 8, 8, dtype=torch.float64)
    _, forward = torch.func.jvp(lambda x: model(x, t), (x,), (along,))  # type: ignore[misc]
    assert isinstance(forward, Tensor)
    with torch.no_grad():
        difference = (model(x + 1e-6 * along, t) - model(x - 1e-6 * along, t)) / 2e-6
    assert (forward - difference).abs().max() < 1e-6 * difference.abs().max()
    expected = torch.autograd.grad(model(x.requires_grad_(), t).sum(), x)[0]
    found = torch.func.grad(lambda x: model(x, t).sum())(x.detach())
    assert (found - expected).abs().max() < 1e-12 * expected.abs().max()


def test_checkpointing_rests_where_no_gradient_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It would read the device's random state at every block."""
    model = tiny(checkpointing=True)
    x, t = inputs()
    expected = model(x, t)
    monkeypatch.setattr(recompute, "checkpoint", None)
    with torch.no_grad():
        assert torch.equal(model(x, t), expected)
