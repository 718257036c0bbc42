"""Adaptive step control: its error, its independence of the batch, its counts."""

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
    Level,
    StepControl,
    sample_adaptive,
)
from k_diffusion.sampling import pairs as pairs_module
from k_diffusion.sampling.noise import SampleNoise

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
        return exact.shrink(x, sigma)

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
