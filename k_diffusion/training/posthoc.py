"""Averages of lengths that a run did not keep, made afterwards from its snapshots.

An average of power-function shape at time t weighs the network at time tau <= t by
p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1). Another one is found as the sum of snapshots whose
weights make the sum of their p nearest to its p, in the integral of the square.

Source: Karras et al. 2024, arXiv:2312.02696, section 3.2 and appendix C.3. Beyond it, the weights
here sum to 1, so that whatever stays constant along training comes out exactly.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from k_diffusion.training.checkpoint import (
    CheckpointError,
    CheckpointInfo,
    read_checkpoint,
    save_checkpoint,
)
from k_diffusion.training.ema import MAIN, average_name, exponent_of
from k_diffusion.training.restore import save_inference
from k_diffusion.training.snapshots import Snapshot

SMALLEST = 1e-12
"""Directions of the least squares with less than this share of the largest are left out."""

TOLERANCE = 0.02
"""The largest error of a profile at which an average is made without being asked to."""


class PosthocError(ValueError):
    """The snapshots do not yield such an average; the message is one line."""


@dataclass(frozen=True)
class Combination:
    """A power function as a sum of others.

    Attributes:
        weights: of each of the others; they sum to 1.
        error: norm of the difference from the one wanted, as a share of that one's norm. Where the
            network only fluctuates from update to update, the average is off by that share of
            its own fluctuation.
    """

    weights: tuple[float, ...]
    error: float


@dataclass(frozen=True)
class Reconstruction:
    """An average made afterwards.

    Attributes:
        weights: name -> tensor in float32; buffers are those of the newest snapshot.
        sigma_rel: its relative length.
        updates: its time, in updates of the averages.
        snapshots: how many files it is made of.
        error: see `Combination`.
        info: what the newest of them says about itself.
    """

    weights: dict[str, Tensor]
    sigma_rel: float
    updates: float
    snapshots: int
    error: float
    info: CheckpointInfo


def overlap(t: float, gamma: float, other_t: float, other_gamma: float) -> float:
    """The integral of the product of two power functions, in units of 1/time.

    Args:
        t, other_t: where each ends; above 0.
        gamma, other_gamma: the exponents.

    Source: Karras et al. 2024, arXiv:2312.02696, appendix C.3, worded so that nothing overflows.
    """
    if t > other_t:
        t, gamma, other_t, other_gamma = other_t, other_gamma, t, gamma
    ratio = (t / other_t) ** other_gamma / other_t
    return (gamma + 1) * (other_gamma + 1) / (gamma + other_gamma + 1) * ratio


def combine(kept: Sequence[tuple[float, float]], t: float, sigma_rel: float) -> Combination:
    """The power function at time t of length sigma_rel as a sum of those kept.

    Args:
        kept: time and relative length of each.
        t: where the wanted one ends, in the same unit of time.
        sigma_rel: its relative length.

    Raises:
        ValueError: sigma_rel is not the length of any power function.
    """
    wanted = 1.0, exponent_of(sigma_rel)
    if (t, sigma_rel) in kept:
        place = list(kept).index((t, sigma_rel))
        return Combination(tuple(float(i == place) for i in range(len(kept))), 0.0)
    functions = [(time / t, exponent_of(length)) for time, length in kept]
    norms = torch.tensor([overlap(*f, *f) for f in functions], dtype=torch.float64).sqrt()
    rows = [[overlap(*f, *g) for g in functions] for f in functions]
    gram = torch.tensor(rows, dtype=torch.float64)
    right = torch.tensor([overlap(*f, *wanted) for f in functions], dtype=torch.float64)
    values, vectors = torch.linalg.eigh(gram / norms / norms[:, None])
    kept_ones = values > SMALLEST * values[-1]
    root = vectors[:, kept_ones] / values[kept_ones].sqrt() / norms[:, None]
    free = root @ (root.T @ right)  # the least squares without the condition
    ones = root @ root.sum(0)
    weights = free + ones * (1 - free.sum()) / ones.sum()
    square = overlap(*wanted, *wanted)
    missing = weights @ gram @ weights - 2 * (weights @ right) + square
    return Combination(tuple(weights.tolist()), math.sqrt(max(0.0, missing.item()) / square))


def plan(
    snapshots: Sequence[Snapshot], sigma_rel: float, t: float | None = None
) -> tuple[list[tuple[Snapshot, dict[str, float]]], float]:
    """What an average is made of, and how well.

    Args:
        snapshots: of one run.
        sigma_rel: relative length of the average.
        t: its time in updates; None: that of the newest snapshot. Later snapshots are not used.

    Returns:
        Each snapshot used with the weights of the averages in it by name, oldest first; and the
        error of the profile, see `Combination`.

    Raises:
        PosthocError: t lies outside the snapshots, or there are none.
        ValueError: sigma_rel is not the length of any power function.
    """
    # Where every step between two snapshots was skipped, both are the same: the later one stays.
    at = {snapshot.updates: snapshot for snapshot in snapshots}
    if not at:
        raise PosthocError("an average is made of snapshots, and none are given")
    t = max(at) if t is None else t
    if not min(at) <= t <= max(at):
        raise PosthocError(
            f"t = {t} updates lies outside the snapshots, which are of {min(at)} to {max(at)}"
        )
    used = [at[updates] for updates in sorted(at) if updates <= t]
    kept = [(float(s.updates), length) for s in used for length in s.profiles.values()]
    found = combine(kept, float(t), sigma_rel)
    weights = iter(found.weights)
    parts = [(s, {name: w for name in s.profiles if (w := next(weights))}) for s in used]
    return [part for part in parts if part[1]], found.error


def reconstruct(
    snapshots: Sequence[Snapshot],
    sigma_rel: float,
    t: float | None = None,
    *,
    tolerance: float = TOLERANCE,
) -> Reconstruction:
    """Make the average of a length that the run did not keep.

    One file after the other is read and verified, and added up in float64.

    Args:
        snapshots: of one run, from `list_snapshots`.
        sigma_rel: relative length of the average, best between those that were kept.
        t: its time in updates; None: that of the newest snapshot. Later snapshots are not used.
        tolerance: the largest error of the profile (see `Combination`) that is let through.

    Raises:
        PosthocError: the error would be larger, or t lies outside the snapshots.
        ValueError: sigma_rel is not the length of any power function.
        CheckpointError: a snapshot is damaged, or they are not of one network.
    """
    parts, error = plan(snapshots, sigma_rel, t)
    if error > tolerance:
        lengths = sorted({length for snapshot, _ in parts for length in snapshot.profiles.values()})
        raise PosthocError(
            f"sigma_rel = {sigma_rel} cannot be made of {len(parts)} snapshots of "
            f"{', '.join(map(str, lengths))}: its profile would be off by {error:.0%} of itself "
            f"(allowed: {tolerance:.0%}); take a length nearer to those, or let a run keep nearer "
            "ones or more snapshots"
        )
    total: dict[str, Tensor] = {}
    for snapshot, weights in parts:
        info, averages = read_checkpoint(snapshot.path, weights)
        buffers = set(info.state["buffers"])
        for name, weight in weights.items():
            average = {n: v for n, v in averages[name].items() if n not in buffers}
            try:
                _add(total, average, weight)
            except ValueError as other:
                raise CheckpointError(
                    f"snapshot {snapshot.path} is of another network than {parts[0][0].path}: "
                    f"{other}"
                ) from None
    newest, weights = parts[-1]
    # As in an average that was kept: buffers are the network's own at that time.
    copied = {n: v for n, v in averages[next(iter(weights))].items() if n in buffers}
    return Reconstruction(
        weights={name: tensor.float() for name, tensor in total.items()} | copied,
        sigma_rel=sigma_rel,
        updates=newest.updates if t is None else t,
        snapshots=len(parts),
        error=error,
        info=info,
    )


def _add(total: dict[str, Tensor], tensors: Mapping[str, Tensor], weight: float) -> None:
    """total += weight * tensors, where total begins empty."""
    if not total:
        total.update({n: torch.zeros_like(v, dtype=torch.float64) for n, v in tensors.items()})
    for name in {**total, **tensors}:
        shapes = [tuple(d[name].shape) if name in d else None for d in (total, tensors)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"{name} has shape {shapes[1]} there, and {shapes[0]} here")
    for name, tensor in tensors.items():
        total[name].add_(tensor.double(), alpha=weight)


def save_reconstruction(made: Reconstruction, path: str | Path) -> str:
    """Write an average that was made afterwards as a file to sample from; gives its sha256.

    Args:
        made: by `reconstruct`.
        path: the file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        whole = Path(folder) / path.name
        save_checkpoint(
            whole,
            {MAIN: made.weights},
            config=made.info.config,
            images_seen=made.info.images_seen,
            step=made.info.step,
            data=made.info.data,
            state={
                "weights": {
                    "average": average_name(made.sigma_rel),
                    "updates": made.updates,
                    "snapshots": made.snapshots,
                    "error of its profile": made.error,
                }
            },
        )
        return save_inference(whole, path)
