"""What the data decide of a config, and that it stays so when a run goes on."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from k_diffusion.training.checkpoint import CheckpointError
from k_diffusion.training.config import TrainConfig
from k_diffusion.training.dataset import ArraySource
from k_diffusion.training.fit import settle
from k_diffusion.training.opening import opening_lines
from k_diffusion.training.trainer import Trainer

IMAGES = torch.randint(256, (300, 1, 8, 8), generator=torch.Generator().manual_seed(0)).byte()


def rounded(source: ArraySource, share: float) -> ArraySource:
    """The same data, as a machine would see it that adds up in another order."""
    mean, std = source.moments
    source.__dict__["moments"] = (mean, std * (1 + share))
    return source


def test_moments_of_bytes_are_those_of_their_values_on_any_number_of_threads() -> None:
    values = IMAGES.double() / 127.5 - 1
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(ArraySource(IMAGES).moments)
    torch.set_num_threads(1)
    assert found[0] == found[1] == found[2]
    mean, std = found[0]
    assert abs(mean - float(values.mean())) < 1e-7  # bytes become float32 first
    assert abs(std - float(values.std(correction=0))) < 1e-7


def test_a_run_goes_on_where_sums_are_rounded_otherwise(
    make_run_config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    config = make_run_config(model={"type": "tiny", "sigma_data": "auto"})
    trainer = Trainer(config, source=ArraySource(IMAGES))
    sigma_data = trainer.config.model["sigma_data"]
    assert sigma_data == trainer.source.std
    trainer.save(tmp_path / "a.safetensors")
    other = rounded(ArraySource(IMAGES), 1e-12)
    assert other.std != sigma_data
    resumed = Trainer(config, source=other, resume=tmp_path / "a.safetensors")
    assert resumed.config.model["sigma_data"] == sigma_data == resumed.network.sigma_data
    with pytest.raises(CheckpointError, match=r"sigma_data = 0\.5.*of the data: they are others"):
        Trainer(
            config,
            source=rounded(ArraySource(IMAGES), 1e-4),
            resume=tmp_path / "a.safetensors",
        )


def test_without_a_run_before_the_data_decide(make_run_config: Callable[..., TrainConfig]) -> None:
    config = make_run_config(model={"type": "tiny", "sigma_data": "auto"})
    source = ArraySource(IMAGES)
    assert settle(config, source).model["sigma_data"] == source.std
    assert settle(config, source, None, 2 * source.std).model["sigma_data"] == source.std
    given = make_run_config(model={"type": "tiny", "sigma_data": 0.25})
    assert settle(given, source, None, source.std).model["sigma_data"] == 0.25


def test_other_data_are_told(make_run_config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    config = make_run_config(model={"type": "tiny", "sigma_data": 0.5})
    Trainer(config, source=ArraySource(IMAGES)).save(tmp_path / "a.safetensors")
    for share, said in ((1e-9, 0), (1e-4, 1)):
        source = rounded(ArraySource(IMAGES), share)
        trainer = Trainer(config, source=source, resume=tmp_path / "a.safetensors")
        lines = opening_lines(trainer, tmp_path / "a.safetensors", looked=True)
        found = [line for line in lines if line.startswith("the data are others than before")]
        assert len(found) == said
    assert re.search(r"before: std 0\.\d+ before and 0\.\d+ now; the run", found[0])
