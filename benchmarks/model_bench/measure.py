"""Floating-point operations, bytes kept for the backward pass, seconds, and what the core can do.

All are of one call of a network for a batch: "forward" without gradients, or "both": forward, and
backward from a given gradient of the output.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from model_bench.library import CHANNELS, SIZE, Call

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
KINDS = ("forward", "both")


def attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Of `scaled_dot_product_attention` for these shapes."""
    return int(sdpa_flop_count(query, key, value))


def attention_backward_flops(
    grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any
) -> int:
    """Of its backward pass: the four matrix products that the gradients ask for.

    The kernel makes a fifth, to have the scores again that it did not keep. That is the price of
    its memory, as with checkpointing, and a network that keeps its scores would seem to do less.
    """
    return 2 * attention_flops(query, key, value)


# The CPU's kernel, which torch's counter does not know and would count as nothing.
CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
}


class Case:
    """A network ready to be measured.

    Args:
        make: builds it.
        call: its output for x and times.
        layout: the memory format of weights and images, one of LAYOUTS.
        batch: images of a call.
        device: where to.
        prepare: what is done to the network last, such as to compile it.
        autocast: the dtype of the network's inside; None: float32.
    """

    def __init__(
        self,
        make: Callable[[], nn.Module],
        call: Call,
        layout: str,
        batch: int,
        device: torch.device | str = "cpu",
        prepare: Callable[[nn.Module], Any] | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        torch.manual_seed(0)
        self.network = make().to(device)
        fill_zeros(self.network)
        self.network.to(memory_format=LAYOUTS[layout])
        self.parameters = sum(p.numel() for p in self.network.parameters())
        self._called = self.network if prepare is None else prepare(self.network)
        self._call = call
        self._autocast = autocast
        x = torch.randn(batch, CHANNELS, SIZE, SIZE, device=device)
        self.x = x.to(memory_format=LAYOUTS[layout])
        self.t = torch.linspace(1, 999, batch, device=device)
        self._gradient: Tensor | None = None

    def output(self) -> Tensor:
        """The network's answer."""
        with torch.autocast(
            self.x.device.type, self._autocast, enabled=self._autocast is not None
        ):
            return self._call(self._called, self.x, self.t)

    def run(self, kind: str) -> None:
        """One call, "forward" or "both"."""
        if kind == "forward":
            self.network.eval()
            with torch.no_grad():
                self.output()
            return
        self.network.train()
        self.network.zero_grad()
        out = self.output()
        if self._gradient is None:
            self._gradient = torch.randn_like(out)
        out.backward(self._gradient)

    def seconds(self, kind: str) -> float:
        """Of one call on the host."""
        start = time.perf_counter()
        self.run(kind)
        return time.perf_counter() - start

    def flops(self, kind: str) -> int:
        """Floating-point operations in matrix products, convolutions and attention of one call.

        Only on the CPU, in the network as it is written: not compiled, nothing checkpointed.
        """
        counter = FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)
        with counter:
            self.run(kind)
        return int(counter.get_total_flops())

    def saved_bytes(self) -> int:
        """Bytes of what one forward pass keeps for the backward pass, parameters left out.

        Each storage counts once and whole, however many tensors look at it.
        """
        own = {p.untyped_storage()._cdata for p in self.network.parameters()}
        kept: dict[int, Tensor] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = tensor.detach()  # alive, so that no other takes its place
            return tensor

        self.network.train()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            self.output()
        return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def fill_zeros(network: nn.Module) -> None:
    """Small numbers in place of all parameters that begin as zero, as in a network in training.

    Products with exact zeros may be cheaper or, where they underflow, dearer than others.
    """
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)


CONVOLUTIONS = ((64, 32), (128, 32), (128, 16), (256, 16), (256, 8))
"""Channels, height and width of the plain convolutions of 3 x 3."""
PRODUCTS = (512, 1024, 2048)
"""Rows and columns of the plain matrix products."""


class Limit:
    """What the core can do: plain convolutions and matrix products, of which the best counts.

    Args:
        batch: images of a convolution.
        device, dtype: where and in what.
        products: rows and columns of the matrix products.
    """

    def __init__(
        self,
        batch: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        products: tuple[int, ...] = PRODUCTS,
    ) -> None:
        self.cases: dict[str, tuple[Callable[[], Any], int]] = {}
        for (channels, size), layout in itertools.product(CONVOLUTIONS, LAYOUTS):
            shape = (batch, channels, size, size)
            like = {"device": device, "dtype": dtype}
            x = torch.randn(shape, **like).to(memory_format=LAYOUTS[layout])  # type: ignore[call-overload]
            w = torch.randn(channels, channels, 3, 3, **like).to(memory_format=LAYOUTS[layout])  # type: ignore[call-overload]
            work = 2 * 9 * channels * channels * batch * size * size
            name = f"convolution, {channels} channels, {size}x{size}, {layout}"
            self.cases[name] = (lambda x=x, w=w: F.conv2d(x, w, padding=1)), work
        for n in products:
            a, b = torch.randn(2, n, n, device=device, dtype=dtype)
            self.cases[f"matrix product, {n}"] = (lambda a=a, b=b: a @ b), 2 * n**3

    def seconds(self, repeats: int = 3) -> dict[str, float]:
        """The least seconds of each, on the host."""
        found = {}
        with torch.no_grad():
            for name, (work, _) in self.cases.items():
                times = []
                for _ in range(repeats):
                    start = time.perf_counter()
                    work()
                    times.append(time.perf_counter() - start)
                found[name] = min(times)
        return found

    def rates(self, seconds: dict[str, float]) -> dict[str, float]:
        """FLOP a second of each."""
        return {name: self.cases[name][1] / took for name, took in seconds.items()}
