"""What only a GPU can show: no wait inside the loop, a run captured in a CUDA graph, its speed.

    python benchmarks/on_gpu.py                 # every registered solver, on the first GPU
    python benchmarks/on_gpu.py --device cpu    # the same script without capture: a dry run

For every solver, with a small convolutional network as the model:
- the loop runs under `torch.cuda.set_sync_debug_mode("error")`: a wait for the device raises;
- the loop is captured in a CUDA graph, replayed for two other starts, and compared with the loop
  run eagerly from them, bit for bit (solvers that draw noise: from the same generator states);
- microseconds per evaluation outside the model: the loop with a model that returns a ready tensor,
  on the host (what Python takes to launch) and replayed as a graph (what the device takes).
Writes benchmarks/results/on_gpu.json with the device's name.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from k_diffusion.sampling import SOLVERS, Plan, Run, SampleNoise, make_plan
from k_diffusion.utils.scheduler import KarrasScheduler

HERE = Path(__file__).parent
SHAPE = (1, 4, 64, 64)
Model = Callable[[Tensor, Tensor], Any]


def loop(plan: Plan, x: Tensor, noise: SampleNoise, model: Model) -> Callable[[], Tensor]:
    """The run's loop alone: what is moved to the device is moved before it."""
    run = Run(plan, x, noise)

    def advance() -> Tensor:
        while not run.done:
            answer = model(run.x, run.sigma)
            run.advance(*[answer] * plan.outputs)
        return run.result

    return advance


def seconds(work: Callable[[], Any], device: torch.device, rounds: int = 20) -> float:
    """Median time of a call, the device's work included."""
    times = []
    for k in range(rounds + 3):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if k >= 3:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def check(plan: Plan, device: torch.device) -> dict[str, Any]:
    """One solver: waits, capture, speed."""
    torch.manual_seed(0)
    network = torch.nn.Conv2d(SHAPE[1], SHAPE[1], 3, padding=1).to(device).requires_grad_(False)

    def model(x: Tensor, sigma: Tensor) -> Tensor:
        return network(x / (1 + sigma.reshape(-1, 1, 1, 1) ** 2).sqrt())

    cuda = device.type == "cuda"
    starts = [80 * torch.randn(SHAPE, device=device) for _ in range(3)]
    expected = []
    for x in starts:
        advance = loop(plan, x, SampleNoise([7], x), model)
        if cuda:
            torch.cuda.set_sync_debug_mode("error")
        try:
            expected.append(advance())
        finally:
            if cuda:
                torch.cuda.set_sync_debug_mode("default")
    row: dict[str, Any] = {"evaluations": plan.evaluations, "waits": 0}

    ready = torch.randn(SHAPE, device=device)
    x = starts[0]
    eager = seconds(lambda: loop(plan, x, SampleNoise([7], x), lambda x, s: ready)(), device)
    row["eager, us an evaluation"] = 1e6 * eager / plan.evaluations
    if not cuda:
        return row
    if plan.stochastic:
        # A captured generator goes on from replay to replay; that is no run from a seed.
        row["captured"] = "not tried: draws noise"
        return row

    def captured(model: Model) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        held = starts[0].clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # warm-up, as capture asks for
            loop(plan, held, SampleNoise([7], held), model)()
        torch.cuda.current_stream().wait_stream(side)
        advance = loop(plan, held, SampleNoise([7], held), model)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = advance()
        return graph, held, result

    graph, held, result = captured(model)
    for x, right in zip(starts, expected, strict=True):
        held.copy_(x)
        graph.replay()
        if not torch.equal(result, right):
            raise SystemExit(f"{plan.solver}: the captured run differs from the eager one")
    row["captured"] = "bit for bit"
    graph, _, _ = captured(lambda x, s: ready)
    row["graph, us an evaluation"] = 1e6 * seconds(graph.replay, device) / plan.evaluations
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "on_gpu.json")
    args = parser.parse_args()
    device = torch.device(args.device)
    rows = {}
    for name in SOLVERS:
        rows[name] = check(make_plan(name, KarrasScheduler().levels(args.steps)), device)
        print(name, rows[name])
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu, dry run"
    if device.type == "cuda":  # a dry run leaves no figures
        args.out.parent.mkdir(exist_ok=True)
        report = {"device": hardware, "torch": torch.__version__, "solvers": rows}
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
