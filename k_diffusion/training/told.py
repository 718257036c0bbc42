"""What drawn samples are told: one mechanism for previews, figures, the doctor and the commands.

A sample's condition is a function of its number alone, and is made when the sample is drawn: no
batch holds more than its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from k_diffusion.guidance import Null
from k_diffusion.models import Conditioner
from k_diffusion.models.registry import known_classes
from k_diffusion.training.augmentation import KEYWORD, unaugmented
from k_diffusion.training.conditioning import condition_of
from k_diffusion.training.dataset import Purpose, Source, as_float
from k_diffusion.utils.maths import fold_seed

Lay = Callable[[Conditioner, int, int], list[int]]
"""Conditioner, its number of classes and that of samples -> the class of each sample; none where
the images of the data have to say it."""


def in_turn(conditioner: Conditioner, classes: int, count: int) -> list[int]:
    """All classes one after the other, again and again."""
    return [number % classes for number in range(count)]


class Shown:
    """What samples are told of images of the data.

    The images lie evenly over those of one size, which all samples have; samples beyond their
    number begin again. What is left to chance (a mask, say) is each sample's own, by seed and
    number.

    Args:
        conditioner: on its device.
        source: of the images. A broken one is replaced, as in training.
        count: samples.
        seed: of that chance.

    Attributes:
        shape: of the images, and of the samples.
        numbers: of the image that each sample is told of, int64, shape (count,).
    """

    def __init__(self, conditioner: Conditioner, source: Source, count: int, seed: int) -> None:
        self.conditioner, self.source, self.seed = conditioner, source, seed
        members, self.shape = of_one_size(source)
        self.numbers = evenly(members, count)

    def __call__(self, samples: Sequence[int]) -> dict[str, Tensor]:
        """The condition of some samples, by their numbers."""
        batch = self.source.batch(self.numbers[list(samples)])
        seeds = [fold_seed(self.seed, Purpose.CONDITION, sample) for sample in samples]
        x0 = as_float(batch.images.to(self.conditioner.device))
        return condition_of(self.conditioner, batch, x0, self.source.class_names, seeds)


class Told:
    """What samples are told: the `condition` of `KSampler.sample_many`.

    Args:
        network: what is told. Where it must be told how its images were augmented, samples are
            told that they were not.
        device: where it is.
        labels: the class of each sample; empty: no classes.
        common: keyword -> value, what all are told beside that, as a batch of one.
        shown: what each is told beside that of an image of the data.
        conditioner: that the network was trained with; None: it was told nothing.
    """

    def __init__(
        self,
        network: nn.Module,
        device: torch.device | str,
        *,
        labels: Sequence[int] = (),
        common: Mapping[str, Tensor] | None = None,
        shown: Shown | None = None,
        conditioner: Conditioner | None = None,
    ) -> None:
        self.network, self.device, self.conditioner = network, device, conditioner
        self.labels, self.common, self.shown = list(labels), dict(common or {}), shown

    @property
    def shape(self) -> tuple[int, ...] | None:
        """That the samples must have, of what they are told; None: any."""
        return None if self.shown is None else self.shown.shape

    @property
    def anything(self) -> bool:
        """Whether guidance has something to go away from."""
        return bool(self.labels or self.common or self.shown)

    @property
    def null(self) -> Null:
        """What guidance goes away from: the condition that training hid the others by.

        A network with `drop_condition` knows it itself; for others the conditioner does. What a
        network must be told of its images' augmentation stays.
        """
        if hasattr(self.network, "drop_condition"):
            return None
        return self._hidden

    def _hidden(self, condition: Mapping[str, Tensor]) -> dict[str, Tensor]:
        count = len(next(iter(condition.values()))) if condition else 0
        kept = {KEYWORD: condition[KEYWORD]} if unaugmented(self.network, 0, self.device) else {}
        if self.conditioner is None:
            return kept
        known = self.conditioner.keywords
        told = {name: value for name, value in condition.items() if name in known}
        hidden = torch.ones(count, dtype=torch.bool, device=self.device)
        return {**self.conditioner.hide(told, hidden), **kept}

    @torch.no_grad()
    def __call__(self, samples: Sequence[int]) -> dict[str, Tensor] | None:
        """The condition of some samples, by their numbers; None: nothing."""
        count = len(samples)
        told = unaugmented(self.network, count, self.device)
        for name, value in self.common.items():
            told[name] = value.to(self.device).expand(count, *value.shape[1:])
        if self.shown is not None:
            told |= self.shown(samples)
        if self.labels:
            own = [self.labels[sample] for sample in samples]
            told["class_label"] = torch.tensor(own, device=self.device)
        return told or None


def make_told(
    network: nn.Module,
    conditioner: Conditioner | None,
    source: Source | None,
    count: int,
    lay: Lay = in_turn,
    *,
    seed: int,
    device: torch.device | str,
) -> Told:
    """What so many samples are told, as it is usual: classes, where they are all that is told; else
    what images of the data are; without data nothing, as the conditioner says it.

    Args:
        network: what is told.
        conditioner: that it was trained with, on the device; None: it is told nothing.
        source: of images; None: there are none at hand.
        count: samples.
        lay: which classes they have.
        seed: of what is left to chance.
        device: of network and conditions.

    Raises:
        ValueError: there are no images, and the conditioner cannot tell nothing.
    """
    if conditioner is None:
        return Told(network, device)
    if tuple(getattr(conditioner, "keywords", ())) == ("class_label",):
        classes = known_classes(network)
        if classes and (labels := lay(conditioner, classes, count)):
            return Told(network, device, labels=labels, conditioner=conditioner)
    if source is not None:
        shown = Shown(conditioner, source, count, seed)
        return Told(network, device, shown=shown, conditioner=conditioner)
    return Told(network, device, common=conditioner.null(1), conditioner=conditioner)


def of_one_size(source: Source) -> tuple[Tensor, tuple[int, ...]]:
    """The images that are taken at the source's shape, or, where none is, at the first one's.

    Returns:
        Their numbers, int64, and that shape.
    """
    if source.buckets is None:
        return torch.arange(len(source)), tuple(source.shape)
    bucket = source.shapes.index(source.shape)
    if not bool((source.buckets == bucket).any()):
        bucket = int(source.buckets[0])
    return (source.buckets == bucket).nonzero()[:, 0], tuple(source.shapes[bucket])


def evenly(members: Tensor, count: int) -> Tensor:
    """So many of them, evenly spread; beyond their number they begin again."""
    places, many = torch.arange(count), len(members)
    return members[places * many // count if count <= many else places % many]
