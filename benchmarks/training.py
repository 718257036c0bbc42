"""Our trainer beside denoising-diffusion-pytorch's, on the same network: what a step costs.

    make bench                               # installs the peers into benchmarks/.peers first
    python benchmarks/training.py --quick    # a few seconds: a small network, one round

Each library runs in a process of its own; turns of some steps alternate. Writes
benchmarks/results/training.json and docs/benchmarks-training.md.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from processes import Worker, machine, pretty
from training_bench import report
from training_bench.library import Setting, make_images

HERE = Path(__file__).resolve().parent
WORKER = "training_bench.worker"
PEER = "denoising_diffusion_pytorch"
NETWORK = {"dim": 32, "dim_mults": [1, 2, 4, 8]}
QUICK = {"dim": 8, "dim_mults": [1, 2]}
BATCH, IMAGES = 16, 2000  # the peer's default batch, which is its smallest
SETTINGS = {1: "updated in every step", 10: "updated every tenth step"}
"""Steps between updates of the average, and what the report calls that."""
ROUNDS = tuple((name, every) for every in SETTINGS for name in ("ours", PEER))


def measure(workers: dict[str, Any], rounds: int, steps: int, skipped: int) -> list[list[Any]]:
    """The steps of each turn, for each of ROUNDS."""
    turns: list[list[Any]] = [[] for _ in ROUNDS]
    for _ in range(rounds):
        for found, (name, ema_every) in zip(turns, ROUNDS, strict=True):
            order = {"steps": steps, "skipped": skipped, "ema_every": ema_every}
            found.append(workers[name].ask(do="steps", **order))
    return turns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small network, one round")
    parser.add_argument("--rounds", type=int, default=8, help="turns of each")
    parser.add_argument("--threads", type=int, default=2, help="of each library's arithmetic")
    parser.add_argument("--workers", type=int, default=2, help="processes that load images")
    parser.add_argument("--peers", type=Path, default=HERE / ".peers", help="where they lie")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "training.json")
    parser.add_argument("--docs", type=Path, default=HERE.parent / "docs")
    args = parser.parse_args()
    start = time.perf_counter()
    folder = args.peers / PEER
    if not (folder / "ema_pytorch").exists():
        sys.exit(f"{PEER} and ema_pytorch not installed in {folder}: run `make bench`")
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[variable] = str(args.threads)
    rounds, images = (1, 100) if args.quick else (args.rounds, IMAGES)
    steps = max(SETTINGS)  # a whole number of times the steps between updates of the average
    # Two batches a worker are made ahead while the other library has its turn.
    skipped = 2 * args.workers + 1
    with tempfile.TemporaryDirectory() as scratch:
        make_images(Path(scratch) / "images", images)
        network = QUICK if args.quick else NETWORK
        setting = Setting(str(Path(scratch) / "images"), BATCH, args.workers, network)
        workers = {name: Worker(WORKER, name, folder) for name in ("ours", PEER)}
        about = {
            name: worker.ask(do="begin", threads=args.threads, setting=asdict(setting))
            for name, worker in workers.items()
        }
        turns = measure(workers, rounds, steps, skipped)
        loading = {
            name: min(worker.ask(do="load", batches=10) for _ in range(2 if args.quick else 5))
            for name, worker in workers.items()
        }
        for worker in workers.values():
            worker.ask(do="end")
            worker.close()
    rows = []
    for found, (name, ema_every) in zip(turns, ROUNDS, strict=True):
        head = {"key": name, "library": about[name]["name"], "setting": SETTINGS[ema_every]}
        rows.append(report.row(head, found, BATCH))
        rows[-1]["a batch, ms"] = round(1e3 * loading[name], 4)
    results: dict[str, Any] = {
        "about": machine() | {
            "libraries": {a["name"]: a["version"] for a in about.values()},
            "parameters": about["ours"]["parameters"],
            "network": ", ".join(f"{k}={v}" for k, v in network.items()),
            "threads": args.threads,
            "workers": args.workers,
            "batch": BATCH,
            "steps": steps,
            "skipped": skipped,
            "rounds": rounds,
            "quick": args.quick,
            "seconds": round(time.perf_counter() - start),
        },
        "rows": rows,
    }  # fmt: skip
    if len({a["parameters"] for a in about.values()}) > 1:
        sys.exit(f"the libraries trained networks of different sizes: {about}")
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(pretty(results) + "\n")
    report.write(results, args.docs)
    for what, bound, figure, verdict in report.goals(results):
        print(f"{what}: {figure}, {bound}: {verdict}")
    print(f"{args.out} after {results['about']['seconds']} s")


if __name__ == "__main__":
    main()
