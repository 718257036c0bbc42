"""The loss by noise level: bands of equal shares, sums that add up, lines that a resume leaves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist

import pytest
import torch

from k_diffusion.training.bands import BANDS, SigmaBands, means
from k_diffusion.training.config import TrainConfig
from k_diffusion.training.dataset import ArraySource, Digits, Stream
from k_diffusion.training.run import run_training

MakeConfig = Callable[..., TrainConfig]
CPU = torch.device("cpu")


def lognormal(u: torch.Tensor) -> torch.Tensor:
    """-log sigma where log sigma is normal (-1.2, 1.2)."""
    return 1.2 - 1.2 * torch.special.ndtri(1 - u).double()


def make_bands() -> SigmaBands:
    return SigmaBands(lognormal, lambda half_log_snr: torch.exp(-half_log_snr), CPU)


def test_edges_are_quantiles() -> None:
    normal = NormalDist(-1.2, 1.2)
    expected = torch.tensor([normal.inv_cdf(k / BANDS) for k in range(1, BANDS)]).exp()
    torch.testing.assert_close(torch.tensor(make_bands().edges), expected, rtol=1e-5, atol=0)


def test_sums_are_those_of_a_loop() -> None:
    bands = make_bands()
    generator = torch.Generator().manual_seed(0)
    sigma = torch.exp(-1.2 + 1.2 * torch.randn(500, generator=generator).double())
    losses = torch.rand(500, generator=generator)
    totals, counts = [0.0] * BANDS, [0] * BANDS
    for loss, level in zip(losses.tolist(), sigma.tolist(), strict=True):
        band = sum(level > edge for edge in bands.edges)
        totals[band] += loss
        counts[band] += 1
    found = bands.sums(losses, sigma).tolist()
    assert found[BANDS:] == counts
    assert found[:BANDS] == pytest.approx(totals, rel=1e-12)


def test_a_band_without_samples_has_no_mean() -> None:
    found = means(make_bands().sums(torch.tensor([1.0, 3.0]), torch.tensor([1e-9, 1e9])).tolist())
    assert found == [1.0, *[None] * (BANDS - 2), 3.0]


@pytest.mark.parametrize("prediction", ["edm", "flow"])
def test_lines_of_a_run(make_run_config: MakeConfig, prediction: str) -> None:
    """Stratified levels fall into all bands alike, so the bands' mean is the loss."""
    model = {"type": "tiny", "prediction": prediction, "num_classes": 10}
    model["time_convention"] = "unit" if prediction == "flow" else "log_sigma"
    config = make_run_config(model=model, loss={"stratified": True}, log_every_images=64)
    result = run_training(config, progress=False, say=lambda line: None)
    lines = [json.loads(line) for line in Path(result.metrics).read_text().splitlines()]
    assert lines[0]["band_edges"] == sorted(lines[0]["band_edges"])
    trained = [line for line in lines if line["event"] == "train"]
    assert len(trained) == 10
    for line in trained:
        assert len(line["bands"]) == BANDS
        assert sum(line["bands"]) / BANDS == pytest.approx(line["loss"], rel=1e-6)


def test_what_was_not_finite_counts_in_no_band(make_run_config: MakeConfig) -> None:
    config = make_run_config(loss={"stratified": True}, log_every_images=96)
    digits = Digits()
    images = digits.images.clone()
    images[Stream(digits, config.batch_size, config.seed)[4].indices[0]] = torch.nan
    source = ArraySource(images, digits.labels, digits.class_names)
    result = run_training(config, source=source, progress=False, say=lambda line: None)
    assert result.skipped_steps
    for line in map(json.loads, Path(result.metrics).read_text().splitlines()):
        if line["event"] == "train":
            assert sum(line["bands"]) / BANDS == pytest.approx(line["loss"], rel=1e-6)
