"""Images a second that one core augments, beside the established pipeline, in one run.

    python benchmarks/augmentation.py      # `make bench` installs the peer and scikit-image first

Batches of colour images in memory. "ours" is `utils.warp.Warp`, what happens to each image drawn
from its own seed; "grid_sample" the bare cubic interpolation of every image by a ready grid;
"established" k-diffusion 0.1.1's pipeline, one Pillow image at a time;
"our K.augmentation" the same names here, one image at a time too. "off": switched off, where the
established pipeline still makes its matrices, and training here calls nothing. Processor time, best
of several turns that the cases take one after the other. Writes
benchmarks/results/augmentation.json.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.nn import functional as F

from k_diffusion.augmentation import KarrasAugmentationPipeline
from k_diffusion.training.augmentation import Augmentation
from k_diffusion.training.config_file import make_config
from k_diffusion.training.dataset import ArraySource
from k_diffusion.utils.warp import Warp

HERE = Path(__file__).parent
SIZES = {32: 512, 64: 128, 256: 32}
"""Side of the images -> how many at once."""
CHANCES = {"0.12": 0.12, "1": 1.0}


def load_peer(folder: Path) -> Any:
    """The established module alone: its package imports what is not needed here."""
    path = folder / "k_diffusion" / "augmentation.py"
    if not path.exists():
        sys.exit(f"the peer is not installed in {folder}: run `make bench`, or give --peers")
    sys.path.append(str(folder))
    spec = importlib.util.spec_from_file_location("peer_augmentation", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        sys.exit(f"the established pipeline cannot be imported ({error}): pip install scikit-image")
    return module


def measure(cases: dict[str, tuple[Callable[[], Any], int]], turns: int) -> dict[str, float]:
    """Images a second of each case (what to call, images of a call), of the best turn."""
    best = dict.fromkeys(cases, float("inf"))
    for turn in range(turns + 1):
        for name, (call, images) in cases.items():
            start = time.process_time()
            call()
            if turn:
                best[name] = min(best[name], (time.process_time() - start) / images)
    return {name: 1 / seconds for name, seconds in best.items()}


def cases_of(side: int, peer: Any) -> dict[str, tuple[Callable[[], Any], int]]:
    batch = SIZES[side]
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (batch, side, side, 3), generator=generator, dtype=torch.uint8)
    x = pixels.movedim(3, 1).contiguous().float() / 127.5 - 1
    pictures = [Image.fromarray(one.numpy()) for one in pixels[: max(32, batch // 4)]]
    seeds = list(range(batch))
    eye = torch.eye(2, 3).repeat(batch, 1, 1) + 0.05 * torch.randn(batch, 2, 3, generator=generator)
    grid = F.affine_grid(eye, list(x.shape), align_corners=False)
    config = make_config(
        {"model": {"type": "unet"}, "data": {"source": "digits"}, "total_images": 1}
    )
    nothing = Augmentation(config, torch.nn.Identity(), ArraySource(x))

    def one_by_one(pipeline: Any) -> tuple[Callable[[], Any], int]:
        def call() -> None:
            torch.manual_seed(0)  # the same happens to the images in every turn, and in both
            for picture in pictures:
                pipeline(picture)

        return call, len(pictures)

    cases: dict[str, tuple[Callable[[], Any], int]] = {
        "grid_sample": (
            lambda: F.grid_sample(
                x, grid, mode="bicubic", padding_mode="reflection", align_corners=False
            ),
            batch,
        )
    }
    for name, chance in CHANCES.items():
        warp = Warp(chance)
        cases[f"ours, {name}"] = (lambda warp=warp: warp(x, seeds)), batch  # type: ignore[misc]
        cases[f"established, {name}"] = one_by_one(peer.KarrasAugmentationPipeline(chance))
        cases[f"our K.augmentation, {name}"] = one_by_one(KarrasAugmentationPipeline(chance))
    off = {"disable_all": True}
    cases["ours, off"] = (lambda: nothing(x, seeds)), batch
    cases["established, off"] = one_by_one(peer.KarrasAugmentationPipeline(0.0, **off))
    cases["our K.augmentation, off"] = one_by_one(KarrasAugmentationPipeline(0.0, **off))
    return cases


def table(rows: list[dict[str, Any]]) -> str:
    """As docs/augmentation.md has it."""
    lines = ["| | " + " | ".join(f"{row['side']} x {row['side']}" for row in rows) + " |"]
    lines.append("| --- |" + " ---: |" * len(rows))
    for name in rows[0]["images_per_second"]:
        speeds = [rounded(row["images_per_second"][name]) for row in rows]
        lines.append(f"| {name} | " + " | ".join(f"{speed:,}" for speed in speeds) + " |")
    for chance in CHANCES:
        ratios = " | ".join(f"{row['ratios'][chance]:.1f}" for row in rows)
        lines.append(f"| ours / established, {chance} | {ratios} |")
    return "\n".join(lines)


def rounded(value: float) -> int:
    """To three digits."""
    return int(float(f"{value:.3g}"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", type=Path, default=HERE / ".peers" / "k_diffusion")
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "augmentation.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    peer = load_peer(args.peers)
    rows = []
    for side in SIZES:
        found = measure(cases_of(side, peer), args.turns)
        ratios = {chance: found[f"ours, {chance}"] / found[f"established, {chance}"]
                  for chance in CHANCES}  # fmt: skip
        rows.append({"side": side, "batch": SIZES[side], "images_per_second": found,
                     "ratios": ratios})  # fmt: skip
        told = ", ".join(f"{ratio:.1f} at {chance}" for chance, ratio in ratios.items())
        print(f"{side} x {side}, batches of {SIZES[side]}: {told} times the established")
        for name, speed in found.items():
            print(f"  {name:<25} {speed:>14,.0f}")
    print(table(rows))
    about = {
        "unit": "images a second of one core's time",
        "device": platform.processor() or platform.machine(),
        "torch": torch.__version__,
    }
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
