"""A real run on a GPU: `examples/colour.toml`, as many images of it as a number of minutes holds.

    python benchmarks/on_gpu_colour.py --data cifar10-train.zip --held-out cifar10-test.zip
    python benchmarks/on_gpu_colour.py --data ... --minutes 25 --now 9    # in parts: call it again
    python benchmarks/on_gpu_colour.py --data ... --dry-run               # anywhere, a tiny network

The documented commands, one after the other, each a process of its own: a short run tells how many
images a second the machine trains on, and by that `--total-images` of the real run; `k-diffusion
train --resume`, which SIGTERM ends in order when `--now` minutes are over; then, when the run is at
its end, `export` to float16, `evaluate`, `sample` a grid, `plot`, `doctor`. Writes
benchmarks/results/on_gpu_colour.json with the device's name; the weights, grid and plot lie in
the run's folder.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from processes import pretty

HERE = Path(__file__).resolve().parent
CONFIG = HERE.parent / "examples" / "colour.toml"
MOST = 25e6
"""Bytes of the weights, so that a package can hold them."""
SPARE = 0.88
"""Share of the time that is training: the rest is for starts, evaluations and previews."""
DRY = {
    "model.channels": 16, "model.head_channels": 16, "model.blocks": 1,
    "precision": "no", "compile": "false", "workers": 0,
    "optimizer.warmup_images": 256, "checkpoint_every_images": 256, "log_every_images": 64,
    "preview.every_images": 512, "preview.count": 10, "preview.steps": 4,
    "ema.snapshot_every_images": 512, "evaluate.every_images": "none",
}  # fmt: skip
BATCH = {False: 512, True: 16}
TRIAL = {False: 300, True: 4}
"""Steps of the short run that tells the speed."""


class Commands:
    """The command line, told at every call what is asked for.

    Args:
        options: of this script.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.seconds = options, 0.0

    def __call__(self, *words: Any, minutes: float | None = None) -> int:
        """Run one command; SIGTERM after so many minutes. Returns its exit status."""
        line = [sys.executable, "-m", "k_diffusion.cli", *map(str, words)]
        print("$ k-diffusion", *line[3:], flush=True)
        began = time.perf_counter()
        with subprocess.Popen(line) as process:
            try:
                status = process.wait(None if minutes is None else 60 * minutes)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGTERM)
                status = process.wait()
            except BaseException:
                process.kill()
                raise
        self.seconds = time.perf_counter() - began
        return status

    def train(
        self,
        out: Path,
        images: int,
        *more: str,
        settings: dict[str, Any] | None = None,
        minutes: float | None = None,
    ) -> int:
        """`k-diffusion train` with the documented config."""
        changed = (DRY if self.options.dry_run else {}) | (settings or {})
        return self(
            "train", "--config", CONFIG, "--data", self.options.data, "--out", out,
            "--total-images", images, "--batch-size", BATCH[self.options.dry_run], *more,
            *[word for key in changed for word in ("--set", f"{key}={changed[key]}")],
            minutes=minutes,
        )  # fmt: skip


def rate(metrics: Path) -> float:
    """Images a second at the end of a run, by its metrics file."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    return float([line for line in lines if line["event"] == "train"][-1]["images_per_second"])


def plan(run: Commands, out: Path) -> dict[str, Any]:
    """How many images the real run trains on: found once, and kept beside it."""
    path, batch = out.with_name(out.name + "-plan.json"), BATCH[run.options.dry_run]
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text())
        return found
    trial = out.with_name(out.name + "-trial")
    images = TRIAL[run.options.dry_run] * batch
    settings = {
        "evaluate.every_images": "none",
        "optimizer.warmup_images": images // 2,
        "log_every_images": images // 4,  # the last line is of steps after all compiling
    }
    if run.train(trial, images, "--overwrite", settings=settings):
        raise SystemExit("the trial failed: see its words above")
    speed = rate(trial / "metrics.jsonl")
    total = int(speed * 60 * run.options.minutes * SPARE) // batch * batch
    if run.options.dry_run:
        total = 64 * batch
    plan = {"images_per_second": speed, "total_images": total, "minutes": run.options.minutes}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(plan))
    return plan


def finish(run: Commands, out: Path) -> dict[str, Any]:
    """Weights, figures and pictures of a run that is at its end."""
    options = run.options
    weights, figures = out / "colour.safetensors", out / "evaluation.json"
    few = ["-n", 64, "--steps", 4, "--real-images", 200] if options.dry_run else ["-n", 5000]
    held_out = ["--held-out", options.held_out] if options.held_out else []
    words: list[list[Any]] = [
        ["export", out, "-o", weights, "--dtype", "float16", "--overwrite"],
        ["evaluate", weights, "--data", options.data, *held_out, *few, "--out", figures,
         "--cache", out / "evaluation", "--overwrite"],
        ["sample", weights, "--class-label", "0-9", "-n", 100, "--out", out / "grid",
         "--overwrite"],
        ["plot", out],
        ["doctor", out],
    ]  # fmt: skip
    if options.dry_run:
        words[2] += ["--steps", 4]
    failed = [one[0] for one in words if run(*one)]
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in metrics if line["event"] == "train"]
    size = weights.stat().st_size
    return {
        "images_seen": trained[-1]["images_seen"],
        "last loss": trained[-1]["loss"],
        "weights, bytes": size,
        "fit into the package": size <= MOST,
        "failed": failed,
        "on the way": [
            {"images_seen": line["images_seen"], **(line["figures"] or {})}
            for line in metrics
            if line["event"] == "evaluate"
        ],
        "evaluation": json.loads(figures.read_text()) if figures.exists() else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", required=True, help="a zip or folder of images in class folders")
    parser.add_argument("--held-out", default="", help="real images that are not trained on")
    parser.add_argument("--minutes", type=float, default=25, help="of training, in all")
    parser.add_argument("--now", type=float, help="the most minutes that are trained this time")
    parser.add_argument("--run", type=Path, default=Path("runs/colour"), help="the run's folder")
    parser.add_argument("--dry-run", action="store_true", help="a tiny network, on any device")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "on_gpu_colour.json")
    options = parser.parse_args()
    if not torch.cuda.is_available() and not options.dry_run:
        parser.error("there is no GPU: --dry-run goes without")
    began, run = time.perf_counter(), Commands(options)
    planned = plan(run, options.run)
    left = None if options.now is None else options.now - (time.perf_counter() - began) / 60
    status = run.train(options.run, planned["total_images"], "--resume", minutes=left)
    if status in (128 + signal.SIGTERM, -signal.SIGTERM):
        print(f"stopped in order after {run.seconds / 60:.1f} minutes: the same command goes on")
        return
    if status:
        raise SystemExit(f"training ended with status {status}: see its words above")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    about = {"device": device, "torch": torch.__version__, "dry run": options.dry_run, **planned}
    options.out.write_text(pretty({"about": about, **finish(run, options.run)}) + "\n")
    print(options.out)


if __name__ == "__main__":
    main()
