"""The courses of the learning rate: each its formula, the established ones to 1e-12."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from k_diffusion.training.config import ConfigError, TrainConfig
from k_diffusion.training.learning_rate import COURSES, learning_rate
from k_diffusion.training.sections import COURSE_OPTIONS, OptimizerConfig
from k_diffusion.training.trainer import Trainer
from k_diffusion.utils import ConstantLRWithWarmup, ExponentialLR, InverseLR

MakeConfig = Callable[..., TrainConfig]
BATCH, TOTAL = 100, 1000


def course(**options: Any) -> list[float]:
    """The rate of steps of 100 images, to one beyond the run's end."""
    config = OptimizerConfig(**{"lr": 2.0, **options})
    return [learning_rate(config, seen, TOTAL, BATCH) for seen in range(0, TOTAL + BATCH, BATCH)]


def test_constant_and_cosine() -> None:
    assert course() == [2.0] * 11
    assert course(warmup_images=400) == [0.5, 1.0, 1.5] + [2.0] * 8
    for i, lr in enumerate(course(schedule="cosine", final_share=0.1)):
        assert abs(lr - (0.2 + 1.8 * (0.5 + 0.5 * math.cos(math.pi * i / 10)))) < 1e-12
    both = course(schedule="cosine", warmup_images=400)
    assert both[:4] == [0.5, 1.0, 1.5, 2.0]
    assert abs(both[7] - 1.0) < 1e-12  # half-way between the warm-up's end and the run's
    assert both[10] == 0


def test_inverse_square_root() -> None:
    rates = course(schedule="inverse_sqrt", decay_images=250, warmup_images=200)
    expected = [1.0, 2.0, 2.0] + [2.0 / math.sqrt(100 * i / 250) for i in range(3, 11)]
    assert max(abs(a - b) for a, b in zip(rates, expected, strict=True)) < 1e-12
    floored = course(schedule="inverse_sqrt", decay_images=250, min_lr=1.5)
    assert min(floored) == floored[-1] == 1.5


ESTABLISHED: dict[str, tuple[Callable[..., Any], dict[str, Any], dict[str, Any]]] = {
    "inverse": (
        InverseLR,
        {"inv_gamma": 3.0, "power": 0.7, "warmup": 0.9},
        {"schedule": "inverse", "decay_images": 300, "power": 0.7, "warmup_decay": 0.9},
    ),
    "inverse_floor": (
        InverseLR,
        {"inv_gamma": 2.0, "warmup": 0.5, "min_lr": 0.9},
        {"schedule": "inverse", "decay_images": 200, "warmup_decay": 0.5, "min_lr": 0.9},
    ),
    "exponential": (
        ExponentialLR,
        {"num_steps": 7, "decay": 0.3, "warmup": 0.8},
        {"schedule": "exponential", "decay_images": 700, "decay": 0.3, "warmup_decay": 0.8},
    ),
    "exponential_floor": (
        ExponentialLR,
        {"num_steps": 2, "min_lr": 0.4},
        {"schedule": "exponential", "decay_images": 200, "min_lr": 0.4},
    ),
    "constant": (ConstantLRWithWarmup, {"warmup": 0.95}, {"warmup_decay": 0.95}),
}


@pytest.mark.parametrize("name", ESTABLISHED)
def test_established_courses_are_reached(name: str) -> None:
    make, theirs, ours = ESTABLISHED[name]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = make(optimizer, **theirs)
    for step, rate in enumerate(course(**ours)):
        assert abs(rate - schedule.get_last_lr()[0]) < 1e-12, step
        optimizer.step()
        schedule.step()


def test_every_course_is_known_to_the_config() -> None:
    assert set(COURSES) == set(COURSE_OPTIONS)
    for name, options in COURSE_OPTIONS.items():
        length = {"decay_images": 10.0} if "decay_images" in options else {}
        assert OptimizerConfig(schedule=name, **length).schedule == name  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        ({"final_share": 0.5}, r"optimizer.final_share = 0.5 is for schedule = 'cosine', not 'c"),
        (
            {"decay_images": 5},
            "decay_images = 5.0 is for schedule = 'inverse_sqrt' or 'inverse' or",
        ),
        ({"schedule": "cosine", "min_lr": 0.1}, "min_lr = 0.1 is for schedule = .*: leave it out"),
        ({"schedule": "exponential", "decay_images": 1, "power": 2}, "power = 2.0 is for schedule"),
        ({"schedule": "inverse", "decay_images": 1, "decay": 0.4}, "decay = 0.4 is for schedule"),
        ({"schedule": "inverse_sqrt"}, "decay_images is missing, which schedule = 'inverse_sqrt'"),
        ({"warmup_images": 3, "warmup_decay": 0.5}, "warmup_decay = 0.5 takes the place of"),
        ({"warmup_decay": 1.0}, "optimizer.warmup_decay = 1.0: input should be less than 1"),
        (
            {"schedule": "exponential", "decay_images": 1, "decay": 2.0},
            "optimizer.decay = 2.0: input should be less than or equal to 1",
        ),
        (
            {"schedule": "inverse", "decay_images": 1, "lr": 1e-4, "min_lr": 1e-2},
            "optimizer.min_lr = 0.01 is above lr = 0.0001, so that nothing would fall: give at mo",
        ),
        ({"momentum": 0.9}, "optimizer.momentum = 0.9 is for type = 'muon': leave it out"),
        ({"type": "lion"}, "optimizer.type = 'lion' is not one of 'adamw' or 'muon'"),
    ],
)
def test_options_without_effect_are_refused(
    make_run_config: MakeConfig, optimizer: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_run_config(optimizer=optimizer)


def test_it_is_used_and_groups_have_their_share(make_run_config: MakeConfig) -> None:
    config = make_run_config(optimizer={"lr": 1e-2, "warmup_images": 320, "schedule": "cosine"})

    def two_groups(network: torch.nn.Module) -> torch.optim.Optimizer:
        first, *others = network.parameters()
        return torch.optim.AdamW([{"params": [first], "lr_scale": 0.25}, {"params": others}])

    trainer = Trainer(config, optimizer=two_groups)
    for state in trainer:
        expected = learning_rate(config.optimizer, state.images_seen - 32, 640, 32)
        assert state.lr == expected
        assert [g["lr"] for g in trainer.optimizer.param_groups] == [0.25 * expected, expected]
