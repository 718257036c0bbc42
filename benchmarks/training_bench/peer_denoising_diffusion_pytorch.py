"""denoising-diffusion-pytorch's Trainer, as it comes but for what the measure needs.

Its images go through torchvision, of which this process has a stand-in: the five transformations
that the Trainer's data set takes, by the same calls of Pillow and numpy.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.machinery
import os
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from model_bench.library import Stub

from training_bench.library import SIZE, Laps, Setting, Stopwatch

NAME = "denoising_diffusion_pytorch"


class Compose:
    """One after the other."""

    def __init__(self, steps: Sequence[Any]) -> None:
        self.steps = steps

    def __call__(self, image: Any) -> Any:
        for step in self.steps:
            image = step(image)
        return image


class Lambda:
    """Any function."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def __call__(self, image: Any) -> Any:
        return self.function(image)


class Resize:
    """Until the shorter side is of a size; nothing where it is."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size

    def __call__(self, image: Any) -> Any:
        height, width = self.size
        return image if image.size == (width, height) else image.resize((width, height), 2)


class RandomHorizontalFlip:
    """Every second one, at random."""

    def __call__(self, image: Any) -> Any:
        return image.transpose(0) if torch.rand(1) < 0.5 else image


class CenterCrop:
    """The middle."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size

    def __call__(self, image: Any) -> Any:
        height, width = self.size
        left, top = (image.width - width) // 2, (image.height - height) // 2
        return image.crop((left, top, left + width, top + height))


class ToTensor:
    """Floats in [0, 1], channels first."""

    def __call__(self, image: Any) -> torch.Tensor:
        import numpy as np

        values = torch.from_numpy(np.array(image))
        return values.permute(2, 0, 1).contiguous().to(torch.float32).div(255)


def package(folder: Path) -> Any:
    """The module with Unet, GaussianDiffusion and Trainer, once what it lacks stands in place."""
    import accelerate  # noqa: F401  before the stand-ins: it looks which packages there are

    sys.path.insert(0, str(folder))
    transforms: Any = types.ModuleType("torchvision.transforms")
    for kind in (Compose, Lambda, Resize, RandomHorizontalFlip, CenterCrop, ToTensor):
        setattr(transforms, kind.__name__, kind)
    whole: Any = types.ModuleType("torchvision")
    whole.transforms, whole.utils = transforms, Stub("torchvision.utils")
    for module in (whole, whole.transforms, whole.utils):
        module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
        sys.modules[module.__name__] = module
    # In place of the package, which imports all its trainers: of its modules just the one is run.
    empty = types.ModuleType(NAME)
    empty.__path__ = [str(folder / NAME)]
    sys.modules[NAME] = empty
    return importlib.import_module(f"{NAME}.{NAME}")


class Theirs:
    """Its Trainer, made to run some steps at a time."""

    def __init__(self, folder: Path, setting: Setting) -> None:
        module = package(folder)
        module.cpu_count = lambda: setting.workers
        torch.manual_seed(0)
        unet = module.Unet(**setting.network)
        self.parameters = sum(p.numel() for p in unet.parameters())
        self.name, self.version = "denoising-diffusion-pytorch", module.__version__
        diffusion = module.GaussianDiffusion(unet, image_size=SIZE)
        results = Path(setting.images).parent / "theirs"
        self.trainer = module.Trainer(
            diffusion,
            setting.images,
            train_batch_size=setting.batch,
            save_and_sample_every=10**9,
            results_folder=str(results),
            calculate_fid=False,
        )
        # As after its first steps, in which it copies the weights instead.
        self.trainer.ema.initted.fill_(True)
        self.trainer.ema.step.fill_(1000)
        self._unet, self._watch = unet, None

    def run(self, steps: int, ema_every: int, watch: Stopwatch) -> None:
        trainer = self.trainer
        if self._watch is None:
            self._watch = watch
            watch.watch_calculation(self._unet)
            trainer.dl = Laps(trainer.dl, watch)
            trainer.opt.step = watch.timed("optimizer", trainer.opt.step)
            trainer.ema.update = watch.timed("ema", trainer.ema.update)
            accelerator = trainer.accelerator
            accelerator.clip_grad_norm_ = watch.timed("clip", accelerator.clip_grad_norm_)
        trainer.ema.update_every = ema_every
        trainer.train_num_steps = trainer.step + steps
        with (
            contextlib.redirect_stdout(sys.stderr),
            open(os.devnull, "w") as nowhere,
            contextlib.redirect_stderr(nowhere),  # its progress line, which is drawn all the same
        ):
            trainer.train()
        watch.stop()

    def load(self, number: int) -> Any:
        data, batch = self.trainer.ds, self.trainer.batch_size
        order = [(number * batch + i) % len(data) for i in range(batch)]
        return torch.utils.data.default_collate([data[i] for i in order])

    def close(self) -> None:
        self.trainer.dl = None  # and with it the processes that load


def training(folder: Path, setting: Setting) -> Theirs:
    return Theirs(folder, setting)
