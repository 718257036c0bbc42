"""What a run is warned of before it begins: once, in plain words, with the change to try."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from k_diffusion.denoiser import EDMDenoiser
from k_diffusion.guidance import Clamp, apg, cfg
from k_diffusion.sampling import KSampler, SamplingAdvice
from k_diffusion.utils.scheduler import KarrasScheduler


class Flat(torch.nn.Module):
    """A network that predicts 0."""

    prediction, time_convention, sigma_data = "edm", "log_sigma", 0.5

    def forward(self, x: Tensor, t: Tensor, **condition: Any) -> Tensor:
        return torch.zeros_like(x)


def said(model: Any, scheduler: Any = "karras", solver: str = "euler", **options: Any) -> list[str]:
    x = torch.randn(2, 1, 4, 4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sampler = KSampler(model, scheduler, solver)
        for _ in range(2):  # once for each sampler
            sampler.sample(x, **{"steps": 5, **options})
    assert all(issubclass(w.category, SamplingAdvice) for w in caught)
    assert all(w.filename == __file__ for w in caught)
    return [str(w.message) for w in caught]


@pytest.mark.parametrize("solver", ["euler", "dpmpp_2m", "heun", "dpmpp_3m"])
def test_a_sound_run_is_told_nothing(solver: str) -> None:
    for steps in (3, 20):
        assert said(EDMDenoiser(Flat()), solver=solver, steps=steps) == []
    assert said(lambda x, sigma: x * 0, solver=solver) == []
    assert said(cfg(EDMDenoiser(Flat()), 7.5)) == []


def test_levels_beyond_the_models_range() -> None:
    (line,) = said(EDMDenoiser(Flat()), KarrasScheduler(sigma_max=500.0))
    assert "begins at sigma / alpha = 500, but the model was trained up to 80 only" in line
    assert "give the scheduler a sigma_max of 80" in line
    (line,) = said(EDMDenoiser(Flat()), KarrasScheduler(sigma_max=2.0))
    assert "samples come out blurred or alike; give the scheduler a sigma_max of 80" in line
    assert said(EDMDenoiser(Flat()), KarrasScheduler(sigma_max=60.0)) == []


@pytest.mark.parametrize(
    ("solver", "steps"), [("dpmpp_2m", 1), ("dpmpp_3m_sde", 1), ("unipc", 1), ("ipndm", 2)]
)
def test_steps_too_few_for_the_order(solver: str, steps: int) -> None:
    from k_diffusion.sampling import SOLVERS

    lines = said(EDMDenoiser(Flat()), solver=solver, steps=steps)
    expected = steps < SOLVERS[solver].order
    assert bool(lines) == expected
    if expected:
        assert f"are too few for {solver}" in lines[0] or "is too few" in lines[0]
        assert said(EDMDenoiser(Flat()), solver=solver, steps=SOLVERS[solver].order) == []


def test_images_that_are_not_on_the_models_scale() -> None:
    image = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 255
    (line,) = said(EDMDenoiser(Flat()), init=image, strength=0.5)
    assert "init has a standard deviation of" in line
    assert "but the model's data have 0.5: bring it to the scale of training" in line
    assert said(EDMDenoiser(Flat()), init=image / 127.5 - 1, strength=0.5) == []
    # Begun from an image, a run need not begin at the noisiest level.
    assert said(EDMDenoiser(Flat()), init=image / 127.5 - 1, strength=0.1) == []


def test_guidance_that_saturates() -> None:
    model = EDMDenoiser(Flat())
    (line,) = said(cfg(model, 30.0))
    assert "guidance of scale 30 saturates most models: take less, or apg" in line
    assert said(apg(model, 30.0)) == []
    assert said(cfg(model, 30.0, rescale=0.7)) == []
    assert said(Clamp(cfg(model, 30.0))) == []
    assert len(said(cfg(Clamp(model), 30.0))) == 1  # held too early


def test_each_sampler_says_it_for_itself() -> None:
    lines = [said(cfg(EDMDenoiser(Flat()), 30.0)) for _ in range(2)]
    assert [len(found) for found in lines] == [1, 1]
