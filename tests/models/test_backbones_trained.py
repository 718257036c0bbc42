"""What every backbone must do beside computing: be kept, learn, spare memory, compile.

More: test_backbones.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from backbones import BACKBONES, build, conditions, every_backbone, inputs, saved_bytes, told
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from k_diffusion.denoiser import make_denoiser
from k_diffusion.models import make_model, model_config

# ---------------------------------------------------------------- keeping, learning


def every_day(*names: str) -> pytest.MarkDecorator:
    """All backbones, but those that take long only by `pytest -m slow`."""
    marks = {name: [] if name in names else [pytest.mark.slow] for name in BACKBONES}
    return pytest.mark.parametrize(
        "name", [pytest.param(name, marks=marks[name]) for name in BACKBONES]
    )


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


@every_day("unet", "dit", "hourglass")
def test_overfits_sixteen_images(name: str) -> None:
    learning = BACKBONES[name].learning
    network = build(name, awake=False, in_channels=1, num_classes=16, **learning.options)
    torch.manual_seed(0)
    images = torch.randn(16, 1, *BACKBONES[name].size)
    label = torch.arange(16)
    optimizer = torch.optim.Adam(network.parameters(), learning.rate, betas=(0.9, 0.99))
    after_step = getattr(network, "after_step", lambda: None)

    def loss(repeats: int) -> Tensor:
        x0, time = images.repeat(repeats, 1, 1, 1), torch.rand(16 * repeats)
        angle = (0.6 + time * 0.8).reshape(-1, 1, 1, 1)
        noise = torch.randn_like(x0)
        x = angle.cos() * x0 + angle.sin() * noise
        return (network(x, time * 1000, class_label=label.repeat(repeats)) - noise).square().mean()

    first = loss(8).item()
    for _ in range(learning.steps):
        optimizer.zero_grad()
        loss(2).backward()
        optimizer.step()
        after_step()
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


@every_backbone
def test_checkpointing_saves_memory_and_changes_no_gradient(name: str) -> None:
    kept, outputs, gradients = {}, [], []
    for policy in (False, True, 1, 2, (0,)):
        options = {**told(name), **BACKBONES[name].dropping, **BACKBONES[name].deep}
        network = build(name, **options, checkpointing=policy).train()
        x, t = (v.repeat(8, *[1] * (v.ndim - 1)) for v in inputs(name, network, 1))
        torch.manual_seed(5)
        # Keyed so that true and 1 are two.
        kept[repr(policy)], out = saved_bytes(network, x, t, **conditions(network, x))
        out.square().mean().backward()
        outputs.append(out)
        gradients.append([p.grad for p in network.parameters()])
    assert kept["True"] < 0.4 * kept["False"]
    assert kept["True"] == kept["1"] < kept["2"] < kept["False"]
    assert kept["True"] <= kept["(0,)"] < kept["False"]
    assert all(torch.equal(out, outputs[0]) for out in outputs)
    for again in gradients:
        assert all(torch.equal(a, b) for a, b in zip(again, gradients[0], strict=True))  # type: ignore[arg-type]


COMPILED = [
    pytest.param(
        *(name, which, is_told),
        marks=[pytest.mark.slow] if name != "dit" or which or is_told else [],
    )
    for name, kind in BACKBONES.items()
    for which in range(len(kind.compiled))
    for is_told in (False, True)
]
"""One always: its code takes some 20 seconds to build. That each is one graph is tested below."""


@pytest.mark.parametrize(("name", "which", "is_told"), COMPILED)
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # the compiler's own
def test_it_compiles_as_one_graph(name: str, which: int, is_told: bool) -> None:
    options = told(name) if is_told else {}
    network = build(name, **{**options, **BACKBONES[name].compiled[which]}).eval()
    x, t = inputs(name, network)
    given = conditions(network, x)
    torch.compiler.reset()
    with torch.no_grad():
        compiled = torch.compile(network, fullgraph=True)(x, t, **given)
        expected = network(x, t, **given)
        assert (compiled - expected).abs().max() < 1e-5 * expected.abs().max().clamp(min=1)


@every_day("unet", "image_v1", "dit", "hourglass")
def test_its_gradients_are_one_graph(name: str) -> None:
    """Of the whole of it: the graph is the one that the compiler above gets, too."""
    network = build(name, **told(name))
    x, t = inputs(name, network)
    given = conditions(network, x)
    expected = network(x, t, **given)
    expected.square().mean().backward()
    gradients = [p.grad.clone() for p in network.parameters()]  # type: ignore[union-attr]
    network.zero_grad()
    torch.compiler.reset()
    y = torch.compile(network, fullgraph=True, backend="aot_eager")(x, t, **given)
    assert (y - expected).abs().max() < 1e-5 * expected.abs().max().clamp(min=1)
    y.square().mean().backward()
    for p, gradient in zip(network.parameters(), gradients, strict=True):
        assert (p.grad - gradient).abs().max() < 1e-4 * gradient.abs().max().clamp(min=1)  # type: ignore[operator]


@every_day("dit")
def test_one_graph_serves_small_and_large_batches(name: str) -> None:
    """What is kept for the backward pass depends on sizes; compiled, none of it may."""
    network = build(name)
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    compiled = torch.compile(network, backend=counter, dynamic=True)
    for batch in (2, 40, 160):
        compiled(*inputs(name, network, batch))
    assert counter.frame_count <= 2
