"""What the doctor measures with weights and data: each fault found, and not where there is none."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from k_diffusion.denoiser import make_denoiser
from k_diffusion.training.checkpoint import CheckpointInfo
from k_diffusion.training.config import TrainConfig
from k_diffusion.training.dataset import Digits, as_float
from k_diffusion.training.doctor import Finding, NotSeen, examine_run
from k_diffusion.training.doctor.measured import (
    CHECKS,
    LEVELS,
    Patient,
    errors,
    excess,
    open_patient,
)
from k_diffusion.training.run import run_training
from k_diffusion.training.told import Told

MakeConfig = Callable[..., TrainConfig]
Denoise = Callable[..., Tensor]


class Someone:
    """Stands for a conditioner, of which only that there is one is asked."""


def digits(count: int = 64) -> tuple[Tensor, Tensor]:
    source = Digits()
    batch = source.batch(torch.arange(count) * len(source) // count)
    return as_float(batch.images), batch.labels


def class_means() -> Tensor:
    source = Digits()
    images, labels = as_float(source.images), source.labels
    return torch.stack([images[labels == k].mean(0) for k in range(10)])


def gaussian(means: Tensor, std: float, shift: float = 0.0) -> Denoise:
    """The best estimate of images that are Gaussian around their class's mean; wrong by a shift."""

    def denoise(x: Tensor, sigma: Tensor, class_label: Tensor | None = None) -> Tensor:
        mean = means.mean(0) if class_label is None else means[class_label]
        s = sigma.to(x.dtype).reshape(-1, 1, 1, 1)
        return mean + std**2 / (std**2 + s**2) * (x - mean) + shift

    return denoise


def patient(
    weights: Mapping[str, Denoise],
    x0: Tensor | None = None,
    labels: Tensor | None = None,
    std: float = 0.75,
    **config: Any,
) -> Patient:
    info = CheckpointInfo(
        Path("a"), "", dict(config), 1, 1, {"std": std, "shape": [1, 8, 8]}, {}, {}, 0
    )
    denoisers = {name: make_denoiser(function) for name, function in weights.items()}
    condition = {} if labels is None else {"class_label": labels}
    conditioner: Any = None if labels is None else Someone()
    told = Told(torch.nn.Identity(), "cpu", labels=[] if labels is None else labels.tolist())
    return Patient(info, denoisers, conditioner, x0, condition, "no data here", told)


def look(name: str, at: Patient) -> Finding | None:
    return CHECKS[name](at)


# ---------------------------------------------------------------- losses


def test_errors_are_those_of_the_formula() -> None:
    """|D - x0|² of D = 0 is the images' mean square at every level; of D = x the noise's."""
    x0, _ = digits(8)
    zero = errors(make_denoiser(lambda x, sigma: x * 0), x0, {}, 0.5)
    assert zero.shape == (len(LEVELS), 8)
    own = x0.double().square().flatten(1).mean(1)
    torch.testing.assert_close(zero, own.expand(len(LEVELS), 8), rtol=1e-6, atol=0)
    noise = errors(make_denoiser(lambda x, sigma: x), x0, {}, 0.5)
    unit = noise / torch.tensor(LEVELS, dtype=torch.float64)[:, None].square() / 0.25
    torch.testing.assert_close(unit, unit[:1].expand_as(unit), rtol=1e-3, atol=0)  # one noise
    assert 0.7 < float(unit.mean()) < 1.3
    torch.testing.assert_close(errors(make_denoiser(lambda x, s: x), x0, {}, 0.5), noise)


def test_excess_is_a_mean_of_shares_and_its_standard_error() -> None:
    other = torch.tensor([[1.0, 3.0, 2.0], [10.0, 30.0, 20.0]], dtype=torch.float64)
    one = torch.tensor([[1.5, 3.0, 3.0], [12.0, 30.0, 20.0]], dtype=torch.float64)
    # Shares of the levels' means 2 and 20: (0.25 + 0.1) / 2, 0, (0.5 + 0) / 2.
    shares = [0.175, 0.0, 0.25]
    mean = sum(shares) / 3
    spread = math.sqrt(sum((s - mean) ** 2 for s in shares) / 2)
    assert excess(one, other) == pytest.approx((mean, spread / math.sqrt(3)))
    assert excess(one[:, :1], other[:, :1])[1] == math.inf


# ---------------------------------------------------------------- the average


def test_an_average_that_is_worse_than_the_weights() -> None:
    x0, _ = digits()
    good, means = gaussian(class_means(), 0.6), class_means()
    assert look("average measured", patient({"last": good, "ema": good}, x0)) is None
    slightly = gaussian(means, 0.6, 0.02)
    assert look("average measured", patient({"last": good, "ema": slightly}, x0)) is None
    bad = gaussian(means, 0.6, 0.3)
    found = look("average measured", patient({"last": good, "ema": bad}, x0))
    assert found is not None
    assert "above that of the last weights" in found.says
    assert found.change == "a longer run, or a lower ema.max_decay"
    own = errors(make_denoiser(bad), x0, {}, 0.75)
    assert found.figures["losses"]["ema"] == pytest.approx(float(own.mean()), rel=1e-9)

    def bad_at_one(x: Tensor, sigma: Tensor) -> Tensor:
        return good(x, sigma) + 3.0 * (torch.arange(len(x)) == 5).reshape(-1, 1, 1, 1)

    # Much, but chance.
    assert look("average measured", patient({"last": good, "ema": bad_at_one}, x0)) is None
    # That weights are worse is what averages are for.
    assert look("average measured", patient({"last": bad, "ema": good}, x0)) is None


def test_another_average_that_is_better() -> None:
    x0, _ = digits()
    good, bad = gaussian(class_means(), 0.6), gaussian(class_means(), 0.6, 0.3)
    at = patient({"last": bad, "ema": bad, "ema_0.05": bad, "ema_0.1": good}, x0)
    found = look("average measured", at)
    assert found is not None
    assert "above that of ema_0.1" in found.says
    assert found.change.startswith("k-diffusion sample --weights ema_0.1")
    at = patient({"last": good, "ema": bad, "ema_0.05": bad, "ema_0.1": good}, x0)
    found = look("average measured", at)
    assert found is not None
    assert found.change.startswith(
        "k-diffusion sample --weights ema_0.1, a better average, or a long"
    )


def test_without_data_or_average() -> None:
    good = gaussian(class_means(), 0.6)
    with pytest.raises(NotSeen, match="no data here"):
        look("average measured", patient({"last": good, "ema": good}))
    with pytest.raises(NotSeen, match="one set of weights alone"):
        look("average measured", patient({"last": good}, digits()[0]))


# ---------------------------------------------------------------- conditioning


def deaf(means: Tensor, std: float) -> Denoise:
    inner = gaussian(means, std)
    return lambda x, sigma, class_label=None: inner(x, sigma)


def test_dead_conditioning() -> None:
    x0, labels = digits()
    means = class_means()
    assert look("conditioning", patient({"ema": gaussian(means, 0.6)}, x0, labels)) is None
    found = look("conditioning", patient({"ema": deaf(means, 0.6)}, x0, labels))
    assert found is not None
    assert "does not listen to its condition" in found.says
    assert found.figures["excess"] == [0.0] * len(LEVELS)
    assert found.figures["noise_over_signal"] == pytest.approx([0.75 * k for k in LEVELS])
    assert "whether the labels belong to their images" in found.change
    # Labels that have nothing to do with the images, told to a network that trusts them.
    shuffled = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    at = patient({"ema": gaussian(means, 0.6)}, x0, shuffled)
    assert look("conditioning", at) is not None


def test_a_condition_that_is_hardly_shown() -> None:
    x0, labels = digits()
    found = look("conditioning", patient({"ema": gaussian(class_means(), 0.6)}, x0, labels,
                                         condition_dropout=1.0))  # fmt: skip
    assert found is not None
    assert found.change == "condition_dropout = 0.1"
    at = patient({"ema": deaf(class_means(), 0.6)}, x0, labels, condition_dropout=0.8)
    found = look("conditioning", at)
    assert found is not None
    assert found.change.startswith("condition_dropout = 0.1 (it is 0.8), or look")


def test_others_conditions_are_far_away() -> None:
    """Data is often sorted by class: the neighbour's condition would be one's own."""
    x0, labels = digits()
    order = labels.argsort(stable=True)[: int((labels < 3).sum())]  # three classes
    at = patient({"ema": gaussian(class_means(), 0.6)}, x0[order], labels[order])
    assert look("conditioning", at) is None


def test_conditions_that_do_not_differ() -> None:
    x0, labels = digits()
    good = gaussian(class_means(), 0.6)
    with pytest.raises(NotSeen, match="0 of 64 images have a condition of their own"):
        look("conditioning", patient({"ema": good}, x0, labels * 0))
    with pytest.raises(NotSeen, match="is told nothing"):
        look("conditioning", patient({"ema": good}, x0))


# ---------------------------------------------------------------- steps


def test_too_few_steps() -> None:
    smooth = gaussian(class_means(), 0.6)
    assert look("steps in sampling", patient({"ema": smooth})) is None

    def rough(x: Tensor, sigma: Tensor) -> Tensor:
        """An estimate that turns around many times on the way."""
        return smooth(x, sigma) + 0.5 * torch.sin(12 * sigma.log()).to(x.dtype).reshape(-1, 1, 1, 1)

    found = look("steps in sampling", patient({"ema": rough}))
    assert found is not None
    assert "20 steps of dpmpp_2m are too few for this model" in found.says
    assert found.change.startswith("k-diffusion sample --steps ")
    assert found.figures["distance"]["20"] > 0.05


def test_the_condition_of_the_samples() -> None:
    """As `make_told` has it; where that cannot be had, they are not drawn."""
    x0, labels = digits()
    told: list[Tensor] = []

    def denoise(x: Tensor, sigma: Tensor, class_label: Tensor) -> Tensor:
        told.append(class_label)
        return x * 0

    look("steps in sampling", patient({"ema": denoise}, x0, labels))
    assert all(torch.equal(one, labels[:16]) for one in told)
    assert told
    at = replace(patient({"ema": denoise}), told=None)
    with pytest.raises(NotSeen, match="the network must be told something, and no data here"):
        look("steps in sampling", at)


# ---------------------------------------------------------------- a real run


def test_a_tiny_run(make_run_config: MakeConfig) -> None:
    """All of it can be looked at; the average, which keeps the first weights, is too long."""
    config = make_run_config(
        model={"type": "tiny", "num_classes": 10, "prediction": "flow", "time_convention": "unit"},
        optimizer={"lr": 0.01},
        ema={"max_decay": 0.9999, "power": 10.0},
        total_images=32 * 210,
        log_every_images=320,
    )
    run_training(config, progress=False, say=lambda line: None)
    report = examine_run(config.out)
    assert report.images_seen == 32 * 210
    found = {finding.check: finding for finding in report.findings}
    assert "above that of the last weights" in found["average measured"].says
    assert "still holds weights of the run's beginning" in found["length of the average"].says
    assert set(report.unseen) == {"batch size", "memorisation"}
    assert "noise_scale_decay" in report.unseen["batch size"]
    assert {"skipped steps", "data statistics", "broken files"} <= set(report.fine)
    assert examine_run(config.out).to_json() == report.to_json()


def test_what_is_not_at_hand_is_said(make_run_config: MakeConfig, tmp_path: Path) -> None:
    config = make_run_config(total_images=64)
    result = run_training(config, progress=False, say=lambda line: None)
    report = examine_run(config.out, weights=False)
    assert report.unseen["conditioning"] == "the weights were left out, as asked"
    # Other data than the run's.
    at = open_patient(result.checkpoint, "cpu", 8)
    assert at.x0 is not None
    assert len(at.x0) == 8
    assert set(at.weights) == {"last", "ema"}
    assert not torch.equal(*(next(iter(d.network.parameters())) for d in at.weights.values()))
    from k_diffusion.training import dataset

    class Others(dataset.Digits):
        def facts(self) -> dict[str, Any]:
            return {**super().facts(), "images": 7}

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(dataset.SOURCES, "digits", Others)
        report = examine_run(config.out)
        assert "data at hand is another than the run's: its images is 7" in report.unseen[
            "average measured"
        ]  # fmt: skip
        assert "steps in sampling" not in report.unseen
        patch.setitem(dataset.SOURCES, "digits", lambda **options: missing())
        report = examine_run(config.out)
        assert report.unseen["conditioning"].startswith("the run's data cannot be opened here (gon")
    # A checkpoint that is damaged, and none.
    whole = result.checkpoint.read_bytes()
    result.checkpoint.write_bytes(whole[:-100])
    report = examine_run(config.out)
    assert "the newest checkpoint cannot be used here (all 1 checkpoints" in report.unseen[
        "steps in sampling"
    ]  # fmt: skip
    result.checkpoint.unlink()
    assert "has no checkpoint yet" in examine_run(config.out).unseen["conditioning"]


def missing() -> Any:
    from k_diffusion.training.dataset import DataError

    raise DataError("gone")
