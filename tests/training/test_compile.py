"""A compiled network: the same run to rounding, and nothing else is different.

The compiler's front end alone (backend "aot_eager") is what most tests take: it traces, splits
forward from backward and guards sizes as the whole one does, and compiles in a second.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from k_diffusion.training import load_denoiser
from k_diffusion.training.checkpoint import read_checkpoint
from k_diffusion.training.config import TrainConfig
from k_diffusion.training.step_gradient import StepGradient
from k_diffusion.training.trainer import Trainer

MakeConfig = Callable[..., TrainConfig]
TINY = {"type": "tiny", "num_classes": 10, "prediction": "edm", "time_convention": "log_sigma"}
UNET = {"type": "unet_tiny", "channels": 8, "head_channels": 8, "num_classes": 10}


@pytest.fixture(autouse=True)
def _forget() -> Any:
    """Each test compiles anew: torch counts a function's compilations over all of them."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Compiler:
    """Stands for torch.compile: its front end, and a record of what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[nn.Module, dict[str, Any]]] = []
        self.batches: list[int] = []
        self._compile = torch.compile

    def __call__(self, network: nn.Module, **options: Any) -> Any:
        self.asked.append((network, options))
        from functorch.compile import make_boxed_func
        from torch._dynamo.backends.common import aot_autograd

        def look(graph: Any, inputs: Any) -> Any:
            self.batches += {int(x.shape[0]) for x in inputs if x.shape[1:] == (1, 8, 8)}
            return make_boxed_func(graph)

        return self._compile(network, backend=aot_autograd(fw_compiler=look), **options)


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    found = Compiler()
    monkeypatch.setattr(torch, "compile", found)
    return found


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainer.network.named_parameters()}


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float) -> None:
    assert set(one) == set(other)
    for name, tensor in one.items():
        assert (tensor - other[name]).abs().max() <= tolerance, name


ONE_LEVEL = {"channel_mults": [1], "attention": [True], "checkpointing": True}


@pytest.mark.parametrize("model", [TINY, UNET | ONE_LEVEL], ids=["tiny", "unet"])
def test_same_run_to_rounding(
    make_run_config: MakeConfig, compiler: Compiler, model: dict[str, Any]
) -> None:
    changes: dict[str, Any] = {
        "model": model,
        "total_images": 3 * 32,
        "micro_batch_size": 12,  # 10, 11 and 11: the sizes differ
    }
    plain = Trainer(make_run_config(**changes))
    losses = [state.loss for state in plain]
    trainer = Trainer(make_run_config(**changes, compile=True))
    compiled = [state.loss for state in trainer]
    assert compiler.asked == [(trainer.network, {"dynamic": False})]
    assert max(abs(a / b - 1) for a, b in zip(losses, compiled, strict=True)) < 1e-5
    assert_close(weights(plain), weights(trainer), 2e-5)
    assert_close(plain.ema.state_dict(), trainer.ema.state_dict(), 2e-5)
    assert set(compiler.batches) == {10, 11}  # each size by itself, and no third


def test_resume_is_bitwise_and_names_are_the_network_s(
    make_run_config: MakeConfig, tmp_path: Path, compiler: Compiler
) -> None:
    config = make_run_config(model=TINY | {"dropout": 0.2}, total_images=4 * 32, compile=True)
    whole = Trainer(config)
    list(whole)
    part = Trainer(config)
    list(itertools.islice(part, 2))
    part.save(tmp_path / "a.safetensors")
    rest = Trainer(config, resume=tmp_path / "a.safetensors")
    list(rest)
    assert_close(weights(whole), weights(rest), 0.0)
    assert_close(whole.ema.state_dict(), rest.ema.state_dict(), 0.0)
    rest.save(tmp_path / "b.safetensors")
    info, parts = read_checkpoint(tmp_path / "b.safetensors", ["model", "ema", "optimizer"])
    assert not any("_orig_mod" in name for name in info.tensors)
    assert set(parts["model"]) == set(rest.network.state_dict())
    denoiser, _ = load_denoiser(tmp_path / "b.safetensors", "last")
    x, sigma = torch.randn(2, 1, 8, 8), torch.tensor([0.5, 2.0])
    rest.network.eval()
    with torch.no_grad():
        label = torch.tensor([1, 2])
        expected = rest.denoiser(x, sigma, class_label=label)
        assert torch.equal(denoiser(x, sigma, class_label=label), expected)
    # An uncompiled run may go on from a compiled one, and the other way round.
    assert (
        Trainer(
            make_run_config(model=TINY | {"dropout": 0.2}), resume=tmp_path / "b.safetensors"
        ).step
        == 4
    )


def test_a_bad_module_is_still_named(make_run_config: MakeConfig, compiler: Compiler) -> None:
    trainer = Trainer(make_run_config(model=TINY, total_images=64, compile=True))
    with torch.no_grad():
        trainer.network.time.bias.fill_(math.inf)  # type: ignore[union-attr]
    state = next(iter(trainer))
    assert state.report is not None
    assert state.report.where == "time (Linear)"


class Told(nn.Module):
    """Counts its own calls of `after_step`, which changes a weight in place."""

    prediction, time_convention, num_classes = "flow", "unit", 0

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.calls = 0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)) * t[:, None, None, None])

    @torch.no_grad()
    def after_step(self) -> None:
        self.calls += 1
        self.first.weight.div_(self.first.weight.norm())


def test_after_step_reaches_the_compiled_weights(
    make_run_config: MakeConfig, compiler: Compiler
) -> None:
    found = []
    for compile in (False, True):
        torch.manual_seed(0)
        config = make_run_config(compile=compile, total_images=160)
        found.append(Trainer(config, network=Told()))
        assert len(list(found[-1])) == found[-1].network.calls == 5
        assert abs(found[-1].network.first.weight.norm() - 1) < 1e-6
    assert_close(weights(found[0]), weights(found[1]), 1e-6)


def test_the_search_for_a_micro_batch_compiles_nothing(
    make_run_config: MakeConfig, compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []

    def limited(self: StepGradient, inputs: Any, micro_batch: int, *more: Any) -> Tensor:
        if compiling := not trainer.step and trainer.micro_batch is None:
            tried.append(len(inputs))
        if compiling and len(inputs) > 9:
            raise torch.OutOfMemoryError("out of memory")
        return add(self, inputs, micro_batch, *more)

    add = StepGradient._add_gradients
    monkeypatch.setattr(StepGradient, "_add_gradients", limited)
    config = make_run_config(model=TINY, micro_batch_size="auto", compile=True, total_images=64)
    trainer = Trainer(config)
    list(trainer)
    assert trainer.micro_batch == 9
    assert len(tried) > 3
    assert set(compiler.batches) == {8}  # four parts of 32


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own making
def test_inductor_s_run_is_the_same_to_rounding(make_run_config: MakeConfig) -> None:
    make = functools.partial(make_run_config, model=UNET, total_images=96, micro_batch_size=20)
    plain, compiled = Trainer(make()), Trainer(make(compile=True))
    losses = [[state.loss for state in trainer] for trainer in (plain, compiled)]
    print(max(abs(a / b - 1) for a, b in zip(*losses, strict=True)))
    assert max(abs(a / b - 1) for a, b in zip(*losses, strict=True)) < 1e-5
    assert_close(weights(plain), weights(compiled), 5e-5)
