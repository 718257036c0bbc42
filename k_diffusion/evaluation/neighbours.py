"""Nearest neighbours: are samples new, or are they training images again?"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from k_diffusion.evaluation.distances import Distances, rows_of


def nearest(
    queries: torch.Tensor, references: torch.Tensor, *, chunk: int = 256
) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest reference of each query, by Euclidean distance over all values, in float64.

    Args:
        queries: shape (count, ...).
        references: shape (count, ...), the same size a row.
        chunk: queries compared at a time; bounds the memory.

    Returns:
        Distances and reference indices, both of shape (count,).
    """
    q, r = rows_of(queries), rows_of(references)
    if q.shape[1] != r.shape[1] or not len(r):
        raise ValueError(
            f"queries of {q.shape[1]} values cannot be compared with {len(r)} references of "
            f"{r.shape[1]}; the same size a row fits"
        )
    found = [block.nearest() for _, block in Distances(q, r, chunk)]
    return torch.cat([f[0] for f in found]), torch.cat([f[1] for f in found])


def nearest_other(
    images: torch.Tensor, *, of: torch.Tensor | None = None, chunk: int = 256
) -> torch.Tensor:
    """Each image's distance to its nearest other image (leave-one-out), shape (count,).

    Args:
        images: shape (count, ...).
        of: the numbers of those that are asked for, int64; None: all.
        chunk: images compared at a time; bounds the memory.
    """
    return _nearest_others(images, of, chunk)[0]


@dataclass(frozen=True)
class Memorised:
    """How near samples are to training images, beside how near these are to one another.

    Attributes:
        share: of samples that count as memorised, see `memorised_share`.
        ratio: each sample's distance to its nearest training image, divided by that image's to its
            own nearest other one; 0 for a copy. Shape (count,).
        nearest: that training image's number, int64, shape (count,).
        other: the number of that image's own nearest other one, int64, shape (count,).
    """

    share: float
    ratio: Tensor = field(repr=False)
    nearest: Tensor = field(repr=False)
    other: Tensor = field(repr=False)

    def closest(self, count: int) -> Tensor:
        """The numbers of the samples most like a training image, the most alike first."""
        return self.ratio.argsort(stable=True)[:count]


def memorisation(samples: torch.Tensor, training: torch.Tensor, *, chunk: int = 256) -> Memorised:
    """Each sample's nearest training image, and how much nearer than usual it is.

    Args:
        samples: images or their features, shape (count, ...), at least one.
        training: shape (count, ...), at least two.
        chunk: rows compared at a time; bounds the memory.
    """
    if not len(samples):
        raise ValueError("0 samples have no share; give at least one")
    distance, index = nearest(samples, training, chunk=chunk)
    asked, place = index.unique(return_inverse=True)
    usual, others = (found[place] for found in _nearest_others(training, asked, chunk))
    share = ((distance < usual) | (distance == 0)).double().mean()
    ratio = torch.where(distance == 0, 0.0, distance / usual)  # of doubled images it is infinite
    return Memorised(float(share), ratio, index, others)


def memorised_share(samples: torch.Tensor, training: torch.Tensor) -> float:
    """The share of samples that look more like one training image than real images look alike.

    A sample counts if it is nearer to its nearest training image than that image is to its own
    nearest other training image, or if it is an exact copy. Held-out real images give the share
    that chance gives (about a third to a half where data are plenty): a share near theirs says
    that the samples are as new as real images, a share near 1 that the training images came back.

    Args:
        samples: shape (count, ...), at least one.
        training: shape (count, ...), at least two.
    """
    return memorisation(samples, training).share


def _nearest_others(images: Tensor, of: Tensor | None, chunk: int) -> tuple[Tensor, Tensor]:
    rows = rows_of(images)
    if len(rows) < 2:
        raise ValueError(f"{len(rows)} images have no other; at least 2 are needed")
    numbers = torch.arange(len(rows), device=rows.device) if of is None else of
    found = []
    for place, block in Distances(rows[numbers], rows, chunk):
        block.leave_out(numbers[place])
        found.append(block.nearest())
    return torch.cat([f[0] for f in found]), torch.cat([f[1] for f in found])
