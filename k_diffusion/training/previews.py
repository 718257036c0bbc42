"""Pictures of what a run's average draws, on the way: the same noises and conditions each time.

They change nothing of the run: network, buffers and random generators are afterwards as before,
and each picture is a function of the weights alone. So a resumed run leaves the same files.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from k_diffusion.guidance import cfg
from k_diffusion.training.config import ConfigError
from k_diffusion.training.drawing import sampler_of
from k_diffusion.training.health import unchanged_buffers, unchanged_generators
from k_diffusion.training.retention import checkpoint_path
from k_diffusion.training.told import make_told
from k_diffusion.utils.images import image_grid, save_png
from k_diffusion.utils.words import reason_of

if TYPE_CHECKING:
    from k_diffusion.training.trainer import Trainer

FOLDER = "previews"
SHOWN = 64
"""Pixels across, at least, of a small image in the grid."""


class Previews:
    """Draws and writes a run's previews.

    Args:
        trainer: whose average draws.

    Raises:
        ConfigError: the data is no images, no levels can be laid, or guidance is asked for where
            nothing is told.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer, self._config = trainer, trainer.config.preview
        if self._config.every_images is None:
            return
        shape = trainer.source.shape
        if len(shape) != 3 or not 1 <= shape[0] <= 4:
            raise ConfigError(
                f"preview draws images, but the data has shape {tuple(shape)}: leave "
                "preview.every_images out"
            )
        if "autoencoder" in trainer.source.facts():
            raise ConfigError(
                "preview draws images, but the data is latents: leave preview.every_images out"
            )
        if self._config.guidance != 1 and trainer.conditioner is None:
            raise ConfigError(
                f"preview.guidance = {self._config.guidance} compares with a network that is told "
                "nothing, and this one is told nothing anyway: leave it out"
            )
        sampler_of(trainer.denoiser, self._config, "preview")
        self.told = make_told(
            trainer.network,
            trainer.conditioner,
            trainer.source,
            self._config.count,
            seed=self._config.seed,
            device=trainer.device,
        )

    def save(self, say: Callable[[str], None]) -> Tensor | None:
        """Draw the average of this moment into its file, on the main process.

        Args:
            say: takes a line where there can be none: what it draws is not finite, say, or the
                disk refuses the file. The run goes on.

        Returns:
            The grid, uint8; None where there is none.
        """
        trainer = self._trainer
        if not trainer.processes.main:
            return None
        path = preview_path(trainer.config.out, trainer.images_seen)
        try:
            grid = self._grid()
            path.parent.mkdir(exist_ok=True)
            save_png(path, grid, self.text())
        except Exception as error:  # not finite, memory, the disk, data that are gone
            say(f"no preview at {trainer.images_seen} images: {reason_of(error)}")
            return None
        return grid

    def _grid(self) -> Tensor:
        images = self.draw()
        labels, names = self.told.labels, self._trainer.source.class_names
        turn = list(dict.fromkeys(labels))
        columns: list[str] = []
        if 1 < len(turn) <= 20 and len(labels) >= len(turn):
            columns = [names[k] if k < len(names) else str(k) for k in turn]
        return image_grid(images, columns_named=columns, scale=max(1, SHOWN // images.shape[-1]))

    def draw(self) -> Tensor:
        """The images of this moment, floats near [-1, 1] on the CPU, shape (count, C, H, W)."""
        trainer, config = self._trainer, self._config
        network = trainer.network
        with (
            unchanged_generators(network),
            unchanged_buffers(network),
            _evaluating(network),
            trainer.ema.swapped(),
            torch.no_grad(),
        ):
            denoiser: Any = trainer.denoiser
            if config.guidance != 1:
                denoiser = cfg(denoiser, config.guidance, null=self.told.null)
            return (
                sampler_of(denoiser, config, "preview")
                .sample_many(
                    config.count,
                    steps=config.steps,
                    shape=self.told.shape or trainer.source.shape,
                    condition=self.told,
                    seed=config.seed,
                    rank=0,
                    world=1,
                )
                .collect()
            )

    def text(self) -> dict[str, str]:
        """What the picture says of itself: all that it takes to draw it again."""
        trainer, config = self._trainer, self._config
        labels, shown = self.told.labels, self.told.shown
        said = {
            "images seen": trainer.images_seen,
            "step": trainer.step,
            "weights": "ema",
            "seeds": f"{config.seed} to {config.seed + config.count - 1}",
            "sampler": config.sampler,
            "scheduler": config.scheduler,
            "steps": config.steps,
            "guidance": config.guidance,
            "classes": ",".join(map(str, labels)) if labels else "none",
            "config": json.dumps(trainer.config.to_json()),
        }
        if shown is None:
            said["command"] = shlex.join(self._command())
        else:
            said["told of images"] = ",".join(map(str, shown.numbers.tolist()))
        return {name: str(value) for name, value in said.items()}

    def _command(self) -> list[str]:
        """That draws the same images, where the run has kept its checkpoint of this moment."""
        trainer, config = self._trainer, self._config
        words = [
            "k-diffusion",
            "sample",
            str(checkpoint_path(trainer.config.out, trainer.images_seen)),
        ]
        for option in ("seed", "sampler", "scheduler", "steps", "guidance"):
            words += [f"--{option}", str(getattr(config, option))]
        return [*words, "-n", str(config.count)]


def preview_path(run: str | Path, images_seen: int) -> Path:
    """Where a run's preview of this time lies."""
    return Path(run) / FOLDER / f"preview-{images_seen:012d}.png"


def remove_previews_after(run: str | Path, images_seen: int) -> None:
    """Remove those from after a time to which the run has gone back; 0: all."""
    last = preview_path(run, images_seen).name
    for path in (Path(run) / FOLDER).glob(f"preview-{'[0-9]' * 12}.png"):
        if path.name > last:
            path.unlink(missing_ok=True)


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """Within the block all modules evaluate; afterwards each does as before."""
    training = [module for module in network.modules() if module.training]
    network.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
