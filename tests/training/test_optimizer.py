"""Any optimiser may be passed in, and what it remembers comes back bitwise."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from k_diffusion.training.checkpoint import CheckpointError, read_checkpoint
from k_diffusion.training.config import ConfigError, TrainConfig
from k_diffusion.training.muon import Muon
from k_diffusion.training.optimizer import (
    group_values,
    load_moments,
    make_optimizer,
    moments,
    plain_state,
)
from k_diffusion.training.run import run_training
from k_diffusion.training.sections import OptimizerConfig
from k_diffusion.training.trainer import Trainer

MakeConfig = Callable[..., TrainConfig]
Make = Callable[[nn.Module], torch.optim.Optimizer]


class Counting(torch.optim.Optimizer):
    """Keeps count in all the ways there are: numbers, words, a float64 average, in its group."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 1e-3, "k": 0, "total": 0.0, "span": (1, 2), "lr_scale": 1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["k"] += 1
            group["total"] += 1 / 3 * group["k"]
            group["span"] = (group["k"], 0.1)
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                state["count"] = state.get("count", 0) + 1
                state["share"] = state.get("share", 0.0) * 0.7 + 0.3
                state["kind"] = "odd" if state["count"] % 2 else "even"
                exact = state.setdefault("exact", torch.zeros_like(p, dtype=torch.float64))
                exact.lerp_(p.grad.double(), 0.3)
                steps = state.setdefault("steps", torch.zeros((), dtype=torch.int64))
                steps += 1
                size = group["lr"] * state["share"] * (1 + 0.1 * group["total"])
                p.sub_((size * exact * (2 if state["kind"] == "odd" else 1)).to(p.dtype))


OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda n: torch.optim.SGD(n.parameters(), momentum=0.9, nesterov=True),
    "plain sgd": lambda n: torch.optim.SGD(n.parameters()),
    "adam": lambda n: torch.optim.Adam(n.parameters(), amsgrad=True),
    "rmsprop": lambda n: torch.optim.RMSprop(n.parameters(), momentum=0.5, centered=True),
    "nadam": lambda n: torch.optim.NAdam(n.parameters()),
    "adafactor": lambda n: torch.optim.Adafactor(n.parameters()),
    "counting": lambda n: Counting(n.parameters()),
}
if hasattr(torch.optim, "Muon"):
    OPTIMIZERS["torch's muon"] = lambda n: torch.optim.Muon(
        [p for p in n.parameters() if p.ndim == 2]
    )


def state_of(trainer: Trainer) -> dict[str, Any]:
    names = {id(p): name for name, p in trainer.network.named_parameters()}
    return {
        f"{names[id(p)]}/{key}": value
        for p, state in trainer.optimizer.state.items()
        for key, value in state.items()
    }


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert set(one) == set(other)
    for name, value in one.items():
        if isinstance(value, Tensor):
            assert value.dtype == other[name].dtype, name
            assert torch.equal(value, other[name]), name
        else:
            assert (type(value), value) == (type(other[name]), other[name]), name


def assert_resumes_bitwise(
    config: TrainConfig, path: Path, optimizer: Make | None, stops: tuple[int, ...] = (3, 4)
) -> Trainer:
    whole = Trainer(config, optimizer=optimizer)
    list(whole)
    resume = None
    for stop in stops:
        part = Trainer(config, optimizer=optimizer, resume=resume)
        list(itertools.islice(part, stop))
        resume = path / f"{part.step}.safetensors"
        part.save(resume)
    rest = Trainer(config, optimizer=optimizer, resume=resume)
    list(rest)
    assert rest.step == whole.step == config.steps
    assert_same(dict(whole.network.named_parameters()), dict(rest.network.named_parameters()))
    assert_same(whole.ema.state_dict(), rest.ema.state_dict())
    assert_same(state_of(whole), state_of(rest))
    assert group_values(whole.optimizer) == group_values(rest.optimizer)
    return rest


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resume_is_bitwise(make_run_config: MakeConfig, tmp_path: Path, name: str) -> None:
    config = make_run_config(total_images=320, optimizer={"lr": 3e-3})
    assert_resumes_bitwise(config, tmp_path, OPTIMIZERS[name])


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_ours_resume_bitwise(make_run_config: MakeConfig, tmp_path: Path, kind: str) -> None:
    model = {"type": "unet_tiny", "channels": 8, "head_channels": 8, "num_classes": 10}
    options = {"type": kind, "lr": 3e-3, "weight_decay": 0.01, "warmup_images": 64}
    config = make_run_config(model=model, total_images=192, optimizer=options)
    trainer = assert_resumes_bitwise(config, tmp_path, None, (1, 2))
    assert isinstance(trainer.optimizer, Muon if kind == "muon" else torch.optim.AdamW)


def test_what_is_plain_is_saved_as_json(make_run_config: MakeConfig, tmp_path: Path) -> None:
    config = make_run_config(optimizer={"lr": 2e-3})
    trainer = Trainer(config, optimizer=OPTIMIZERS["counting"])
    list(itertools.islice(trainer, 3))
    trainer.save(tmp_path / "a.safetensors")
    info, parts = read_checkpoint(tmp_path / "a.safetensors", ["optimizer"])
    saved = info.state["optimizer"]
    assert saved["class"] == "Counting"
    assert saved["weights"]["enter.weight"] == {"count": 3, "kind": "odd", "share": 0.657}
    assert saved["groups"] == [{"k": 3, "total": 2.0, "span": [3, 0.1]}]
    assert {name for name in parts["optimizer"] if name.startswith("enter.bias")} == {
        "enter.bias/exact", "enter.bias/steps",
    }  # fmt: skip
    again = Trainer(config, optimizer=OPTIMIZERS["counting"], resume=tmp_path / "a.safetensors")
    assert again.optimizer.param_groups[0]["span"] == (3, 0.1)  # a tuple, as it was


def test_what_the_caller_changed_in_a_group_stays_changed(
    make_run_config: MakeConfig, tmp_path: Path
) -> None:
    """A resumed run may have another learning rate or decay, as ever: it is not the optimiser's."""

    def make(decay: float) -> Make:
        return lambda n: torch.optim.AdamW(n.parameters(), weight_decay=decay)

    trainer = Trainer(make_run_config(), optimizer=make(0.1))
    next(iter(trainer))
    trainer.save(tmp_path / "a.safetensors")
    again = Trainer(make_run_config(), optimizer=make(0.2), resume=tmp_path / "a.safetensors")
    assert again.optimizer.param_groups[0]["weight_decay"] == 0.2


def test_another_class_or_type_is_refused(make_run_config: MakeConfig, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    trainer = Trainer(make_run_config(), optimizer=OPTIMIZERS["sgd"])
    next(iter(trainer))
    trainer.save(path)
    with pytest.raises(CheckpointError, match="its optimizer is SGD, not AdamW: give the same"):
        Trainer(make_run_config(), resume=path)
    muon = make_run_config(optimizer={"type": "muon"})
    with pytest.raises(CheckpointError, match="a run with optimizer.type = 'adamw', not 'muon'"):
        Trainer(muon, optimizer=OPTIMIZERS["sgd"], resume=path)


def test_a_checkpoint_from_before_there_was_a_choice_is_adamw_s(
    make_run_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(make_run_config())
    next(iter(trainer))
    config = trainer.config.to_json()
    del config["optimizer"]["type"]
    with monkeypatch.context() as patch:
        patch.setattr(TrainConfig, "to_json", lambda self: config)
        trainer.save(tmp_path / "a.safetensors")
    assert Trainer(make_run_config(), resume=tmp_path / "a.safetensors").step == 1


def test_moments_that_fit_no_weight_are_refused() -> None:
    network = nn.Linear(2, 3)
    optimizer = make_optimizer(network, OptimizerConfig())
    for name, shape in (("weight/a", (2, 3)), ("weight/a", (3,)), ("bias/a", (4,)), ("gain/a", ())):
        with pytest.raises(ValueError, match=f"optimizer/{name} of shape .* fits no weight"):
            load_moments(optimizer, network, {name: torch.zeros(shape)})


def test_state_that_cannot_be_saved_is_named() -> None:
    network = nn.Linear(2, 3)
    optimizer = make_optimizer(network, OptimizerConfig())
    optimizer.state[network.weight]["parts"] = [torch.zeros(2)]
    with pytest.raises(TypeError, match="AdamW keeps a list as 'parts' of weight"):
        plain_state(optimizer, network, group_values(optimizer))


def test_an_optimizer_of_other_weights_is_refused(make_run_config: MakeConfig) -> None:
    other = nn.Linear(2, 3)
    with pytest.raises(ConfigError, match=r"SGD holds a weight of shape \(3, 2\) that is not"):
        Trainer(make_run_config(), optimizer=lambda n: torch.optim.SGD(other.parameters()))
    with pytest.raises(ConfigError, match="optimizer gave int: give a function"):
        Trainer(make_run_config(), optimizer=lambda n: 3)  # type: ignore[arg-type,return-value]


def test_weights_that_are_left_out_neither_learn_nor_count(make_run_config: MakeConfig) -> None:
    def make(network: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(network.leave.parameters())

    trainer = Trainer(make_run_config(grad_clip=None), optimizer=make)
    before = {name: p.clone() for name, p in trainer.network.named_parameters()}
    for _ in itertools.islice(trainer, 3):
        assert all(p.grad is None for p in trainer.network.parameters())
    changed = {n for n, p in trainer.network.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {"leave.weight", "leave.bias"}


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_groups_keep_their_shares_of_the_largest_rate(
    make_run_config: MakeConfig, tmp_path: Path, kind: Any
) -> None:
    """The config's course is that of the group that was given the largest."""

    def make(network: Any) -> torch.optim.Optimizer:
        return kind(
            [
                {"params": network.enter.parameters(), "lr": 1e-4},
                {"params": network.leave.parameters()},
                {"params": network.time.parameters(), "lr_scale": 3.0},
            ],
            lr=1e-1,
        )

    config = make_run_config(optimizer={"lr": 1e-2, "schedule": "cosine"})
    trainer = Trainer(config, optimizer=make)
    for state in itertools.islice(trainer, 3):
        rates = [group["lr"] for group in trainer.optimizer.param_groups]
        assert rates == pytest.approx([1e-3 * state.lr, state.lr, 3 * state.lr], rel=1e-12)
    trainer.save(tmp_path / "three.safetensors")
    again = Trainer(config, optimizer=make, resume=tmp_path / "three.safetensors")
    assert [g.get("lr_scale") for g in again.optimizer.param_groups] == [1e-3, None, 3.0]


def test_a_run_takes_an_optimizer(make_run_config: MakeConfig) -> None:
    made: list[torch.optim.Optimizer] = []

    def make(network: nn.Module) -> torch.optim.Optimizer:
        made.append(torch.optim.SGD(network.parameters(), momentum=0.9))
        return made[0]

    result = run_training(make_run_config(total_images=64), optimizer=make, progress=False)
    assert {"enter.weight/momentum_buffer"} <= set(
        read_checkpoint(result.checkpoint, ["optimizer"])[1]["optimizer"]
    )
    assert len(made) == 1


def test_moments_are_no_copies() -> None:
    network = nn.Linear(2, 3)
    optimizer = torch.optim.SGD(network.parameters(), momentum=0.9)
    network(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    found = moments(optimizer, network)
    assert found["bias/momentum_buffer"] is optimizer.state[network.bias]["momentum_buffer"]
