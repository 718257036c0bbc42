"""What the network is told of each image: made by a conditioner, and hidden for a share of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from k_diffusion.models import Conditioner
from k_diffusion.training.config import ConfigError, TrainConfig
from k_diffusion.training.dataset import Batch, Purpose, Source, as_float
from k_diffusion.training.fit import check_null
from k_diffusion.training.inputs import draw_hidden
from k_diffusion.utils.maths import fold_seed


class Conditioning:
    """Makes the conditions of a run's samples, each a function of its place in the run.

    Args:
        config: of the run.
        conditioner: on its device; None: the network is told nothing.
        network: what is told.
        source: of the images.
        device: where the conditions are to be.
    """

    def __init__(
        self,
        config: TrainConfig,
        conditioner: Conditioner | None,
        network: nn.Module,
        source: Source,
        device: torch.device,
    ) -> None:
        self.config, self.conditioner, self.network = config, conditioner, network
        self.source, self.device = source, device

    def shown(self, batch: Batch, x0: Tensor, step: int, first: int) -> dict[str, Tensor]:
        """The samples' condition, a share of them without any.

        Args:
            batch: this process's part of the step.
            x0: its images, on the device.
            step: counted from 0.
            first: the place of its first sample in the whole step's batch.
        """
        if self.conditioner is None:
            return {}
        config, count = self.config, len(x0)
        hidden = draw_hidden(config.seed, step, config.batch_size, config.condition_dropout)
        hidden = hidden[first : first + count].to(self.device, non_blocking=True)
        start = step * config.batch_size + first
        condition = self._of(batch, x0, range(start, start + count))
        drop = getattr(self.network, "drop_condition", self.conditioner.hide)
        shown: dict[str, Tensor] = drop(condition, hidden)
        return shown

    def examples(self) -> dict[tuple[int, ...], dict[str, Tensor]]:
        """Shape -> the condition of the first image of it, once it is seen to fit the network.

        A shape that no image has is left out, where anything is told.

        Raises:
            ConfigError: it does not, or the conditioner would have to be trained.
        """
        if self.conditioner is None:
            return {tuple(shape): {} for shape in self.source.shapes}
        for name, parameter in self.conditioner.named_parameters():
            if parameter.requires_grad:
                raise ConfigError(
                    f"{type(self.conditioner).__name__} has weights that ask for gradients "
                    f"({name}), but only the network is trained: freeze them by "
                    "requires_grad_(False), or make them part of the network"
                )
        try:
            return {shape: self._example(number) for shape, number in first_ones(self.source)}
        except ValueError as error:
            raise ConfigError(
                f"model, conditioner and data do not fit each other: {error}"
            ) from None

    def _example(self, number: int) -> dict[str, Tensor]:
        assert self.conditioner is not None
        batch = self.source.batch(torch.tensor([number]))
        example = self._of(batch, as_float(batch.images.to(self.device)), [0])
        check: Any = getattr(self.network, "check_condition", None)
        if check is not None:
            check(1, **example)
        check_null(self.network, self.conditioner, example)
        return example

    @torch.no_grad()
    def _of(self, batch: Batch, x0: Tensor, places: Sequence[int]) -> dict[str, Tensor]:
        """What the conditioner makes of a batch; places: the samples' in the whole run."""
        assert self.conditioner is not None
        seeds = [fold_seed(self.config.seed, Purpose.CONDITION, place) for place in places]
        return condition_of(self.conditioner, batch, x0, self.source.class_names, seeds)


def first_ones(source: Source) -> Iterator[tuple[tuple[int, ...], int]]:
    """Each shape that images have, and the number of the first one of it."""
    if source.buckets is None:
        yield tuple(source.shape), 0
        return
    for bucket, shape in enumerate(source.shapes):
        if len(members := (source.buckets == bucket).nonzero()[:, 0]):
            yield tuple(shape), int(members[0])


def condition_of(
    conditioner: Conditioner,
    batch: Batch,
    x0: Tensor,
    class_names: Sequence[str],
    seeds: Sequence[int],
) -> dict[str, Tensor]:
    """What a conditioner makes of a batch.

    Args:
        conditioner: on its device.
        batch: of a source.
        x0: its images, on the device.
        class_names: of the source.
        seeds: one a sample, for what is left to chance.
    """
    raws: dict[str, Any] = {"clean": x0}
    if class_names:
        raws["label"] = batch.labels
        raws["class_name"] = [class_names[label] for label in batch.labels.tolist()]
    return conditioner.from_batch({**raws, **batch.raws}, seeds)
