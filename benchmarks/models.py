"""Our networks beside those of diffusers, azula and denoising-diffusion-pytorch: time and memory.

    make bench                             # installs the peers into benchmarks/.peers first
    python benchmarks/models.py --quick    # under a minute: two images, one round, channels_last

Each library runs in a process of its own, on one thread; timed calls take turns. Writes
benchmarks/results/models.json and docs/benchmarks-models.md.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from model_bench import report
from processes import Worker, machine, pretty

HERE = Path(__file__).resolve().parent
WORKER = "model_bench.worker"
PEERS = ("diffusers", "azula", "denoising_diffusion_pytorch")
KINDS = ("forward", "both")
LAYOUTS = ("contiguous", "channels_last")
BATCH = 8
CHECKPOINTED = ("unet", "hourglass")


@dataclass
class Turn:
    """A setting of a network, and what was measured of it."""

    worker: Worker
    network: dict[str, Any]
    layout: str
    batch: int
    checkpointed: bool = False
    backend: str | None = None
    counted: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=lambda: {kind: [] for kind in KINDS})

    def ask(self, do: str, **more: Any) -> Any:
        return self.worker.ask(
            do=do, index=self.network["index"], checkpointed=self.checkpointed,
            setting={"layout": self.layout, "batch": self.batch, "backend": self.backend}, **more,
        )  # fmt: skip

    @property
    def head(self) -> dict[str, Any]:
        return {
            "key": self.worker.name,
            "library": self.worker.about["name"],
            "network": self.network["name"],
            "options": self.network["options"],
            "layout": self.layout,
            "compiled": self.backend is not None,
        }


def turns_of(
    workers: Sequence[Worker],
    batch: int,
    backend: str | None = None,
    layouts: Sequence[str] = LAYOUTS,
) -> list[Turn]:
    """All that is to be timed, by turns of a round; with a backend also compiled by it."""
    turns = []
    for worker in workers:
        for network in worker.about["networks"]:
            if network["large"]:
                continue
            turns += [Turn(worker, network, layout, batch) for layout in layouts]
            if backend is not None:
                turns.append(Turn(worker, network, LAYOUTS[1], batch, backend=backend))
            if network["checkpoints"] and network["name"] in CHECKPOINTED:
                turns.append(Turn(worker, network, LAYOUTS[1], batch, checkpointed=True))
    return turns


def measure(turns: Sequence[Turn], limit: Worker, batch: int, rounds: int) -> dict[str, float]:
    """Counts once, times in rounds; gives the best rate of each plain operation, in FLOP/s."""
    for turn in turns:
        turn.counted = turn.ask("count")
    rates: dict[str, float] = {}
    for _ in range(rounds):
        for turn in turns:
            for kind in KINDS:
                turn.seconds[kind].append(turn.ask("seconds", kind=kind))
            # Between any two networks, so that the limit has met whatever they have met.
            for name, rate in limit.ask(batch=batch).items():
                rates[name] = max(rate, rates.get(name, 0.0))
    return rates


def checkpointing(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """Bytes and time with every block checkpointed over those of the plain network."""
    rows = []
    for turn in (t for t in turns if t.checkpointed):
        (plain,) = (
            t
            for t in turns
            if (t.worker, t.network, t.layout) == (turn.worker, turn.network, turn.layout)
            and not t.checkpointed
            and t.backend is None
        )
        medians = [statistics.median(t.seconds["both"]) for t in (turn, plain)]
        saved = [t.counted["saved bytes"] for t in (turn, plain)]
        rows.append({
            "network": turn.network["name"],
            "layout": turn.layout,
            "saved MB": round(saved[0] / 1e6, 3),
            "bytes": round(saved[0] / saved[1], 4),
            "both, median s": round(medians[0], 5),
            "time": round(medians[0] / medians[1], 4),
        })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="two images a batch, one round, one layout"
    )
    parser.add_argument("--rounds", type=int, default=10, help="timed calls of each network")
    parser.add_argument("--peers", type=Path, default=HERE / ".peers", help="where they lie")
    parser.add_argument("--compile", action="store_true", help="also compiled: minutes for each")
    parser.add_argument("--alone", action="store_true", help="without the peers")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "models.json")
    parser.add_argument("--docs", type=Path, default=HERE.parent / "docs")
    args = parser.parse_args()
    start = time.perf_counter()
    names = () if args.alone else PEERS
    missing = [name for name in names if not (args.peers / name).exists()]
    if missing:
        sys.exit(f"{', '.join(missing)} not installed in {args.peers}: run `make bench`")
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[variable] = "1"
    batch, rounds = (2, 1) if args.quick else (BATCH, args.rounds)
    workers = [Worker(WORKER, "ours", HERE)]
    workers += [Worker(WORKER, name, args.peers / name) for name in names]
    limit = Worker(WORKER, "limit", HERE)
    backend = "inductor" if args.compile else None
    turns = turns_of(workers, batch, backend, LAYOUTS[1:] if args.quick else LAYOUTS)
    rates = measure(turns, limit, batch, rounds)
    by = max(rates, key=lambda name: rates[name])
    results: dict[str, Any] = {
        "about": machine() | {
            "libraries": {w.about["name"]: w.about["version"] for w in workers},
            "batch": batch,
            "rounds": rounds,
            "quick": args.quick,
        },
        "limit": {
            "GFLOP/s": round(rates[by] / 1e9, 2),
            "by": by,
            "all": {name: round(rate / 1e9, 2) for name, rate in rates.items()},
        },
        "networks": [
            report.row(t.head, t.counted, t.seconds, batch, rates[by])
            for t in turns
            if not t.checkpointed
        ],
        "checkpointing": checkpointing(turns),
        "missing": [line for worker in workers for line in worker.about["missing"]],
    }  # fmt: skip
    for worker in (*workers, limit):
        worker.close()
    results["about"]["seconds"] = round(time.perf_counter() - start)
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(pretty(results) + "\n")
    report.write(results, args.docs)
    for line in results["missing"]:
        print(line)
    print(f"{args.out} after {results['about']['seconds']} s")


if __name__ == "__main__":
    main()
