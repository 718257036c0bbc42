"""What a guided denoiser tells of the one inside, and what is done to it as to a module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from k_diffusion.denoiser import EDMDenoiser, FunctionDenoiser
from k_diffusion.guidance import (
    Cached,
    Clamp,
    Composed,
    Guided,
    OnPath,
    Part,
    SwitchAt,
    autoguidance,
    cfg,
)
from k_diffusion.utils.levels import FLOW, VE


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(2, 2)

    def forward(self, x: Any, time: Any) -> Any:
        return self.line(x)


def make() -> EDMDenoiser:
    torch.manual_seed(0)
    return EDMDenoiser(Line(), 0.7)


KINDS: dict[str, Callable[[Any], Any]] = {
    "cfg": lambda d: cfg(d, 2.0),
    "of two": lambda d: Clamp(cfg(d, 2.0)),
    "composed": lambda d: Composed(d, [Part({})]),
    "gradient": lambda d: Guided(d, lambda x0, sigma: -x0.square().sum(1)),
    "cached": Cached,
    "other coordinates": lambda d: OnPath(d, FLOW),
}


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_set_as_a_module_is_and_stays_guided(kind: str) -> None:
    denoiser = make()
    guided = KINDS[kind](denoiser)
    weight = denoiser.network.line.weight
    assert guided.eval() is guided
    assert not denoiser.training
    assert guided.train() is guided
    assert denoiser.training
    assert guided.train(False) is guided
    assert not denoiser.training
    assert guided.requires_grad_(False) is guided
    assert not weight.requires_grad
    for name, dtype in (("half", torch.float16), ("float", torch.float32)):
        assert getattr(guided, name)() is guided
        assert weight.dtype is dtype
    assert guided.to("cpu", dtype=torch.bfloat16).eval() is guided
    assert weight.dtype is torch.bfloat16
    assert guided.to("meta") is guided
    assert denoiser.network.line.weight.device.type == "meta"


def test_all_models_inside_are_set() -> None:
    one, two, three = make(), make(), make()
    guided = SwitchAt(autoguidance(one, two, 2.0), OnPath(three, VE), 1.0)
    assert guided.eval().double() is guided
    for denoiser in (one, two, three):
        assert not denoiser.training
        assert denoiser.network.line.weight.dtype is torch.float64


def test_a_network_that_is_a_function_is_set_too() -> None:
    network = Line()
    guided = cfg(FunctionDenoiser(network), 2.0)
    assert guided.eval() is guided
    assert not network.training
    with pytest.raises(AttributeError, match="FunctionDenoiser has no 'eval': do that to the"):
        cfg(lambda x, sigma: x, 2.0).eval()


def test_what_is_told_of_the_denoiser_inside() -> None:
    denoiser = make()
    guided = Clamp(cfg(denoiser, 2.0))
    assert guided.sigma_data == 0.7
    assert guided.prediction == "edm"
    assert guided.process is denoiser.process
    assert guided.network is denoiser.network
    assert guided.training is True
    assert all(p is q for p, q in zip(guided.parameters(), denoiser.parameters(), strict=True))


@pytest.mark.parametrize("name", ["forward", "with_variance", "estimate", "state_dict", "nothing"])
def test_nothing_else_is_handed_out_unguided(name: str) -> None:
    with pytest.raises(AttributeError, match=rf"Contrast has no '{name}'; the denoiser inside"):
        getattr(cfg(make(), 2.0), name)
    assert not hasattr(cfg(make(), 2.0), "__len__")
