"""The functions of solvers that have no established name, and dpm_fast."""

from __future__ import annotations

import inspect
import itertools
import math

import pytest
import torch
from established_models import GENERATED, SIGMAS, model, model_for, noise, pair

from k_diffusion import sampling
from k_diffusion.sampling import SOLVERS, CallerNoise, Levels, Run, make_plan, solver
from k_diffusion.sampling.compat import make_function

# --- dpm_fast ------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 4, 6, 7])
def test_dpm_fast_makes_n_calls_and_counts_them(n, monkeypatch):
    counted, calls, infos = [], [], []

    class Bar:
        def __init__(self, total, disable):
            counted.append((total, disable))

        def __enter__(self):
            return self

        def __exit__(self, *args):
            counted.append("closed")

        def update(self):
            counted.append(len(calls))

    def watched(x, sigma):
        calls.append(float(sigma[0]))
        return model(x, sigma)

    monkeypatch.setattr(sampling, "tqdm", Bar, raising=False)
    sampling.sample_dpm_fast(watched, noise(), 0.1, 10.0, n, None, infos.append, True)
    assert counted == [(n, True), *range(1, n + 1), "closed"]
    steps = n // 3 + 1
    assert [info["i"] for info in infos] == list(range(steps))
    for i, info in enumerate(infos):
        assert set(info) == {"x", "i", "t", "t_up", "sigma", "sigma_hat", "denoised"}
        assert float(info["sigma"]) == pytest.approx(10 * 0.01 ** (i / steps))
        assert float(info["t"]) == pytest.approx(-math.log(float(info["sigma"])), rel=1e-5)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_dpm_fast_asks_for_noise_in_every_step(eta):
    times = []

    def sampler(sigma, sigma_next):
        times.append((float(sigma), float(sigma_next)))
        return torch.zeros(2, 3, 4)

    keywords = {"eta": eta, "noise_sampler": sampler, "disable": True}
    sampling.sample_dpm_fast(model, noise(), 0.1, 10.0, 7, **keywords)
    ends = [10 * 0.01 ** (i / 3) for i in range(4)]
    assert times == [pytest.approx(pair, rel=1e-5) for pair in itertools.pairwise(ends)]


def test_dpm_fast_takes_tensors_and_goes_up():
    ends = torch.tensor(0.1), torch.tensor(10.0)
    plain = sampling.sample_dpm_fast(model, noise(), 0.1, 10.0, 7, disable=True)
    result = sampling.sample_dpm_fast(model, noise(), *ends, 7, disable=True)
    assert (result - plain).abs().max() < 1e-6
    x = torch.linspace(-1, 1, 24, dtype=torch.float64).view(2, 3, 4)
    noised = sampling.sample_dpm_fast(model, x, 10.0, 0.1, 300, disable=True)
    assert noised.abs().max() > 5
    back = sampling.sample_dpm_fast(model, noised, 0.1, 10.0, 300, disable=True)
    assert (back - x).abs().max() < 5e-4


# --- solvers without an established name ---------------------------------------------------------


@pytest.mark.parametrize("name", GENERATED)
def test_a_generated_function_is_its_plan(name):
    """The same numbers as a run of the plan by hand, and a callback for each first query."""
    chosen, x, infos = SOLVERS[name[7:]], noise(dtype=torch.float64), []
    levels = SIGMAS.double()

    def sampler(sigma, sigma_next):
        generator = torch.Generator().manual_seed(int(1e6 * float(sigma)) % 2**31)
        return torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)

    keywords = {"callback": infos.append, "disable": True}
    noisy = "noise_sampler" in inspect.signature(getattr(sampling, name)).parameters
    if noisy:
        keywords["noise_sampler"] = sampler
    result = getattr(sampling, name)(model_for(name), x, levels, **keywords)

    plan = make_plan(chosen, Levels.from_sigmas(levels.tolist()), intervals=True)
    run = Run(plan, x, CallerNoise(sampler, x))
    while not run.done:
        answers = model_for(name)(run.x, run.sigma)
        run.advance(*(answers if chosen.outputs == 2 else (answers,)))
    if not any(draw.interval.fresh for draw in plan.draws):
        assert torch.equal(result, run.result)
    starts = [step.level.sigma for step in plan.steps if step.start]
    assert [float(info["sigma"]) for info in infos] == starts
    assert [info["i"] for info in infos] == list(range(len(starts)))


def test_generated_functions_draw_on_atoms_where_the_noise_is_their_own(monkeypatch):
    """Overlapping intervals share a path, which independent draws for each would not."""
    made = []
    monkeypatch.setattr(
        sampling,
        "default_noise_sampler",
        lambda x: lambda *times: (made.append(tuple(map(float, times))), torch.zeros_like(x))[1],
    )
    chosen = SOLVERS["dpmpp_sde"]  # it asks for overlapping intervals
    make_function(chosen)(model, noise(), SIGMAS, disable=True)
    ends = [time for pair in made for time in pair]
    assert sorted(made, reverse=True) == made
    assert len(set(ends)) == 7  # three whole intervals, each cut once
    assert all(a[1] == b[0] for a, b in itertools.pairwise(made))
    asked = []

    def mine(*times):
        asked.append(tuple(map(float, times)))
        return torch.zeros(2, 3, 4)

    make_function(chosen)(model, noise(), SIGMAS, disable=True, noise_sampler=mine)
    assert [time for pair in asked[1::2] for time in pair] == pytest.approx(
        [10, 4, 4, 1.5, 1.5, 0.4]
    )
    assert [pair[0] for pair in asked[::2]] == [pair[0] for pair in asked[1::2]]


def test_generated_functions_take_positions_and_keywords():
    run = sampling.sample_deis
    by_position = run(model, noise(), SIGMAS, None, None, True, 2)
    assert torch.equal(by_position, run(model, noise(), SIGMAS, disable=True, order=2))
    assert not torch.equal(by_position, run(model, noise(), SIGMAS, disable=True, order=1))
    import numpy as np

    order, eta = np.int64(2), np.float32(0)
    assert torch.equal(by_position, run(model, noise(), SIGMAS, disable=True, order=order))
    assert torch.equal(
        sampling.sample_ddim(model, noise(), SIGMAS, disable=True, eta=eta),
        sampling.sample_ddim(model, noise(), SIGMAS, disable=True),
    )


@pytest.fixture
def two_outputs():
    @solver(order=1, source="this test", outputs=2)
    def guided_euler(x, levels, noise):
        """Euler's method with the noise of the second estimate."""
        for s, t in levels.pairs():
            d, u = yield x, s
            x = d + (t.sigma / s.sigma) * (x - u)
        return x

    yield "sample_guided_euler"
    del SOLVERS["guided_euler"]
    vars(sampling).pop("sample_guided_euler", None)


def test_two_outputs(two_outputs):
    run, x, infos = getattr(sampling, two_outputs), noise(), []
    result = run(pair, x, SIGMAS, callback=infos.append, disable=True)
    for s, t in itertools.pairwise(SIGMAS):
        d, u = pair(x, s * x.new_ones(2))
        x = d + (t / s) * (x - u)
    assert (result - x).abs().max() < 1e-6
    assert torch.equal(infos[0]["denoised"], model(noise(), SIGMAS[0] * torch.ones(2)))


@pytest.mark.parametrize("answer", [model, lambda x, s: [model(x, s)] * 3])
def test_two_outputs_are_asked_for_by_name(two_outputs, answer):
    with pytest.raises(TypeError, match=r"pair \(denoised, uncond_denoised\) for sample_guided"):
        getattr(sampling, two_outputs)(answer, noise(), SIGMAS, disable=True)
