"""Ours, on the peer's Unet."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import k_diffusion
from k_diffusion.training import parallel
from k_diffusion.training.config_file import make_config
from k_diffusion.training.metrics import METRICS, Log
from k_diffusion.training.progress import Progress
from k_diffusion.training.trainer import Trainer
from training_bench.library import CHANNELS, SIZE, Laps, Setting, Stopwatch
from training_bench.peer_denoising_diffusion_pytorch import package


class Wrapped(nn.Module):
    """Another library's network, with what ours asks of one."""

    prediction, time_convention, num_classes = "v", "timestep", 0

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Shape (B, 3, H, W) of x and times (B,)."""
        answer: Tensor = self.network(x, t)
        return answer


class Ours:
    """Our Trainer with what `run_training` does after each step: the log and the progress line."""

    def __init__(self, network: nn.Module, setting: Setting) -> None:
        self.name, self.version = "k_diffusion (ours)", k_diffusion.__version__
        self.parameters = sum(p.numel() for p in network.parameters())
        config = make_config({
            "model": {"type": "unet_tiny", "prediction": "v"},  # its place is taken by the peer's
            "data": {
                "source": "folder", "path": setting.images, "size": SIZE, "channels": CHANNELS,
                "flip": True, "classes": "none",
            },
            "total_images": 10**9,
            "batch_size": setting.batch,
            "workers": setting.workers,
            "optimizer": {"lr": 1e-4, "betas": [0.9, 0.99]},
            "out": str(Path(setting.images).parent / "ours"),
        })  # fmt: skip
        self.trainer = Trainer(config, network=Wrapped(network))
        self._network = network
        self._loop: Iterator[Any] | None = None

    def run(self, steps: int, ema_every: int, watch: Stopwatch) -> None:
        if self._loop is None:
            self._begin(watch)
        assert self._loop is not None
        self.trainer.ema.every = ema_every  # as ema.update_every_steps has it
        for _ in range(steps):
            state = next(self._loop)
            self._log.add(state)
            self._progress.show(state, self._log.recent, last=False)
        watch.stop()

    def _begin(self, watch: Stopwatch) -> None:
        trainer: Any = self.trainer
        watch.watch_calculation(self._network)
        batches = trainer.stream.batches
        trainer.stream.batches = lambda *args, **options: Laps(batches(*args, **options), watch)
        trainer.optimizer.step = watch.timed("optimizer", trainer.optimizer.step)
        trainer.ema.update = watch.timed("ema", trainer.ema.update)
        nn.utils.get_total_norm = watch.timed("clip", nn.utils.get_total_norm)
        clip = parallel.clip
        for name, module in list(sys.modules.items()):  # wherever its name was imported
            if name.startswith("k_diffusion.") and getattr(module, "clip", None) is clip:
                setattr(module, "clip", watch.timed("clip", clip))  # noqa: B010
        out = Path(trainer.config.out)
        out.mkdir(parents=True, exist_ok=True)
        self._log = Log(trainer, out / METRICS, resumed=False, say=print)
        self._nowhere = open(os.devnull, "w")  # noqa: SIM115  as long as this process
        self._progress = Progress(shown=True, stream=self._nowhere)  # drawn all the same
        self._loop = iter(trainer)

    def load(self, number: int) -> Any:
        return self.trainer.stream[number]

    def close(self) -> None:
        self._loop = None
        self._log.close()
        self._progress.close()
        self._nowhere.close()


def training(folder: Path, setting: Setting) -> Ours:
    torch.manual_seed(0)
    return Ours(package(folder).Unet(**setting.network), setting)
