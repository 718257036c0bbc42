"""Ways to inpaint, by how near what they draw comes to the true conditional distribution.

    python benchmarks/inpainting.py
    python benchmarks/inpainting.py --checkpoint FILE    # of a model of the digits with classes

Data are a mixture of three correlated Gaussians in the plane, (a, b); a is known, b is drawn. What
is printed is the largest difference of the distribution functions of the drawn b and of the true
one, for two values of a. The known part is

fresh     replaced in the state at each step, with fresh noise (Lugmayr et al. 2022,
          arXiv:2201.09865, equation 8),
fixed     replaced in the state at each step, always with the noise of the beginning,
estimate  put into the model's estimate of x0: what `KSampler.sample(mask=)` does.

Each part of `jump` steps is walked `times` times. Sampling noise of the figures is about 0.015.

Of a trained model: the share of real digits whose class stays the same, for a classifier, when
their lower half is drawn anew; the model told the class, or not, or not but guided by the upper
half.

Either writes its part of benchmarks/results/inpainting.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from k_diffusion.sampling import Levels, Resample, Run, SampleNoise, make_plan
from k_diffusion.sampling.masks import make_stages, noise_back
from k_diffusion.utils.scheduler import KarrasScheduler

OUT = Path(__file__).resolve().parent / "results" / "inpainting.json"
WEIGHTS = torch.tensor([0.35, 0.4, 0.25], dtype=torch.float64)
MEANS = torch.tensor([[-1.0, -0.8], [0.3, 0.9], [1.0, -0.6]], dtype=torch.float64)
SPREADS = ((0.3, 0.35, 0.8), (0.35, 0.25, -0.6), (0.25, 0.3, 0.3))
COVARIANCES = torch.tensor(
    [[[s * s, r * s * t], [r * s * t, t * t]] for s, t, r in SPREADS], dtype=torch.float64
)
MASK = torch.tensor([0.0, 1.0], dtype=torch.float64)


def denoise(x: Tensor, sigma: Tensor) -> Tensor:
    """E[x0 | x] of the mixture, at one level for all samples."""
    total = COVARIANCES + sigma[0] ** 2 * torch.eye(2, dtype=torch.float64)
    away = x[:, None, :] - MEANS
    solved = torch.einsum("kij,bkj->bki", torch.linalg.inv(total), away)
    share = (WEIGHTS.log() - 0.5 * torch.logdet(total) - 0.5 * (away * solved).sum(-1)).softmax(-1)
    each = MEANS + torch.einsum("kij,bkj->bki", COVARIANCES, solved)
    return (share[..., None] * each).sum(1)


def distance(b: Tensor, a: float) -> float:
    """Largest difference of the distribution functions of drawn values b and of b given a."""
    spread = COVARIANCES[:, 0, 0]
    share = (WEIGHTS.log() - 0.5 * spread.log() - 0.5 * (a - MEANS[:, 0]) ** 2 / spread).softmax(0)
    gain = COVARIANCES[:, 0, 1] / spread
    centre = MEANS[:, 1] + gain * (a - MEANS[:, 0])
    variance = COVARIANCES[:, 1, 1] - gain * COVARIANCES[:, 0, 1]
    b = b.sort().values
    true = (share * torch.special.ndtr((b[:, None] - centre) / variance.sqrt())).sum(1)
    return (true - torch.arange(1, len(b) + 1) / len(b)).abs().max().item()


def inpaint(
    way: str, solver: str, levels: Levels, resample: Resample, a: float, count: int
) -> float:
    """The distance that one way comes to."""
    generator = torch.Generator().manual_seed(1)

    def fresh() -> Tensor:
        return torch.randn(count, 2, generator=generator, dtype=torch.float64)

    init = torch.tensor([a, 0.0], dtype=torch.float64).expand(count, 2)
    fixed = fresh()
    x = fixed * levels[0].sigma + init * (1 - MASK)
    model: Callable[[Tensor, Tensor], Tensor] = denoise
    if way == "estimate":

        def model(x: Tensor, sigma: Tensor) -> Tensor:
            return torch.lerp(init, denoise(x, sigma), MASK)

    for i, stage in enumerate(make_stages(levels, resample)):
        if stage.back_from is not None:
            x = noise_back(x, fresh(), stage.back_from, stage.levels[0])
        plan = make_plan(solver, stage.levels)
        run = Run(plan, x, SampleNoise(range(i * count, (i + 1) * count), x))
        while not run.done:
            if way != "estimate" and plan.steps[run.k].start:
                eps = fixed if way == "fixed" else fresh()
                run.x = torch.lerp(init + eps * run.sigma[:, None], run.x, MASK)
            run.advance(model(run.x, run.sigma))
        x = run.result
    return distance(x[:, 1], a)


def digits(checkpoint: str, count: int) -> dict[str, Any]:
    """What a trained model makes of the upper halves of digits."""
    from k_diffusion.evaluation import classify, share_of, train_classifier
    from k_diffusion.guidance import pseudo_inverse
    from k_diffusion.sampling import KSampler
    from k_diffusion.training import Digits, load_denoiser

    denoiser, info = load_denoiser(checkpoint)
    found: dict[str, Any] = {"checkpoint sha256": info.sha256}
    real, held_out = Digits("train"), Digits("test")
    judge = train_classifier(real.images, real.labels, epochs=20)
    images, labels = held_out.images[:count], held_out.labels[:count]
    keep = torch.ones(8, 8)
    keep[4:] = 0
    none = torch.full_like(labels, denoiser.network.num_classes)
    guided = pseudo_inverse(denoiser, lambda x: x * keep, images * keep)
    for name, model, told in (
        ("told the class", denoiser, labels),
        ("not told", denoiser, none),
        ("not told, pseudo_inverse", guided, none),
    ):
        for times in (1, 4):
            drawn = KSampler(model, "karras", "dpmpp_2m").sample(
                steps=20, init=images, mask=1 - keep, condition=told, resample=times,
                seeds=range(len(images)),
            )  # fmt: skip
            share = share_of(classify(judge, drawn)[0], labels)
            found[f"{name}, {times} times"] = share
            print(f"{name:26} {times} times: {share:.1%} keep their class", flush=True)
    return found


def write(part: str, figures: dict[str, Any]) -> None:
    """Put figures beside those of the other part."""
    both = json.loads(OUT.read_text(encoding="utf-8")) if OUT.exists() else {}
    both[part] = figures
    OUT.write_text(json.dumps(both, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=4000, help="samples drawn")
    parser.add_argument("--solvers", default="heun,dpmpp_2m,euler_ancestral")
    parser.add_argument("--checkpoint", default="", help="of a model of the digits")
    options = parser.parse_args()
    if options.checkpoint:
        write("digits", digits(options.checkpoint, min(options.count, 300)))
        return
    found: dict[str, Any] = {"samples": options.count}
    count = options.count
    cases = [(20, 1, 1), (20, 4, 1), (20, 10, 1), (20, 10, 5), (20, 10, 10), (60, 1, 1), (60, 4, 1)]
    for solver in options.solvers.split(","):
        for steps, times, jump in cases:
            levels = KarrasScheduler(0.002, 80).levels(steps)
            row = {
                way: [
                    round(inpaint(way, solver, levels, Resample(times, jump), a, count), 3)
                    for a in (-0.4, 0.6)
                ]
                for way in ("fresh", "fixed", "estimate")
            }
            found[f"{solver}, {steps} steps, {times} times {jump}"] = row
            figures = "   ".join(
                f"{way} " + " ".join(f"{value:.3f}" for value in values)
                for way, values in row.items()
            )
            print(f"{solver:16} {steps:3} steps, {times:2} times {jump:2}: {figures}", flush=True)
    write("mixture", found)


if __name__ == "__main__":
    main()
