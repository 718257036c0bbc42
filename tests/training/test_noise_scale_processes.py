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


def squares(config: TrainConfig) -> dict[str, list[float]]:
    """Mean squared norms of parts' mean gradients, of each step: of 32 images, of 16 one after the
    other, and of the 16 that two processes reduce at a time, 8 of each."""
    trainer = Trainer(config)
    weights = [p for p in trainer.objective.parameters() if p.requires_grad]
    found: dict[str, list[float]] = {"whole": [], "halves": [], "sharded": []}
    for step, batch in enumerate(trainer.stream.batches(0, STEPS, 0)):
        whole = trainer.inputs.draw(batch, step)
        losses = trainer.objective(whole.x0, whole.sigma, whole.noise, **whole.keywords)
        quarters = losses.split(8)

        def norm(*parts: torch.Tensor, numbers: bool | None = None) -> float:
            mean = torch.cat(parts).mean()
            gradients = torch.autograd.grad(mean, weights, retain_graph=True, allow_unused=True)
            kept = [g for g in gradients if g is not None and numbers in (None, not g.ndim)]
            return sum(float(g.double().square().sum()) for g in kept)

        found["whole"].append(norm(losses))
        found["halves"].append((norm(*quarters[:2]) + norm(*quarters[2:])) / 2)
        pairs = [(quarters[0], quarters[2]), (quarters[1], quarters[3])]
        # Single numbers are not cut: each process counts its own 8.
        cut = sum(norm(*pair, numbers=False) for pair in pairs) / 2
        found["sharded"].append(cut + sum(norm(part, numbers=True) for part in quarters) / 4)
        trainer.train_step(batch, config.optimizer.lr)
    return found


def test_it_is_told_the_norms_of_the_parts(
    make_run_config: Callable[..., TrainConfig], launch: Launch, tmp_path: Path
) -> None:
    launch(__file__, "as_two")
    expected = squares(make_run_config(model=MODEL))
    for way in WAYS:
        told = torch.load(tmp_path / f"{way}.pt")
        assert len(told) == STEPS
        for step, (small_square, large_square, small, large) in enumerate(told):
            assert (small, large) == (16, 32), way
            parts = expected["sharded" if way == "sharded" else "halves"][step]
            assert small_square == pytest.approx(parts, rel=1e-5), way
            assert large_square == pytest.approx(expected["whole"][step], rel=1e-5), way


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(sys.argv[2]))
    leave_processes()
