"""Averages that move only every so many steps: what they hold, and that nothing of it is lost."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from k_diffusion.training.checkpoint import CheckpointError, read_checkpoint
from k_diffusion.training.config import ConfigError, TrainConfig
from k_diffusion.training.dataset import ArraySource, Digits
from k_diffusion.training.ema import Ema, PowerFunction, Profile, WarmUp, exponent_of
from k_diffusion.training.resume import facts_of, state_of
from k_diffusion.training.run import run_training
from k_diffusion.training.snapshots import list_snapshots
from k_diffusion.training.trainer import Trainer

MakeConfig = Callable[..., TrainConfig]
LENGTHS = {"profiles": [0.05, 0.10]}
PROFILES = [WarmUp(), WarmUp(power=2 / 3, inv_gamma=2.0, max_decay=0.9), PowerFunction(0.1),
            WarmUp(power=100.0, max_decay=0.95)]  # fmt: skip
"""With a warm-up, with one that meets its limit, a power function, and a constant decay."""


def decays(profile: Profile, count: int) -> list[float]:
    """Their formulas once more."""
    if isinstance(profile, PowerFunction):
        power = exponent_of(profile.sigma_rel) + 1
        return [((t - 1) / t) ** power for t in range(1, count + 1)]
    assert isinstance(profile, WarmUp)
    free = [1 - (1 + i / profile.inv_gamma) ** -profile.power for i in range(count)]
    return [min(profile.max_decay, decay) for decay in free]


def slowly(profile: Profile, values: list[Tensor], every: int) -> Tensor:
    """An average moved by every step, in float64, that is shown at each the weights of the next
    step at which the one under test moves; it ends there."""
    stops = sorted({1, *range(every, len(values) + 1, every)})
    average = torch.zeros_like(values[0], dtype=torch.float64)
    for step, decay in enumerate(decays(profile, stops[-1]), start=1):
        shown = values[next(stop for stop in stops if stop >= step) - 1].double()
        average = decay * average + (1 - decay) * shown
    return average


def averages_of(trainer: Trainer) -> dict[str, Tensor]:
    return {
        f"{kind}/{name}": tensor.clone()
        for kind, average in trainer.averages.items()
        for name, tensor in average.state_dict().items()
    }


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert set(one) == set(other)
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("every", [1, 2, 7, 10])
@pytest.mark.parametrize("count", [1, 6, 20, 47])
def test_it_keeps_what_each_step_would_have_kept(profile: Profile, every: int, count: int) -> None:
    network = nn.Linear(4, 3)
    ema = Ema(network, profile, every)
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(3, 4, generator=generator) for _ in range(count)]
    for value in values:
        with torch.no_grad():
            network.weight.copy_(value)
        ema.update()
    expected = slowly(profile, values, every)
    assert (ema.state_dict()["weight"] - expected).abs().max() < 1e-6
    assert ema.updates == count
    assert ema.reached == (max(1, count - count % every))


@pytest.mark.parametrize("sigma_rel", [0.05, 0.2])
def test_a_power_function_weighs_intervals_by_its_integral(sigma_rel: float) -> None:
    network, every = nn.Linear(4, 3), 8
    ema = Ema(network, PowerFunction(sigma_rel), every)
    values = torch.randn(40, 3, 4, generator=torch.Generator().manual_seed(0))
    for value in values:
        with torch.no_grad():
            network.weight.copy_(value)
        ema.update()
    power, stops = exponent_of(sigma_rel) + 1, [0, 1, *range(every, 41, every)]
    shares = [(b / 40) ** power - (a / 40) ** power for a, b in pairwise(stops)]
    expected = sum(s * values[b - 1].double() for s, b in zip(shares, stops[1:], strict=True))
    assert (ema.state_dict()["weight"] - expected).abs().max() < 1e-6


def test_buffers_move_with_the_average() -> None:
    network = nn.BatchNorm1d(2)
    ema = Ema(network, every=3)
    seen = []
    for _ in range(6):
        network.num_batches_tracked += 1
        ema.update()
        seen.append(int(ema.state_dict()["num_batches_tracked"]))
    assert seen == [1, 1, 3, 3, 3, 6]


# ---------------------------------------------------------------- in a run


def test_in_a_run_it_is_the_average_of_that_network_s_course(make_run_config: MakeConfig) -> None:
    plain = Trainer(make_run_config(ema=LENGTHS))
    seldom = Trainer(make_run_config(ema={**LENGTHS, "update_every_steps": 6}))
    losses = [(state.loss, state.ema_decay) for state in plain]
    values = []
    for state in seldom:
        assert (state.loss, state.ema_decay) == losses[state.step - 1]  # of neither is it a part
        values.append(seldom.network.enter.weight.detach().clone())
    for average in seldom.averages.values():
        expected = slowly(average.profile, values, 6)
        assert (average.state_dict()["enter.weight"] - expected).abs().max() < 1e-6
        assert (average.updates, average.reached) == (20, 18)


def test_a_skipped_step_does_not_count(make_run_config: MakeConfig) -> None:
    digits = Digits()
    config = make_run_config(ema={**LENGTHS, "update_every_steps": 4})
    images = digits.images.clone()
    images[int(Trainer(config).stream[5].indices[5])] = math.nan
    trainer = Trainer(config, source=ArraySource(images, digits.labels, digits.class_names))
    moved, before, values = [], averages_of(trainer), []
    for state in trainer:
        now = averages_of(trainer)
        if any(not torch.equal(now[name], before[name]) for name in now):
            moved.append(state.step)
        before = now
        if not state.skipped:
            values.append(trainer.network.enter.weight.detach().clone())
    assert moved == [1, 4, 9, 13, 17]  # step 6 is skipped
    expected = slowly(trainer.averages["ema_0.1"].profile, values, 4)
    assert (before["ema_0.1/enter.weight"] - expected).abs().max() < 1e-6


@pytest.mark.parametrize("stop", [1, 3, 9, 10])
def test_resumed_between_two_moves_it_is_bitwise_the_unbroken_one(
    make_run_config: MakeConfig, tmp_path: Path, stop: int
) -> None:
    config = make_run_config(ema={**LENGTHS, "update_every_steps": 5})
    whole, part = Trainer(config), Trainer(config)
    course = [averages_of(whole) for _ in whole]
    for state in part:
        if state.step == stop:
            break
    part.save(tmp_path / "part.safetensors")
    resumed = Trainer(config, resume=tmp_path / "part.safetensors")
    assert_same(averages_of(resumed), course[stop - 1])
    assert resumed.ema.reached == max(1, stop - stop % 5)
    for state in resumed:
        assert_same(averages_of(resumed), course[state.step - 1])
    assert_same(averages_of(whole), averages_of(resumed))


def test_going_back_takes_up_where_the_average_stood(
    make_run_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_run_config(ema={**LENGTHS, "update_every_steps": 5})
    straight, back = Trainer(config), Trainer(config)
    straight.passed_over = [(7, 9)]
    for _ in straight:
        pass
    for state in back:
        if state.step == 7 and not back.passed_over:
            back.save(tmp_path / "seven.safetensors")
        if state.step == 12 and not back.passed_over:
            back.go_back(tmp_path / "seven.safetensors", 8, 9)
            assert (back.ema.updates, back.ema.reached) == (7, 5)
    assert_same(averages_of(straight), averages_of(back))


def test_the_interval_may_change_at_a_resume(make_run_config: MakeConfig, tmp_path: Path) -> None:
    first = Trainer(make_run_config(ema={"update_every_steps": 5}))
    values = []
    for state in first:
        values.append(first.network.enter.weight.detach().clone())
        if state.step == 8:
            break
    first.save(tmp_path / "eight.safetensors")
    then = Trainer(make_run_config(ema=LENGTHS | {"profiles": []}),
                   resume=tmp_path / "eight.safetensors")  # fmt: skip
    values += [then.network.enter.weight.detach().clone() for _ in then]
    # Steps 6 to 9 show the network of step 9; all others that are left move by themselves.
    shown = [values[i] for i in (0, 4, 4, 4, 4, 8, 8, 8, 8, *range(9, 20))]
    expected = slowly(WarmUp(), shown, 1)
    assert (then.ema.state_dict()["enter.weight"] - expected).abs().max() < 1e-6


def test_checkpoints_from_before_had_moved_at_each_update(
    make_run_config: MakeConfig, tmp_path: Path
) -> None:
    trainer = Trainer(make_run_config())
    next(iter(trainer))
    state = facts_of(trainer)["state"]
    assert (state["ema_updates"], state["ema_reached"]) == (1, 1)
    trainer.save(tmp_path / "one.safetensors")
    info, _ = read_checkpoint(tmp_path / "one.safetensors", ["ema"])
    del info.state["ema_reached"]
    assert state_of(info).ema_reached == 1
    info.state["ema_reached"] = 2
    with pytest.raises(CheckpointError, match="averages that moved at update 2 of 1"):
        state_of(info)


def test_snapshots_tell_the_time_that_they_hold(make_run_config: MakeConfig) -> None:
    ema = {**LENGTHS, "update_every_steps": 6, "snapshot_every_images": 256}
    config = make_run_config(ema=ema)
    run_training(config, progress=False, say=lambda line: None)
    found = list_snapshots(config.out)
    # After steps 8, 16 and 20.
    assert [(s.images_seen, s.updates) for s in found] == [(256, 6), (512, 12), (640, 18)]


@pytest.mark.parametrize("value", [0, -1, 1.5, "none"])
def test_intervals_that_cannot_be_are_refused(make_run_config: MakeConfig, value: object) -> None:
    with pytest.raises(ConfigError, match=r"ema\.update_every_steps"):
        make_run_config(ema={"update_every_steps": value})
