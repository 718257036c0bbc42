"""The established switch for gradient checkpointing: it acts, on every network, and ends again."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from k_diffusion import models
from k_diffusion.models import checkpointing, get_checkpointing


def hourglass() -> nn.Module:
    return models.Hourglass(
        in_channels=3, patch_size=2, widths=(32, 32), depths=(2, 2), head_channels=16,
        kernel_size=3, mapping_width=16, mapping_depth=1,
    )  # fmt: skip


def transformer_v1() -> nn.Module:
    return models.ImageTransformerDenoiserModelV1(2, 64, 128, 3, 3, [2, 2])


def image_v1() -> nn.Module:
    return models.ImageDenoiserModelV1(3, 16, [2, 2], [16, 32], [False, True], dropout_rate=0.1)


def unet() -> nn.Module:
    return models.UNet(
        in_channels=3, channels=16, channel_mults=(1, 2), blocks=2, attention=(False, True),
        head_channels=16, dropout=0.1,
    )  # fmt: skip


NETWORKS = [image_v1, unet, hourglass, transformer_v1]
every_network = pytest.mark.parametrize("make", NETWORKS)


def saved(call: Callable[[], Tensor]) -> tuple[int, Tensor]:
    """Bytes of the tensors that a forward pass keeps, each once, and its output."""
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = call()
    return sum(t.untyped_storage().nbytes() for t in kept.values()), output


def run(make: Callable[[], nn.Module], on: bool) -> tuple[int, list[Tensor]]:
    torch.manual_seed(0)
    network = make().train()
    for parameter in network.parameters():
        if not parameter.detach().any():
            nn.init.normal_(parameter, std=0.2)
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([0.3, 2.0])
    weights = sum(p.numel() * p.element_size() for p in network.parameters())
    torch.manual_seed(1)
    with checkpointing(on):
        size, output = saved(lambda: network(x, t))
    output.square().mean().backward()  # the switch counts where the forward pass ran
    grads = [p.grad for p in network.parameters() if p.grad is not None]
    return size - weights, grads


@every_network
def test_it_saves_memory_and_changes_no_gradient(make: Any) -> None:
    (plain, expected), (frugal, got) = run(make, False), run(make, True)
    assert frugal < 0.6 * plain, (frugal, plain)
    assert len(got) == len(expected) > 10
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def test_it_is_off_and_ends() -> None:
    assert get_checkpointing() is False
    with checkpointing():
        assert get_checkpointing() is True
        with checkpointing(False):
            assert get_checkpointing() is False
        assert get_checkpointing() is True
    with contextlib.suppress(RuntimeError), checkpointing(True):
        raise RuntimeError
    assert get_checkpointing() is False
    assert models.checkpointing is models.flags.checkpointing  # no file has its name


def test_threads_that_overlap_leave_nothing_on() -> None:
    entered, may_leave = threading.Event(), threading.Event()

    def other() -> None:
        with checkpointing():
            entered.set()
            may_leave.wait(10)

    thread = threading.Thread(target=other)
    with checkpointing():
        thread.start()
        assert entered.wait(10)
    may_leave.set()
    thread.join(10)
    assert get_checkpointing() is False


def test_a_compiled_network_sees_it() -> None:
    def asked(x: Tensor) -> Tensor:
        return x + 1 if get_checkpointing() else x - 1

    compiled = torch.compile(asked, fullgraph=True, backend="eager")
    x = torch.zeros(1)
    for _ in range(2):
        assert compiled(x).item() == -1
        with checkpointing():
            assert compiled(x).item() == 1


def test_compile_wrap_compiles_at_the_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def compiler(function: Any, **options: Any) -> Any:
        asked.append(options)
        return lambda x: function(x) + 100

    def double(x: int) -> int:
        """Twice."""
        return 2 * x

    monkeypatch.setattr(torch, "compile", compiler)
    monkeypatch.delenv("K_DIFFUSION_USE_COMPILE", raising=False)
    wrapped = models.flags.compile_wrap(double, dynamic=True)
    assert (wrapped.__name__, wrapped.__doc__, asked) == ("double", "Twice.", [])
    assert (wrapped(3), wrapped(4)) == (106, 108)
    assert asked == [{"dynamic": True}]
    monkeypatch.setenv("K_DIFFUSION_USE_COMPILE", "0")
    assert models.flags.compile_wrap(double)(3) == 6
    assert models.flags.get_use_compile() is False
    assert models.flags.get_use_flash_attention_2() is True
    monkeypatch.setenv("K_DIFFUSION_USE_FLASH_2", "0")
    assert models.flags.get_use_flash_attention_2() is False
    assert len(asked) == 1
