"""The averaged weights: closed form, profiles, buffers, precision, and their place in a run."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from k_diffusion.training.checkpoint import CheckpointError, read_checkpoint
from k_diffusion.training.config import ConfigError, TrainConfig
from k_diffusion.training.dataset import ArraySource, Digits
from k_diffusion.training.ema import (
    LONGEST,
    Ema,
    PowerFunction,
    Profile,
    WarmUp,
    average_name,
    exponent_of,
    length_of,
    warmup_decay,
)
from k_diffusion.training.trainer import Trainer
from k_diffusion.utils import EMAWarmup, ema_update

MakeConfig = Callable[..., TrainConfig]


class Tied(nn.Module):
    """Two names for one weight, a counting buffer, one that is not saved, and bf16 numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3, bias=False)
        self.second = nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight
        self.low = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)


def test_warmup_decay_is_the_published_curve() -> None:
    assert warmup_decay(0) == 0
    assert abs(warmup_decay(9999, max_decay=1.0) - 0.999) < 1e-12
    assert abs(warmup_decay(3, inv_gamma=3.0, power=2.0, max_decay=1.0) - 0.75) < 1e-12
    assert warmup_decay(10**9) == 0.9999
    decays = [warmup_decay(i, max_decay=1.0) for i in range(100)]
    assert decays == sorted(decays)


@pytest.mark.parametrize("power", [0.75, 2 / 3, 2.0])
def test_average_is_the_closed_form(power: float) -> None:
    network = nn.Linear(4, 3)
    ema = Ema(network, WarmUp(power=power, inv_gamma=2.0, max_decay=0.9))
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(3, 4, generator=generator) for _ in range(40)]
    for value in values:
        with torch.no_grad():
            network.weight.copy_(value)
        ema.update()
    # The share of value i: (1 - decay_i) times all later decays; the initial weights have none.
    decays = [min(0.9, 1 - (1 + i / 2.0) ** -power) for i in range(40)]
    expected = torch.zeros(3, 4, dtype=torch.float64)
    for i, value in enumerate(values):
        share = 1 - decays[i]
        for later in decays[i + 1 :]:
            share *= later
        expected += share * value.double()
    assert (ema.state_dict()["weight"] - expected).abs().max() < 1e-6
    assert ema.updates == 40


def test_low_precision_weights_are_averaged_in_float32() -> None:
    network = Tied()
    ema = Ema(
        network, WarmUp(max_decay=0.999, power=100.0)
    )  # the upper limit from the second update on
    ema.update()
    with torch.no_grad():
        network.low.fill_(2.0)
    for _ in range(10):
        ema.update()
    average = ema.state_dict()["low"]
    assert average.dtype == torch.float32
    # bf16 would lose each of these steps: it has 8 bits.
    assert (average - (2 - 0.999**10)).abs().max() < 1e-6


def test_buffers_are_copied_and_shared_weights_kept_once() -> None:
    network = Tied()
    ema = Ema(network)
    network.count += 5
    assert ema.state_dict()["count"] == 0
    ema.update()
    assert ema.state_dict()["count"] == 5
    assert set(ema.state_dict()) == {"first.weight", "low", "count"}


def test_average_is_no_view_of_the_network() -> None:
    network = nn.Linear(2, 2)
    ema = Ema(network)
    before = ema.state_dict()["weight"].clone()
    with torch.no_grad():
        network.weight.add_(1)
    assert torch.equal(ema.state_dict()["weight"], before)


@pytest.mark.parametrize("profile", [WarmUp(), PowerFunction(0.1)])
def test_state_round_trip_goes_on_bitwise(profile: Profile) -> None:
    torch.manual_seed(0)
    network, other = nn.Linear(4, 3), nn.Linear(4, 3)
    ema, copied = Ema(network, profile), Ema(other, profile)
    for step in range(20):
        with torch.no_grad():
            network.weight.add_(torch.randn(3, 4))
            other.load_state_dict(network.state_dict())
        ema.update()
        if step == 9:
            state = {name: t.clone() for name, t in ema.state_dict().items()}
            copied.load_state_dict(state, ema.updates)
        elif step > 9:
            copied.update()
    assert torch.equal(ema.state_dict()["weight"], copied.state_dict()["weight"])


def test_state_that_does_not_fit_is_refused() -> None:
    ema = Ema(nn.Linear(4, 3))
    with pytest.raises(ValueError, match=r"bias has shape \(4,\).*\(3,\)"):
        ema.load_state_dict({"weight": torch.ones(3, 4), "bias": torch.ones(4)}, 1)
    with pytest.raises(ValueError, match="bias is missing"):
        ema.load_state_dict({"weight": torch.ones(3, 4)}, 1)
    assert not torch.equal(ema.state_dict()["weight"], torch.ones(3, 4))
    assert ema.updates == 0


@pytest.mark.parametrize("profile", [WarmUp(), PowerFunction(0.1)])
def test_swapped_lends_the_average_and_gives_the_weights_back(profile: Profile) -> None:
    network = nn.Linear(2, 2)
    ema = Ema(network, profile)
    ema.update()
    with torch.no_grad():
        network.weight.fill_(3.0)
    ema.update()
    average = ema.state_dict()["weight"].clone()
    assert not torch.equal(network.weight, average)

    def use() -> None:
        with ema.swapped():
            assert torch.equal(network.weight, average)
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        use()
    assert (network.weight == 3.0).all()
    target = nn.Linear(2, 2)
    ema.copy_to(target)
    assert torch.equal(target.weight, average)


# ---------------------------------------------------------------- power functions


def test_length_and_exponent_are_each_others_inverse() -> None:
    # Karras et al. 2024, section 3.1: the exponents of the lengths 0.05 and 0.10.
    assert abs(exponent_of(0.05) - 16.97) < 0.005
    assert abs(exponent_of(0.10) - 6.94) < 0.005
    for i in range(1, 2886):
        sigma_rel = i * 1e-4
        assert abs(length_of(exponent_of(sigma_rel)) / sigma_rel - 1) < 1e-12
    for gamma in (1e-9, 0.01, 1.0, 30.0, 1e6):
        assert abs(exponent_of(length_of(gamma)) - gamma) < 1e-6 * gamma + 1e-9
    assert abs(length_of(0.0) - LONGEST) < 1e-15


def test_length_is_the_width_of_the_weight() -> None:
    for sigma_rel in (0.02, 0.1, 0.25):
        gamma, n = exponent_of(sigma_rel), 200_000
        tau = (torch.arange(n, dtype=torch.float64) + 0.5) / n
        weight = (gamma + 1) * tau**gamma / n
        assert abs(weight.sum() - 1) < 1e-8
        mean = (weight * tau).sum()
        assert abs((weight * (tau - mean) ** 2).sum().sqrt() - sigma_rel) < 1e-8


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, LONGEST, 0.3, math.nan])
def test_lengths_of_no_power_function_are_refused(sigma_rel: float) -> None:
    with pytest.raises(ValueError, match=r"above 0 and below 0\.2887"):
        PowerFunction(sigma_rel)


@pytest.mark.parametrize("sigma_rel", [0.05, 0.1, 0.25])
def test_power_function_weighs_each_update_by_its_share(sigma_rel: float) -> None:
    network = nn.Linear(4, 3)
    ema = Ema(network, PowerFunction(sigma_rel))
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(3, 4, generator=generator) for _ in range(60)]
    for value in values:
        with torch.no_grad():
            network.weight.copy_(value)
        ema.update()
    power = exponent_of(sigma_rel) + 1
    shares = [(i / 60) ** power - ((i - 1) / 60) ** power for i in range(1, 61)]
    expected = sum(share * value.double() for share, value in zip(shares, values, strict=True))
    assert (ema.state_dict()["weight"] - expected).abs().max() < 1e-6


def test_names_of_averages() -> None:
    assert [average_name(s) for s in (0.05, 0.10, 0.125)] == ["ema_0.05", "ema_0.1", "ema_0.125"]


# ---------------------------------------------------------------- in a run


def test_main_average_is_the_established_one_bitwise(make_run_config: MakeConfig) -> None:
    changes = {"max_decay": 0.75, "power": 2 / 3, "inv_gamma": 2.0}  # the limit is reached
    trainer = Trainer(make_run_config(ema=changes))
    average = copy.deepcopy(trainer.network)
    warmup = EMAWarmup(inv_gamma=2.0, power=2 / 3, max_value=0.75)
    for state in trainer:
        assert state.ema_decay == warmup.get_value()
        ema_update(trainer.network, average, warmup.get_value())
        warmup.step()
        ours = trainer.ema.state_dict()
        for name, tensor in average.state_dict().items():
            assert torch.equal(ours[name], tensor), name
    assert trainer.ema.decay == 0.75
    assert trainer.ema.updates == 20


def test_profiles_are_kept_beside_it_and_change_nothing(make_run_config: MakeConfig) -> None:
    plain, with_profiles = (
        Trainer(make_run_config()),
        Trainer(make_run_config(ema={"profiles": [0.05, 0.10]})),
    )
    direct = Ema(with_profiles.network, PowerFunction(0.10))
    losses = [state.loss for state in plain]
    for state in with_profiles:
        assert state.loss == losses[state.step - 1]
        direct.update()
    assert list(with_profiles.averages) == ["ema", "ema_0.05", "ema_0.1"]
    for name, tensor in plain.ema.state_dict().items():
        assert torch.equal(with_profiles.ema.state_dict()[name], tensor)
        kept = with_profiles.averages["ema_0.1"].state_dict()[name]
        assert torch.equal(kept, direct.state_dict()[name])
    shorter, longer = (with_profiles.averages[f"ema_{s}"].state_dict() for s in ("0.05", "0.1"))
    assert not torch.equal(shorter["enter.weight"], longer["enter.weight"])


def test_a_skipped_step_moves_no_average(make_run_config: MakeConfig) -> None:
    digits = Digits()
    config = make_run_config(ema={"profiles": [0.05, 0.10]})
    images = digits.images.clone()
    images[int(Trainer(config).stream[7].indices[5])] = math.nan
    trainer = Trainer(config, source=ArraySource(images, digits.labels, digits.class_names))
    before: dict[str, torch.Tensor] = {}
    skipped = 0
    for state in trainer:
        now = {
            f"{kind}/{name}": tensor.clone()
            for kind, average in trainer.averages.items()
            for name, tensor in average.state_dict().items()
        }
        for name, tensor in now.items():
            if state.skipped:
                assert torch.equal(tensor, before[name]), name
            assert tensor.isfinite().all()
        skipped += state.skipped
        before = now
    assert skipped == 1
    assert {average.updates for average in trainer.averages.values()} == {19}


def test_resumed_averages_are_bitwise_the_unbroken_ones(
    make_run_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_run_config(ema={"profiles": [0.05, 0.10]})
    whole, half = Trainer(config), Trainer(config)
    for _ in whole:
        pass
    for state in half:
        if state.step == 9:
            break
    half.save(tmp_path / "half.safetensors")
    resumed = Trainer(config, resume=tmp_path / "half.safetensors")
    assert {average.updates for average in resumed.averages.values()} == {9}
    for _ in resumed:
        pass
    for name, average in whole.averages.items():
        for key, tensor in average.state_dict().items():
            assert torch.equal(resumed.averages[name].state_dict()[key], tensor), (name, key)
    # The parts of the file: the main average where it always was.
    info, parts = read_checkpoint(tmp_path / "half.safetensors", ["ema", "ema_0.1"])
    assert info.averages == ["ema", "ema_0.05", "ema_0.1"]
    assert set(parts["ema"]) == set(parts["ema_0.1"]) == set(half.ema.state_dict())
    assert info.parameters == 257 + 1


def test_a_profile_may_end_but_not_begin_in_mid_run(
    make_run_config: MakeConfig, tmp_path: Path
) -> None:
    one = Trainer(make_run_config(ema={"profiles": [0.05]}))
    next(iter(one))
    one.save(tmp_path / "a.safetensors")
    two = make_run_config(ema={"profiles": [0.05, 0.10]})
    with pytest.raises(CheckpointError, match=r"has no average ema_0\.1, and one cannot begin"):
        Trainer(two, resume=tmp_path / "a.safetensors")
    none = Trainer(make_run_config(), resume=tmp_path / "a.safetensors")
    assert list(none.averages) == ["ema"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"profiles": [0.05, 0.3]}, r"ema\.profiles = \[0.05, 0.3\]: sigma_rel = 0.3 .* 0\.2887"),
        ({"profiles": [0.0]}, "sigma_rel = 0.0 is no length"),
        ({"profiles": [0.1, 0.10]}, r"0\.1 stands twice"),
        ({"profiles": 0.1}, r"ema\.profiles = 0\.1: input should be a list"),
        ({"profiles": ["long"]}, r"ema\.profiles\.0 = 'long'"),
        ({"snapshot_every_images": 64}, r"ema\.snapshot_every_images = 64 has nothing to keep"),
        ({"profiles": [0.1], "snapshot_every_images": 0}, r"ema\.snapshot_every_images = 0"),
        ({"profiles": [0.1], "snapshot_dtype": "bfloat16"}, "'float32' or 'float16'"),
    ],
)
def test_configs_that_cannot_be_are_refused_by_name(
    make_run_config: MakeConfig, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        make_run_config(ema=changes)
    assert "\n" not in str(caught.value)
