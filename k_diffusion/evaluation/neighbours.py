"""Nearest neighbours: are samples new, or are they training images again?"""

from __future__ import annotations

import torch


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
    q, r = _rows(queries), _rows(references)
    if q.shape[1] != r.shape[1] or not len(r):
        raise ValueError(
            f"queries of {q.shape[1]} values cannot be compared with {len(r)} references of "
            f"{r.shape[1]}; the same size a row fits"
        )
    found = [_distances(part, r).min(1) for part in q.split(chunk)]
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])


def nearest_other(images: torch.Tensor, *, chunk: int = 256) -> torch.Tensor:
    """Each image's distance to its nearest other image (leave-one-out), shape (count,)."""
    rows = _rows(images)
    if len(rows) < 2:
        raise ValueError(f"{len(rows)} images have no other; at least 2 are needed")
    found = []
    for start in range(0, len(rows), chunk):
        distances = _distances(rows[start : start + chunk], rows)
        own = torch.arange(len(distances))
        distances[own, start + own] = torch.inf
        found.append(distances.min(1).values)
    return torch.cat(found)


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
    if not len(samples):
        raise ValueError("0 samples have no share; give at least one")
    distance, index = nearest(samples, training)
    usual = nearest_other(training)[index]
    return float(((distance < usual) | (distance == 0)).double().mean())


def _rows(images: torch.Tensor) -> torch.Tensor:
    return images.detach().flatten(1).double()


def _distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    # Without the shortcut through a matrix product, which loses digits between near neighbours.
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
