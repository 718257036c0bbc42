"""Muon: what orthogonalising does to singular values, and the update against a slow definition."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from k_diffusion.models import MODELS, make_model
from k_diffusion.training.checkpoint import read_checkpoint
from k_diffusion.training.config import ConfigError, TrainConfig
from k_diffusion.training.muon import COEFFICIENTS, STEPS, Muon, hidden_weights, orthogonalize
from k_diffusion.training.optimizer import make_optimizer
from k_diffusion.training.sections import OptimizerConfig
from k_diffusion.training.shards import is_cut
from k_diffusion.training.trainer import Trainer


def polynomial(s: Tensor) -> Tensor:
    """What the iteration makes of singular values, which it sees one by one."""
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        s = a * s + b * s**3 + c * s**5
    return s


def slowly(matrix: Tensor) -> Tensor:
    """`orthogonalize` by its definition: the polynomial of the singular values, in float64."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    return u @ torch.diag(polynomial(s / s.norm().clamp(min=1e-30))) @ v


def spread(rows: int, columns: int, least: float, seed: int = 0) -> Tensor:
    """A matrix whose singular values go from 1 to `least`, evenly in their logarithm."""
    torch.manual_seed(seed)
    u, _, v = torch.linalg.svd(torch.randn(rows, columns, dtype=torch.float64), full_matrices=False)
    s = torch.logspace(0, math.log10(least), min(rows, columns), dtype=torch.float64)
    return u @ torch.diag(s) @ v


# ---------------------------------------------------------------- orthogonalising


def test_singular_values_end_near_one() -> None:
    s = polynomial(torch.logspace(-8, 0, 400_001, dtype=torch.float64))
    above = torch.logspace(math.log10(0.0052), 0, 400_001, dtype=torch.float64)
    assert polynomial(above).min() > 0.681
    assert polynomial(above).max() < 1.135
    assert (s.min() > 0) & (s.max() < 1.203)


@pytest.mark.parametrize("shape", [(8, 8), (64, 64), (96, 16), (16, 300)])
def test_of_matrices(shape: tuple[int, int]) -> None:
    matrix = spread(*shape, least=0.05)
    for scale in (1.0, 1e-12, 1e12):
        found = orthogonalize((matrix * scale).float())
        assert found.dtype == torch.float32
        assert found.shape == shape
        assert (found - slowly(matrix)).abs().max() < 1e-5
        values = torch.linalg.svdvals(found)
        assert values.min() > 0.68
        assert values.max() < 1.14


def test_float64_stays_and_a_batch_is_each_alone() -> None:
    several = torch.stack([spread(12, 20, 0.1, seed) for seed in range(6)]).reshape(2, 3, 12, 20)
    found = orthogonalize(several)
    assert found.dtype == torch.float64
    for i, j in ((0, 0), (1, 2)):
        assert (found[i, j] - slowly(several[i, j])).abs().max() < 1e-12
        assert (found[i, j] - orthogonalize(several[i, j])).abs().max() < 1e-14


def test_zeros_stay_zero() -> None:
    assert torch.equal(orthogonalize(torch.zeros(3, 4)), torch.zeros(3, 4))


# ---------------------------------------------------------------- the update


class Mixed(nn.Module):
    """Two equal matrices, one with another shape, a convolution, and a bias."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.one = nn.Parameter(torch.randn(6, 4))
        self.two = nn.Parameter(torch.randn(6, 4))
        self.tall = nn.Parameter(torch.randn(9, 5))
        self.kernel = nn.Parameter(torch.randn(7, 3, 3, 3))
        self.bias = nn.Parameter(torch.randn(5))

    def hidden(self) -> list[nn.Parameter]:
        return [self.one, self.two, self.tall, self.kernel]

    def set_gradients(self, seed: int, but: tuple[str, ...] = ()) -> None:
        torch.manual_seed(seed)
        for name, p in self.named_parameters():
            gradient = torch.randn_like(p)
            p.grad = None if name in but else gradient


def test_the_update_is_the_slow_definition() -> None:
    network, options = Mixed(), {"momentum": 0.8, "weight_decay": 0.3}
    optimizer = Muon(network.hidden(), [network.bias], lr=0.1, **options)  # type: ignore[arg-type]
    weights = [p.detach().double() for p in network.hidden()]
    averages = [torch.zeros_like(w) for w in weights]
    for step, lr in enumerate((0.1, 0.05, 0.2, 0.2)):
        network.set_gradients(step, but=("tall",) if step == 1 else ())
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        for i, p in enumerate(network.hidden()):
            if p.grad is None:
                continue
            g = p.grad.double()
            averages[i] = 0.8 * averages[i] + 0.2 * g
            towards = (0.8 * averages[i] + 0.2 * g).flatten(1)
            scale = 0.2 * math.sqrt(max(towards.shape))
            turned = slowly(towards).reshape(g.shape)
            weights[i] = weights[i] - lr * (0.3 * weights[i] + scale * turned)
            assert (p.double() - weights[i]).abs().max() < 1e-5, (step, i)


def test_an_update_has_the_size_of_adamw_s() -> None:
    """For gradients of independent noise both move a weight by about the learning rate's 0.2."""
    weight = nn.Parameter(torch.zeros(64, 256))
    optimizer = Muon([weight], lr=1.0)
    torch.manual_seed(0)
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    assert 0.68 * 0.2 < weight.square().mean().sqrt() < 1.14 * 0.2


def test_the_rest_is_adamw_s() -> None:
    network, twin = Mixed(), Mixed()
    options: dict[str, Any] = {"lr": 0.01, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1}
    ours = Muon([network.one], [network.tall, network.bias], **options)
    theirs = torch.optim.AdamW([twin.tall, twin.bias], fused=True, **options)
    for step in range(3):
        for each, optimizer in ((network, ours), (twin, theirs)):
            each.set_gradients(step)
            optimizer.step()
    assert torch.equal(network.tall, twin.tall)
    assert torch.equal(network.bias, twin.bias)
    assert not torch.equal(network.one, twin.one)
    assert torch.equal(network.two, twin.two)  # given to neither


def test_a_copy_goes_on_as_the_first() -> None:
    """`load_state_dict` makes all groups anew, the ones that AdamW works on among them."""
    network, twin = Mixed(), Mixed()

    def make(m: Mixed) -> Muon:
        return Muon([{"params": m.hidden(), "lr_scale": 0.5}], [m.bias], lr=0.01)

    one, other = make(network), make(twin)
    network.set_gradients(0)
    one.step()
    twin.load_state_dict(network.state_dict())
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    for each, optimizer in ((network, one), (twin, other)):
        each.set_gradients(1)
        optimizer.param_groups[1]["lr"] = 0.5
        loss = optimizer.step(lambda: 3.0)
        assert loss == 3.0
    for p, q in zip(network.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
    assert other.param_groups[0]["lr_scale"] == 0.5


def test_what_is_no_matrix_is_refused() -> None:
    with pytest.raises(ValueError, match=r"got one of shape \(5,\): give it among the rest"):
        Muon([Mixed().bias])
    with pytest.raises(ValueError, match="no hidden weights"):
        Muon([], [Mixed().bias])


# ---------------------------------------------------------------- which weights are hidden

AT_THE_ENDS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "unet": (
        {"type": "unet_tiny"},
        {"mapping.time", "mapping.classes", "conv_in", "conv_out"},
    ),
    "mp_unet": (
        {"type": "mp_unet", "channels": 64, "has_uncertainty": True},
        {"mapping.time", "mapping.classes", "conv_in", "conv_out", "log_variance.layer"},
    ),
    "hourglass": (
        {"type": "hourglass_tiny"},
        {"patch_in.proj", "time_in_proj", "class_emb", "patch_out.proj"},
    ),
    "dit": (
        {"type": "dit", "patch_size": 2, "width": 64, "depth": 2},
        {"mapping.time", "mapping.classes", "patch_in", "modulation_out", "patch_out"},
    ),
}


@pytest.mark.parametrize("name", AT_THE_ENDS)
def test_hidden_weights_of_our_networks(name: str) -> None:
    config, ends = AT_THE_ENDS[name]
    network = make_model({**config, "in_channels": 3, "num_classes": 10})
    matrices = {n for n, p in network.named_parameters() if p.ndim >= 2}
    assert matrices - set(hidden_weights(network)) == {f"{end}.weight" for end in ends}
    wrapped = nn.ModuleDict({"inside": network})
    assert set(hidden_weights(wrapped)) == {f"inside.{n}" for n in hidden_weights(network)}


def test_hidden_weights_of_any_network() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.Conv2d(8, 8, 3, groups=8),  # eight maps of one channel each are no matrix
        nn.GroupNorm(1, 8),
        nn.Conv2d(8, 8, 3),
        nn.Conv2d(8, 1, 1),
        nn.Linear(8, 8).requires_grad_(False),
        nn.ConvTranspose2d(8, 8, 2),
        nn.Bilinear(8, 8, 8),
        nn.Linear(8, 3),
    )
    assert hidden_weights(network) == ["3.weight", "6.weight"]


def test_a_network_may_say_otherwise() -> None:
    network = Mixed()
    network.hidden_weights = ("one", "kernel")  # type: ignore[assignment]
    config = OptimizerConfig(type="muon", momentum=0.7, weight_decay=0.1, eps=1e-5)
    optimizer = make_optimizer(network, config)
    groups = [
        ([{id(p): n for n, p in network.named_parameters()}[id(p)] for p in g["params"]],
         g["weight_decay"], g.get("momentum"), g.get("eps"))
        for g in optimizer.param_groups
    ]  # fmt: skip
    assert groups == [
        (["one", "kernel"], 0.1, 0.7, None),
        (["two", "tall"], 0.1, None, 1e-5),
        (["bias"], 0.0, None, 1e-5),
    ]
    network.hidden_weights = ("one", "bias")  # type: ignore[assignment]
    with pytest.raises(ValueError, match="Mixed.hidden_weights has 'bias', which is no weight of"):
        make_optimizer(network, config)


class Grouped(nn.Module):
    """Of which some weights learn at another rate, and decay otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.middle, self.mapping, self.leave = (nn.Linear(4, 4) for _ in range(4))

    def param_groups(self, lr: float) -> list[dict[str, Any]]:
        usual = [*self.enter.parameters(), *self.middle.parameters(), *self.leave.parameters()]
        slow = {"params": [*self.mapping.parameters()], "lr": lr / 4, "weight_decay": 0.25}
        return [{"params": usual}, slow]


def test_a_network_s_own_groups_hold_for_both_kinds_of_weights() -> None:
    network = Grouped()
    config = OptimizerConfig(type="muon", lr=0.5, weight_decay=0.125)
    groups = make_optimizer(network, config).param_groups
    names = {id(p): name for name, p in network.named_parameters()}
    found = [
        ([names[id(p)] for p in g["params"]], g["lr_scale"], g["weight_decay"], "momentum" in g)
        for g in groups
    ]
    enter, leave = (["enter.weight", "enter.bias"], ["leave.weight", "leave.bias"])
    assert found == [
        (["middle.weight"], 1.0, 0.125, True),
        (["mapping.weight"], 0.25, 0.25, True),
        ([*enter, "middle.bias", *leave], 1.0, 0.125, False),
        (["mapping.bias"], 0.25, 0.25, False),
    ]


def test_a_network_without_hidden_weights_is_refused() -> None:
    with pytest.raises(ConfigError, match="optimizer.type is muon, but Linear has no hidden weigh"):
        make_optimizer(nn.Linear(3, 3), OptimizerConfig(type="muon"))


# ---------------------------------------------------------------- sharded


def sharded(folder: Path) -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    shapes = [(5, 4), (5, 4), (7, 3, 3, 3), (6, 6)]  # 5 and 7 rows: processes' parts are unequal
    whole = [nn.Parameter(torch.randn(s)) for s in shapes]
    places: list[Any] = [[Shard(0)], [Shard(1)], [Shard(0)], [Replicate()]]
    parts: list[Any] = [
        nn.Parameter(distribute_tensor(p.data, mesh, at))
        for p, at in zip(whole, places, strict=True)
    ]
    biases = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizers = [
        Muon(weights, [bias], lr=0.1, weight_decay=0.1)
        for weights, bias in zip((whole, parts), biases, strict=True)
    ]
    for _ in range(3):
        for p, q, at in zip(whole, parts, places, strict=True):
            p.grad = torch.randn(p.shape)
            q.grad = distribute_tensor(p.grad, mesh, at)
        for bias in biases:
            bias.grad = torch.ones(3)
        for optimizer in optimizers:
            optimizer.step()
        for p, q, at in zip(whole, parts, places, strict=True):
            assert list(q.placements) == at
            assert (p - q.full_tensor()).abs().max() < 1e-6, (p.shape, at)
            average = optimizers[1].state[q]["momentum"]
            assert list(average.placements) == at

    trained_in_shards(folder)


def turned(base: Any, make_config: Callable[..., TrainConfig], parallel: str) -> TrainConfig:
    """The config of a network with hidden weights of 8 and of 11 rows: unequal parts for two."""

    class Turned(base):  # type: ignore[misc]
        hidden_weights = ("enter.weight", "classes.weight")

    MODELS["turned"] = Turned
    model = {"type": "turned", "num_classes": 10, "prediction": "edm", "sigma_data": "auto"}
    return make_config(
        model={**model, "time_convention": "log_sigma"},
        total_images=6 * 32,
        parallel=parallel,
        optimizer={"type": "muon", "lr": 1e-2, "weight_decay": 0.1},
    )


def trained_in_shards(folder: Path) -> None:
    """A run to its end, and one that goes on from shards and from a file of its middle."""
    import conftest

    config = turned(conftest.Blocks, conftest.config_of, "fsdp")
    for state in (trainer := Trainer(config)):
        if state.step == 3:
            trainer.save(folder / "half")
            trainer.save(folder / "half.safetensors")
    trainer.save(folder / "whole.safetensors")
    assert is_cut(trainer.optimizer.state[trainer.network.classes.weight]["momentum"])
    for half in ("half", "half.safetensors"):
        resumed = Trainer(config, resume=folder / half)
        assert [state.step for state in resumed] == [4, 5, 6]
        resumed.save(folder / f"from-{half}.safetensors")


def contents(path: Path) -> dict[str, Tensor]:
    _, parts = read_checkpoint(path, ["model", "ema", "optimizer"])
    return {f"{part}/{n}": t for part, named in parts.items() for n, t in named.items()}


def test_sharded_weights_move_as_whole_ones(
    launch: Callable[..., list[str]],
    make_run_config: Callable[..., TrainConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    launch(__file__, "sharded")
    whole = contents(tmp_path / "whole.safetensors")
    assert {"optimizer/enter.weight/momentum", "optimizer/classes.weight/momentum"} <= set(whole)
    for half in ("half", "half.safetensors"):
        resumed = contents(tmp_path / f"from-{half}.safetensors")
        assert [n for n in whole if not torch.equal(whole[n], resumed[n])] == [], half
    monkeypatch.setitem(MODELS, "turned", None)  # so that it goes again
    trainer = Trainer(turned(MODELS["blocks"], make_run_config, "ddp"))
    list(trainer)
    trainer.save(tmp_path / "alone.safetensors")
    for name, tensor in contents(tmp_path / "alone.safetensors").items():
        if not name.endswith("calls"):
            assert (tensor - whole[name]).abs().max() < 1e-5, name


def test_a_group_that_comes_later_is_of_the_rest() -> None:
    hidden = torch.nn.Parameter(torch.randn(4, 4))
    late = torch.nn.Parameter(torch.ones(3))
    optimizer = Muon([hidden], lr=0.1, betas=(0.5, 0.9), eps=1e-3)
    optimizer.add_param_group({"params": [late], "weight_decay": 0.0})
    alone = torch.nn.Parameter(torch.ones(3))
    adamw = torch.optim.AdamW([alone], lr=0.1, betas=(0.5, 0.9), eps=1e-3, weight_decay=0.0)
    for step in range(3):
        hidden.grad = torch.randn(4, 4)
        late.grad = alone.grad = torch.tensor([1.0, -2.0, 0.5]) * (step + 1)
        optimizer.step(), adamw.step()
    assert torch.equal(late, alone)
