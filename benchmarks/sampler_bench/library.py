"""What an adapter tells of its library: methods that run on given levels, and its own schedules."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


class Model:
    """A denoiser that counts its calls: `model(x, alpha, sigma)` gives the estimate of x0.

    `at_call` is called before each answer, for measures that need to know where the loop stands.
    """

    def __init__(
        self,
        denoise: Callable[[Tensor, float, float], Tensor],
        at_call: Callable[[], None] | None = None,
    ) -> None:
        self.calls = 0
        self._denoise = denoise
        self._at_call = at_call

    def __call__(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        self.calls += 1
        if self._at_call is not None:
            self._at_call()
        return self._denoise(x, alpha, sigma)


Exact = Callable[[Model, Tensor, Sequence[float]], Tensor]
"""`(model, z, ratios) -> y`: from unit-variance coordinates at the first ratio to x / alpha at the
last, in float64. The last ratio may be 0."""
Quick = Callable[[Tensor, Any, int], Callable[[], Any]]
"""`(x, model, steps) -> call`: what a user would write, ready to be called again and again. The
model is called as the library likes, and has its answer ready."""


@dataclass
class Method:
    """One sampling method of a library.

    Attributes:
        name: what its library calls it, with its options.
        like: name of the method of ours that has the same formula; "" if none is known.
        exact: runs it on a problem; None for methods that draw noise.
        quick: prepares a run as users have it, for the measures of cost; None: cost not measured.
        endings: which ends it can go to: "clean" (the last level is 0), "open" (it is above 0).
        stochastic: whether `quick` draws noise.
    """

    name: str
    like: str = ""
    exact: Exact | None = None
    quick: Quick | None = None
    endings: Sequence[str] = ("clean", "open")
    stochastic: bool = False


def hold(model: Any, *tensors: Tensor) -> None:
    """Says which tensors beside x would lie on the device, to whoever counts waits for it."""
    getattr(model, "hold", lambda *_: None)(*tensors)


@dataclass
class Library:
    """A library under measure; a schedule gives the n noisy levels (sigma / alpha) of n steps."""

    name: str
    version: str
    methods: list[Method]
    schedules: dict[str, Callable[[int], Sequence[float]]] = field(default_factory=dict)


def exploding(z: Tensor, ratio: float) -> Tensor:
    """From unit-variance to variance-exploding coordinates."""
    return z * math.sqrt(1 + ratio * ratio)


def tensor(values: Sequence[float]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.float64)


def unit(ratio: float) -> float:
    """Signal scale of unit-variance coordinates."""
    return 0.0 if math.isinf(ratio) else 1 / math.sqrt(1 + ratio * ratio)
