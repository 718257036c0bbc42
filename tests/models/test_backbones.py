"""What every backbone must do, whatever is inside: one line in BACKBONES, and all of this holds."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from k_diffusion.denoiser import make_denoiser
from k_diffusion.models import MODELS, make_model, model_config
from k_diffusion.models.conditions import ClassLabel, Image, Tokens, Vector
from k_diffusion.models.network import Network


@dataclass(frozen=True)
class Backbone:
    """How a backbone is made small.

    Args:
        config: a tiny one.
        gradcheck: what makes it tinier still.
        size, small: of images that it takes; and of the few values of gradcheck.
        dropping: the options with which it drops activations in training.
        rate: a learning rate at which it learns 16 images in 300 steps.
        waking: standard deviation of what begins at zero, in a network that is to speak.
    """

    config: dict[str, Any]
    gradcheck: dict[str, Any]
    size: tuple[int, ...] = (8, 8)
    small: tuple[int, ...] = (4, 2)
    dropping: dict[str, Any] = field(default_factory=lambda: {"dropout": 0.5})
    rate: float = 3e-3
    waking: float = 0.2


UNET: dict[str, Any] = {"channels": 16, "channel_mults": (1, 2), "blocks": 1, "head_channels": 8}
BACKBONES = {
    # Cosines times 10 make sharp attention, which random blocks in a row would make sharper.
    "hourglass": Backbone(
        {
            "patch_size": 4,
            "widths": (96, 96),
            "depths": (1, 1),
            "kernel_size": 1,
            "head_channels": 16,
            "mapping_width": 96,
            "mapping_depth": 1,
        },
        {"patch_size": 1, "widths": (8, 8), "head_channels": 8, "mapping_width": 4},
        waking=0.05,
    ),
    "unet": Backbone(
        {**UNET, "attention": (False, True), "resampling": "antialiased"},
        {"channels": 4, "head_channels": 4},
    ),
}

IMAGE_V1: dict[str, Any] = {
    "prediction": "eps", "mapping_width": 64, "channels": (32, 64), "depths": (1, 1),
    "self_attention": (False, True),
}  # fmt: skip
BACKBONES["image_v1"] = Backbone(IMAGE_V1, {"channels": (4, 4), "mapping_width": 4}, small=(4, 4))
EVERY = {"num_classes": 5, "embedding_dim": 3, "augmentation_dim": 2, "image_channels": 2}

every_backbone = pytest.mark.parametrize("name", BACKBONES)


def test_no_backbone_is_left_out() -> None:
    networks = {name for name, cls in MODELS.items() if issubclass(cls, Network)}
    assert networks == set(BACKBONES)


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
        wake(network, BACKBONES[name].waking)
    return network


def wake(network: nn.Module, std: float = 0.2) -> None:
    for parameter in network.parameters():
        if not parameter.detach().any():
            nn.init.normal_(parameter, std=std)


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


# ---------------------------------------------------------------- what it computes


@every_backbone
def test_an_untrained_output_is_small(name: str) -> None:
    network = build(name, awake=False, **told(name))
    x, t = inputs(name, network)
    assert network(x, t, **conditions(network, x)).abs().max() < 1e-3


@every_backbone
def test_a_sample_does_not_depend_on_its_neighbours(name: str) -> None:
    network = build(name, **told(name)).eval()
    x, t = inputs(name, network, 4)
    given = conditions(network, x)
    together = network(x, t, **given)
    assert together.shape == x.shape
    assert together.std() > 0.1
    for i in range(4):
        alone = network(x[i : i + 1], t[i : i + 1], **row(given, i))
        assert (alone - together[i : i + 1]).abs().max() < 1e-5 * together.abs().max().clamp(min=1)


@every_backbone
def test_every_condition_changes_the_output(name: str) -> None:
    network = build(name, **told(name)).eval()
    x, t = inputs(name, network)
    given = conditions(network, x)
    whole = network(x, t, **given)
    assert (whole - network(x, t + 1, **given)).abs().amax((1, 2, 3)).min() > 1e-4
    for kind in network.conditions:
        others = {key: value for key, value in given.items() if key not in kind.keywords}
        # Label 0 and all tokens are conditions, too: each sample differs.
        assert (whole - network(x, t, **others)).abs().amax((1, 2, 3)).min() > 1e-4, kind.name


@every_backbone
def test_gradcheck(name: str) -> None:
    options = BACKBONES[name].gradcheck
    network = build(name, **{**told(name), "in_channels": 1, "image_channels": 1, **options})
    network = network.double()
    size = BACKBONES[name].small
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 1, *size, generator=generator, dtype=torch.float64)
    t = torch.tensor([0.3, 700.0], dtype=torch.float64)
    given = conditions(network, x, tokens=2)
    smooth = {k: v.double() for k, v in given.items() if v.is_floating_point()}
    fixed = {k: v for k, v in given.items() if not v.is_floating_point()}

    def function(x: Tensor, t: Tensor, *values: Tensor) -> Tensor:
        return network(x, t, **dict(zip(smooth, values, strict=True)), **fixed)

    wanted = [value.requires_grad_() for value in (x, t, *smooth.values())]
    assert torch.autograd.gradcheck(function, wanted)


@every_backbone
def test_bf16_autocast_is_finite_and_near(name: str) -> None:
    network = build(name, **told(name))
    x, t = inputs(name, network)
    given = conditions(network, x)
    plain = network(x, t, **given)
    with torch.autocast("cpu", torch.bfloat16):
        y = network(x, t, **given)
    y.float().square().mean().backward()
    assert y.isfinite().all()
    assert (y - plain).abs().max() < 0.05 * plain.abs().max()
    assert (y != plain).any()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


@every_backbone
def test_every_parameter_gets_a_gradient(name: str) -> None:
    network = build(name, **told(name))
    x, t = inputs(name, network)
    network(x, t, **conditions(network, x)).square().sum().backward()
    missing = [
        name
        for name, p in network.named_parameters()
        if p.grad is None or not p.grad.abs().max() > 0
    ]
    assert not missing


@every_backbone
def test_dropout_is_off_in_evaluation(name: str) -> None:
    dropping = BACKBONES[name].dropping
    network = build(name, **dropping)
    same = build(name)
    x, t = inputs(name, network)
    assert not torch.equal(network(x, t), network(x, t))
    assert torch.equal(network.eval()(x, t), same.eval()(x, t))


# ---------------------------------------------------------------- absence


def context_name(network: Network) -> Tokens:
    for kind in network.conditions:
        if isinstance(kind, Tokens):
            return kind
    return pytest.skip("it takes no tokens")


@every_backbone
def test_masked_tokens_are_ignored_exactly(name: str) -> None:
    network = build(name, **told(name)).eval()
    kind = context_name(network)
    x, t = inputs(name, network)
    given = conditions(network, x)
    tokens, mask = given[kind.name].requires_grad_(), given[kind.mask]
    assert mask.any(1).all()
    assert not mask.all()
    plain = network(x, t, **given)
    plain.square().sum().backward()
    assert (tokens.grad[~mask] == 0).all()
    assert (tokens.grad[mask].abs().amax(-1) > 0).all()
    for value in (5.0, torch.inf, torch.nan):
        other = torch.where(mask[..., None], tokens, torch.tensor(value))
        assert torch.equal(network(x, t, **{**given, kind.name: other}), plain)
    # As if they were not there at all.
    shorter = {kind.name: tokens[1:2, :3], kind.mask: None}
    assert mask[1].tolist() == [True, True, True, False]
    alone = network(x[1:2], t[1:2], **{**row(given, 1), **shorter})
    assert (alone - plain[1:2]).abs().max() < 1e-5 * plain.abs().max().clamp(min=1)


@every_backbone
def test_the_null_conditions_are_no_condition(name: str) -> None:
    network = build(name, **told(name)).eval()
    x, t = inputs(name, network)
    given = conditions(network, x)
    unconditional = network(x, t)
    zero: dict[str, Any] = {}
    for kind in network.conditions:
        value = given[kind.name]
        match kind:
            case ClassLabel():
                zero[kind.name] = torch.full_like(value, kind.num_classes)
            case Tokens():
                zero[kind.name] = torch.full_like(value, torch.nan)
                zero[kind.mask] = torch.zeros_like(given[kind.mask])
            case _:
                zero[kind.name] = torch.zeros_like(value)
    everyone = torch.ones(3, dtype=torch.bool)
    ways = [
        dict.fromkeys(given),
        zero,
        network.drop_condition(given, everyone),
        network.drop_condition({k: v for k, v in given.items() if "mask" not in k}, everyone),
    ]
    for way in ways:
        assert torch.equal(network(x, t, **way), unconditional)
    for kind in network.conditions:  # each alone is absent
        alone = {key: zero[key] for key in kind.keywords}
        assert torch.equal(network(x, t, **alone), unconditional)


@every_backbone
def test_absent_and_present_stand_in_one_batch(name: str) -> None:
    network = build(name, **told(name)).eval()
    x, t = inputs(name, network)
    given = conditions(network, x)
    hidden = torch.tensor([True, False, True])
    y = network(x, t, **network.drop_condition(given, hidden))
    assert (y - network(x, t))[hidden].abs().max() < 1e-5
    assert (y - network(x, t, **given))[~hidden].abs().max() < 1e-5


# ---------------------------------------------------------------- keeping, learning


@every_backbone
def test_saved_and_loaded_it_is_the_same_bitwise(name: str, tmp_path: Path) -> None:
    network = build(name, **told(name)).eval()
    x, t = inputs(name, network)
    given = conditions(network, x)
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    plain = json.loads(json.dumps(model_config(network)))
    torch.manual_seed(1)
    again = make_model(plain).eval()
    assert model_config(again) == plain
    assert not torch.equal(again(x, t, **given), network(x, t, **given))
    again.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    assert torch.equal(again(x, t, **given), network(x, t, **given))


@every_backbone
def test_built_without_memory_and_loaded_it_is_the_same(name: str) -> None:
    network = build(name, **told(name)).eval()
    x, t = inputs(name, network)
    given = conditions(network, x)
    with torch.device("meta"):
        empty = make_model(model_config(network)).eval()
    nothing = {k: v.to("meta") for k, v in given.items()}
    empty.check_condition(3, **nothing)  # type: ignore[operator]
    assert empty(x.to("meta"), t.to("meta"), **nothing).shape == x.shape
    empty.to_empty(device="cpu")
    for tensor in (*empty.parameters(), *empty.buffers()):
        tensor.data.fill_(torch.nan) if tensor.is_floating_point() else tensor.zero_()
    empty.load_state_dict(network.state_dict())
    assert torch.equal(empty(x, t, **given), network(x, t, **given))


@every_backbone
def test_overfits_sixteen_images(name: str) -> None:
    network = build(name, awake=False, in_channels=1, num_classes=16)
    torch.manual_seed(0)
    images = torch.randn(16, 1, *BACKBONES[name].size)
    label = torch.arange(16)
    optimizer = torch.optim.Adam(network.parameters(), BACKBONES[name].rate)

    def loss(repeats: int) -> Tensor:
        x0, time = images.repeat(repeats, 1, 1, 1), torch.rand(16 * repeats)
        angle = (0.2 + time * 1.2).reshape(-1, 1, 1, 1)
        noise = torch.randn_like(x0)
        x = angle.cos() * x0 + angle.sin() * noise
        return (network(x, time * 1000, class_label=label.repeat(repeats)) - noise).square().mean()

    first = loss(8).item()
    for _ in range(300):
        optimizer.zero_grad()
        loss(2).backward()
        optimizer.step()
    with torch.no_grad():
        last = loss(8).item()
    assert last < first / 20


@every_backbone
def test_it_is_a_denoiser(name: str) -> None:
    network = build(name, **told(name))
    x, _ = inputs(name, network)
    x0 = make_denoiser(network)(x, torch.tensor([0.2, 0.5, 0.9]), **conditions(network, x))
    assert x0.shape == x.shape
    assert x0.isfinite().all()


# ---------------------------------------------------------------- device, memory, compiler


class Operations(TorchDispatchMode):
    """The names of all operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.names.add(function._schema.name)
        return function(*args, **(kwargs or {}))


@every_backbone
def test_forward_waits_for_no_device_and_copies_nothing_to_it(name: str) -> None:
    network = build(name, **told(name))
    x, t = inputs(name, network)
    given = conditions(network, x)
    with Operations() as operations:
        network(x, t, **given)
    assert "aten::cat" in operations.names  # of x and the image: it does look
    waiting = {"_local_scalar_dense", "lift_fresh", "_to_copy", "nonzero", "is_nonzero", "equal"}
    assert not operations.names & {f"aten::{name}" for name in waiting}


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


@every_backbone
def test_checkpointing_saves_memory_and_changes_no_gradient(name: str) -> None:
    results = []
    for policy in (False, True):
        network = build(name, **told(name), **BACKBONES[name].dropping, checkpointing=policy)
        x, t = inputs(name, network, 8)
        torch.manual_seed(5)
        kept, out = saved_bytes(network.train(), x, t, **conditions(network, x))
        out.square().mean().backward()
        results.append((kept, out, [p.grad for p in network.parameters()]))
    (plain, y, gradients), (lean, z, again) = results
    assert lean < 0.4 * plain
    assert torch.equal(y, z)
    assert all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True))  # type: ignore[arg-type]


@every_backbone
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # the compiler's own
def test_it_compiles_as_one_graph(name: str, backend: str, request: pytest.FixtureRequest) -> None:
    """The graph is the same for both; to make code of it takes most of a minute."""
    if backend == "inductor" and "slow" not in request.config.option.markexpr:
        pytest.skip("it takes a minute to compile: run pytest -m slow")
    network = build(name, **told(name)).eval()
    x, t = inputs(name, network)
    given = conditions(network, x)
    torch.compiler.reset()
    with torch.no_grad():
        compiled = torch.compile(network, fullgraph=True, backend=backend)(x, t, **given)
        assert (compiled - network(x, t, **given)).abs().max() < 1e-4
