"""From real digits to new ones: train, draw a grid, and measure how good it is.

    python examples/demo.py                  about three minutes on two cores, then seconds
    python examples/demo.py --samples 1000   measure on more samples

It trains as examples/digits.toml says (so does `k-diffusion train --config examples/digits.toml`),
goes on from where it was stopped, and does not train again once it has ended.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Where other programs share the cores, threads that wait idly for one another lose them for long.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import torch
from torch import Tensor

from k_diffusion.evaluation import (
    Classifier,
    classify,
    frechet_distance,
    memorised_share,
    share_of,
    train_classifier,
)
from k_diffusion.sampling import KSampler, unit_noise
from k_diffusion.training import (
    CheckpointError,
    Digits,
    TrainConfig,
    latest_checkpoint,
    load_config,
    load_denoiser,
    read_info,
    run_training,
)
from k_diffusion.training.compare import same_config
from k_diffusion.training.fit import settle
from k_diffusion.utils.images import image_grid, save_png
from k_diffusion.utils.scheduler import KarrasScheduler

SCHEDULER = KarrasScheduler()
# Sampler and steps, such that each calls the network 20 times or once less.
SAMPLERS = {"ddim": 20, "euler_ancestral": 20, "heun": 10, "dpmpp_2m": 20, "unipc": 20}
BEST = "dpmpp_2m"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder to write to")
    parser.add_argument("--samples", type=int, default=400, help="samples to measure on")
    parser.add_argument("--fresh", action="store_true", help="train anew")
    parser.add_argument(
        "--config", type=Path, default=Path(__file__).with_name("digits.toml"), help="settings"
    )
    options = parser.parse_args(arguments)
    if options.samples < 10:
        parser.error(f"--samples is {options.samples}; give at least 10, one a class")
    began = time.perf_counter()

    config = load_config(options.config, {"out": str(options.out)})
    train, held_out = Digits("train"), Digits("test")
    checkpoint = trained(config, train, fresh=options.fresh)
    denoiser, info = load_denoiser(checkpoint)

    print("drawing a grid: real digits, then the same ten seeds by each sampler", flush=True)
    first = [int((held_out.labels == label).nonzero()[0]) for label in range(10)]
    rows = [held_out.images[first]]
    rows += [draw(denoiser, name, list(range(10)), torch.arange(10)) for name in SAMPLERS]
    grid = image_grid(
        torch.cat(rows), rows_named=["real", *SAMPLERS], columns_named=train.class_names, scale=6
    )
    save_png(
        options.out / "grid.png",
        grid,
        {"checkpoint sha256": info.sha256, "samplers": SAMPLERS, "seeds": "0 to 9"},
    )

    print("training a classifier on the real digits, as the judge", flush=True)
    judge = train_classifier(train.images, train.labels, epochs=20)
    figures = measure(denoiser, judge, train, held_out, options.samples)
    figures |= {
        "checkpoint": str(checkpoint),
        "checkpoint sha256": info.sha256,
        "images seen": info.images_seen,
        "parameters": info.parameters,
        "seconds": round(time.perf_counter() - began, 1),
    }
    metrics = options.out / "metrics.json"
    metrics.write_text(json.dumps(figures, indent=2) + "\n")
    report(figures)
    print(f"\ncheckpoint: {checkpoint}")
    print(f"grid:       {options.out / 'grid.png'}")
    print(f"metrics:    {metrics}")
    return 0


def trained(config: TrainConfig, source: Digits, fresh: bool) -> Path:
    """The checkpoint of the whole run, trained now unless it is there."""
    newest = None
    if not fresh:
        try:
            newest = latest_checkpoint(config.out)
        except CheckpointError as error:
            print(error, file=sys.stderr)
    wanted = settle(config, source).to_json()
    same = newest is not None and same_config(read_info(newest).config, wanted)
    if newest is not None and not same:
        print(f"{newest} was trained with other settings: training anew")
    elif newest is not None and read_info(newest).images_seen >= config.total_images:
        print(f"{newest} is trained already (--fresh trains anew)")
        return newest
    print(f"training on {len(source)} real digits; Ctrl-C keeps what there is", flush=True)
    result = run_training(config, resume="auto" if same else None, overwrite=not same)
    if result.stopped_by is not None:
        print("run the demo again to go on", file=sys.stderr)
        sys.exit(128 + result.stopped_by)
    return result.checkpoint


def draw(denoiser: Any, solver: str, seeds: list[int], labels: Tensor) -> Tensor:
    """One image (1, 8, 8) a seed, of the asked class, in [-1, 1]."""
    sampler = KSampler(denoiser, SCHEDULER, solver)
    parts = []
    for some, asked in zip(torch.tensor(seeds).split(200), labels.split(200), strict=True):
        chosen = some.tolist()
        noise = unit_noise((1, 8, 8), chosen)
        parts.append(sampler.sample(noise, SAMPLERS[solver], asked, seed=chosen))
    return torch.cat(parts)


def measure(
    denoiser: Any, judge: Classifier, train: Digits, held_out: Digits, count: int
) -> dict[str, Any]:
    """How good the samples are, by the judge's classes and features, and how new."""
    found, features = classify(judge, held_out.images)
    shuffled = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    real = classify(judge, train.images[shuffled])[1]
    same = min(count, len(held_out))  # distances can be compared at equal counts only
    reference = mean_frechet(real, features[:same])
    figures: dict[str, Any] = {
        "classifier accuracy on held-out digits": share_of(found, held_out.labels),
        "share of held-out digits nearer to a training image than real ones are": (
            memorised_share(held_out.images, train.images)
        ),
        "samples": count,
        "samplers": {},
    }
    for solver, steps in SAMPLERS.items():
        some = count if solver == BEST else min(count, 100)
        labels = torch.arange(some) % 10
        print(f"drawing and judging {some} samples of {solver}", flush=True)
        samples = draw(denoiser, solver, list(range(1000, 1000 + some)), labels)
        found, drawn = classify(judge, samples)
        row = {"steps": steps, "samples": some, "share of the asked class": share_of(found, labels)}
        if solver == BEST:
            row["frechet ratio"] = mean_frechet(drawn, features[:same]) / reference
            row["memorised share"] = memorised_share(samples, train.images)
        figures["samplers"][solver] = row
    return figures


def mean_frechet(features: Tensor, held_out: Tensor) -> float:
    """The distance of `held_out` to as many features at a time, over all whole parts."""
    size = len(held_out)
    parts = [part for part in features.split(size) if len(part) == size]
    return sum(frechet_distance(part, held_out) for part in parts) / len(parts)


def report(figures: dict[str, Any]) -> None:
    """Print the figures, the samplers as a table."""
    print()
    for name, value in figures.items():
        if isinstance(value, float):
            print(f"{name}: {value:.3f}")
    print(f"\n{'sampler':<17}{'steps':>6}{'samples':>9}{'asked class':>13}", end="")
    print(f"{'frechet ratio':>15}{'memorised':>11}")
    for solver, row in figures["samplers"].items():
        print(f"{solver:<17}{row['steps']:>6}{row['samples']:>9}", end="")
        print(f"{row['share of the asked class']:>13.1%}", end="")
        if "frechet ratio" in row:
            print(f"{row['frechet ratio']:>15.2f}{row['memorised share']:>11.1%}", end="")
        print()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
