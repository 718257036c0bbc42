"""Adaptive step control: what it refuses and names, and `KSampler` with it."""

import importlib.util
import itertools
import math
from pathlib import Path

import pytest
import torch

from k_diffusion.denoiser import FunctionDenoiser
from k_diffusion.sampling import (
    FLOW,
    Churn,
    KSampler,
    Level,
    StepControl,
    sample_adaptive,
)
from k_diffusion.sampling.adaptive import ADAPTIVE
from k_diffusion.sampling.stepping import PIDStepSizeController
from k_diffusion.utils.scheduler import CustomScheduler, KarrasScheduler

_spec = importlib.util.spec_from_file_location("exact", Path(__file__).with_name("exact.py"))
exact = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(exact)
level = exact.level


def nan_below(x, sigma, limit):
    bad = (sigma.reshape(-1, 1) < limit.reshape(-1, 1)) & torch.ones_like(x, dtype=torch.bool)
    return torch.where(bad, torch.full_like(x, math.nan), x / (1 + sigma.reshape(-1, 1) ** 2))


START, END = Level(1.0, 5.0), Level(1.0, 0.1)


def call(denoiser=lambda x, s: x * 0, x=None, start=START, end=END, **options):
    return sample_adaptive(denoiser, torch.ones(3, 4) if x is None else x, start, end, **options)


REFUSED = [
    ({"pair": "dpm_2"}, ValueError, "unknown embedded pair 'dpm_2'; did you mean 'dpm_23'"),
    ({"eta": 1.0}, ValueError, "eta = 1.0 draws noise: 3 samples need as many seeds"),
    ({"eta": 1.0, "seeds": [1]}, ValueError, "3 samples need as many seeds"),
    ({"eta": -1.0}, ValueError, "eta and s_noise must be 0 or more, got -1.0"),
    ({"start": END, "end": START, "eta": 1.0, "seeds": [1, 2, 3]}, ValueError, "with eta"),
    ({"start": END, "end": END}, ValueError, "no way at all"),
    ({"start": Level(1.0, 0.0), "end": END}, ValueError, "from clean data"),
    ({"start": Level(0.5, 0.5)}, ValueError, "does not lie on the denoiser's ve path"),
    ({"x": torch.ones(3, 4, dtype=torch.long)}, ValueError, "floating point.* torch.int64"),
    ({"x": torch.ones(0, 4)}, ValueError, r"got torch.float32 \(0, 4\)"),
    ({"control": StepControl(1e-9, 1e-9)}, ValueError, "below the rounding of torch.float32"),
    ({"denoiser": lambda x, s: x[:, :1]}, ValueError, r"returned shape \(3, 1\) for .* \(3, 4\)"),
    ({"denoiser": lambda x, s: (x, x)}, TypeError, "must return one tensor, got tuple"),
    (
        {"denoiser": FunctionDenoiser(lambda x, s: x, FLOW), "start": FLOW.at(0.0),
         "end": Level(0.0, 1.0)},
        ValueError,
        r"dpm_23 cannot reach \(alpha 0, sigma 1\): use a Runge-Kutta pair",
    ),
    (
        {"control": StepControl(1e-3, 1e-3, max_steps=2)},
        RuntimeError,
        "sample 0 is at sigma / alpha = .* it has tried 2 steps",
    ),
    (
        {"denoiser": nan_below, "condition": {"limit": torch.tensor([0.0, 9.0, 0.0])}},
        FloatingPointError,
        "answer for sample 1 at sigma / alpha = 5 is not finite",
    ),
    (
        {"denoiser": nan_below, "condition": {"limit": torch.tensor([0.0, 0.0, 1.0])},
         "pair": "bogacki_shampine"},
        RuntimeError,
        "sample 2 is at sigma / alpha = 1 .* no step from there has a finite result",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("options", "error", "message"), REFUSED)
def test_what_cannot_be_is_refused_by_name(options, error, message):
    with pytest.raises(error, match=message) as caught:
        call(**options)
    assert "\n" not in str(caught.value)


def test_the_last_answer_is_checked_too():
    def denoise(x, sigma):
        return x * 0 + torch.where(sigma.reshape(-1, 1) <= 0.1, math.nan, 0.0)

    with pytest.raises(FloatingPointError, match="sample 0 did not come out finite"):
        call(denoise, end=Level(1.0, 0.0), last=Level(1.0, 0.1))


def test_a_step_that_shrinks_to_nothing_is_named():
    calls = itertools.count()

    def denoise(x, sigma):
        return x * 0 + 1e9 * (-1) ** (next(calls) // 2)

    control = StepControl(1e-6, 1e-6)
    with pytest.raises(RuntimeError, match="sample 0 is at sigma / alpha = 5 .*shrunk to"):
        call(denoise, torch.ones(1, 4, dtype=torch.float64), control=control)
    assert next(calls) < 1000  # long before max_steps


def test_bad_step_control():
    for name in ("rtol", "atol", "h_init", "accept_safety", "max_steps"):
        with pytest.raises(ValueError, match=f"{name} must be above 0, got -1"):
            StepControl(**{name: -1})
    for most in (2.5, math.inf):
        with pytest.raises(ValueError, match=f"max_steps must be a whole number, got {most}"):
            StepControl(max_steps=most)
    for safety in (2.5, 2.57, 3.0, math.nan):
        with pytest.raises(ValueError, match=r"accept_safety must be .*, got (2.5|2.57|3.0|nan)"):
            StepControl(accept_safety=safety)
    with pytest.raises(ValueError, match="accept_safety must be below 2.5, got 2.6"):
        PIDStepSizeController(0.1, 0.0, 1.0, 0.0, accept_safety=2.6)
    assert PIDStepSizeController(0.1, 0, 1, 0, order=5, accept_safety=2.49).propose_step(0.0)
    with pytest.raises(ValueError, match="rtol and atol are both 0"):
        StepControl(0.0, 0.0)


def test_a_relative_tolerance_alone_takes_exact_zeros():
    x = torch.tensor([[1.0, 0.0]])
    y, _ = call(x=x, control=StepControl(1e-3, 0.0))
    assert y[0, 1] == 0
    assert y[0, 0] == pytest.approx(0.02, rel=1e-5)


@pytest.mark.parametrize("name", sorted(ADAPTIVE))
def test_ksampler_takes_them_by_name(name, capsys):
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    told = []
    sampler = KSampler(exact.shrink, KarrasScheduler(0.01, 20.0), name, rtol=1e-3, atol=1e-4)
    y = sampler.sample(x, 6, callback=lambda *args: told.append(args), progress=True)
    target = x.double() * 20 / (1 + 20**2) ** 0.5
    assert (y - target).abs().max() < 3e-2
    assert y.dtype == x.dtype
    sigmas = torch.cat([sigma for _, _, sigma, _ in told])
    assert sigmas.max().item() == pytest.approx(20.0, rel=1e-6)
    assert sigmas.min().item() == pytest.approx(0.01, rel=1e-6)
    assert [k for k, *_ in told] == list(range(len(told)))
    assert "sampling" in capsys.readouterr().err
    control = StepControl(1e-3, 1e-4)
    direct, _ = sample_adaptive(
        exact.shrink,
        x * 20,
        Level(1.0, 20.0),
        Level(1.0, 0.0),
        pair=ADAPTIVE[name].pair,
        control=control,
        last=sampler.levels(6)[-2],
    )
    assert torch.equal(y, direct)
    assert torch.equal(y, KSampler(exact.shrink, KarrasScheduler(0.01, 20.0), ADAPTIVE[name],
                                   rtol=1e-3, atol=1e-4).sample(x, 6))  # fmt: skip


def test_ksampler_options_seeds_and_refusals():
    x = torch.randn(3, 50)
    noisy = KSampler(exact.shrink, "karras", "dpm_adaptive", eta=1.0)
    whole = noisy.sample(x, 6, seed=4)
    assert (whole[1:2] - noisy.sample(x[1:2], 6, seed=5)).abs().max() < 1e-6
    assert (whole - noisy.sample(x, 6, seed=5)).abs().max() > 0.1
    quiet = KSampler(exact.shrink, "karras", "dpm_adaptive", eta=1.0, s_noise=0.0)
    assert quiet.sample(x, 6, seed=4).std() < 0.9 * whole.std()
    with pytest.raises(ValueError, match="dpm_adaptive lays its steps as it goes: it has no plan"):
        noisy.plan(6)
    with pytest.raises(ValueError, match="dpm_adaptive draws noise for the steps it finds"):
        noisy.sample(x, 6, noise="path")
    assert torch.equal(noisy.sample(x, 6, seed=4, noise_on_cpu=True), whole)
    with pytest.raises(ValueError, match="dpm_adaptive has no plan to churn"):
        KSampler(exact.shrink, "karras", "dpm_adaptive", churn=Churn(1.0))
    with pytest.raises(ValueError, match="unknown sampler 'dpm_adaptiv'.* mean 'dpm_adaptive'"):
        KSampler(exact.shrink, "karras", "dpm_adaptiv")
    for options, message in (
        ({"rtoll": 1e-3}, "unknown option of dpm_adaptive, 'rtoll'; did you mean 'rtol'"),
        ({"rtol": "small"}, "dpm_adaptive's rtol must be a finite number: 'small'"),
        ({"eta": -1.0}, "dpm_adaptive's eta must be 0 or more"),
        ({"h_init": 0.0}, "h_init must be above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            KSampler(exact.shrink, "karras", "dpm_adaptive", **options)
    one = KSampler(exact.shrink, CustomScheduler(sigmas=(5.0, 0.0)), "dpm_adaptive", rtol=1e-4)
    assert (one.sample(x, 1) - x * 5 / 26**0.5).abs().max() < 2e-2


def test_ksampler_from_pure_noise():
    asked = []

    def velocity(x, sigma):
        asked.append(sigma[0].item())
        return exact.gaussian_denoiser(FLOW, 0.0, 0.25)(x, sigma)

    x = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0))
    sampler = KSampler(FunctionDenoiser(velocity, FLOW), solver="dpm_adaptive")
    assert (sampler.sample(x, 40) - 0.5 * x).abs().max() < 0.1
    levels = sampler.levels(40)
    assert asked[0] == 1.0
    assert asked[1] == pytest.approx(levels[1].sigma, rel=1e-6)
    assert asked[-1] == pytest.approx(levels[-2].sigma, rel=1e-6)
