"""The networks on a GPU, in bfloat16 and compiled, beside the card's own rate of matrix products.

    python benchmarks/on_gpu_models.py                         # on the first GPU
    python benchmarks/on_gpu_models.py --peers benchmarks/.peers
    python benchmarks/on_gpu_models.py --device cpu --quick    # a dry run: small, not compiled

For every network of benchmarks/models.py, and for the preset unet_base at 64 x 64: seconds forward
and forward and backward, the share of the best matrix product, the most memory taken. Each library
runs in a process of its own. Then neighbourhood attention by FlexAttention, by tiles of plain
attention, and by NATTEN where it is installed. Writes benchmarks/results/on_gpu_models.json with
the device's name.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from model_bench.measure import Limit, took
from processes import Worker, pretty
from torch import Tensor

HERE = Path(__file__).resolve().parent
PEERS = ("diffusers", "azula", "denoising_diffusion_pytorch")
KINDS = ("forward", "both")
GOAL = 0.5  # share of the matrix products' rate, unet_base, forward and backward
NEIGHBORHOODS = ((16, 64, 64, 4, 64, 7), (4, 128, 128, 4, 64, 7), (16, 32, 32, 8, 64, 7))
"""Batch, height, width, heads, channels of a head, side of the neighbourhood."""


def measure(worker: Worker, args: argparse.Namespace, rate: float) -> list[dict[str, Any]]:
    """Every network of a library."""
    rows = []
    for network in worker.about["networks"]:
        if args.only and network["name"] not in args.only:
            continue
        setting = {
            "batch": args.batch,
            "layout": "channels_last",
            "device": args.device,
            "dtype": "bfloat16",
            "backend": args.backend,
        }
        order = {"index": network["index"], "setting": setting, "checkpointed": False}
        row = {"library": worker.about["name"], "network": network["name"],
               "options": network["options"]}  # fmt: skip
        try:
            counted = worker.ask(do="count", **order)
            seconds = {
                kind: [worker.ask(do="seconds", kind=kind, **order) for _ in range(args.rounds)]
                for kind in KINDS
            }
        except RuntimeError as failure:  # such as a graph that a peer's network cannot be
            row["failed"] = str(failure)
        else:
            row["parameters"] = counted["parameters"]
            row["GFLOP an image"] = counted["flops"]["forward"] / 1e9
            row["saved MB"] = counted["saved bytes"] / 1e6
            row["peak MB"] = counted.get("peak bytes", 0) / 1e6
            for kind, times in seconds.items():
                middle = statistics.median(times)
                done = args.batch * counted["flops"][kind] / middle
                row[f"{kind}, s"] = middle
                row[f"{kind}, TFLOP/s"] = done / 1e12
                row[f"{kind}, share"] = done / rate
        worker.ask(do="free", **order)
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def neighborhood(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Each way of neighbourhood attention: seconds, and the largest difference from float32."""
    name = "k_diffusion.models.neighborhood"
    if importlib.util.find_spec(name) is None:
        print(f"{name}: not there, not measured")
        return []
    attention = importlib.import_module(name).neighborhood_attention
    device = torch.device(args.device)
    backends = ["tiles", "flex"] + ["natten"] * (importlib.util.find_spec("natten") is not None)
    rows = []
    for batch, height, width, heads, channels, kernel in args.neighborhoods:
        shape = (3, batch, height, width, heads, channels)
        exact = torch.randn(shape, device=device)
        with torch.no_grad():
            right = attention(*exact, kernel, backend="tiles")
        parts = [part.detach().requires_grad_() for part in exact.to(torch.bfloat16)]
        gradient = torch.randn_like(parts[0])
        for backend in backends:
            # FlexAttention has no gradient on the CPU.
            kinds = KINDS if device.type == "cuda" or backend != "flex" else KINDS[:1]
            inputs = parts if "both" in kinds else [part.detach() for part in parts]
            row: dict[str, Any] = {"backend": backend, "shape": shape[1:], "kernel": kernel}

            attend = functools.partial(attention, kernel_size=kernel, backend=backend)
            row["largest difference"] = (attend(*inputs) - right).abs().max().item()
            for kind in kinds:
                work = functools.partial(attend_once, attend, inputs, gradient, kind)
                row[f"{kind}, s"] = seconds(work, device, args.rounds)
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows


def attend_once(
    attend: Callable[..., Tensor], inputs: list[Tensor], gradient: Tensor, kind: str
) -> None:
    """Attention of q, k and v, and for "both" its gradients for them."""
    with torch.set_grad_enabled(kind == "both"):
        out = attend(*inputs)
        if kind == "both":
            torch.autograd.grad(out, inputs, gradient)


def seconds(work: Callable[[], Any], device: torch.device, rounds: int) -> float:
    """Median of several calls, after one that warms up."""
    work()
    return statistics.median(took(work, device) for _ in range(rounds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--backend", default="inductor", help="of torch.compile; none: eager")
    parser.add_argument("--only", nargs="*", help="names of networks: unet, dit...")
    parser.add_argument("--peers", type=Path, help="where they lie; left out: ours alone")
    parser.add_argument("--quick", action="store_true", help="one image, two rounds, eager")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "on_gpu_models.json")
    args = parser.parse_args()
    products: tuple[int, ...] = (2048, 4096, 8192)
    args.neighborhoods = NEIGHBORHOODS
    if args.quick:
        args.batch, args.rounds, args.backend = 1, 2, "none"
        products, args.neighborhoods = (64, 128), ((1, 10, 9, 1, 16, 3),)
    args.backend = None if args.backend == "none" else args.backend
    device = torch.device(args.device)
    limit = Limit(args.batch, args.device, torch.bfloat16, products)
    limit.rates()
    rates = limit.rates(3 if args.quick else 20)
    del limit
    if device.type == "cuda":
        torch.cuda.empty_cache()
    rate = max(v for name, v in rates.items() if name.startswith("matrix product"))
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu, dry run",
        "torch": torch.__version__,
        "batch": args.batch,
        "compiled by": args.backend,
        "matrix product, TFLOP/s": rate / 1e12,
        "plain, TFLOP/s": {name: round(v / 1e12, 2) for name, v in rates.items()},
        "networks": [],
    }
    print(f"{results['device']}: {rate / 1e12:.3g} TFLOP/s in matrix products", flush=True)
    libraries = {"ours": HERE}
    if args.peers is not None:
        libraries |= {n: args.peers / n for n in PEERS if (args.peers / n).exists()}
    for name, folder in libraries.items():
        worker = Worker("model_bench.worker", name, folder)
        results["networks"] += measure(worker, args, rate)
        for line in worker.about["missing"]:
            print(line)
        worker.close()
    results["neighbourhood attention"] = neighborhood(args)
    for row in results["networks"]:
        if row["network"] == "unet_base" and "both, share" in row:
            share = row["both, share"]
            print(f"unet_base: {share:.2f} of the matrix products' rate, asked for: {GOAL}")
    if device.type == "cuda":  # a dry run leaves no figures
        args.out.parent.mkdir(exist_ok=True)
        args.out.write_text(pretty(results) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
