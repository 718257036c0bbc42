"""What an adapter tells of its library: networks of the measured size, and how to call them."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor, nn

SIZE, CHANNELS = 32, 3  # of an image
PARAMETERS = (6e6, 10e6)
FLOPS = (2e9, 4e9)  # forward, an image; a multiplication and an addition are two
"""What the networks are to have, so that they can be compared."""

Call = Callable[[nn.Module, Tensor, Tensor], Tensor]


def plainly(network: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    """How most networks are called: x (B, 3, H, W), times from 0 to 1000 (B,)."""
    answer: Tensor = network(x, t)
    return answer


@dataclass
class Network:
    """A network to measure.

    Attributes:
        name: what the table calls it; several with one name are settings of one network, of which
            the fastest counts.
        make: builds it, on the default device.
        options: what it was built with, to be shown.
        call: the network's output for x and times.
        checkpointed: builds it with every block checkpointed; None: not measured.
        size: height and width of its images.
        large: whether it is not of the size that is compared, but for a GPU alone.
    """

    name: str
    make: Callable[[], nn.Module]
    options: str
    call: Call = plainly
    checkpointed: Callable[[], nn.Module] | None = None
    size: int = SIZE
    large: bool = False


@dataclass
class Library:
    """A library under measure; `missing` has a line for each network that it ought to have."""

    name: str
    version: str
    networks: list[Network]
    missing: list[str] = field(default_factory=list)


class Stub(types.ModuleType):
    """Stands for a package that a library imports but does not need for its networks."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def stub(*names: str) -> None:
    """Put stand-ins for packages into this process, which is the library's own."""
    for name in names:
        sys.modules[name] = Stub(name)
