"""Adaptive step control: its error, its independence of the batch, its counts, its refusals."""

import dataclasses
import importlib.util
import itertools
import math
from decimal import Decimal
from pathlib import Path

import pytest
import torch

from k_diffusion.denoiser import FunctionDenoiser
from k_diffusion.sampling import (
    FLOW,
    PAIRS,
    VE,
    VP,
    Churn,
    KSampler,
    Level,
    StepControl,
    sample_adaptive,
)
from k_diffusion.sampling import pairs as pairs_module
from k_diffusion.sampling.adaptive import ADAPTIVE
from k_diffusion.sampling.noise import SampleNoise
from k_diffusion.sampling.stepping import PIDStepSizeController
from k_diffusion.utils.scheduler import CustomScheduler, KarrasScheduler

_spec = importlib.util.spec_from_file_location("exact", Path(__file__).with_name("exact.py"))
exact = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(exact)
level = exact.level

PATHS = (VE, VP, FLOW)
NAMES = sorted(PAIRS)


def mixture_run(pair, rtol, path=VE, end=0.01):
    s, t = level(path, 20.0), level(path, end)
    x = torch.tensor(exact.MIXTURE.points)[:, None] * s.alpha
    control = StepControl(rtol, rtol / 10)
    y, info = sample_adaptive(exact.mixture_denoiser(path), x, s, t, pair=pair, control=control)
    target = torch.tensor(exact.MIXTURE.target(s, t))[:, None]
    return (y - target).abs().max().item(), y / t.alpha, info


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_the_error_follows_the_tolerance(name, path):
    # Where a handful of steps does, their growth is what bounds them, not the tolerance.
    tolerances = [10.0**-k for k in (range(2, 6) if name == "dpm_12" else range(3, 7))]
    errors, steps = [], []
    for rtol in tolerances:
        error, _, info = mixture_run(name, rtol, path)
        assert error < 8 * rtol
        errors.append(error)
        steps.append(info.accepted)
    assert 100 < errors[0] / errors[-1] < 5000
    for few, many in itertools.pairwise(steps):
        assert all(a <= b for a, b in zip(few, many, strict=True))
        assert sum(few) < sum(many)


@pytest.mark.parametrize("name", NAMES)
def test_the_path_does_not_matter(name):
    _, y, info = mixture_run(name, 1e-3)
    for path in (VP, FLOW):
        _, other, its = mixture_run(name, 1e-3, path)
        assert (other - y).abs().max() < 1e-8
        assert its == info


def fixed_steps(pair, n, path=VP):
    """The largest error after n equal steps of a pair's clock: no gain, so no change of step."""
    s, t = level(path, 2.0), level(path, 0.1)
    x = torch.tensor(exact.host.MIXTURE.points)[:, None] * s.alpha
    begin, end = (pair.chart.clock(v.half_log_snr) for v in (s, t))
    control = StepControl(rtol=1e9, h_init=abs(end - begin) / n, icoeff=0.0)
    y, info = sample_adaptive(exact.mixture_denoiser(path), x, s, t, pair=pair, control=control)
    assert set(info.steps) == {n}
    return abs(y[:, 0].numpy() - exact.host.MIXTURE.target(s, t)).max()


@pytest.mark.parametrize("name", NAMES)
def test_both_results_of_a_pair_have_their_order(name):
    pair = PAIRS[name]

    def lower(start, end):
        weights = pair.weights(start, end)
        return dataclasses.replace(weights, high=weights.low)

    low = dataclasses.replace(pair, weights=lower, carries=False)
    for method, order in ((pair, pair.order), (low, pair.order - 1)):
        slope = math.log2(fixed_steps(method, 64) / fixed_steps(method, 128))
        assert abs(slope - order) < (0.15 if order < 3 else 0.3), (method.order, slope)


def test_tableaux_are_consistent():
    for method in (PAIRS["dormand_prince"], PAIRS["bogacki_shampine"]):
        sums = [math.fsum(row) for row in method.weights(0.0, 1.0).inner]
        assert method.nodes[1:] == pytest.approx(sums, abs=1e-14)
    assert [pair.carries for pair in PAIRS.values()] == [False, False, True, True]
    for name in ("bogacki_shampine", "dormand_prince"):
        weights = PAIRS[name].weights(0.0, 1.0)
        assert math.fsum(weights.high) == pytest.approx(1, abs=1e-15)
        assert math.fsum(weights.low) == pytest.approx(1, abs=1e-15)


def test_the_bend_of_a_short_step_keeps_its_digits():
    for u in (1e-9, 1e-4, 0.029, 0.031, -0.02, 1.5, -3.0):
        true = (Decimal(u).exp() - 1) / Decimal(u) - 1
        assert pairs_module._rise(u) == pytest.approx(float(true), rel=2e-14)


def by_mean(x, sigma, mean):
    """Data around a mean of the sample's own, in two values far apart: steps differ by sample."""
    s = sigma.reshape(-1, 1)
    return mean.reshape(-1, 1) + torch.tanh(x * mean.reshape(-1, 1) / (s**2 + 0.1))


@pytest.mark.parametrize("eta", [0.0, 0.8])
@pytest.mark.parametrize("name", NAMES)
def test_a_sample_is_the_same_alone_in_a_batch_and_in_another_order(name, eta):
    x = 20 * torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    mean = torch.tensor([0.1, 3.0, -1.0, 0.7, 8.0])
    seeds = [3, 1, 4, 11, 5]

    def run(rows, **more):
        control = StepControl(1e-3, 1e-3)
        y, info = sample_adaptive(
            by_mean,
            x[rows],
            Level(1.0, 20.0),
            Level(1.0, 0.05),
            pair=name,
            control=control,
            eta=eta,
            seeds=[seeds[i] for i in rows],
            condition={"mean": mean[rows]},
            **more,
        )
        return y, info

    whole, info = run([0, 1, 2, 3, 4])
    assert len(set(info.steps)) > 2
    shuffled, its = run([3, 0, 4, 2, 1])
    assert its.nfe == tuple(info.nfe[i] for i in (3, 0, 4, 2, 1))
    assert (shuffled - whole[[3, 0, 4, 2, 1]]).abs().max() < 1e-6
    for i in range(5):
        alone, its = run([i])
        assert (alone - whole[i : i + 1]).abs().max() < 1e-6
        assert (its.steps[0], its.nfe[0]) == (info.steps[i], info.nfe[i])
    full, its = run([0, 1, 2, 3, 4], compact=False)
    assert (full - whole).abs().max() < 1e-6
    assert its == info


@pytest.mark.parametrize("name", NAMES)
def test_counts_are_exact(name):
    asked, lengths = [0] * 3, []

    def denoise(x, sigma, which):
        lengths.append(len(x))
        for i in which.tolist():
            asked[i] += 1
        return torch.tanh(x * 7.0 ** which.reshape(-1, 1)) * (1 + which.reshape(-1, 1))

    x = 5 * torch.randn(3, 4, generator=torch.Generator().manual_seed(2))
    told = []
    _, info = sample_adaptive(
        denoise,
        x,
        Level(1.0, 5.0),
        Level(1.0, 0.02),
        pair=name,
        control=StepControl(1e-3, 1e-3, h_init=3.0),
        condition={"which": torch.arange(3)},
        callback=lambda k, x, sigma, d: told.append((k, len(x), tuple(sigma.shape), len(d))),
    )
    assert info.nfe == tuple(asked)
    assert info.calls == len(lengths)
    assert told == [(k, n, (n,), n) for k, n in enumerate(lengths)]
    stages = len(PAIRS[name].nodes)
    for steps, nfe, accepted, refused in zip(
        info.steps, info.nfe, info.accepted, info.refused, strict=True
    ):
        assert steps == accepted + refused
        # A refused step leaves its first slope to the next; a carrying pair, its last too.
        if PAIRS[name].carries:
            assert nfe == 1 + steps * (stages - 1)
        else:
            assert nfe == steps * stages - refused
    assert sum(info.refused) > 0
    assert lengths[0] == 3
    assert min(lengths) < 3


def test_a_denoiser_that_needs_the_whole_batch_gets_it():
    lengths = []
    own = torch.tensor([[0.1], [5.0], [2.0]])

    def denoise(x, sigma):
        lengths.append(len(x))
        return own + torch.tanh(x * own)

    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    _, info = sample_adaptive(denoise, x, Level(1.0, 5.0), Level(1.0, 0.1), compact=False)
    assert set(lengths) == {3}
    assert len(lengths) == info.calls
    assert len(set(info.nfe)) > 1


def test_noise_is_drawn_for_accepted_steps_alone(monkeypatch):
    drawn = []
    draw = SampleNoise.draw
    monkeypatch.setattr(SampleNoise, "draw", lambda self: drawn.append(self) or draw(self))
    x = 20 * torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    control = StepControl(h_init=3.0)
    _, info = sample_adaptive(
        by_mean,
        x,
        Level(1.0, 20.0),
        Level(1.0, 0.05),
        control=control,
        eta=1.0,
        seeds=[1, 2],
        condition={"mean": torch.tensor([1.0, 5.0])},
    )
    assert sum(info.refused) > 0
    assert len(drawn) == sum(info.accepted)
    assert len(set(map(id, drawn))) == 2


@pytest.mark.parametrize("name", NAMES)
def test_with_noise_no_level_beyond_the_end_is_asked_about(name):
    asked = []

    def denoise(x, sigma):
        asked.append(sigma.min().item())
        return shrink(x, sigma)

    x = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ends = Level(1.0, 5.0), Level(1.0, 0.5)
    sample_adaptive(denoise, x, *ends, pair=name, eta=1.0, seeds=[1, 2])
    assert min(asked) >= 0.5 - 1e-12


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize(
    ("name", "eta", "rtol", "off"),
    # The pair of high order takes few steps, and so keeps more of its start than the diffusion.
    [("dpm_23", 0.5, 1e-5, 0.2), ("dpm_23", 1.0, 1e-4, 0.2), ("dormand_prince", 1.0, 1e-5, 0.8)],
)
def test_noise_keeps_the_marginal(name, eta, rtol, off, path):
    s, t = level(path, 20.0), level(path, 0.1)
    variance = 0.3
    start, end = ((v.alpha**2 * variance + v.sigma**2) ** 0.5 for v in (s, t))
    x = torch.randn(2, 20_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = start * x + s.alpha * 0.7
    denoiser = exact.gaussian_denoiser(path, 0.7, variance)
    control = StepControl(rtol, rtol / 10)
    y, _ = sample_adaptive(denoiser, x, s, t, pair=name, control=control, eta=eta, seeds=(1, 2))
    assert abs(y.std().item() / end - 1) < 0.01
    assert abs(y.mean().item() - 0.7 * t.alpha) < 0.01
    # What is left of the start in data units: (v + r²) to the power (1 + eta²) / 2 (see host.py).
    kept = gaussian_slope(x, y) * s.alpha / t.alpha
    ode = end / t.alpha / (start / s.alpha)
    assert abs(kept / ode ** (1 + eta**2) - 1) < off


def gaussian_slope(x, y):
    x, y = x - x.mean(), y - y.mean()
    return ((x * y).mean() / (x * x).mean()).item()


@pytest.mark.parametrize("path", [VP, FLOW], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_from_pure_noise_to_clean_data(name, path):
    variance = torch.linspace(0.05, 1.5, 6, dtype=torch.float64)
    asked = []
    inner = exact.gaussian_denoiser(path, 0.4, variance)

    def denoise(x, sigma):
        asked.append(sigma[0].item())
        return inner(x, sigma)

    denoiser = FunctionDenoiser(denoise, path)
    denoiser.float64_sigma = True
    x = torch.randn(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    noise, clean = Level(0.0, 1.0), Level(1.0, 0.0)
    rtol = 1e-4
    control = StepControl(rtol, rtol)
    y, info = sample_adaptive(denoiser, x, noise, clean, pair=name, control=control)
    target = exact.gaussian_flow(x, noise, clean, 0.4, variance)
    assert (y - target).abs().max() < 8 * rtol
    assert asked[0] == 1.0
    last = level(path, rtol**0.5 / 100)
    assert asked[-1] == pytest.approx(last.sigma, rel=1e-9)
    if name.startswith("dpm"):
        assert asked[1] == pytest.approx(level(path, 10 / rtol**0.5).sigma, rel=1e-12)
        assert info.nfe[0] == 2 + info.steps[0] * len(PAIRS[name].nodes) - info.refused[0]
    # One's own ends of the two DDIM steps.
    asked.clear()
    first, last = level(path, 30.0), level(path, 0.03)
    sample_adaptive(denoiser, x, noise, clean, pair=name, control=control, first=first, last=last)
    assert asked[-1] == pytest.approx(last.sigma, rel=1e-12)
    if name.startswith("dpm"):
        assert asked[1] == pytest.approx(first.sigma, rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_there_and_back(name):
    variance = torch.linspace(0.05, 1.5, 6, dtype=torch.float64)
    s, t = level(VP, 0.01), level(VP, 50.0)
    denoiser = exact.gaussian_denoiser(VP, 0.4, variance)
    x = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    control = StepControl(1e-4, 1e-4)
    up, _ = sample_adaptive(denoiser, x, s, t, pair=name, control=control)
    assert (up - exact.gaussian_flow(x, s, t, 0.4, variance)).abs().max() < 3e-3
    down, _ = sample_adaptive(denoiser, up, t, s, pair=name, control=control)
    assert (down - x).abs().max() < 3e-3


def test_dtypes():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        seen = set()

        def denoise(x, sigma, seen=seen):
            seen.add((x.dtype, sigma.dtype))
            return x / (1 + sigma.reshape(-1, 1).to(x.dtype) ** 2)

        x = torch.randn(2, 3, dtype=dtype)
        y, _ = sample_adaptive(denoise, x, Level(1.0, 5.0), Level(1.0, 0.1))
        state = torch.float64 if dtype == torch.float64 else torch.float32
        assert y.dtype == dtype
        assert seen == {(state, state)}
        seen.clear()
        careful = FunctionDenoiser(denoise)
        careful.float64_sigma = True
        sample_adaptive(careful, x, Level(1.0, 5.0), Level(1.0, 0.1))
        assert seen == {(state, torch.float64)}


def test_conditions_follow_their_samples_however_they_are_held():
    x = 20 * torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    mean = torch.tensor([0.1, 3.0, 8.0])

    def nested(x, sigma, held, table):
        assert table.shape == (7,)
        assert held["list"][1] is None
        return by_mean(x, sigma, held["list"][0]) + 0 * held["pair"][0].reshape(-1, 1)

    ends = Level(1.0, 20.0), Level(1.0, 0.05)
    plain, info = sample_adaptive(by_mean, x, *ends, condition={"mean": mean})
    held = {"list": [mean, None], "pair": (mean, 3)}
    same, _ = sample_adaptive(nested, x, *ends, condition={"held": held, "table": torch.arange(7)})
    assert len(set(info.nfe)) > 1
    assert torch.equal(plain, same)


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


def shrink(x, sigma):
    return x / (1 + sigma.reshape(-1, *[1] * (x.ndim - 1)) ** 2)


@pytest.mark.parametrize("name", sorted(ADAPTIVE))
def test_ksampler_takes_them_by_name(name, capsys):
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    told = []
    sampler = KSampler(shrink, KarrasScheduler(0.01, 20.0), name, rtol=1e-3, atol=1e-4)
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
        shrink,
        x * 20,
        Level(1.0, 20.0),
        Level(1.0, 0.0),
        pair=ADAPTIVE[name].pair,
        control=control,
        last=sampler.levels(6)[-2],
    )
    assert torch.equal(y, direct)
    assert torch.equal(y, KSampler(shrink, KarrasScheduler(0.01, 20.0), ADAPTIVE[name],
                                   rtol=1e-3, atol=1e-4).sample(x, 6))  # fmt: skip


def test_ksampler_options_seeds_and_refusals():
    x = torch.randn(3, 50)
    noisy = KSampler(shrink, "karras", "dpm_adaptive", eta=1.0)
    whole = noisy.sample(x, 6, seed=4)
    assert (whole[1:2] - noisy.sample(x[1:2], 6, seed=5)).abs().max() < 1e-6
    assert (whole - noisy.sample(x, 6, seed=5)).abs().max() > 0.1
    quiet = KSampler(shrink, "karras", "dpm_adaptive", eta=1.0, s_noise=0.0)
    assert quiet.sample(x, 6, seed=4).std() < 0.9 * whole.std()
    with pytest.raises(ValueError, match="dpm_adaptive lays its steps as it goes: it has no plan"):
        noisy.plan(6)
    with pytest.raises(ValueError, match="dpm_adaptive draws noise for the steps it finds"):
        noisy.sample(x, 6, noise="path")
    assert torch.equal(noisy.sample(x, 6, seed=4, noise_on_cpu=True), whole)
    with pytest.raises(ValueError, match="dpm_adaptive has no plan to churn"):
        KSampler(shrink, "karras", "dpm_adaptive", churn=Churn(1.0))
    with pytest.raises(ValueError, match="unknown sampler 'dpm_adaptiv'.* mean 'dpm_adaptive'"):
        KSampler(shrink, "karras", "dpm_adaptiv")
    for options, message in (
        ({"rtoll": 1e-3}, "unknown option of dpm_adaptive, 'rtoll'; did you mean 'rtol'"),
        ({"rtol": "small"}, "dpm_adaptive's rtol must be a finite number: 'small'"),
        ({"eta": -1.0}, "dpm_adaptive's eta must be 0 or more"),
        ({"h_init": 0.0}, "h_init must be above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            KSampler(shrink, "karras", "dpm_adaptive", **options)
    one = KSampler(shrink, CustomScheduler(sigmas=(5.0, 0.0)), "dpm_adaptive", rtol=1e-4)
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
