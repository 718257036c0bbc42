"""What guidance and the run around a sampler keep to, as figures.

    python benchmarks/around.py

Data are a mixture of three Gaussians in the plane, whose classes are its components, so that every
estimate is exact; a small network of random weights stands where rounding is the matter. Printed,
and written to benchmarks/results/around.json:

alone       the largest difference of a sample in a batch of 4 and alone, over every kind of
            guidance, sampler and path
batched     the largest difference of guidance by one call on twice the batch and by two calls
interval    the calls that guidance in an interval makes, and those that its levels ask for
kept        the largest difference of what a mask keeps, over all samplers
strength    the largest difference of strength 0 from the image, and of 1 from a plain run
memory      of 50 samples on a device that holds 3: those drawn, those drawn twice, and their
            difference from a device that holds all
kill -9     the same of 50 samples, written by a process that is killed and started again
likelihood  the error of the log-density of a Gaussian, in nats per dimension
inversion   the relative error of image -> noise -> image, by 100 steps of heun each way
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from k_diffusion.denoiser import FunctionDenoiser
from k_diffusion.guidance import (
    Clamp,
    Composed,
    DynamicThreshold,
    Guided,
    Part,
    SwitchAt,
    apg,
    autoguidance,
    cfg,
    cfg_zero_star,
    perturbed_attention,
    posterior_sampling,
    pseudo_inverse,
)
from k_diffusion.models import UNet
from k_diffusion.sampling import SOLVERS, KSampler, Run, log_density, make_plan, unit_noise
from k_diffusion.utils.levels import FLOW, VE, Levels
from k_diffusion.utils.levels import Path as Coordinates
from k_diffusion.utils.scheduler import KarrasScheduler

OUT = Path(__file__).resolve().parent / "results" / "around.json"
MEANS = torch.tensor([[-1.0, 0.5], [0.8, 1.0], [0.3, -1.2]], dtype=torch.float64)
SPREAD = 0.3
SAMPLERS = ("euler", "heun", "dpmpp_2m", "dpmpp_2m_sde")
SEEDS, LABELS = [5, 6, 7, 8], torch.tensor([0, 1, 2, 1])
SHAPE, MANY = (3, 6, 6), 50


class Mixture:
    """The exact denoiser of the mixture; class_label 3 (or none) is all of it."""

    float64_sigma = True

    def __init__(self, path: Coordinates = VE) -> None:
        self.path, self.calls = path, 0

    def alpha(self, sigma: Any) -> Any:
        """The signal scale."""
        return self.path.alpha(sigma)

    def __call__(self, x: Tensor, sigma: Tensor, class_label: Tensor | None = None) -> Tensor:
        """E[x0 | x, class]."""
        self.calls += 1
        alpha, sigma = self.alpha(sigma.double())[:, None, None], sigma.double()[:, None, None]
        variance = (alpha * SPREAD) ** 2 + sigma**2
        away = x.double()[:, None] - alpha * MEANS
        logits = -away.square().sum(2) / (2 * variance[..., 0])
        if class_label is not None:
            others = (class_label[:, None] != torch.arange(3)) & (class_label[:, None] < 3)
            logits = logits.masked_fill(others, -math.inf)
        each = MEANS + alpha * SPREAD**2 / variance * away
        return (logits.softmax(1)[..., None] * each).sum(1).to(x.dtype)


def lesser(path: Coordinates) -> FunctionDenoiser:
    """A worse model."""
    model = Mixture(path)
    return FunctionDenoiser(lambda x, sigma, **told: 0.9 * model(x, sigma, **told), path)


def first(x0: Tensor) -> Tensor:
    """The operator that keeps one of two values."""
    return x0 * torch.tensor([1.0, 0.0], dtype=x0.dtype)


def towards(x0: Tensor, sigma: Tensor) -> Tensor:
    """A score."""
    return -(x0 - MEANS[0].to(x0.dtype)).square().sum(1)


NONE: dict[str, Any] = {"class_label": None}
MEASURED, MASK = torch.tensor([[0.4, 0.0]]), torch.tensor([1.0, 0.0])
KINDS: dict[str, Callable[[Any], Any]] = {
    "cfg": lambda m: cfg(m, 2.0, null=NONE),
    "cfg, two calls": lambda m: cfg(m, 2.0, null=NONE, batched=False),
    "cfg by level": lambda m: cfg(m, lambda ratio: 2 - 1 / (1 + ratio), null=NONE),
    "cfg in an interval": lambda m: cfg(m, 3.0, null=NONE, interval=(0.1, 2.0)),
    "cfg, rescaled": lambda m: cfg(m, 3.0, null=NONE, rescale=0.7),
    "apg": lambda m: apg(m, 3.0, null=NONE, norm=0.5),
    "CFG-Zero*": lambda m: cfg_zero_star(m, 2.0, null=NONE),
    "autoguidance": lambda m: autoguidance(m, lesser(m.path), 2.0),
    "composed": lambda m: Composed(m, [Part({}, 2.0, MASK), Part({}, 1.0)], null=NONE),
    "gradient": lambda m: Guided(m, towards, 0.5),
    "posterior sampling": lambda m: posterior_sampling(m, first, MEASURED, noise=0.1),
    "pseudo-inverse": lambda m: pseudo_inverse(m, first, MEASURED, noise=0.1),
    "clamp": Clamp,
    "dynamic threshold": lambda m: DynamicThreshold(m, 0.9),
    "two models": lambda m: SwitchAt(m, lesser(m.path), 0.7),
    "cfg of pseudo-inverse": lambda m: cfg(
        pseudo_inverse(m, first, MEASURED, noise=0.1), 2.0, null=NONE
    ),
}


def network(prediction: str = "edm") -> UNet:
    """A small network of random weights."""
    torch.manual_seed(4)
    made = UNet(in_channels=2, num_classes=3, channels=8, channel_mults=(1, 1), blocks=1,
                attention=(False, True), head_channels=8, prediction=prediction,
                time_convention="unit" if prediction == "flow" else "log_sigma")  # fmt: skip
    for parameter in made.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return made.eval()


def worst(a: Tensor, b: Tensor) -> float:
    """The largest difference."""
    return float((a - b).abs().max())


def alone() -> dict[str, Any]:
    """Every sample of a batch of 4 as if alone."""
    off: dict[str, float] = {}

    def each(model: Any, kind: str, solver: str, scheduler: str | None, shape: Any) -> None:
        sampler, noise = KSampler(model, scheduler, solver), unit_noise(shape, SEEDS)
        batch = sampler.sample(noise, 8, LABELS, seed=SEEDS)
        assert batch.shape == noise.shape
        assert batch.dtype == noise.dtype
        for i in range(4):
            one = sampler.sample(noise[i : i + 1], 8, LABELS[i : i + 1], seed=SEEDS[i : i + 1])
            off[kind] = max(off.get(kind, 0.0), worst(one, batch[i : i + 1]))

    for solver in SAMPLERS:
        for path, scheduler in ((VE, "karras"), (FLOW, None)):
            for kind, make in KINDS.items():
                each(make(Mixture(path)), kind, solver, scheduler, (2,))
            guided = perturbed_attention(network("edm" if path is VE else "flow"), 3.0)
            each(guided, "perturbed attention", solver, None, (2, 8, 8))
    return {"combinations": len(off) * len(SAMPLERS) * 2, "largest difference": max(off.values()),
            "by kind": off}  # fmt: skip


def batched() -> dict[str, float]:
    """One call or two, relative to the largest value."""
    found = {}
    for name, model, shape in (("mixture", Mixture(), (2,)), ("network", network(), (2, 8, 8))):
        null = {"class_label": torch.full((4,), 3)} if name == "mixture" else None
        drawn = [
            KSampler(cfg(model, 2.0, null=null, batched=way), "karras", "dpmpp_2m").sample(
                unit_noise(shape, SEEDS), 20, LABELS
            )
            for way in (True, False)
        ]
        found[name] = worst(drawn[0], drawn[1]) / float(drawn[0].abs().max())
    return found


def interval() -> dict[str, int]:
    """Calls of guidance in an interval."""
    model = Mixture()
    guided = cfg(model, 3.0, null=NONE, interval=(0.2, 2.0), batched=False)
    sampler = KSampler(guided, "karras", "euler")
    sampler.sample(unit_noise((2,), SEEDS), 20, LABELS)
    within = sum(0.2 < level.ratio <= 2.0 for level in sampler.levels(20)[:-1])
    return {"made": model.calls, "asked for": 20 + within, "without an interval": 40}


def kept() -> dict[str, float]:
    """What a mask keeps, and a strength of 0 and 1."""
    init, mask = torch.rand(4, 2) * 2 - 1, torch.tensor([0.0, 1.0])
    noise, off = unit_noise((2,), SEEDS), 0.0
    for name, solver in SOLVERS.items():
        if solver.outputs == 1:
            drawn = KSampler(Mixture(), KarrasScheduler(0.01, 20), name).sample(
                noise, 6, LABELS, seed=SEEDS, init=init, mask=mask
            )
            off = max(off, worst(drawn[:, 0], init[:, 0]))
    sampler = KSampler(Mixture(), "karras", "dpmpp_2m")
    plain = sampler.sample(noise, 20, LABELS)
    none, all_ = (sampler.sample(noise, 20, LABELS, init=init, strength=s) for s in (0.0, 1.0))
    return {"kept": off, "strength 0": worst(none, init), "strength 1": worst(all_, plain)}


def smooth(x: Tensor, sigma: Tensor) -> Tensor:
    """A model whose values see each other."""
    near = torch.nn.functional.avg_pool2d(x, 3, 1, 1)
    return torch.tanh(2 * near / (1 + sigma.reshape(-1, 1, 1, 1)))


def sampler_of(model: Any = smooth) -> KSampler:
    """A stochastic sampler."""
    return KSampler(model, KarrasScheduler(0.05, 5), "euler_ancestral")


def memory() -> dict[str, float]:
    """A device that holds three samples."""

    def limited(x: Tensor, sigma: Tensor) -> Tensor:
        if len(x) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return smooth(x, sigma)

    options: dict[str, Any] = {"steps": 4, "shape": SHAPE}
    drawn = list(sampler_of(limited).sample_many(MANY, **options))
    whole = sampler_of().sample_many(MANY, **options).collect()
    numbers = [i for i, _ in drawn]
    off = worst(torch.stack([sample for _, sample in drawn]), whole)
    return {"drawn": len(drawn), "twice": len(numbers) - len(set(numbers)), "difference": off}


def write(folder: str, slowly: bool) -> None:
    """Draws the set into a folder; slowly: tells of a file half way, and waits to be killed."""

    def model(x: Tensor, sigma: Tensor) -> Tensor:
        if slowly and len(list(Path(folder).glob("0*"))) >= MANY // 2:
            print("half way", flush=True)
            signal.pause()
        return smooth(x, sigma)

    sampler_of(model).sample_many(MANY, steps=4, shape=SHAPE, batch_size=8).save(folder)


def killed() -> dict[str, float]:
    """kill -9 in the middle, started again."""
    command = [sys.executable, __file__, "--write"]
    with tempfile.TemporaryDirectory() as folder:
        with subprocess.Popen(
            [*command, folder, "--slowly"], stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "half way\n"
            os.kill(process.pid, signal.SIGKILL)
        before = {path: path.stat().st_mtime_ns for path in Path(folder).glob("0*")}
        subprocess.run([*command, folder], check=True)
        paths = sorted(Path(folder).glob("0*"))
        anew = sum(path.stat().st_mtime_ns != time for path, time in before.items())
        samples = torch.stack([load_file(path)["sample"] for path in paths])
    whole = sampler_of().sample_many(MANY, steps=4, shape=SHAPE, batch_size=8).collect()
    return {"there when killed": len(before), "drawn twice": anew, "at the end": len(paths),
            "difference": worst(samples, whole)}  # fmt: skip


def likelihood() -> dict[str, float]:
    """The log-density of a Gaussian, which is known, at unlike points."""
    x = torch.randn(16, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    low, high, found = 0.01, 80.0, {}
    for path in (VE, FLOW):

        def gaussian(x: Tensor, sigma: Tensor, path: Coordinates = path) -> Tensor:
            alpha = path.alpha(sigma)
            gain = alpha * 0.25 / (alpha**2 * 0.25 + sigma**2)
            return 0.4 + gain[:, None, None] * (x - alpha[:, None, None] * 0.4)

        model = FunctionDenoiser(gaussian, path)
        model.float64_sigma = True  # type: ignore[attr-defined]
        start = path.at(-math.log(low))
        true = normal(x, 0.4, 0.25 + low**2)
        # Where pure noise is not reached, the density there is the Gaussian's own, or nearly noise.
        ends: dict[str, tuple[Any, Any]]
        if path is VE:
            end = path.at(-math.log(high))
            ends = {
                "": (end, lambda x: normal(x, 0.4, 0.25 + high**2)),
                f", N(0, {high:g}²)": (end, None),
            }
        else:
            ends = {"": (path.at(-math.inf), None)}
        for name, (end, prior) in ends.items():
            got = log_density(model, x, start, end, prior=prior).nats
            found[f"{path}{name}"] = worst(got, true) / 6
    return found


def normal(x: Tensor, mean: float, variance: float) -> Tensor:
    """The log-density of N(mean, variance) for each sample."""
    each = -((x - mean) ** 2) / (2 * variance) - 0.5 * math.log(2 * math.pi * variance)
    return each.flatten(1).sum(1)


def inversion() -> dict[str, float]:
    """Image -> noise -> image on the mixture, by the same levels up and down."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(3, (500,), generator=generator)
    x = MEANS[rows] + SPREAD * torch.randn(500, 2, dtype=torch.float64, generator=generator)
    model, found = Mixture(), {}
    for steps in (50, 100, 200):
        levels = Levels(KarrasScheduler(0.01, 20.0).levels(steps + 1)[:-1], VE)
        state = x
        for way in (levels.flipped(), levels):
            run = Run(make_plan("heun", way), state, sigma_dtype=torch.float64)
            while not run.done:
                run.advance(model(run.x, run.sigma))
            state = run.result
        found[f"{steps} steps"] = float((state - x).norm() / x.norm())
    return found


CHECKS: dict[str, Callable[[], dict[str, Any]]] = {
    "alone": alone, "batched": batched, "interval": interval, "kept": kept, "memory": memory,
    "kill -9": killed, "likelihood": likelihood, "inversion": inversion,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--write", default="", help="a folder: what kill -9 starts")
    parser.add_argument("--slowly", action="store_true", help="and kills")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.write:
        write(options.write, options.slowly)
        return
    figures = {}
    for name, check in CHECKS.items():
        figures[name] = check()
        told = (f"{key} {value:.3g}" for key, value in figures[name].items() if key != "by kind")
        print(f"{name:<12}{', '.join(told)}", flush=True)
    options.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
