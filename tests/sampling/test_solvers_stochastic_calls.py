"""Solvers that draw noise or take two answers: identities, the noise that they ask for, and what
they refuse."""

import itertools
import math

import numpy as np
import pytest
import torch

from k_diffusion.sampling import (
    FLOW,
    SOLVERS,
    VP,
    CallerNoise,
    Churn,
    KSampler,
    Levels,
    Run,
    SampleNoise,
    make_plan,
)  # fmt: skip
from k_diffusion.utils.scheduler import FlowScheduler, KarrasScheduler

from .by_hand import SIGMAS, X, Z, adams, d_of, ours

# --- identities -------------------------------------------------------------------------------

CASES = {
    "karras": KarrasScheduler().levels(7),
    "karras above 0": KarrasScheduler().levels(7)[:-1],
    "flow from pure noise": FlowScheduler().levels(7),
    "vp": KarrasScheduler(0.05, 20.0).levels(6).on(VP),
}
SAME = [
    (("ddpm", {}), ("euler_ancestral", {})),
    (("lcm", {}), ("euler_ancestral", {"eta": 1e9})),
    (("restart", {"times": 0}), ("heun", {})),
    (("er_sde", {"order": 1, "eta": 0.0}), ("ddim", {})),
    (("sa_solver_predictor", {"order": 1, "eta": 0.0}), ("ddim", {})),
    (("euler_cfg_pp", {}), ("euler", {})),
    (("euler_ancestral_cfg_pp", {}), ("euler_ancestral", {})),
    (("dpmpp_2m_cfg_pp", {}), ("dpmpp_2m", {})),
    (("dpmpp_2s_ancestral_cfg_pp", {}), ("dpmpp_2s_ancestral", {})),
    (("res_multistep_cfg_pp", {}), ("dpmpp_2m_sde_heun", {"eta": 0.0})),
    (("seeds_2", {"eta": 0.0, "r": 0.3}), ("dpmpp_sde", {"eta": 0.0, "r": 0.3})),
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("pair", SAME, ids=lambda pair: pair[0][0])
def test_identities(pair, case):
    (name, options), (other, others) = pair
    here, there = ours(name, CASES[case], **options), ours(other, CASES[case], **others)
    assert np.abs(here - there).max() <= 1e-12


def test_the_adams_predictor_of_order_2_is_the_2m_sde_method_in_heun_s_form():
    levels = CASES["karras above 0"]
    here = ours("sa_solver_predictor", levels, order=2, eta=1.0)
    assert np.abs(here - ours("dpmpp_2m_sde_heun", levels, eta=1.0)).max() <= 1e-11


# All but dpm_2_ancestral and restart, whose steps in sigma depend on the path.
UNITS = [
    "ddpm", "dpmpp_2s_ancestral", "dpmpp_2m_sde_heun", "er_sde", "lcm", "sa_solver", "seeds_2",
    "sa_solver_midpoint", "sa_solver_pece", "sa_solver_predictor", "seeds_3",
    "euler_cfg_pp", "euler_ancestral_cfg_pp",
    "dpmpp_2m_cfg_pp", "dpmpp_2s_ancestral_cfg_pp", "res_multistep_cfg_pp",
]  # fmt: skip


@pytest.mark.parametrize("churn", [None, Churn(s_churn=1.0)])
@pytest.mark.parametrize("path", [VP, FLOW], ids=str)
@pytest.mark.parametrize("name", UNITS)
def test_a_path_is_a_choice_of_units(name, path, churn):
    """With a nonlinear denoiser, two answers that differ, and the same noise."""
    ve = Levels.from_sigmas([10.0, 4.0, 2.5, 0.9, 0.3, 0.1])
    there = ve.on(path)
    x, a = X * there[0].alpha, there[-1].alpha
    here = ours(name, ve, pair=True, churn=churn, carry=True)
    assert np.abs(here - ours(name, there, True, churn, x, carry=True) / a).max() <= 1e-11


@pytest.mark.parametrize("name", ["er_sde", "sa_solver", "sa_solver_pece", "seeds_3", "seeds_2"])
def test_eta_0_draws_nothing(name):
    assert not make_plan(name, CASES["karras"], eta=0.0).stochastic
    assert make_plan(name, CASES["karras"]).stochastic


def test_lcm_on_gaussian_data_keeps_too_little_spread():
    """The reason for its order 0: each step begins from the mean of what x can come from, and more
    of them don't help. Data N(0, 1); the state is followed as its weights of x0 and the noise."""
    for n in (50, 400):
        plan = make_plan("lcm", KarrasScheduler(0.01, 100.0).levels(n)[:-1])
        unit = iter(torch.eye(n, dtype=torch.float64))

        class Source:
            def draw(self, interval, unit=unit):
                return next(unit)

        x = next(unit) * 100
        run = Run(plan, x, Source())
        while not run.done:
            run.advance(run.x / (1 + run.sigma**2))
        assert 0.4 < run.result.square().sum().item() < 0.55


# --- the noise that they ask for --------------------------------------------------------------


def asked(name, levels, **options):
    intervals = []

    def sampler(sigma, sigma_next):
        intervals.append((sigma, sigma_next))
        return torch.zeros(2, 3, dtype=torch.float64)

    x = torch.zeros(2, 3, dtype=torch.float64)
    plan = make_plan(name, levels, intervals=True, **options)
    run = Run(plan, x, CallerNoise(sampler, x))
    while not run.done:
        run.advance(*[run.x / 2] * plan.outputs)
    return intervals


ONCE = [
    "ddpm", "dpm_2_ancestral", "dpmpp_2s_ancestral", "dpmpp_2m_sde_heun", "er_sde", "lcm",
    "sa_solver", "sa_solver_midpoint", "sa_solver_pece", "sa_solver_predictor",
    "euler_ancestral_cfg_pp",
    "dpmpp_2s_ancestral_cfg_pp",
]  # fmt: skip


@pytest.mark.parametrize("name", ONCE)
def test_a_caller_s_sampler_is_asked_once_per_interval(name):
    levels = Levels.from_sigmas(SIGMAS)
    assert asked(name, levels) == list(itertools.pairwise(SIGMAS))[:-1]
    assert asked(name, levels[:-1]) == list(itertools.pairwise(SIGMAS))[:-1]


def test_seeds_ask_for_the_parts_of_each_interval():
    pairs = list(itertools.pairwise(SIGMAS))[:-1]
    levels = Levels.from_sigmas(SIGMAS)
    two = [p for s, t in pairs for p in itertools.pairwise([s, (s * t) ** 0.5, t])]
    thirds = [[s, (s * s * t) ** (1 / 3), (s * t * t) ** (1 / 3), t] for s, t in pairs]
    three = [p for marks in thirds for p in itertools.pairwise(marks)]
    assert np.abs(np.array(asked("seeds_2", levels)) - two).max() <= 1e-12
    assert np.abs(np.array(asked("seeds_3", levels)) - three).max() <= 1e-12
    assert asked("seeds_2", levels, r=1.0) == pairs


def test_restart_s_noise_belongs_to_no_path():
    levels = KarrasScheduler().levels(20)
    plan = make_plan("restart", levels, times=3)
    assert len(plan.draws) == 3
    assert all(draw.interval.fresh for draw in plan.draws)
    assert asked("restart", levels, times=3) == []


def test_the_calls_of_each_way_to_correct():
    levels = Levels.from_sigmas(SIGMAS)
    for name, calls in [("sa_solver_predictor", 6), ("sa_solver", 6), ("sa_solver_pece", 11)]:
        assert make_plan(name, levels).evaluations == calls


def test_restart_takes_as_many_steps_as_the_levels_do_there():
    levels = Levels.from_sigmas([4.0, 3.0, 1.5, 1.0, 0.4, 0.1, 0.0])
    plain = make_plan("restart", levels, times=0)
    once = make_plan("restart", levels)
    # from 2 to 0.1 there lie 1.5, 1 and 0.4: three intervals, each two calls
    assert once.evaluations - plain.evaluations == 6
    assert make_plan("restart", levels, times=4, inner=5).evaluations - plain.evaluations == 40
    ways = [s.level.sigma for s in once.steps if not s.start]
    assert min(abs(v - 2.0) for v in ways) <= 1e-12
    # 2 itself is one of these levels, but for rounding; and 2 is no place to restart from
    exact = Levels.from_sigmas([2.0 * (1 + 1e-15), 1.0, 0.4, 0.1])
    assert make_plan("restart", exact).evaluations == 6 + 6
    assert not make_plan("restart", Levels.from_sigmas([4.0, 2.0 * (1 - 1e-15), 0.0])).stochastic
    # the first level is where x comes from, not where anything was solved
    assert not make_plan("restart", Levels.from_sigmas([0.5, 0.0])).stochastic
    low = make_plan("restart", Levels.from_sigmas([0.12, 0.05, 0.0]))
    assert low.draws[0].interval.start.sigma == 0.05
    # near is meant in log: 0.19 and 0.02 lie 1.9 and 5 times off
    near = make_plan("restart", Levels.from_sigmas([4.0, 0.19, 0.02]), low=0.1)
    assert near.draws[0].interval.start.sigma == 0.19
    # above a place between levels that begin below `high`, one step is the least
    below = make_plan("restart", Levels.from_sigmas([4.0, 0.1, 0.0]))
    assert below.evaluations == 3 + 2
    # where no level lies between, there is nothing to restart
    assert not make_plan("restart", levels, low=0.01, high=0.05).stochastic


# --- history under churn, and refusals ---------------------------------------------------------


def test_a_correction_after_churn_is_scaled_with_the_state():
    """The corrector on flow levels with churn, all states written out in units of alpha."""
    levels = Levels.from_sigmas([0.9, 0.6, 0.4, 0.2], FLOW)
    churn = Churn(s_churn=0.6)
    options = {"order": 1, "eta": 0.0, "churn": churn}
    z, gamma = iter(Z), 0.2
    y, old = X / levels[0].alpha, None
    ratios = [level.ratio for level in levels]

    def level_at(ratio):
        return 1 / (1 + ratio), ratio / (1 + ratio)

    for s, t in itertools.pairwise(ratios):
        hat = s * (1 + gamma)
        y = y + math.sqrt(hat**2 - s**2) * next(z)
        alpha, sigma = level_at(hat)
        d = d_of(alpha * y, sigma)
        if old is not None:
            d_old, start, end = old
            nodes = [-math.log(start), -math.log(hat)]
            y = y + adams(nodes, [d_old, d], start, end, 0.0) - (1 - end / start) * d_old
        y = t / hat * y + (1 - t / hat) * d
        old = d, hat, t
    expected = y * levels[-1].alpha
    assert np.abs(ours("sa_solver", levels, **options) - expected).max() <= 1e-12


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dpmpp_sde", {"r": 0.0}, r"dpmpp_sde: r must lie in \[0.001, 1\], got 0.0"),
        ("seeds_2", {"r": 0.0}, r"seeds_2: r must lie in \[0.001, 1\], got 0.0"),
        ("seeds_2", {"r": 1e-12}, r"seeds_2: r must lie in \[0.001, 1\], got 1e-12"),
        ("seeds_3", {"r1": 1e-12}, r"seeds_3: r1 and r2 must lie in \[0.001, 1\), .* got 1e-12"),
        ("seeds_3", {"r1": 0.7}, "seeds_3: r1 and r2 must lie in"),
        ("restart", {"low": 3.0}, "restart: low must lie above 0 and below high, got 3.0 and 2.0"),
        ("restart", {"low": 0.0}, "restart: low must lie above 0"),
        ("restart", {"times": -1}, "restart: times and inner must be 0 or more, got -1"),
        ("er_sde", {"order": 4}, "er_sde's order must be one of 1, 2, 3, got 4"),
        ("sa_solver", {"s_tmin": 2.0, "s_tmax": 1.0}, "sa_solver: s_tmin .* got 2.0 and 1.0"),
    ],
)
def test_options_out_of_range_are_refused(name, options, message):
    with pytest.raises(ValueError, match=f"^{message}"):  # its name stands there once
        make_plan(name, Levels.from_sigmas(SIGMAS), **options)


# --- KSampler with a guided denoiser -----------------------------------------------------------


def guided(x, sigma):
    sigma = sigma.reshape(-1, 1)
    return torch.tanh(x / (1 + sigma)), 0.7 * torch.tanh(x / (2 + sigma))


@pytest.mark.parametrize("name", [name for name, s in SOLVERS.items() if s.outputs == 2])
def test_ksampler_hands_on_both_answers(name):
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sampler, seen = KSampler(guided, "karras", name), []
    result = sampler.sample(x, 5, seed=3)
    watched = sampler.sample(x, 5, seed=3, callback=lambda k, x, s, d: seen.append((x, s, d)))
    listed = KSampler(lambda *query: list(guided(*query)), "karras", name).sample(x, 5, seed=3)
    assert torch.equal(result, watched)
    assert torch.equal(result, listed)
    assert seen
    assert all(torch.equal(d, guided(x, s)[0]) for x, s, d in seen)
    plan = sampler.plan(5)
    state = x * plan.levels[0].sigma
    run = Run(plan, state, SampleNoise([3, 4], state))
    while not run.done:
        run.advance(*guided(run.x, run.sigma))
    assert torch.equal(result, run.result)


@pytest.mark.parametrize(
    ("answer", "what"),
    [(lambda x: x, "Tensor"), (lambda x: (x, x, x), "3 of them"), (lambda x: (x,), "1 of them")],
)
@pytest.mark.parametrize("callback", [None, lambda *a: None])
def test_a_denoiser_without_a_pair_is_refused(answer, what, callback):
    sampler = KSampler(lambda x, sigma: answer(x), "karras", "euler_cfg_pp")
    with pytest.raises(TypeError, match=f"euler_cfg_pp needs a denoiser .* got {what}"):
        sampler.sample(torch.ones(2, 3), 3, callback=callback)


def test_a_pair_is_refused_where_one_answer_is_taken():
    with pytest.raises(TypeError, match="must return a tensor, .* got tuple"):
        KSampler(guided, "karras", "euler").sample(torch.ones(2, 3), 3)
