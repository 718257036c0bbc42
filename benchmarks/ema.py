"""Averages made after a run against ones kept in it, and the time that keeping one takes.

A small U-Net learns the digits for 640 steps of batch 64; beside the averages of relative length
0.05 and 0.10, of which snapshots are taken, those of other lengths are kept directly. Printed for
each and for several numbers of snapshots: over all weights the largest difference, as a share of
the largest number of its tensor, the error of the profile that the library tells by itself, and how
many times farther off it is made without the condition that the snapshots' weights sum to 1.

Then the time of one update of 10 million weights in one call, and in loops over the tensors as
others have them. Writes benchmarks/results/ema.json.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from k_diffusion.models import make_model
from k_diffusion.training import make_config, posthoc, run_training
from k_diffusion.training.ema import Ema, PowerFunction, exponent_of
from k_diffusion.training.posthoc import reconstruct
from k_diffusion.training.snapshots import list_snapshots

OUT = Path(__file__).parent / "results" / "ema.json"
LENGTHS = (0.02, 0.03, 0.04, 0.06, 0.07, 0.08, 0.09, 0.12, 0.15, 0.2, 0.25)
STEPS, BATCH, SNAPSHOTS = 640, 64, 64
UNET = {"type": "unet", "attention": [False, True], "channel_mults": [1, 2], "blocks": 1}


def largest_difference(ours: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """Over all tensors, as a share of each one's largest number."""
    floats = [n for n, v in exact.items() if v.is_floating_point() and v.abs().max() > 0]
    return max(((ours[n] - exact[n]).abs().max() / exact[n].abs().max()).item() for n in floats)


def unconditioned(
    kept: Sequence[tuple[float, float]], t: float, sigma_rel: float
) -> posthoc.Combination:
    """`posthoc.combine` by least squares alone: the weights sum to what they sum to."""
    functions = [(time / t, exponent_of(length)) for time, length in kept]
    wanted = 1.0, exponent_of(sigma_rel)
    rows = [[posthoc.overlap(*f, *g) for g in functions] for f in functions]
    gram = torch.tensor(rows, dtype=torch.float64)
    right = torch.tensor([posthoc.overlap(*f, *wanted) for f in functions], dtype=torch.float64)
    norms = gram.diagonal().sqrt()
    inverse = torch.linalg.pinv(
        gram / norms / norms[:, None], rtol=posthoc.SMALLEST, hermitian=True
    )
    return posthoc.Combination(tuple((inverse @ (right / norms) / norms).tolist()), 0.0)


def errors(folder: str) -> list[dict[str, float]]:
    """Train, and compare what is made afterwards with what was kept."""
    config = make_config(
        {
            "model": {
                **UNET,
                "channels": 16,
                "head_channels": 16,
                "num_classes": 10,
                "prediction": "edm",
                "sigma_data": "auto",
            },
            "data": {"source": "digits"},
            "total_images": STEPS * BATCH,
            "batch_size": BATCH,
            "optimizer": {"lr": 2e-3, "schedule": "cosine", "warmup_images": 2000},
            "ema": {
                "profiles": [0.05, 0.10],
                "snapshot_every_images": STEPS * BATCH // SNAPSHOTS,
            },
            "out": folder,
        }
    )
    kept: dict[float, Ema] = {}

    def keep(trainer: object, state: object) -> None:
        if not kept:
            network = trainer.network  # type: ignore[attr-defined]
            kept.update({length: Ema(network, PowerFunction(length)) for length in LENGTHS})
        for average in kept.values():
            average.update()

    run_training(config, on_step=keep)
    found = []
    for count in (8, 16, 32, 64):
        snapshots = list_snapshots(folder)[SNAPSHOTS // count - 1 :: SNAPSHOTS // count]
        for length, average in kept.items():
            made = reconstruct(snapshots, length, tolerance=9.0)
            difference = largest_difference(made.weights, average.state_dict())
            with mock.patch.object(posthoc, "combine", unconditioned):
                plain = reconstruct(snapshots, length, tolerance=9.0)
            farther = largest_difference(plain.weights, average.state_dict()) / difference
            found.append(
                {
                    "snapshots": count,
                    "sigma_rel": length,
                    "error of the profile": made.error,
                    "largest relative difference": difference,
                    "times farther without the condition": farther,
                }
            )
            print(
                f"{count:3} snapshots, sigma_rel {length:<4}: profile off by {made.error:.1e}, "
                f"weights by {difference:.1e}, without the condition {farther:.1f} times that"
            )
    return found


def times() -> dict[str, float]:
    """Milliseconds of one update of a 10-million-weight network, medians, on one thread."""
    torch.set_num_threads(1)
    network = make_model({**UNET, "channels": 128, "blocks": 2, "in_channels": 3})
    count = sum(p.numel() for p in network.parameters())
    ema = Ema(network, PowerFunction(0.10))
    live = list(network.parameters())
    average = [p.detach().clone() for p in live]

    @torch.no_grad()
    def lerp() -> None:
        for a, p in zip(average, live, strict=True):
            a.lerp_(p, 1e-3)

    @torch.no_grad()
    def multiply_and_add() -> None:
        for a, p in zip(average, live, strict=True):
            a.mul_(0.999).add_(p, alpha=1e-3)

    @torch.no_grad()
    def by_state_dict() -> None:
        new = network.state_dict()
        for a, p in zip(average, new.values(), strict=False):
            a.copy_(a * 0.999 + p.detach() * 1e-3)

    ways: dict[str, Callable[[], None]] = {
        "Ema.update": ema.update,
        "loop of lerp_": lerp,
        "loop of mul_ and add_": multiply_and_add,
        "loop with temporaries": by_state_dict,
    }
    rounds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(30):
        for name, update in ways.items():  # in turn, so that all see the same disturbances
            start = time.perf_counter()
            update()
            rounds[name].append(1000 * (time.perf_counter() - start) * 1e7 / count)
    found = {name: statistics.median(values) for name, values in rounds.items()}
    for name, milliseconds in found.items():
        print(f"{name:22} {milliseconds:6.2f} ms for 10 million weights ({len(live)} tensors)")
    return found


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        made = errors(folder)
    OUT.parent.mkdir(exist_ok=True)
    results = {"made afterwards": made, "milliseconds for 10 million weights": times()}
    OUT.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
