"""What a guidance holds on the host goes to the device once, not at each call of a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from k_diffusion.guidance import (
    Composed,
    Guided,
    Part,
    apg,
    autoguidance,
    cfg,
    cfg_zero_star,
    posterior_sampling,
    pseudo_inverse,
)
from k_diffusion.guidance.held import placed
from k_diffusion.sampling import KSampler, Run

SHAPE = (4, 3, 8, 8)


def other(condition: Any) -> dict[str, Tensor]:
    return {"class_label": 1 - condition["class_label"]}


def each() -> Tensor:
    return torch.tensor([1.0, 2.0, 3.0, 4.0])


def masks() -> Tensor:
    return torch.ones(4, 1, 8, 8)


def measured() -> Tensor:
    return torch.zeros(SHAPE)


def model(x: Tensor, sigma: Tensor, class_label: Tensor | None = None) -> Tensor:
    return x * 0.5


def score(x0: Tensor, sigma: Tensor) -> Tensor:
    return -x0.flatten(1).square().sum(1)


def itself(x0: Tensor) -> Tensor:
    return x0


KINDS: dict[str, Callable[[], Any]] = {
    "cfg, one scale": lambda: cfg(model, torch.tensor(2.0)),
    "cfg": lambda: cfg(model, each().double()),
    "cfg by name": lambda: cfg(model, "strength"),
    "apg": lambda: apg(model, each()),
    "cfg zero star": lambda: cfg_zero_star(model, each()),
    "autoguidance": lambda: autoguidance(model, model, each()),
    "cfg of cfg": lambda: cfg(cfg(model, each()), each(), null=other),
    "composed": lambda: Composed(model, [Part({}, 1.0, torch.ones(8, 8))]),
    "composed of each": lambda: Composed(model, [Part({}, each(), masks())]),
    "cfg of composed": lambda: cfg(Composed(model, [Part({}, each(), masks())]), 2.0, null=other),
    "gradient": lambda: Guided(model, score, each()),
    "posterior sampling": lambda: posterior_sampling(model, itself, measured()),
    "pseudo-inverse": lambda: pseudo_inverse(model, itself, measured().double()),
    "cfg of pseudo-inverse": lambda: cfg(
        pseudo_inverse(model, itself, measured()), 2.0, null=other
    ),
    "pseudo-inverse by name": lambda: pseudo_inverse(model, itself, "target"),
}


NAMED: dict[str, dict[str, Callable[[], Tensor]]] = {
    "cfg by name": {"strength": each},
    "pseudo-inverse by name": {"target": measured},
}


class Copies(TorchDispatchMode):
    """Counts the tensors that are copied from the host to a device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.device.type == "meta" and func._schema.name in (
            "aten::_to_copy", "aten::copy_", "aten::lift_fresh_copy", "aten::cat", "aten::index",
        ):  # fmt: skip
            self.count += any(t.device.type == "cpu" for t in _tensors(args))
        return out


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for item in value for t in _tensors(item)] if isinstance(value, (list, tuple)) else []


@pytest.mark.parametrize("kind", KINDS)
def test_calls_after_the_first_copy_nothing_to_the_device(kind: str) -> None:
    """On a device without data, which every machine has."""
    guided = KINDS[kind]()
    condition = {name: make() for name, make in NAMED.get(kind, {}).items()}
    condition["class_label"] = torch.zeros(4, dtype=torch.int64, device="meta")
    run = Run(KSampler(guided, "karras", "euler").plan(3), torch.empty(SHAPE, device="meta"))
    counts = []
    while not run.done:
        with Copies() as copies:
            estimate = guided(run.x, run.sigma, **condition)
        counts.append(copies.count)
        run.advance(estimate)
    assert counts[0] > 0
    assert counts[1:] == [0, 0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_calls_after_the_first_do_not_wait_for_a_gpu(kind: str) -> None:
    """Under the debug mode that raises at any wait."""
    guided = KINDS[kind]()
    condition = {name: make() for name, make in NAMED.get(kind, {}).items()}
    condition["class_label"] = torch.zeros(4, dtype=torch.int64, device="cuda")
    run = Run(KSampler(guided, "karras", "euler").plan(3), torch.randn(SHAPE, device="cuda"))
    try:
        while not run.done:
            run.advance(guided(run.x, run.sigma, **condition))
            torch.cuda.set_sync_debug_mode("error")
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_what_is_written_into_is_placed_anew() -> None:
    value = torch.ones(3)
    there = torch.device("meta")
    first = placed(value, there)
    assert first.device == there
    assert placed(value, there) is first
    assert placed(value, torch.device("cpu")) is value
    assert placed(value, there, torch.float64) is not first
    wide = placed(value, torch.device("cpu"), torch.float64)
    value[0] = 5
    assert placed(value, there) is not first
    assert float(placed(value, torch.device("cpu"), torch.float64)[0]) == 5
    assert float(wide[0]) == 1


def test_a_scale_with_a_gradient_keeps_it() -> None:
    scale = torch.tensor(2.0, requires_grad=True)
    guided = cfg(lambda x, sigma, shift=0.0: 0 * x + shift, scale)
    for _ in range(2):
        result = guided(torch.zeros(1, 2).double(), torch.ones(1).double(), shift=3.0)
        (gradient,) = torch.autograd.grad(result.sum(), scale)
        assert float(gradient) == 6.0
