"""How each backbone is made small, and what it is called with: for the tests of all of them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from k_diffusion.models import MODELS, make_model
from k_diffusion.models.conditions import ClassLabel, Image, Tokens, Vector
from k_diffusion.models.network import Network


@dataclass(frozen=True)
class Learning:
    """With what it learns 16 images.

    Args:
        rate: of Adam.
        steps: how many.
        options: of the model, beside those with which it is small.
    """

    rate: float = 3e-3
    steps: int = 250
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Backbone:
    """How a backbone is made small.

    Args:
        config: a tiny one.
        gradcheck: what makes it tinier still.
        compiled: what makes it as few kernels as hold every kind of layer; each is built by a C++
            compiler.
        deep: what gives it as many blocks as it takes to see them computed twice.
        size, small: of images that it takes; and of the few values of gradcheck.
        dropping: the options with which it drops activations in training.
        outputs: channels that it can put out for two of x.
        adding: the options that leave an untold network as it is: it then is the one without them.
        learning: with what it learns 16 images.
    """

    config: dict[str, Any]
    gradcheck: dict[str, Any]
    compiled: tuple[dict[str, Any], ...]
    deep: dict[str, Any] = field(default_factory=dict)
    size: tuple[int, ...] = (8, 8)
    small: tuple[int, ...] = (4, 2)
    dropping: dict[str, Any] = field(default_factory=lambda: {"dropout": 0.5})
    outputs: int = 5
    adding: tuple[str, ...] = ("embedding_dim", "augmentation_dim", "context_dim")
    learning: Learning = Learning()


# Some would be edm by default, whose time is not in timesteps, in which these tests count.
BACKBONES = {
    "unet": Backbone(
        {
            "channels": 16, "channel_mults": (1, 2), "blocks": 1, "head_channels": 8,
            "attention": (False, True), "resampling": "antialiased",
        },
        {"channels": 4, "head_channels": 4},
        ({"channel_mults": (1,), "attention": (True,)},),
    ),
    "image_v1": Backbone(
        {
            "prediction": "eps", "mapping_width": 64, "channels": (32, 64), "depths": (1, 1),
            "self_attention": (False, True),
        },
        {"channels": (4, 4), "mapping_width": 4},
        ({"channels": (32,), "depths": (1,), "self_attention": (True,)},),
        small=(4, 4),
        outputs=2,
        adding=("embedding_dim", "augmentation_dim"),  # attention moves other layers' names
    ),
    "mp_unet": Backbone(
        {
            "prediction": "eps", "channels": 16, "channel_mults": (1, 2), "blocks": 1,
            "head_channels": 16, "attention": (False, True),
        },
        {"channels": 4, "head_channels": 4},
        ({"channel_mults": (1,), "attention": (True,)},),
        deep={"blocks": 2},
        # Directions of weights turn by the learning rate a step: there it is larger than elsewhere.
        learning=Learning(4e-2, 130),
    ),
    "dit": Backbone(
        {"width": 32, "depth": 2, "head_channels": 16, "qk_norm": True},
        {"width": 8, "depth": 1, "head_channels": 4},
        ({"depth": 1},),
        deep={"depth": 4},
        learning=Learning(8e-3, 300, {"width": 64, "head_channels": 32}),
    ),
    "hourglass": Backbone(
        {
            "patch_size": 1, "widths": (16, 24), "depths": (1, 1), "head_channels": 8,
            "kernel_size": 3, "mapping_width": 32, "mapping_depth": 1,
        },
        {"widths": (8, 8), "mapping_width": 6},
        (
            {"widths": (16,), "depths": (1,), "attention": "neighborhood"},
            {"widths": (16,), "depths": (2,), "attention": "shifted_window", "window_size": 4},
        ),
        deep={"depths": (2, 2)},
        # Tokens of one pixel see where others lie to them, and only at borders where they lie.
        learning=Learning(
            5e-3,
            options={
                "widths": (32, 64), "mapping_width": 64, "patch_size": 4, "attention": "global",
            },
        ),
        small=(6, 6),
        # An augmentation of zeros is told to it: that the sample is as it was.
        adding=("embedding_dim",),
    ),
}  # fmt: skip

EVERY = {"num_classes": 5, "embedding_dim": 3, "augmentation_dim": 2, "image_channels": 2}

every_backbone = pytest.mark.parametrize("name", BACKBONES)


def fields(name: str) -> set[str]:
    return {f.name for f in dataclasses.fields(MODELS[name].Config)}  # type: ignore[arg-type]


def told(name: str) -> dict[str, Any]:
    """The options with which it takes every condition that it can take."""
    return EVERY | ({"context_dim": 6} if "context_dim" in fields(name) else {})


def build(name: str, awake: bool = True, **options: Any) -> Network:
    """A small network; awake: what starts at zero is set to random values, so that it speaks."""
    torch.manual_seed(0)
    config = {"in_channels": 2, **BACKBONES[name].config, **options}
    network = make_model({"type": name, **config})
    assert isinstance(network, Network)
    if awake:
        wake(network)
    return network


def wake(network: nn.Module) -> None:
    for parameter in network.parameters():
        if not parameter.detach().any():
            nn.init.normal_(parameter, std=0.2)


def inputs(name: str, network: Network, batch: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, network.config.in_channels, *BACKBONES[name].size, generator=generator)
    return x, torch.linspace(3, 950, batch)


def conditions(network: Network, x: Tensor, tokens: int = 4) -> dict[str, Any]:
    """Every condition that it takes; the mask has a sample with all tokens, and some with few."""
    generator = torch.Generator().manual_seed(2)
    batch = x.shape[0]
    given: dict[str, Any] = {}
    for kind in network.conditions:
        match kind:
            case ClassLabel():
                given[kind.name] = torch.arange(batch) % kind.num_classes
            case Vector():
                given[kind.name] = torch.randn(batch, kind.width, generator=generator)
            case Tokens():
                given[kind.name] = torch.randn(batch, tokens, kind.width, generator=generator)
                lengths = tokens - torch.arange(batch) % tokens
                given[kind.mask] = torch.arange(tokens) < lengths[:, None]
            case Image():
                shape = (batch, kind.channels, *x.shape[2:])
                given[kind.name] = torch.randn(shape, generator=generator)
            case _:
                pytest.fail(f"nothing here makes a {type(kind).__name__}")
    return given


def row(given: dict[str, Any], i: int) -> dict[str, Any]:
    return {name: value[i : i + 1] for name, value in given.items()}


def saved_bytes(network: nn.Module, x: Tensor, t: Tensor, **given: Any) -> tuple[int, Tensor]:
    """Bytes kept for the backward pass, parameters left out, and the output."""
    storages = {}
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = network(x, t, **given)
    return sum(storages.values()), out
