"""Two models for one run."""

import math

import pytest
import torch

from k_diffusion.denoiser import FunctionDenoiser
from k_diffusion.guidance import OnPath, SwitchAt
from k_diffusion.sampling import FLOW, VE, VP, KSampler, unit_noise
from k_diffusion.utils.scheduler import KarrasScheduler


def counting(factor, path=VE):
    seen = []

    def model(x, sigma, **condition):
        seen.append((sigma.clone(), dict(condition)))
        return factor * x / (1 + sigma.reshape(-1, *[1] * (x.ndim - 1)))

    denoiser = FunctionDenoiser(model, path)
    denoiser.seen = seen
    return denoiser


def gaussian(path, mean=0.3, variance=0.25):
    def denoise(x, sigma):
        sigma = sigma.double().reshape(-1, *[1] * (x.ndim - 1))
        alpha = path.alpha(sigma)
        gain = alpha * variance / (alpha**2 * variance + sigma**2)
        return (mean + gain * (x.double() - alpha * mean)).to(x.dtype)

    denoiser = FunctionDenoiser(denoise, path)
    denoiser.float64_sigma = True
    return denoiser


@pytest.mark.parametrize("solver", ["dpmpp_2m", "heun", "euler_ancestral"])
def test_each_is_called_at_its_levels_alone(solver):
    base, refiner = counting(0.9), counting(0.5)
    sampler = KSampler(SwitchAt(base, refiner, 1.0), KarrasScheduler(0.1, 10), solver)
    sampler.sample(unit_noise((2, 3), [1, 2]), 10)
    levels = [step.level.sigma for step in sampler.plan(10).steps]
    assert len(base.seen) + len(refiner.seen) == len(levels)  # no call in vain
    assert [s[0].item() for s, _ in base.seen] == pytest.approx([v for v in levels if v > 1])
    assert [s[0].item() for s, _ in refiner.seen] == pytest.approx([v for v in levels if v <= 1])
    assert base.seen
    assert refiner.seen


def test_a_level_on_the_border_is_the_refiner_s():
    base, refiner = counting(0.9), counting(0.5)
    levels = KarrasScheduler(0.1, 10).levels(5)
    KSampler(SwitchAt(base, refiner, levels[2].sigma), KarrasScheduler(0.1, 10), "euler").sample(
        unit_noise((2, 3), [1]), 5
    )
    assert (len(base.seen), len(refiner.seen)) == (2, 3)


@pytest.mark.parametrize("path", [VE, VP, FLOW], ids=str)
def test_a_model_and_itself_is_nothing(path):
    model = gaussian(path)
    scheduler = None if path is FLOW else KarrasScheduler(0.01, 10)
    x = unit_noise((3, 5), [1, 2])
    for solver in ("dpmpp_2m", "dpm_adaptive"):
        plain = KSampler(model, scheduler, solver).sample(x, 8, seed=1)
        both = KSampler(SwitchAt(model, model, 0.7), scheduler, solver).sample(x, 8, seed=1)
        assert torch.equal(plain, both)


def test_where_the_levels_are_not_known_each_sample_has_its_own():
    switch = SwitchAt(counting(0.9), counting(0.5), 1.0)
    x, sigma = torch.ones(3, 4), torch.tensor([3.0, 1.0, 0.2])
    expected = torch.tensor([0.9 / 4, 0.5 / 2, 0.5 / 1.2])[:, None].expand(3, 4)
    assert (switch(x, sigma) - expected).abs().max() < 1e-7


@pytest.mark.parametrize("other", [VE, VP, FLOW], ids=str)
@pytest.mark.parametrize("path", [VE, VP, FLOW], ids=str)
def test_a_refiner_in_other_coordinates_is_asked_at_equal_signal_to_noise(path, other):
    """Both know the same data: the pair is one of them, in any coordinates of either."""
    scheduler = None if path is FLOW else KarrasScheduler(0.01, 10)
    x = unit_noise((50,), [1, 2])
    plain = KSampler(gaussian(path), scheduler, "heun").sample(x, 10)
    switched = KSampler(SwitchAt(gaussian(path), gaussian(other), 2.0), scheduler, "heun")
    assert switched.denoiser.path is path
    assert (switched.sample(x, 10) - plain).abs().max() < 1e-5
    # The host knows the level of an inner call in the model's own coordinates.
    inner = SwitchAt(counting(0.9, other), counting(0.5, other), 2.0)
    sampler = KSampler(OnPath(inner, path), scheduler or KarrasScheduler(0.01, 10), "euler")
    sampler.sample(x, 6)
    levels = sampler.levels(6)
    assert len(inner.denoiser.seen) == sum(level.ratio > 2 for level in levels)


def test_the_refiner_may_be_told_something_else():
    base, refiner = counting(0.9), counting(0.5)
    switch = SwitchAt(base, refiner, 1.0, told=lambda c: {"score": c["label"] + 1})
    KSampler(switch, KarrasScheduler(0.1, 10), "euler").sample(
        unit_noise((3,), [1]), 6, {"label": torch.tensor([4])}
    )
    assert {*base.seen[0][1]} == {"label"}
    assert refiner.seen[0][1] == {"score": torch.tensor([5])}


def test_what_cannot_be_is_named():
    model = counting(1.0)
    for ratio in (0, -1.0, math.inf, math.nan, "half", True):
        with pytest.raises(ValueError, match="ratio must be a number above 0"):
            SwitchAt(model, model, ratio)
    odd = FunctionDenoiser(lambda x, s: x, "sideways")
    with pytest.raises(ValueError, match="refiner is on the path 'sideways'"):
        SwitchAt(model, odd, 1.0)
