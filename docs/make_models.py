"""Trains each backbone for two minutes on the digits, and writes what came of it to docs/models.md.

    python docs/make_models.py                 # all, one after another: about half an hour
    python docs/make_models.py --only unet     # one; the others' figures stay as they are
    python docs/make_models.py --quick         # a few seconds each, nothing is written
    python docs/make_models.py --check         # fails where docs/models.md is not of the figures

Every backbone learns the 1,438 training digits at 8 x 8, and enlarged to 32 x 32; samples of the
latter are reduced to 8 x 8 before they are judged. The judge is that of examples/demo.py: a
classifier trained on the real digits. The figures are kept in benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Where other programs share the cores, threads that wait idly for one another lose them for long.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import torch
import torch.nn.functional as F
from torch import Tensor

from k_diffusion.denoiser import make_denoiser
from k_diffusion.evaluation import classify, share_of, train_classifier
from k_diffusion.models import MODELS
from k_diffusion.sampling import KSampler, unit_noise
from k_diffusion.training import ArraySource, Digits, Trainer, make_config
from k_diffusion.utils.scheduler import KarrasScheduler

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))
from demo import BEST, SAMPLERS, mean_frechet  # noqa: E402

PAGE = ROOT / "docs" / "models.md"
FIGURES = ROOT / "benchmarks" / "results" / "models_quality.json"
BEGIN, END = "<!-- quality: begin -->\n", "<!-- quality: end -->\n"
SIDE = 8  # of the digits as they are
SIZES = (8, 32)
BATCH = 64
WARMUP = 0.05  # share of the time over which the learning rate rises

COMMON = {"num_classes": 10, "prediction": "edm", "sigma_data": "auto"}
MODELS_OF: dict[int, dict[str, dict[str, Any]]] = {
    8: {
        "unet": {
            "channels": 48, "channel_mults": [1, 2], "blocks": 1, "attention": [False, True],
            "head_channels": 24,
        },
        "mp_unet": {
            "channels": 48, "channel_mults": [1, 2], "blocks": 1, "attention": [False, True],
            "head_channels": 24,
        },
        "hourglass": {
            "patch_size": 1, "widths": [128], "depths": [4], "attention": "global",
            "head_channels": 32, "mapping_width": 128,
        },
        "dit": {"patch_size": 1, "width": 128, "depth": 4, "head_channels": 32},
    },
    32: {
        "unet": {
            "channels": 16, "channel_mults": [1, 2, 4], "blocks": 1,
            "attention": [False, False, True], "head_channels": 32,
        },
        "mp_unet": {
            "channels": 16, "channel_mults": [1, 2, 4], "blocks": 1,
            "attention": [False, False, True], "head_channels": 32,
        },
        "hourglass": {
            "patch_size": 2, "widths": [64, 128], "depths": [1, 3],
            "attention": ["neighborhood", "global"], "kernel_size": 7, "head_channels": 32,
            "mapping_width": 128,
        },
        "dit": {"patch_size": 4, "width": 128, "depth": 4, "head_channels": 32},
    },
}  # fmt: skip
"""Height and width of the images -> backbone -> options, half a million to 1.6 million
parameters each."""
RATES = {"unet": 2e-3, "mp_unet": 1e-2, "hourglass": 1e-3, "dit": 1e-3}
"""Backbone -> learning rate after the warm-up; it falls to 0 as a cosine."""


def enlarged(images: Tensor, size: int) -> Tensor:
    """Images (N, C, 8, 8) at (N, C, size, size), smooth; `reduced` gives them back."""
    smooth = F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
    missing = images - reduced(smooth)
    return smooth + F.interpolate(missing, size=(size, size), mode="nearest")


def reduced(images: Tensor) -> Tensor:
    """Images (N, C, size, size) at (N, C, 8, 8): the mean of every square."""
    return F.avg_pool2d(images, images.shape[-1] // SIDE)


@dataclass
class Judge:
    """Judges samples of 8 x 8, see examples/demo.py.

    Args:
        train, held_out: real digits.
        epochs: passes over the training digits.
    """

    train: Digits
    held_out: Digits
    epochs: int = 20

    def __post_init__(self) -> None:
        self.classifier = train_classifier(self.train.images, self.train.labels, epochs=self.epochs)
        found, self.features = classify(self.classifier, self.held_out.images)
        self.accuracy = share_of(found, self.held_out.labels)
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(0))
        self.real = classify(self.classifier, self.train.images[order])[1]

    def figures(self, samples: Tensor, labels: Tensor) -> dict[str, float]:
        """Share of the asked class; Frechet distance to held-out digits over real ones'."""
        found, features = classify(self.classifier, samples)
        count = min(len(samples), len(self.held_out))  # comparable at equal counts only
        reference = mean_frechet(self.real, self.features[:count])
        return {
            "share of the asked class": round(share_of(found, labels), 4),
            "frechet ratio": round(mean_frechet(features, self.features[:count]) / reference, 3),
        }


def train(name: str, size: int, source: ArraySource, seconds: float) -> tuple[Trainer, float]:
    """A backbone trained by the clock, with the averaged weights in its network, and its seconds.

    All but the number of steps is the same from run to run.
    """
    config = make_config({
        "model": {"type": name, **COMMON, **MODELS_OF[size][name]},
        "data": {"source": "digits"},
        "total_images": BATCH,
        "batch_size": BATCH,
        "seed": 0,
        "loss": {
            "density": "lognormal",
            # Enlarging gives each value of a digit to many pixels, whose mean has less noise by
            # the factor (Hoogeboom et al. 2023, arXiv:2301.11093, section 3.1): what was hard to
            # tell at sigma is as hard at sigma times it.
            "density_options": {"mean": -1.2 + math.log(size / SIDE)},
        },
        "condition_dropout": 0.1,
        "ema": {"max_decay": 0.999},
    })  # fmt: skip
    trainer = Trainer(config, source=source)
    start = time.perf_counter()
    for batch in trainer.stream.batches(0, sys.maxsize):
        passed = (time.perf_counter() - start) / seconds if seconds else 1.0
        if passed >= 1:
            break
        rise = min(1.0, (passed + 1e-3) / WARMUP)
        fall = 0.5 + 0.5 * math.cos(math.pi * max(0.0, passed - WARMUP) / (1 - WARMUP))
        trainer.train_step(batch, RATES[name] * rise * fall)
    took = time.perf_counter() - start
    trainer.ema.copy_to(trainer.network)
    return trainer, took


def draw(network: torch.nn.Module, size: int, count: int) -> tuple[Tensor, Tensor]:
    """Samples (count, 1, 8, 8) of the demo's best sampler, and the classes asked for."""
    sampler = KSampler(make_denoiser(network.eval()), KarrasScheduler(), BEST)
    labels = torch.arange(count) % 10
    seeds = torch.arange(1000, 1000 + count)
    parts = []
    for some, asked in zip(seeds.split(100), labels.split(100), strict=True):
        noise = unit_noise((1, size, size), some.tolist())
        parts.append(sampler.sample(noise, SAMPLERS[BEST], asked, seed=some.tolist()))
    return reduced(torch.cat(parts)), labels


def measure(name: str, size: int, judge: Judge, seconds: float, count: int) -> dict[str, Any]:
    """A backbone's row; with no seconds, of the network as it is made."""
    source = ArraySource(
        enlarged(judge.train.images, size), judge.train.labels, judge.train.class_names
    )
    trainer, took = train(name, size, source, seconds)
    samples, labels = draw(trainer.network, size, count)
    return {
        "size": size,
        "backbone": name if seconds else "untrained",
        "options": MODELS_OF[size][name],
        "lr": RATES[name],
        "parameters": sum(p.numel() for p in trainer.network.parameters()),
        "images seen": trainer.images_seen,
        "seconds": round(took, 1),
        "samples": count,
        **judge.figures(samples, labels),
    }


def section(figures: Mapping[str, Any] | None) -> str:
    """What stands between the markers."""
    if figures is None:
        return "Not measured yet: `python docs/make_models.py` does, in about half an hour.\n"
    lines = [
        f"Made by `{figures['command']}` on {figures['threads']} thread(s): do not edit. Each was "
        f"trained for {figures['asked seconds']:g} seconds, with batches of {BATCH}, AdamW, a "
        "cosine schedule, averaged weights, and seed 0. *Asked class* is the share of "
        f"{figures['samples']} samples (`{BEST}`, {SAMPLERS[BEST]} steps) that the judge takes for "
        "the class that was asked for; it recognises "
        f"{figures['judge']:.1%} of held-out real digits. *Frechet ratio* is the samples' Frechet "
        "distance to held-out digits over that of real training digits: 1 is as good as real.",
        "",
        "| images | backbone | parameters | images seen | seconds | asked class | Frechet ratio |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in figures["rows"]:
        cells = (
            f"{row['size']}×{row['size']}",
            row["backbone"],
            f"{row['parameters'] / 1e6:.2f} M",
            f"{row['images seen']:,}",
            f"{row['seconds']:.0f}",
            f"{row['share of the asked class']:.1%}",
            f"{row['frechet ratio']:.2f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    common = ", ".join(f"`{k} = {json.dumps(v)}`" for k, v in COMMON.items())
    lines += [
        "",
        f"What was built, beside {common}:",
        "",
        "| images | type | options | learning rate |",
        "| --- | --- | --- | --- |",
    ]
    for row in figures["rows"]:
        if row["backbone"] != "untrained":
            options = ", ".join(f"`{k} = {json.dumps(v)}`" for k, v in row["options"].items())
            lines.append(
                f"| {row['size']}×{row['size']} | `{row['backbone']}` | {options} | {row['lr']:g} |"
            )
    return "\n".join(lines) + "\n"


def page(text: str, figures: Mapping[str, Any] | None) -> str:
    """The page with the section between its markers anew."""
    head, _, rest = text.partition(BEGIN)
    _, found, tail = rest.partition(END)
    if not found:
        sys.exit(f"{PAGE} has lost its markers {BEGIN.strip()} and {END.strip()}")
    return head + BEGIN + section(figures) + END + tail


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=120.0, help="of training, each")
    parser.add_argument("--samples", type=int, default=400, help="that are judged, each")
    parser.add_argument("--only", nargs="*", default=[], help="backbones: unet, dit...")
    parser.add_argument("--sizes", type=int, nargs="*", default=SIZES, choices=SIZES)
    parser.add_argument("--quick", action="store_true", help="3 seconds, 20 samples, no writing")
    parser.add_argument("--check", action="store_true", help="measure nothing, compare the page")
    options = parser.parse_args(arguments)
    known = json.loads(FIGURES.read_text()) if FIGURES.exists() else None
    if options.check:
        if PAGE.read_text(encoding="utf-8") != page(PAGE.read_text(encoding="utf-8"), known):
            sys.exit("docs/models.md is stale: run `python docs/make_models.py`")
        return
    seconds, count = (3.0, 20) if options.quick else (options.seconds, options.samples)
    judge = Judge(Digits("train"), Digits("test"), epochs=2 if options.quick else 20)
    rows = {(row["size"], row["backbone"]): row for row in (known or {}).get("rows", [])}
    for size in options.sizes:
        for name in options.only or MODELS_OF[size]:
            if name not in MODELS:
                print(f"{name}: not registered, not trained")
                continue
            rows[size, name] = row = measure(name, size, judge, seconds, count)
            print(json.dumps(row), flush=True)
        row = measure("unet", size, judge, 0.0, count)
        rows[size, row["backbone"]] = row
        print(json.dumps(row), flush=True)
    if options.quick:
        return
    order = [(size, name) for size in SIZES for name in ["untrained", *MODELS_OF[size]]]
    figures = {
        "command": " ".join(["python docs/make_models.py", *(
            [f"--seconds {seconds:g}"] if seconds != 120 else []
        )]),
        "asked seconds": seconds,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "samples": count,
        "judge": judge.accuracy,
        "rows": [rows[key] for key in order if key in rows],
    }  # fmt: skip
    FIGURES.parent.mkdir(exist_ok=True)
    FIGURES.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), figures), encoding="utf-8")


if __name__ == "__main__":
    main()
