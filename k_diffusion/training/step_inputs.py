"""Drawing what a step learns from: images, noise levels, noise, conditions, raw inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from k_diffusion.training.augmentation import Augmentation
from k_diffusion.training.conditioning import Conditioning
from k_diffusion.training.config import ConfigError, TrainConfig
from k_diffusion.training.dataset import Batch, Purpose, Stream, as_float
from k_diffusion.training.extra_losses import raw_tensors
from k_diffusion.training.inputs import Inputs, draw_noise
from k_diffusion.training.loss import draw_half_log_snr
from k_diffusion.training.objective import Objective
from k_diffusion.utils.maths import fold_seed


class StepInputs:
    """Draws this process's part of each step, from (seed, step) and its batch.

    Args:
        config: of the run.
        stream: this process's; it says which part of a step's batch it has.
        conditioning: makes what the network is told.
        density: u in [0, 1] -> log(alpha / sigma), the noise levels' distribution.
        objective: whose denoiser knows the noise levels, and whose extra losses ask for raw inputs.
        device: where the inputs are to be.
        augmentation: changes the images there.

    Raises:
        ConfigError: the data lacks what an extra loss asks for.
    """

    def __init__(
        self,
        config: TrainConfig,
        stream: Stream,
        conditioning: Conditioning,
        density: Callable[[Tensor], Tensor],
        objective: Objective,
        device: torch.device,
        augmentation: Augmentation,
    ) -> None:
        self.augmentation = augmentation
        self.config, self.stream, self.conditioning = config, stream, conditioning
        self.density, self.objective, self.device = density, objective, device
        if objective.raws:
            self._raws(stream.source.batch(torch.tensor([0])))

    def draw(self, batch: Batch, step: int) -> Inputs:
        """What this process's part of the step learns from.

        Args:
            batch: of the stream at this step.
            step: counted from 0.
        """
        config, device = self.config, self.device
        share = len(batch.images)
        mine = slice(share * self.stream.rank, share * (self.stream.rank + 1))
        first = step * config.batch_size + mine.start
        x0, said = self.augmentation(
            as_float(batch.images.to(device, non_blocking=True)), range(first, first + share)
        )
        generator = torch.Generator().manual_seed(fold_seed(config.seed, Purpose.LEVELS, step))
        half_log_snr = draw_half_log_snr(
            self.density, config.batch_size, generator, stratified=config.loss.stratified
        )
        denoiser: Any = self.objective.denoiser
        sigma = denoiser.path.sigma(half_log_snr)[mine]
        if device.type == "mps":  # it has no float64
            sigma = sigma.float()
        shape = (config.batch_size, *x0.shape[1:])
        return Inputs(
            x0=x0,
            sigma=sigma.to(device, non_blocking=True),
            noise=draw_noise(config.seed, step, shape, device)[mine],
            condition={**self.conditioning.shown(batch, x0, step, mine.start), **said},
            indices=batch.indices,
            step=step,
            first=mine.start,
            raws=self._raws(batch),
        )

    def _raws(self, batch: Batch) -> dict[str, Tensor]:
        """What the extra losses asked for, of a batch."""
        if not self.objective.raws:
            return {}
        try:
            return raw_tensors(self.objective.raws, batch.raws, self.device)
        except ValueError as error:
            raise ConfigError(f"loss.extra and data do not fit each other: {error}") from None
