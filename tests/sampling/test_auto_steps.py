"""steps="auto": as many steps as a sample needs, for each by itself."""

import warnings

import pytest
import torch

from k_diffusion.sampling import AutoSteps, Churn, KSampler, unit_noise
from k_diffusion.utils.scheduler import KarrasScheduler


def model(x, sigma, sharp):
    """The sharper, the more steps a sample needs."""
    ones = [1] * (x.ndim - 1)
    return torch.tanh(sharp.reshape(-1, *ones) * x / (1 + sigma.reshape(-1, *ones)))


X = unit_noise((2, 6, 6), [1, 2, 3])
SHARP = {"sharp": torch.tensor([0.3, 6.0, 1.0])}
LEVELS = KarrasScheduler(0.02, 10)


def rms(x):
    return x.flatten(1).square().mean(1).sqrt()


@pytest.mark.parametrize(
    ("solver", "tolerance"), [("euler", 0.04), ("dpmpp_2m", 0.04), ("dpmpp_2m_sde", 0.15)]
)
def test_each_sample_is_that_of_the_steps_it_took_and_changed_by_less(solver, tolerance):
    sampler = KSampler(model, LEVELS, solver)
    noise = {"noise": "path"} if solver.endswith("sde") else {}
    auto = AutoSteps(tolerance, first=4, most=1024)
    result = sampler.sample(X, auto, SHARP, seeds=[5, 6, 7], details=True, **noise)
    assert len(set(result.steps)) > 1
    for i, steps in enumerate(result.steps):
        drawn = [
            sampler.sample(X, n, SHARP, seeds=[5, 6, 7], **noise)[i : i + 1]
            for n in (steps // 4, steps // 2, steps)
        ]
        assert (result.samples[i : i + 1] - drawn[-1]).abs().max() < 1e-5
        coarse, fine = (rms(b - a) / rms(b) for a, b in ((drawn[0], drawn[1]), drawn[1:]))
        assert fine.item() <= tolerance
        assert fine.item() == pytest.approx(result.changes[i], rel=1e-3)
        assert steps == 8 or coarse.item() > tolerance  # no earlier
    # Alone a sample takes the same steps, and comes out the same.
    one = {"sharp": SHARP["sharp"][1:2]}
    alone = sampler.sample(X[1:2], auto, one, seeds=[6], details=True, **noise)
    assert alone.steps == result.steps[1:2]
    assert (alone.samples - result.samples[1:2]).abs().max() < 1e-6


def test_step_count_is_another_word():
    sampler = KSampler(model, LEVELS, "euler")
    for steps in ("auto", 7):
        expected = sampler.sample(X, steps, SHARP, details=True)
        found = sampler.sample(X, condition=SHARP, step_count=steps, details=True)
        assert torch.equal(found.samples, expected.samples)
        assert found.steps == expected.steps


def test_the_limit_is_near():
    sampler = KSampler(model, LEVELS, "heun")
    result = sampler.sample(X, AutoSteps(2e-3, most=1024), SHARP)
    limit = sampler.sample(X, 600, SHARP)
    assert ((rms(result - limit) / rms(limit)) < 2e-3).all()


def test_it_counts_the_calls_of_all_its_runs():
    calls = []

    def counted(x, sigma, sharp):
        calls.append(len(x))
        return model(x, sigma, sharp)

    result = KSampler(counted, LEVELS, "euler").sample(X, "auto", SHARP, details=True)
    assert result.calls == len(calls)
    assert calls[: 8 + 16] == [3] * 24
    assert calls[-1] < 3  # those that are done are not drawn again


def test_images_and_masks_go_with_their_samples():
    init = torch.randn(3, 2, 6, 6, generator=torch.Generator().manual_seed(2)).tanh()
    mask = (torch.rand(3, 1, 6, 6, generator=torch.Generator().manual_seed(3)) > 0.5).float()
    sampler = KSampler(model, LEVELS, "euler")
    auto = AutoSteps(0.02, first=4)
    result = sampler.sample(X, auto, SHARP, init=init, mask=mask, details=True)
    assert len(set(result.steps)) > 1
    keep = (mask == 0).expand_as(init)
    assert torch.equal(result.samples[keep], init[keep])
    for i, steps in enumerate(result.steps):
        drawn = sampler.sample(X, steps, SHARP, init=init, mask=mask)
        assert (result.samples[i] - drawn[i]).abs().max() < 1e-5


def test_a_sample_that_does_not_settle_is_told_of():
    with pytest.warns(UserWarning, match="1 of 3 samples still change by up to .* from 8 to 16"):
        result = KSampler(model, LEVELS, "euler").sample(
            X, AutoSteps(0.05, first=4, most=20), SHARP, details=True
        )
    worst = result.changes.index(max(result.changes))
    assert result.steps[worst] == 16
    assert result.changes[worst] > 0.05
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        KSampler(model, LEVELS, "euler").sample(X, AutoSteps(0.05, most=1024), SHARP)


@pytest.mark.parametrize(
    ("made", "called", "message"),
    [
        ({"solver": "euler_ancestral"}, {}, 'draws noise: steps="auto" needs noise="path"'),
        ({"solver": "dpm_adaptive"}, {}, "dpm_adaptive finds its steps itself"),
        ({"solver": "heun", "churn": Churn(2.0)}, {"noise": "path"}, "belongs to no path here"),
        ({"solver": "restart"}, {"noise": "path"}, "belongs to no path here"),
        ({}, {"steps": "Auto"}, "steps must be a whole number of at least 1, got 'Auto'"),
        (
            {},
            {"init": X, "mask": torch.ones(6, 6), "resample": 2},
            "belongs to no path here",
        ),
    ],
)
def test_what_does_not_converge_is_refused(made, called, message):
    with pytest.raises(ValueError, match=message):
        KSampler(model, LEVELS, **made).sample(
            **{"x": X, "steps": "auto", "condition": SHARP, **called}
        )


def test_options_that_cannot_be_are_named():
    for options, message in (
        ({"tolerance": 0}, "tolerance must be a number above 0"),
        ({"first": 0}, "first must be a whole number"),
        ({"most": 10}, "most = 10 leaves no room to double first = 8"),
    ):
        with pytest.raises(ValueError, match=message):
            AutoSteps(**options)
