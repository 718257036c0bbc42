"""What guidance does to a trained model of the digits: the class asked for, and the calls spared.

    python benchmarks/guidance.py                      # trains first (two minutes on two cores)
    python benchmarks/guidance.py --checkpoint FILE    # of a model of the digits with classes

The judge is a classifier trained on the real digits. What guides is another one, trained from other
weights in another order. Writes benchmarks/results/guidance.json.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from k_diffusion.evaluation import classify, share_of, train_classifier
from k_diffusion.guidance import Cached, Guided, cfg
from k_diffusion.sampling import KSampler, unit_noise
from k_diffusion.training import Digits, load_config, load_denoiser, run_training

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "benchmarks" / "results" / "guidance.json"
STEPS = 20
THRESHOLDS = (0.0, 0.005, 0.01, 0.02, 0.05, 0.1)


class Unconditional:
    """The model told no class."""

    float64_sigma = True

    def __init__(self, denoiser: Any) -> None:
        self.denoiser, self.path = denoiser, denoiser.path
        self.process, self.sigma_data = denoiser.process, denoiser.sigma_data

    def alpha(self, sigma: Any) -> Any:
        """The signal scale."""
        return self.denoiser.alpha(sigma)

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The estimate of x0."""
        none = torch.full((len(x),), self.denoiser.network.num_classes)
        estimate: Tensor = self.denoiser(x, sigma, class_label=none)
        return estimate


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--checkpoint", default="", help="of a model of the digits")
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    checkpoint = options.checkpoint
    if not checkpoint:
        config = load_config(ROOT / "examples" / "digits.toml", {"out": "runs/guidance"})
        checkpoint = run_training(config, overwrite=True).checkpoint
    denoiser, info = load_denoiser(checkpoint)
    real, held_out = Digits("train"), Digits("test")
    judge = train_classifier(real.images, real.labels, epochs=20)
    guide = train_classifier(real.images, real.labels, epochs=20, seed=7).requires_grad_(False)
    accuracy = share_of(classify(judge, held_out.images)[0], held_out.labels)
    labels = torch.arange(options.samples) % 10
    noise = unit_noise((1, 8, 8), range(options.samples))
    figures: dict[str, Any] = {"checkpoint sha256": info.sha256, "judge": accuracy}

    def asked(model: Any, condition: Tensor | None = None) -> float:
        drawn = KSampler(model, "karras", "dpmpp_2m").sample(noise, STEPS, condition)
        return share_of(classify(judge, drawn)[0], labels)

    def by_class(x0: Tensor, sigma: Tensor) -> Tensor:
        return guide(x0).log_softmax(1).gather(1, labels[:, None])[:, 0]

    features = guide.features(real.images)
    means = torch.stack([features[real.labels == k].mean(0) for k in range(10)])
    spread = (features - means[real.labels]).square().sum(1).mean()

    def by_embedding(x0: Tensor, sigma: Tensor) -> Tensor:
        return -(guide.features(x0) - means[labels]).square().sum(1) / (2 * spread)

    alone = Unconditional(denoiser)
    rows = {"unconditional": asked(alone)}
    for scale in (1.0, 4.0, 10.0):
        rows[f"classifier, scale {scale:g}"] = asked(Guided(alone, by_class, scale))
    for scale in (4.0, 10.0, 30.0):
        rows[f"embedding distance, scale {scale:g}"] = asked(Guided(alone, by_embedding, scale))
    rows["the conditional model"] = asked(denoiser, labels)
    rows["cfg, scale 2"] = asked(cfg(denoiser, 2.0), labels)
    figures["share of the class asked for"] = rows
    for name, share in rows.items():
        print(f"{name:<32} {share:.1%} of the class asked for")

    exact = KSampler(denoiser, "karras", "dpmpp_2m").sample(noise, 50, labels)
    spared = []
    for threshold in THRESHOLDS:
        cached = Cached(denoiser, threshold)
        before = time.process_time()
        drawn = KSampler(cached, "karras", "dpmpp_2m").sample(noise, 50, labels)
        seconds = time.process_time() - before
        error = float((drawn - exact).square().mean().sqrt())
        row = {"threshold": threshold, "calls": cached.made, "spared": cached.spared,
               "seconds of one core": round(seconds, 2), "error": error,
               "asked": share_of(classify(judge, drawn)[0], labels)}  # fmt: skip
        spared.append(row)
        print(
            f"threshold {threshold:<6g} {cached.made:>3} calls made, {cached.spared:>3} spared, "
            f"{seconds:.2f} s of a core, root mean square error {error:.4f}, "
            f"{row['asked']:.1%} of the class asked for"
        )
    figures["calls spared, of 50"] = spared
    options.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
