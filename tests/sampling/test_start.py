"""Runs that begin from images or from seeds: strength, seeds, shapes, and what is refused."""

import math

import pytest
import torch

from k_diffusion.denoiser import FunctionDenoiser
from k_diffusion.sampling import FLOW, VE, VP, KSampler, SampleNoise, unit_noise
from k_diffusion.utils.scheduler import KarrasScheduler

SOLVERS = ("dpmpp_2m", "heun", "sa_solver", "euler_ancestral", "dpm_adaptive")


def gaussian(path=VE, variance=0.25):
    """Exact for data N(0.3, variance)."""

    def denoise(x, sigma):
        sigma = sigma.reshape(-1, *[1] * (x.ndim - 1))
        alpha = path.alpha(sigma)
        gain = alpha * variance / (alpha**2 * variance + sigma**2)
        return 0.3 + gain * (x - alpha * 0.3)

    return FunctionDenoiser(denoise, path)


def images(batch=3):
    return torch.randn(batch, 2, 4, 4, generator=torch.Generator().manual_seed(5)).tanh()


def noise(batch=3):
    return unit_noise((2, 4, 4), range(10, 10 + batch))


@pytest.mark.parametrize("path", [VE, VP, FLOW], ids=str)
@pytest.mark.parametrize("solver", SOLVERS)
def test_strength_0_gives_the_image_and_1_a_plain_run(solver, path):
    scheduler = None if path is FLOW else KarrasScheduler(0.01, 10)
    sampler = KSampler(gaussian(path), scheduler, solver)
    init, x = images(), noise()
    assert torch.equal(sampler.sample(x, 6, init=init, strength=0, seed=1), init)
    plain = sampler.sample(x, 6, seed=1)
    assert torch.equal(sampler.sample(x, 6, init=init, strength=1, seed=1), plain)
    assert torch.equal(sampler.sample(x, 6, init=init, strength=1.0, mask=torch.ones(4, 4),
                                      seed=1), plain)  # fmt: skip
    half = sampler.sample(x, 6, init=init, strength=0.5, seed=1)
    assert (half - plain).abs().max() > 1e-2
    assert (half - init).abs().max() > 1e-2


@pytest.mark.parametrize("path", [VE, VP, FLOW], ids=str)
def test_a_run_begins_at_the_image_noised_to_the_first_level_that_is_walked(path):
    sampler = KSampler(gaussian(path), KarrasScheduler(0.01, 10), "euler")
    init, x, seen = images(), noise(), []
    levels = sampler.levels(10).start_at(0.4)
    sampler.sample(
        x, 10, init=init, strength=0.4, callback=lambda k, x, sigma, d: seen.append((x, sigma))
    )
    assert len(seen) == 4  # round(0.4 · 10) of them
    expected = levels[0].alpha * init + levels[0].sigma * x
    assert (seen[0][0] - expected).abs().max() <= 1e-6
    assert seen[0][1][0].item() == pytest.approx(levels[0].sigma, rel=1e-6)


def test_a_strength_that_rounds_to_no_step_walks_one():
    seen = []
    sampler = KSampler(gaussian(), "karras", "euler")
    sampler.sample(
        noise(), 10, init=images(), strength=0.01, callback=lambda k, *rest: seen.append(k)
    )
    assert seen == [0]


def test_image_to_image_keeps_the_marginal():
    """Data noised to a level and drawn back are data again: mean and deviation."""
    generator = torch.Generator().manual_seed(3)
    init = 0.3 + 0.5 * torch.randn(2, 20_000, generator=generator)
    x = torch.randn(2, 20_000, generator=generator)
    for solver in ("heun", "dpmpp_2m_sde"):
        sampler = KSampler(gaussian(), KarrasScheduler(0.002, 20), solver)
        samples = sampler.sample(x, 60, init=init, strength=0.5, seed=0)
        assert abs(samples.mean().item() - 0.3) < 0.01
        assert abs(samples.std().item() - 0.5) < 0.01
        # From a low level much of the image is left, from a high one little.
        kept = [
            torch.corrcoef(torch.stack([s.flatten(), init.flatten()]))[0, 1].item()
            for s in (sampler.sample(x, 60, init=init, strength=t, seed=0) for t in (0.2, 0.5, 0.9))
        ]
        assert kept[0] > 0.95 > 0.9 > kept[1] > kept[2] < 0.1


@pytest.mark.parametrize("solver", SOLVERS)
def test_each_sample_alone_equals_the_batch(solver):
    sampler = KSampler(gaussian(), KarrasScheduler(0.01, 10), solver)
    init = images()
    mask = (torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(1)) > 0.5).float()
    seeds = [7, 3, 9]
    for options in ({"strength": 0.6}, {"mask": mask}, {"mask": mask, "strength": 0.7},
                    {"mask": mask, "resample": 2}):  # fmt: skip
        whole = sampler.sample(None, 6, init=init, seeds=seeds, **options)
        for i, seed in enumerate(seeds):
            own = {k: v[i : i + 1] if k == "mask" else v for k, v in options.items()}
            alone = sampler.sample(None, 6, init=init[i : i + 1], seeds=[seed], **own)
            assert (alone - whole[i : i + 1]).abs().max() <= 1e-6


def test_seeds_without_x_make_the_initial_noise():
    sampler = KSampler(gaussian(), "karras", "euler_ancestral")
    seeds = [4, 2, 9]
    x = unit_noise((2, 4, 4), seeds)
    expected = sampler.sample(x, 4, seed=seeds)
    assert torch.equal(sampler.sample(None, 4, shape=(2, 4, 4), seeds=seeds), expected)
    assert torch.equal(sampler.sample(steps=4, shape=(2, 4, 4), seed=seeds), expected)
    assert torch.equal(sampler.sample(x, 4, seeds=torch.tensor(seeds)), expected)
    assert sampler.sample(None, 4, shape=(2, 4, 4), seeds=range(2)).shape == (2, 2, 4, 4)
    # From an image its shape, and with one number its count.
    init = images().double()
    result = sampler.sample(steps=4, init=init, strength=0.5, seed=4)
    assert result.dtype == torch.float64
    assert torch.equal(result, sampler.sample(None, 4, init=init, strength=0.5, seeds=[4, 5, 6]))


def test_one_image_serves_many_samples():
    sampler = KSampler(gaussian(), "karras", "dpmpp_2m")
    init = images(1)
    many = sampler.sample(None, 4, init=init, strength=0.5, seeds=[1, 2])
    assert many.shape == (2, 2, 4, 4)
    assert (many[0] - many[1]).abs().max() > 1e-2
    same = sampler.sample(None, 4, init=init.expand(2, -1, -1, -1), strength=0.5, seeds=[1, 2])
    assert torch.equal(many, same)
    assert torch.equal(
        sampler.sample(None, 4, init=init, strength=0, seeds=[1, 2]), init.expand(2, -1, -1, -1)
    )


def test_the_sampler_s_noise_is_not_the_initial_noise():
    seen = []
    sampler = KSampler(gaussian(), KarrasScheduler(0.5, 1.0), "euler_ancestral")
    sampler.sample(None, 2, shape=(50_000,), seeds=[3], callback=lambda *a: seen.append(a[1]))
    own = SampleNoise([3], torch.empty(1, 50_000)).draw()
    initial = unit_noise((50_000,), [3])
    assert abs((own * initial).mean().item()) < 0.03


IMAGE = torch.zeros(1, 2, 4, 4)
REFUSED = [
    ({"strength": 1.5, "init": IMAGE}, r"strength must lie in \[0, 1\], got 1.5"),
    ({"strength": -0.1, "init": IMAGE}, r"strength must lie in \[0, 1\], got -0.1"),
    ({"strength": math.nan, "init": IMAGE}, r"strength must lie in \[0, 1\], got nan"),
    ({"strength": True, "init": IMAGE}, r"strength must lie in \[0, 1\], got True"),
    ({"strength": "half", "init": IMAGE}, r"strength must lie in \[0, 1\], got 'half'"),
    ({"strength": 0.5}, "strength says how much of init to keep: give init"),
    ({"mask": torch.ones(4, 4)}, "mask says how much of init to keep: give init"),
    ({"init": IMAGE}, "init alone does not say how much of it to keep: give strength"),
    ({"init": torch.zeros(2, 4, 4), "strength": 0.5}, r"init has shape \(2, 4, 4\) and x"),
    ({"init": torch.zeros(1, 2, 4, 5), "strength": 0.5}, r"init has shape \(1, 2, 4, 5\)"),
    ({"init": torch.zeros(2, 2, 4, 4), "strength": 0.5}, r"init has shape \(2, 2, 4, 4\)"),
    ({"init": IMAGE.to(torch.uint8), "strength": 0.5}, "init must be .* got torch.uint8"),
    ({"init": [1.0], "strength": 0.5}, "init must be .* got list"),
    ({"init": IMAGE * math.nan, "strength": 0.5}, "init is not finite in 100.0% of its values"),
    ({"init": IMAGE.to("meta"), "strength": 0.5}, "init is on meta but x on cpu"),
    ({"init": IMAGE, "mask": torch.ones(5, 4)}, r"mask has shape \(5, 4\), which does not go with"),
    ({"init": IMAGE, "mask": torch.ones(2, 1, 4, 4)}, r"mask has shape \(2, 1, 4, 4\)"),
    ({"init": IMAGE, "mask": torch.ones(1, 1, 2, 4, 4)}, r"mask has shape \(1, 1, 2, 4, 4\)"),
    ({"init": IMAGE, "mask": torch.full((4, 4), 255)}, "mask must hold values from 0 .* to 1"),
    ({"init": IMAGE, "mask": torch.full((4, 4), math.nan)}, "mask must hold values from 0"),
    ({"init": IMAGE, "mask": "left"}, "mask must be a tensor, .* got str"),
    ({"init": IMAGE, "mask": torch.ones(4, 4, device="meta")}, "mask is on meta but init on cpu"),
    ({"resample": 3}, "resample fits what is drawn to what a mask keeps: give init and mask"),
    ({"init": IMAGE, "mask": torch.ones(4, 4), "resample": 0}, "times must be a whole number"),
    ({"init": IMAGE, "mask": torch.ones(4, 4), "resample": 2.0}, "resample must be .* got 2.0"),
    ({"seed": 1, "seeds": [1]}, "give seed or seeds, not both"),
    ({"seeds": [1, 2]}, "1 samples need as many seeds, got 2"),
    ({"seeds": []}, "1 samples need as many seeds, got 0"),
    ({"seeds": 5}, "seeds must be whole numbers, one per sample, got 5"),
    ({"seeds": "5"}, "seeds must be whole numbers, one per sample, got '5'"),
    ({"seeds": [1.5]}, r"seed must be a whole number or one per sample, got \[1.5\]"),
    ({"x": None}, "there is no x: give one, or the shape of a sample and seeds"),
    ({"x": None, "shape": (2, 4, 4)}, "seeds must be one per sample where there is no x"),
    ({"x": None, "shape": (2, 4, 4), "seed": 5}, "seeds must be one per sample where there is no"),
    ({"x": None, "shape": (2, 0), "seeds": [1]}, r"shape must be that of one sample, .*\(2, 0\)"),
    ({"shape": (2, 4, 5)}, r"shape \(2, 4, 5\) is not that of a sample of x, \(2, 4, 4\)"),
    ({"init": torch.zeros(3, 2, 4, 4), "strength": 0.5, "x": None, "seeds": [1, 2]},
     r"init has shape \(3, 2, 4, 4\) and x \(2, 2, 4, 4\)"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_what_cannot_be_is_named(options, message):
    called = {"x": torch.zeros(1, 2, 4, 4), "steps": 3, **options}
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        KSampler(gaussian(), "karras").sample(**called)
    assert "\n" not in str(caught.value)
