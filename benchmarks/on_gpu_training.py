"""Training on a GPU, in bfloat16 and compiled: images a second, and what the card could do.

    python benchmarks/on_gpu_training.py              # on the first GPU
    python benchmarks/on_gpu_training.py --dry-run    # anywhere: a small network, a few steps

The Trainer as a run has it, from PNG files on disk to the averaged weights: for each network and
optimiser, eager and compiled, the images a second, the share of the card's own rate of matrix
products (the network's forward and backward pass alone count as work done), milliseconds of a step
spent waiting for data, and the most memory taken. Writes benchmarks/results/on_gpu_training.json
with the device's name.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from model_bench.library import plainly
from model_bench.measure import Case, Limit, Setting
from processes import pretty
from training_bench.library import CHANNELS, Laps, Stopwatch, make_images

from k_diffusion.models import make_model
from k_diffusion.training.config_file import make_config
from k_diffusion.training.trainer import Trainer

HERE = Path(__file__).resolve().parent
NETWORKS: dict[str, tuple[dict[str, Any], int, int]] = {
    "unet_base": ({"type": "unet_base"}, 64, 256),
    "dit_b": ({"type": "dit_b", "patch_size": 4}, 64, 256),
}
"""Name -> config, height and width of the images, images a step."""
DRY: dict[str, tuple[dict[str, Any], int, int]] = {
    "unet_tiny": ({"type": "unet_tiny", "channels": 8, "head_channels": 8}, 8, 4),
}
GOAL = 0.4  # share of the matrix products' rate, unet_base, compiled
HIDDEN = 0.02  # the most of a step that may be spent waiting for data


def flops(config: dict[str, Any], size: int) -> int:
    """Floating-point operations of one image, forward and backward, counted on the CPU."""
    one = Case(lambda: make_model(config), plainly, Setting(1, "contiguous"), size)
    return one.flops("both")


def train(config: dict[str, Any], steps: int, skipped: int) -> dict[str, Any]:
    """Seconds of a run's steps and of their parts, the first ones left out."""
    trainer: Any = Trainer(make_config(config))
    device = trainer.device
    watch = Stopwatch()
    batches = trainer.stream.batches
    trainer.stream.batches = lambda *args, **options: Laps(batches(*args, **options), watch)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for _ in itertools.islice(trainer, skipped + steps):
        pass  # each step ends with the device's own answer, the loss
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    watch.stop()
    counted = watch.steps[skipped:]
    return {
        "s a step": statistics.fmean(step["total"] for step in counted),
        "median s": statistics.median(step["total"] for step in counted),
        "data wait, ms": 1e3 * statistics.fmean(step["data"] for step in counted),
        "first step, s": watch.steps[0]["total"],
        "peak MB": torch.cuda.max_memory_allocated(device) / 1e6 if device.type == "cuda" else 0,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="a small network, without figures")
    parser.add_argument("--steps", type=int, default=60, help="that count")
    parser.add_argument("--skipped", type=int, default=10, help="before them")
    parser.add_argument("--workers", type=int, default=8, help="processes that load images")
    parser.add_argument("--batch", type=int, help="images a step; left out: each network's own")
    parser.add_argument("--images", type=int, default=20_000, help="PNG files that are made")
    parser.add_argument("--only", nargs="*", help=f"of {', '.join(NETWORKS)}")
    parser.add_argument("--optimizers", nargs="*", default=["adamw", "muon"])
    parser.add_argument("--out", type=Path, default=HERE / "results" / "on_gpu_training.json")
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    if not cuda and not args.dry_run:
        parser.error("no GPU here: give --dry-run for a try without figures")
    networks, ways = NETWORKS, (False, True)
    products: tuple[int, ...] = (2048, 4096, 8192)
    if args.dry_run:
        networks, ways, products = DRY, (False,), (64,)
        args.steps, args.skipped, args.workers, args.images = 2, 1, 0, 8
    limit = Limit(1 if args.dry_run else 256, "cuda" if cuda else "cpu", torch.bfloat16, products)
    limit.rates(1)
    rates = limit.rates(1 if args.dry_run else 20)
    del limit
    rate = max(v for name, v in rates.items() if name.startswith("matrix product"))
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if cuda else "cpu, dry run",
        "torch": torch.__version__,
        "matrix product, TFLOP/s": rate / 1e12,
        "workers": args.workers,
        "steps": args.steps,
        "rows": [],
    }
    print(f"{results['device']}: {rate / 1e12:.3g} TFLOP/s in matrix products", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        for name, (model, size, own_batch) in networks.items():
            if args.only and name not in args.only:
                continue
            model, batch = {**model, "in_channels": CHANNELS}, args.batch or own_batch
            folder = Path(scratch) / str(size)
            if not folder.exists():
                make_images(folder, args.images, size)
            work = flops(model, size)
            for optimizer, compiled in itertools.product(args.optimizers, ways):
                torch.compiler.reset()
                gc.collect()
                found = train(
                    {
                        "model": model,
                        "data": {"source": "folder", "path": str(folder), "size": size,
                                 "flip": True, "classes": "none"},
                        "total_images": batch * (args.skipped + args.steps),
                        "batch_size": batch,
                        "precision": "bf16",
                        "compile": compiled,
                        "workers": args.workers,
                        "optimizer": {"type": optimizer, "lr": 1e-4},
                        "out": str(Path(scratch) / "run"),
                    },
                    args.steps,
                    args.skipped,
                )  # fmt: skip
                speed = batch / found["s a step"]
                row = {"network": name, "optimizer": optimizer, "compiled": compiled,
                       "batch": batch, "images/s": speed, "share": speed * work / rate,
                       "GFLOP an image, both": work / 1e9, **found}  # fmt: skip
                results["rows"].append(row)
                print(json.dumps(row), flush=True)
    for row in results["rows"]:
        waits = row["data wait, ms"] / 1e3 / row["s a step"]
        print(
            f"{row['network']}, {row['optimizer']}{', compiled' * row['compiled']}: share "
            f"{row['share']:.3f} (unet_base compiled: at least {GOAL}), of a step spent waiting "
            f"for data {waits:.2%} (at most {HIDDEN:.0%})"
        )
    if cuda and not args.dry_run:  # a dry run leaves no figures
        args.out.parent.mkdir(exist_ok=True)
        args.out.write_text(pretty(results) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
