"""Three processes: a resume is bitwise exact, and each may use other weights than the others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from k_diffusion.models import MODELS
from k_diffusion.training.checkpoint import read_checkpoint
from k_diffusion.training.config import TrainConfig
from k_diffusion.training.trainer import Trainer

Launch = Callable[..., list[str]]
WAYS: dict[str, dict[str, Any]] = {
    "overlapped": {},
    "averaged": {"micro_batch_size": "auto"},
    "sharded": {"parallel": "fsdp"},
}
MODEL = {"num_classes": 10, "prediction": "edm", "time_convention": "log_sigma"}


def config_with(network: str, **changes: Any) -> TrainConfig:
    import conftest

    torch.set_num_threads(1)
    model = {"type": network, "sigma_data": "auto", "dropout": 0.2, **MODEL}
    config: TrainConfig = conftest.config_of(
        **{"model": model, "batch_size": 36, "total_images": 36 * 6, **changes}
    )
    return config


def everything(trainer: Trainer, path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    trainer.save(path)
    info, parts = read_checkpoint(path, ["model", "ema", "optimizer"])
    return {f"{part}/{n}": t for part, named in parts.items() for n, t in named.items()}, info.state


# ---------------------------------------------------------------- a resume


def resumed(folder: Path) -> None:
    import conftest

    class Moving(conftest.Tiny):
        """What it gives depends on a running mean of what its process has seen."""

        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.middle = nn.Conv2d(1, 1, 3, padding=1)
            self.norm = nn.BatchNorm2d(1, momentum=0.5)

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            self.norm(self.middle(x))
            mean: Any = self.norm.running_mean
            mean = mean.clone()
            y: Tensor = super().forward(x - mean, *args, **kwargs)
            return y + self.norm(self.middle(x))

    MODELS["moving"] = Moving
    for way, changes in WAYS.items():
        config = config_with("moving", noise_scale_decay=0.9, **changes)
        half = folder / (way if way == "sharded" else f"{way}.safetensors")

        def run(
            resume: Path | None = None, stop: int = 0, config: TrainConfig = config
        ) -> tuple[Trainer, list[Any]]:
            trainer, seen = Trainer(config, resume=resume), []
            for state in trainer:
                seen.append([state.loss, state.grad_norm, state.noise_scale])
                if state.step == stop:
                    break
            return trainer, seen

        trainer, _ = run(stop=3)
        trainer.save(half)
        trainer.processes.wait()
        whole, theirs = run()[0], run(half)[0]
        one, facts = everything(whole, folder / "one.safetensors")
        other, their_facts = everything(theirs, folder / "other.safetensors")
        assert [n for n in one if not torch.equal(one[n], other[n])] == [], way
        assert facts == their_facts, way
        # Where each process holds a share, noise is told from gradient by two micro-batches a step.
        counts = [int(one[f"{part}/calls"]) for part in ("model", "ema")]
        assert counts == ([12, 12] if way == "sharded" else [6, 6]), (way, counts)
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            assert torch.equal(one[f"model/norm.{name}"], one[f"ema/norm.{name}"]), (way, name)
        means = trainer.processes.gather(float(trainer.network.norm.running_mean))  # type: ignore[union-attr, arg-type]
        assert len(set(means)) == (3 if way == "overlapped" else 1), means


def test_three_processes_resume_bitwise(launch: Launch) -> None:
    launch(__file__, "resumed", processes=3)


# ---------------------------------------------------------------- weights of some


def uneven(folder: Path) -> None:
    import conftest

    rank = 0

    class Uneven(conftest.Tiny):
        """Some weights are used by some processes, or for some samples."""

        way = ""

        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.expert = nn.Conv2d(1, 1, 3, padding=1)
            self.gain = nn.Parameter(torch.zeros(()))
            self.other = nn.Parameter(torch.zeros(()))

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            y: Tensor = super().forward(x, *args, **kwargs)
            if self.way == "overlapped":
                used = len(x) > 1 or rank == 1
                return (y + self.expert(x)) * (1 + self.gain + self.other) if used else y
            y = y * (1 + (self.gain if rank == 1 else self.other))
            return y + self.expert(x) if rank == 0 or self.way == "sharded" else y

    MODELS["uneven"] = Uneven
    for way, changes in WAYS.items():
        Uneven.way = way
        trainer = Trainer(config_with("uneven", **changes))
        rank = trainer.processes.index
        assert all(not state.skipped for state in trainer)
        weights, _ = everything(trainer, folder / f"{way}.safetensors")
        for name in ("expert.weight", "gain", "other"):
            assert float(weights[f"optimizer/{name}/exp_avg_sq"].abs().max()) > 0, (way, name)
        if way != "sharded":
            sums = trainer.processes.gather([p.tolist() for p in trainer.network.parameters()])
            assert sums[0] == sums[1] == sums[2], way
        gains = (trainer.network.gain, trainer.network.other)
        numbers = trainer.processes.gather([float(p.detach()) for p in gains])  # type: ignore[operator]
        assert numbers[0] == numbers[1] == numbers[2], (way, numbers)
        assert 0 not in numbers[0]


def test_weights_that_not_every_process_uses(launch: Launch) -> None:
    launch(__file__, "uneven", processes=3)
