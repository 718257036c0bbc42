"""Time outside the model per evaluation, beside k-diffusion 0.1.1, in one run.

    make bench            # installs the peer into benchmarks/.peers first

One core, float32, 1×4×64×64, a model that returns a ready tensor. `cached` is a call whose plan has
been made before, `first` one that makes it. Writes benchmarks/results/overhead.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sampler_bench.peer_k_diffusion import load_module

from k_diffusion.sampling import KSampler, engine, ksampler, plan
from k_diffusion.utils.scheduler import KarrasScheduler

HERE = Path(__file__).parent
PEER = HERE / ".peers" / "k_diffusion"
STEPS = 30


def load_peer() -> Any:
    """k-diffusion's sampling module under another name."""
    if not (PEER / "k_diffusion" / "sampling.py").exists():
        sys.exit(f"the peer is not installed in {PEER}: run `make bench`")
    return load_module(PEER)


class QuietTorch:
    """torch with a `randn_like` that costs nothing: the peer's euler without its unused draw."""

    def __init__(self, x: torch.Tensor) -> None:
        self._noise = torch.zeros_like(x)

    def __getattr__(self, name: str) -> Any:
        return (lambda x: self._noise) if name == "randn_like" else getattr(torch, name)


def measure(cases: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each case; the cases take turns, so that all meet the same machine."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    for k in range(rounds + 3):
        for name, case in cases.items():
            start = time.perf_counter()
            case()
            if k >= 3:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "overhead.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    peer = load_peer()
    x = torch.randn(1, 4, 64, 64)
    answer = torch.randn(1, 4, 64, 64)

    def model(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return answer

    def first_call(sampler: KSampler) -> None:
        plan._make_plan.cache_clear()
        engine._program.cache_clear()
        ksampler._lay.cache_clear()
        sampler.sample(x, STEPS)

    sigmas = peer.get_sigmas_karras(STEPS, 0.002, 80.0)
    rows = []
    for name in ("euler", "heun", "dpmpp_2m"):
        sampler = KSampler(model, KarrasScheduler(), name)
        theirs = getattr(peer, f"sample_{name}")
        quiet = QuietTorch(x)

        def without_draw(theirs: Any = theirs, quiet: Any = quiet) -> None:
            peer.torch = quiet
            theirs(model, x, sigmas, disable=True)
            peer.torch = torch

        seconds = measure(
            {
                "first": lambda sampler=sampler: first_call(sampler),
                "cached": lambda sampler=sampler: sampler.sample(x, STEPS),
                "peer": lambda theirs=theirs: theirs(model, x, sigmas, disable=True),
                "peer, no unused draw": without_draw,
            },
            args.rounds,
        )
        calls = sampler.plan(STEPS).evaluations
        row = {key: 1e6 * value / calls for key, value in seconds.items()}
        row["ratio, cached"] = row["cached"] / row["peer"]
        row["ratio, first"] = row["first"] / row["peer"]
        row["ratio, cached, no unused draw"] = row["cached"] / row["peer, no unused draw"]
        rows.append({"sampler": name, "evaluations": calls, **row})
    print("microseconds outside the model per evaluation; ratios to k-diffusion 0.1.1.post1")
    for row in rows:
        print("  ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{v}" for k, v in row.items()))
    about = {
        "device": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "shape": list(x.shape),
        "steps": STEPS,
    }
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
