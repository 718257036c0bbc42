"""What the noise scale is told by two processes, beside gradients computed part by part in one."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from k_diffusion.models import MODELS
from k_diffusion.training.config import TrainConfig
from k_diffusion.training.devices import leave_processes
from k_diffusion.training.trainer import Trainer

Launch = Callable[..., list[str]]
WAYS: dict[str, dict[str, Any]] = {
    "overlapped": {},
    "averaged": {"micro_batch_size": "auto"},
    "sharded": {"parallel": "fsdp"},
}
MODEL = {
    "type": "blocks",
    "num_classes": 10,
    "prediction": "edm",
    "time_convention": "log_sigma",
    "sigma_data": "auto",
}
STEPS = 2


def recorded(config: TrainConfig) -> list[list[float]]:
    trainer = Trainer(config)
    assert trainer.noise_scale is not None
    told: list[list[float]] = []
    update = trainer.noise_scale.update

    def noted(*arguments: float) -> None:
        told.append(list(arguments))
        update(*arguments)

    trainer.noise_scale.update = noted  # type: ignore[method-assign]
    list(itertools.islice(trainer, STEPS))
    return told


def as_two(folder: Path) -> None:
    import conftest

    torch.set_num_threads(1)
    MODELS["blocks"] = conftest.Blocks
    for way, changes in WAYS.items():
        config = conftest.config_of(model=MODEL, noise_scale_decay=0.9, **changes)
        torch.save(recorded(config), folder / f"{way}.pt")


def squares(config: TrainConfig, sizes: list[int]) -> dict[int, list[float]]:
    """Size of a part -> mean squared norm of the parts' mean gradients, of each step."""
    trainer = Trainer(config)
    weights = [p for p in trainer.objective.parameters() if p.requires_grad]
    found: dict[int, list[float]] = {size: [] for size in sizes}
    for step, batch in enumerate(trainer.stream.batches(0, STEPS, 0)):
        whole = trainer.inputs.draw(batch, step)
        losses = trainer.objective(whole.x0, whole.sigma, whole.noise, **whole.keywords)
        for size in sizes:
            norms = []
            for part in losses.split(size):
                gradients = torch.autograd.grad(
                    part.mean(), weights, retain_graph=True, allow_unused=True
                )
                norms.append(
                    sum(float(g.double().square().sum()) for g in gradients if g is not None)
                )
            found[size].append(sum(norms) / len(norms))
        trainer.train_step(batch, config.optimizer.lr)
    return found


def test_it_is_told_the_norms_of_the_parts(
    make_run_config: Callable[..., TrainConfig], launch: Launch, tmp_path: Path
) -> None:
    launch(__file__, "as_two")
    expected = squares(make_run_config(model=MODEL), [16, 32])
    for way in WAYS:
        told = torch.load(tmp_path / f"{way}.pt")
        assert len(told) == STEPS
        for step, (small_square, large_square, small, large) in enumerate(told):
            assert (small, large) == (16, 32), way
            if way != "sharded":  # whose parts are of other samples
                assert small_square == pytest.approx(expected[16][step], rel=1e-4), way
            assert large_square == pytest.approx(expected[32][step], rel=1e-4), way


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(sys.argv[2]))
    leave_processes()
