"""How much of the data samples look like, and how much of the data they reach.

Each set stands for the region within balls around its points, each ball reaching to the point's
k-th nearest neighbour in its own set.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from k_diffusion.evaluation.distances import Distances, rows_of


class PrecisionRecall(NamedTuple):
    """Two shares from 0 to 1.

    Attributes:
        precision: of the samples that lie in a ball of the data.
        recall: of the data that lie in a ball of the samples.
    """

    precision: float
    recall: float


class DensityCoverage(NamedTuple):
    """Two figures whose expectation, where both sets come from one distribution, is known.

    Attributes:
        density: how many of the data's balls a sample lies in, divided by k; 1 is usual, more is
            possible.
        coverage: the share of the data's balls that hold a sample, from 0 to 1; usual is about
            1 - 2^-k for sets of equal size.
    """

    density: float
    coverage: float


def precision_recall(
    data: Tensor, samples: Tensor, *, k: int = 3, chunk: int = 256
) -> PrecisionRecall:
    """Improved precision and recall; compare only figures at the same counts.

    Args:
        data: features of real images, shape (count, features), more than k rows.
        samples: features of samples, likewise.
        k: the neighbour that a ball reaches to.
        chunk: rows compared at a time; bounds the memory.

    Source: Kynkaanniemi et al. 2019, arXiv:1904.06991, equations 1 and 2, with its k = 3.
    """
    real, made = _pair(data, samples, k)
    return PrecisionRecall(
        float(_inside(made, real, k, chunk).double().mean()),
        float(_inside(real, made, k, chunk).double().mean()),
    )


def density_coverage(
    data: Tensor, samples: Tensor, *, k: int = 5, chunk: int = 256
) -> DensityCoverage:
    """Density and coverage, which outliers of either set hardly move.

    Args:
        data: features of real images, shape (count, features), more than k rows.
        samples: features of samples, shape (count, features), at least one row.
        k: the neighbour that a ball reaches to.
        chunk: rows compared at a time; bounds the memory.

    Source: Naeem et al. 2020, arXiv:2002.09797, equations 4 and 5, with its k = 5.
    """
    real, made = _pair(data, samples, k, least=1)
    radii = reach(real, k, chunk=chunk)
    balls = 0
    reached = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for _, block in Distances(made, real, chunk):
        inside = block.within(radii)
        balls += int(inside.sum())
        reached |= inside.any(0)
    return DensityCoverage(balls / (k * len(made)), float(reached.double().mean()))


def reach(points: Tensor, k: int, *, chunk: int = 256) -> Tensor:
    """Each point's distance to its k-th nearest other one, shape (count,), float64."""
    rows = rows_of(points)
    found = []
    for place, block in Distances(rows, rows, chunk):
        block.leave_out(torch.arange(len(rows), device=rows.device)[place])
        found.append(block.nearest(k)[0])
    return torch.cat(found)


def _inside(points: Tensor, centres: Tensor, k: int, chunk: int) -> Tensor:
    """Which points lie in a ball around any of the centres, boolean (count,)."""
    radii = reach(centres, k, chunk=chunk)
    return torch.cat([b.within(radii).any(1) for _, b in Distances(points, centres, chunk)])


def _pair(data: Tensor, samples: Tensor, k: int, least: int = 0) -> tuple[Tensor, Tensor]:
    least = least or k + 1
    if data.ndim != 2 or samples.ndim != 2 or data.shape[1] != samples.shape[1]:
        raise ValueError(
            f"features have shapes {tuple(data.shape)} and {tuple(samples.shape)}; (count, "
            "features) with the same features fit"
        )
    if k < 1 or len(data) <= k or len(samples) < least:
        raise ValueError(
            f"{len(data)} data and {len(samples)} samples have no {k} neighbours each: k = {k} "
            f"needs at least {k + 1} and {least}"
        )
    real, made = rows_of(data), rows_of(samples)
    if not bool(real.isfinite().all() & made.isfinite().all()):
        raise ValueError("features hold values that are not finite; look at what made them")
    return real, made
