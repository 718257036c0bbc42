"""Solvers that draw noise or take two answers: each against its formula written out by hand, its
identities, the noise that it asks for, and what it refuses."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad

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

SIGMAS = [10.0, 4.0, 2.5, 0.9, 0.3, 0.1, 0.0]
X = np.array([-12.0, -1.0, 0.5, 7.0])
Z = np.random.default_rng(0).standard_normal((99, X.size))


def d_of(x, sigma):
    """Smooth and nonlinear."""
    return np.tanh(x / (1 + sigma)) / (1 + 0.2 * sigma)


def u_of(x, sigma):
    return 0.7 * np.tanh(x / (2 + sigma)) + 0.1


def ours(name, levels=None, pair=False, churn=None, x=X, carry=False, **options):
    """The plan on float64 arrays with Z as its noise, one a draw, in the solver's order; with
    `carry` the denoiser is the same function of x / alpha and sigma / alpha on every path."""
    levels = Levels.from_sigmas(SIGMAS) if levels is None else levels
    plan = make_plan(name, levels, churn=churn, intervals=True, **options)
    drawn = iter(torch.from_numpy(Z))

    class Source:
        def draw(self, interval):
            return next(drawn)

    run = Run(plan, torch.from_numpy(x), Source())
    while not run.done:
        x, sigma = run.x.numpy(), run.sigma[0].item()
        alpha = levels.path.alpha(sigma) if carry else 1.0
        x, sigma = x / alpha, sigma / alpha
        answers = (d_of(x, sigma), u_of(x, sigma) if pair else d_of(x, sigma))
        run.advance(*map(torch.from_numpy, answers[: plan.outputs]))
    return run.result.numpy()


def check(expected, *args, **kwargs):
    assert np.abs(ours(*args, **kwargs) - expected).max() <= 1e-12


def down_up(s, t, eta):
    up = min(t, eta * math.sqrt(t**2 * (s**2 - t**2) / s**2))
    return math.sqrt(t**2 - up**2), up


# --- by hand, on variance-exploding levels: lambda = -log sigma --------------------------------


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_two_stage_ancestral_by_hand(eta):
    midpoint = multi = X
    z = iter(Z)
    for s, t in itertools.pairwise(SIGMAS):
        down, up = down_up(s, t, eta)
        kick = 0.9 * up * next(z) if up > 0 else 0
        slope, d = (midpoint - d_of(midpoint, s)) / s, d_of(multi, s)
        if down == 0:
            midpoint, multi = midpoint - slope * s, d
            continue
        m = math.sqrt(s * down)
        inner = midpoint + slope * (m - s)
        midpoint = midpoint + (inner - d_of(inner, m)) / m * (down - s) + kick
        h = math.log(s / down)
        inner = math.exp(-h / 2) * multi - math.expm1(-h / 2) * d
        multi = math.exp(-h) * multi - math.expm1(-h) * d_of(inner, m) + kick
    check(midpoint, "dpm_2_ancestral", eta=eta, s_noise=0.9)
    check(multi, "dpmpp_2s_ancestral", eta=eta, s_noise=0.9)


@pytest.mark.parametrize("s_noise", [1.0, 0.9])
def test_ddpm_by_hand(s_noise):
    """With beta and alpha-bar, on variance-preserving levels (Ho et al. 2020, eqs. 6, 7)."""
    sigmas = [0.99, 0.9, 0.5, 0.1, 0.0]
    x = X
    for k, (s, t) in enumerate(itertools.pairwise(sigmas)):
        bar, bar_before = 1 - s**2, 1 - t**2
        beta = 1 - bar / bar_before
        mean = math.sqrt(bar_before) * beta / (1 - bar) * d_of(x, s)
        mean = mean + math.sqrt(1 - beta) * (1 - bar_before) / (1 - bar) * x
        x = mean + s_noise * math.sqrt((1 - bar_before) / (1 - bar) * beta) * Z[k]
    check(x, "ddpm", Levels.from_sigmas(sigmas, VP), s_noise=s_noise)


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_2m_sde_heun_by_hand(eta):
    x, last, h_last = X, None, 0.0
    for k, (s, t) in enumerate(itertools.pairwise(SIGMAS)):
        d = d_of(x, s)
        if t == 0:
            x = d
            break
        h = math.log(s / t)
        w = h + eta * h
        x = t / s * math.exp(-eta * h) * x - math.expm1(-w) * d
        if last is not None:
            x = x + (-math.expm1(-w) / -w + 1) / (h_last / h) * (d - last)
        x = x + t * math.sqrt(-math.expm1(-2 * eta * h)) * 0.9 * Z[k]
        last, h_last = d, h
    check(x, "dpmpp_2m_sde_heun", eta=eta, s_noise=0.9)


def phi_2(h):  # h · phi_2(h)
    return (math.expm1(h) - h) / h


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_seeds_by_hand(eta):
    two = three = X
    z2, z3 = iter(Z), iter(Z)
    r, r1, r2 = 0.4, 0.3, 0.8
    for s, t in itertools.pairwise(SIGMAS):
        d2, d3 = d_of(two, s), d_of(three, s)
        if t == 0:
            two, three = d2, d3
            break
        h = math.log(s / t)
        w = h * (1 + eta)

        def kick(share, h=h):
            return math.sqrt(-math.expm1(-2 * share * h * eta))

        def left(share, h=h):
            return math.exp(-share * h * eta)

        m = s * math.exp(-r * h)
        noise = 0.9 * kick(r) * next(z2) if eta else 0
        inner = d_of(m / s * left(r) * two - math.expm1(-r * w) * d2 + m * noise, m)
        if eta:
            noise = noise * left(1 - r) + 0.9 * kick(1 - r) * next(z2)
        mix = (1 - 1 / (2 * r)) * d2 + 1 / (2 * r) * inner
        two = t / s * left(1) * two - math.expm1(-w) * mix + t * noise

        m1, m2 = s * math.exp(-r1 * h), s * math.exp(-r2 * h)
        noise = 0.9 * kick(r1) * next(z3) if eta else 0
        e1 = d_of(m1 / s * left(r1) * three - math.expm1(-r1 * w) * d3 + m1 * noise, m1)
        if eta:
            noise = noise * left(r2 - r1) + 0.9 * kick(r2 - r1) * next(z3)
        a2 = r2 / r1 * phi_2(-r2 * w)
        a1 = math.expm1(-r2 * w) - a2
        e2 = d_of(m2 / s * left(r2) * three - a1 * d3 - a2 * e1 + m2 * noise, m2)
        if eta:
            noise = noise * left(1 - r2) + 0.9 * kick(1 - r2) * next(z3)
        b2 = phi_2(-w) / r2
        three = t / s * left(1) * three - (math.expm1(-w) - b2) * d3 - b2 * e2 + t * noise
    check(two, "seeds_2", eta=eta, s_noise=0.9, r=r)
    check(three, "seeds_3", eta=eta, s_noise=0.9, r1=r1, r2=r2)


def adams(nodes, values, s, t, rate):
    """The integral of (1 + rate) exp((1 + rate) (u - lambda_t)) P(u) du, by scipy."""
    start, end = -math.log(s), -math.log(t)
    total = 0
    for j, value in enumerate(values):

        def basis(u, j=j):
            p = math.prod((u - b) / (nodes[j] - b) for k, b in enumerate(nodes) if k != j)
            return (1 + rate) * math.exp((1 + rate) * (u - end)) * p

        total = total + quad(basis, start, end, epsabs=1e-13, epsrel=1e-13)[0] * value
    return total


def midpoint_adams(nodes, values, s, t, rate):
    """The same, but a line's slope weighs h² / 2 (1 + rate)."""
    if len(nodes) != 2:
        return adams(nodes, values, s, t, rate)
    start, end = -math.log(s), -math.log(t)

    def weight(u):
        return (1 + rate) * math.exp((1 + rate) * (u - end)) * (u - start)

    h = end - start
    slope = (values[1] - values[0]) / (nodes[1] - nodes[0])
    more = (1 + rate) * h * h / 2 - quad(weight, start, end, epsabs=1e-13, epsrel=1e-13)[0]
    return adams(nodes, values, s, t, rate) + more * slope


def sa_by_hand(order, eta, corrected, again, sigmas, corrector=0, end=0, adams=adams):
    """Predictor and corrector each from the old state; the corrector uses the same noise."""
    x, predicted, past, n, old = X, X, [], len(sigmas) - 1, None
    end = end or (99 if sigmas[-1] else 1)
    for i, (s, t) in enumerate(itertools.pairwise(sigmas)):
        d = d_of(predicted, s)
        if i > 0:
            x_old, before, rate, kick = old
            x = predicted
            if corrected:
                most = min(corrector or order + 1, len(past) + 1)
                most = min(most, n - i + 1 + end)
                points = [*past, (-math.log(s), d)][-most:]
                x = s / before * (before / s) ** -rate * x_old + kick
                x = x + adams(*zip(*points, strict=True), before, s, rate)
                d = d_of(x, s) if again else d
        past = [*past, (-math.log(s), d)]
        if t == 0:
            return d
        most = min(order, len(past))
        most = min(most, n - 1 - i + end)
        rate = eta**2
        kick = t * math.sqrt(1 - (s / t) ** (-2 * rate)) * 0.9 * Z[i]
        predicted = t / s * (s / t) ** -rate * x + kick
        predicted = predicted + adams(*zip(*past[-most:], strict=True), s, t, rate)
        old = x, s, rate, kick
    return predicted


SA = {  # corrected, and its estimate made again
    "sa_solver_predictor": (False, False),
    "sa_solver": (True, False),
    "sa_solver_midpoint": (True, False),
    "sa_solver_pece": (True, True),
}


@pytest.mark.parametrize("name", SA)
@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("eta", [0.6, 1.0])
@pytest.mark.parametrize("corrector", [0, 1, 2, 4])
@pytest.mark.parametrize("last", [None, -1], ids=["to 0", "above 0"])
def test_sa_solver_by_hand(name, order, eta, last, corrector):
    if corrector and not SA[name][0]:
        return
    sigmas = SIGMAS[:last]
    rule = adams
    if name == "sa_solver_midpoint":
        rule, corrector = midpoint_adams, corrector or order
    expected = sa_by_hand(order, eta, *SA[name], sigmas, corrector, adams=rule)
    options = {"corrector_order": corrector} if corrector else {}
    if order == 4:  # falls on any levels
        options["end_order"] = 1
        expected = sa_by_hand(order, eta, *SA[name], sigmas, corrector, end=1, adams=rule)
    found = ours(name, Levels.from_sigmas(sigmas), order=order, eta=eta, s_noise=0.9, **options)
    assert np.abs(found - expected).max() <= 1e-10


def test_sa_solver_refuses_orders_below_0():
    levels = Levels.from_sigmas(SIGMAS)
    for option in ("end_order", "corrector_order"):
        with pytest.raises(ValueError, match=f"{option} must be 0 or more, got -1"):
            make_plan("sa_solver", levels, **{option: -1})


def test_sa_solver_s_noise_has_its_place():
    class Counted:
        drawn = 0

        def draw(self, interval):
            Counted.drawn += 1
            assert 0.3 <= interval.end.sigma <= 2.5
            return torch.from_numpy(Z[0])

    plan = make_plan("sa_solver", Levels.from_sigmas(SIGMAS), s_tmin=0.25, s_tmax=3.0)
    run = Run(plan, torch.from_numpy(X), Counted())
    while not run.done:
        run.advance(run.x / 2)
    assert Counted.drawn == 3


@pytest.mark.parametrize("order", [1, 2, 3])
def test_er_sde_by_hand(order):
    """In the published form, with the integrals of 1 / phi, by scipy."""

    def phi(u):
        return u * (math.exp(u**0.3) + 10)

    x, past = X, []
    for k, (s, t) in enumerate(itertools.pairwise(SIGMAS)):
        d = d_of(x, s)
        if t == 0:
            x = d
            break
        r = phi(t) / phi(s)
        x = r * x + (1 - r) * d
        slope = None
        if past and order > 1:
            one = quad(lambda u: 1 / phi(u), t, s, epsabs=1e-14, epsrel=1e-14)[0]
            slope = (d - past[-1][1]) / (s - past[-1][0])
            x = x + (t - s + one * phi(t)) * slope
            if len(past) > 1 and order > 2:
                two = quad(lambda u, s=s: (u - s) / phi(u), t, s, epsabs=1e-14, epsrel=1e-14)[0]
                curve = (slope - past[-1][2]) / ((s - past[-2][0]) / 2)
                x = x + ((t - s) ** 2 / 2 + two * phi(t)) * curve
        past = [*past, (s, d, slope)]
        x = x + math.sqrt(t**2 - s**2 * r**2) * 0.9 * Z[k]
    expected = x
    assert np.abs(ours("er_sde", order=order, s_noise=0.9) - expected).max() <= 1e-11


def test_restart_by_hand():
    """Down by Heun, twice up from the level nearest to 0.4, which is 0.3, to 3, and down again."""
    x, z = X, iter(Z)

    def heun(x, s, t):
        slope = (x - d_of(x, s)) / s
        end = x + (t - s) * slope
        return end if t == 0 else x + (t - s) / 2 * (slope + (end - d_of(end, t)) / t)

    for s, t in itertools.pairwise(SIGMAS):
        x = heun(x, s, t)
        if t == 0.3:
            for _ in range(2):
                x = x + math.sqrt(3.0**2 - t**2) * 0.9 * next(z)
                way = [
                    (3 ** (1 / 7) + k / 3 * (t ** (1 / 7) - 3 ** (1 / 7))) ** 7 for k in range(4)
                ]
                for a, b in itertools.pairwise(way):
                    x = heun(x, a, b)
    check(x, "restart", low=0.4, high=3.0, times=2, inner=3, s_noise=0.9)


def test_lcm_by_hand():
    x = X
    for k, (s, t) in enumerate(itertools.pairwise([0.9, 0.5, 0.2, 0.0])):
        x = (1 - t) * d_of(x, s) + t * Z[k]
    check(x, "lcm", Levels.from_sigmas([0.9, 0.5, 0.2, 0.0], FLOW))


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_cfg_pp_by_hand(eta):
    """d and u differ; sigma = 0 at the end takes the guided estimate."""
    euler = ancestral = multi = two = res = X
    z1, z2 = iter(Z), iter(Z)
    old = None
    for s, t in itertools.pairwise(SIGMAS):
        euler = d_of(euler, s) + t * (euler - u_of(euler, s)) / s
        down, up = down_up(s, t, eta)
        ancestral = d_of(ancestral, s) + down * (ancestral - u_of(ancestral, s)) / s
        ancestral = ancestral + (0.9 * up * next(z1) if up > 0 else 0)

        pushed, d = two + d_of(two, s) - u_of(two, s), d_of(two, s)
        if down > 0:
            h = math.log(s / down)
            m = math.sqrt(s * down)
            d = d_of(math.exp(-h / 2) * pushed - math.expm1(-h / 2) * d, m)
            two = math.exp(-h) * pushed - math.expm1(-h) * d
        else:
            two = d
        two = two + (0.9 * up * next(z2) if up > 0 else 0)

        d, u = d_of(multi, s), u_of(multi, s)
        d_res, u_res = d_of(res, s), u_of(res, s)
        multi = d - t / s * u + t / s * multi
        if old is None or t == 0:
            res = d_res + t / s * (res - u_res)
        else:
            h = math.log(s / t)
            multi = multi - math.expm1(-h) * h / (2 * old[2]) * (d - old[0])
            c = -old[2] / h
            p1 = -math.expm1(-h) / h
            p2 = (p1 - 1) / -h
            mix = (p1 - p2 / c) * u_res + p2 / c * old[1]
            res = math.exp(-h) * (res + d_res - u_res) + h * mix
        old = u, u_res, math.log(s / t) if t else None
    check(euler, "euler_cfg_pp", pair=True)
    check(ancestral, "euler_ancestral_cfg_pp", pair=True, eta=eta, s_noise=0.9)
    check(two, "dpmpp_2s_ancestral_cfg_pp", pair=True, eta=eta, s_noise=0.9)
    check(multi, "dpmpp_2m_cfg_pp", pair=True)
    check(res, "res_multistep_cfg_pp", pair=True)


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
