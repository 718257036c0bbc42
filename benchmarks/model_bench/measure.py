"""Floating-point operations, bytes kept for the backward pass, seconds, and what the core can do.

All are of one call of a network for a batch: "forward" without gradients, or "both": forward, and
backward from a given gradient of the output.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from k_diffusion.models.flops import FlopCounter
from model_bench.library import CHANNELS, SIZE, Call

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
KINDS = ("forward", "both")


@dataclass(frozen=True)
class Setting:
    """How a network is run.

    Args:
        batch: images of a call.
        layout: the memory format of weights and images, one of LAYOUTS.
        device: where.
        dtype: of the network's inside, by autocast; "float32": no autocast.
        backend: what compiles it; None: nothing does.
    """

    batch: int
    layout: str
    device: str = "cpu"
    dtype: str = "float32"
    backend: str | None = None


class Case:
    """A network ready to be measured.

    Args:
        make: builds it.
        call: its output for x and times.
        setting: how it is run.
        size: height and width of the images.
    """

    def __init__(
        self, make: Callable[[], nn.Module], call: Call, setting: Setting, size: int = SIZE
    ) -> None:
        torch.manual_seed(0)
        layout = LAYOUTS[setting.layout]
        self.setting = setting
        self.network = make().to(setting.device)
        fill_zeros(self.network)
        self.network.to(memory_format=layout)
        self.parameters = sum(p.numel() for p in self.network.parameters())
        self._called: Any = self.network
        if setting.backend is not None:
            self._called = torch.compile(self.network, backend=setting.backend)
        self._call = call
        self._dtype = getattr(torch, setting.dtype)
        x = torch.randn(setting.batch, CHANNELS, size, size, device=setting.device)
        self.x = x.to(memory_format=layout)
        self.t = torch.linspace(1, 999, setting.batch, device=setting.device)
        self._gradient: Tensor | None = None

    def output(self) -> Tensor:
        """The network's answer."""
        if self._dtype == torch.float32:
            return self._call(self._called, self.x, self.t)
        with torch.autocast(self.x.device.type, self._dtype):
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
        """Of one call, see `took`."""
        return took(lambda: self.run(kind), self.x.device)

    def peak_bytes(self) -> int:
        """The most that forward and backward take of the device beyond what was there before."""
        self.network.zero_grad()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        self.run("both")
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def flops(self, kind: str) -> int:
        """Floating-point operations in matrix products, convolutions and attention of one call.

        Only on the CPU, in the network as it is written: not compiled, nothing checkpointed.
        """
        counter = FlopCounter()
        with counter:
            self.run(kind)
        return counter.flops

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
PRODUCTS = (512, 1024)
"""Rows and columns of the plain matrix products."""


def took(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds of work: the core's own, without what others do on it in between; on a GPU, of the
    clock, until the device is done."""
    if device.type != "cuda":
        start = time.process_time()
        work()
        return time.process_time() - start
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    torch.cuda.synchronize(device)
    return time.perf_counter() - start


class Limit:
    """What the device can do: plain convolutions and matrix products, of which the best counts.

    Args:
        batch: images of a convolution.
        device, dtype: where and in what.
        products: rows and columns of the matrix products.
    """

    def __init__(
        self,
        batch: int,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        products: Sequence[int] = PRODUCTS,
    ) -> None:
        self.cases: dict[str, tuple[Callable[[], Any], int]] = {}
        self._device = torch.device(device)
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

    def rates(self, repeats: int = 3) -> dict[str, float]:
        """FLOP a second of each, the fastest time of several."""
        with torch.no_grad():
            return {
                name: flops / min(took(work, self._device) for _ in range(repeats))
                for name, (work, flops) in self.cases.items()
            }
