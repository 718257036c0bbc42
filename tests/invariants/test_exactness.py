"""What every solver must do exactly: point masses, orders, identities."""

import itertools
import math

import numpy as np
import pytest
from host import GRIDS, MIXTURE, execute, levels_between, linear_form, slopes
from make_samplers import documented

from k_diffusion.sampling import FLOW, SOLVERS, VE, VP, Churn, Levels, make_plan
from k_diffusion.utils.scheduler import FlowScheduler, KarrasScheduler, LinearScheduler

C = 0.8  # the point that all data is

# Each path, levels that end at 0 and above 0, one step, starts at pure noise, uneven levels.
LEVELS = {
    "karras": KarrasScheduler().levels(9),
    "karras above 0": KarrasScheduler().levels(9)[:-1],
    "one step": KarrasScheduler().levels(1),
    "one step above 0": KarrasScheduler().levels(9)[3:5],
    "linear vp": LinearScheduler().levels(9),
    "flow from pure noise": FlowScheduler(shift=3.0).levels(9),
    "flow, one step": FlowScheduler().levels(1),
    "flow, two steps": FlowScheduler().levels(2),
    "flow from the middle": FlowScheduler().levels(9)[4:],
    "uneven": levels_between(11, "uneven", VP),
}


@pytest.mark.parametrize("case", LEVELS)
@pytest.mark.parametrize("churn", [None, Churn(s_churn=3.0, s_tmin=0.05, s_tmax=50.0)])
def test_point_mass(name, case, churn):
    """Data at one point c: every queried state has mean alpha·c and standard deviation sigma."""
    levels = LEVELS[case]
    if churn is not None and SOLVERS[name].predictor:
        with pytest.raises(ValueError, match=f"{name} queries predictions .* churn"):
            make_plan(name, levels, churn=churn)
        return
    plan = make_plan(name, levels, churn=churn)
    first = levels[0]
    seen = []
    # Rounding errors grow with the coefficients, from one step to the next: extrapolation over long
    # and uneven steps has large ones.
    largest = max(abs(c) for op in plan.operations for _, c in getattr(op, "terms", ())) ** 2

    def check(state, level):
        # x0 = alpha c + sigma · unit noise at the first level.
        mean = state[0] + state[1] * first.alpha * C
        spread = math.sqrt((state[1] * first.sigma) ** 2 + np.sum(state[2:] ** 2))
        scale = max(1.0, level.sigma, largest)
        assert abs(mean - level.alpha * C) <= 1e-12 * scale
        assert abs(spread - level.sigma) <= 1e-12 * scale
        seen.append(level)

    result = linear_form(plan, C, 0.0, watch=check)
    check(result, levels[-1])
    assert len(seen) == plan.evaluations + 1


def test_declared_order(variant):
    """The least order over problems, grids and paths is the declared one, and the one shown."""
    name, options, order = variant
    measured = slopes(SOLVERS[name], **options)
    tolerance = 0.15 if order < 3 else 0.3
    worst = min(measured, key=measured.get)
    assert abs(measured[worst] - order) <= tolerance, (worst, measured)
    shown = documented()[name][[o for o, _, _ in SOLVERS[name].variants].index(options)]
    assert abs(measured[worst] - float(shown)) <= 0.1, "docs/samplers.md is stale"


def _transfer(plan):
    """The plan's action on Gaussian data, per unit of alpha at the first and the last level."""
    form = linear_form(plan, 0.7, 0.4)
    s, t = plan.levels[0], plan.levels[-1]
    return np.concatenate([[form[0]], [form[1] * s.alpha], form[2:]]) / t.alpha


# Methods in sigma integrate dx = d dalpha + eps dsigma, which depends on the path; not Euler's.
IN_SIGMA = {"heun", "dpm_2", "heunpp2", "gradient_estimation", "lms", "ipndm", "ipndm_v"}
IN_SIGMA |= {"midpoint", "ralston", "rk3", "ssp_rk3", "rk4", "rk4_38", "rk5"}
IN_SIGMA |= {"dpm_2_ancestral", "restart"}


@pytest.mark.parametrize("churn", [None, Churn(s_churn=1.0)])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("path", [VP, FLOW], ids=str)
def test_coordinates(name, grid, path, churn):
    """The same levels in other coordinates give the same samples (and noise, atom by atom), but of
    the methods that work in sigma."""
    if churn is not None and SOLVERS[name].predictor:
        pytest.skip("takes no churn")
    levels = levels_between(8, grid)
    here, there = (_transfer(make_plan(name, lv, churn=churn)) for lv in (levels, levels.on(path)))
    difference = np.abs(here - there).max()
    assert difference > 1e-8 if name in IN_SIGMA else difference <= 1e-12


@pytest.mark.parametrize("levels", [KarrasScheduler().levels(7), LinearScheduler().levels(7)])
def test_first_order_methods_are_one(levels):
    euler, *others = (
        execute(make_plan(name, levels, **options), MIXTURE.points, MIXTURE.denoise)
        for name, options in [
            ("euler", {}),
            ("ddim", {}),
            ("dpm_solver_1", {}),
            ("lms", {"order": 1}),
            ("deis", {"order": 1}),
            ("deis_rhoab", {"order": 1}),
            ("deis_tab", {"order": 1}),
            ("ipndm", {"order": 1}),
            ("ipndm_v", {"order": 1}),
            ("gradient_estimation", {"gamma": 1.0}),
            ("exp_ab", {"order": 1}),
            ("exp_ab_noise", {"order": 1}),
            ("exp_ab_velocity", {"order": 1}),
            ("unip", {"order": 1}),
            ("euler_ancestral", {"eta": 0.0}),
        ]
    )
    for other in others:
        assert np.abs(euler - other).max() <= 1e-12


@pytest.mark.parametrize(
    ("stochastic", "ode"),
    [
        ("dpmpp_2m_sde", "dpmpp_2m"),
        ("dpmpp_2m_sde_heun", "dpmpp_2m_heun"),
        ("dpmpp_sde", "dpmpp_2s"),
        ("seeds_2", "dpmpp_2s"),
        ("dpm_2_ancestral", "dpm_2"),
        ("dpmpp_2s_ancestral", "dpmpp_2s"),
        ("dpmpp_2s_ancestral_cfg_pp", "dpmpp_2s"),
        ("euler_ancestral_cfg_pp", "euler_cfg_pp"),
    ],
)
def test_eta_0_is_the_ode_method(stochastic, ode):
    levels = KarrasScheduler().levels(7)
    plan = make_plan(stochastic, levels, eta=0.0)
    assert not plan.stochastic
    ends = [execute(p, MIXTURE.points, MIXTURE.denoise) for p in (plan, make_plan(ode, levels))]
    assert np.abs(ends[0] - ends[1]).max() <= 1e-12


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(
    ("method", "order", "options"),
    [
        ("dpm_2_ancestral", 2, {}),
        ("dpmpp_2s_ancestral", 2, {}),
        ("seeds_3", 3, {}),
        ("er_sde", 2, {"order": 3}),
        ("sa_solver_predictor", 2, {"order": 4}),
        ("sa_solver", 3, {"order": 2}),
        ("sa_solver", 3, {"order": 4}),
        ("sa_solver_pece", 3, {"order": 2}),
        ("sa_solver_midpoint", 2, {"order": 2}),
    ],
)
def test_order_of_the_ode_limit(method, order, options, grid):
    """At eta 0 some have an order that noise denies them."""
    plans = [
        make_plan(method, levels_between(n, grid), eta=0.0, **options) for n in (48, 96, 192, 384)
    ]
    errors = [e for e in map(MIXTURE.error, plans) if e > 1e-11]
    measured = math.log2(errors[-2] / errors[-1])
    assert abs(measured - order) <= (0.15 if order < 3 else 0.3)


def test_ancestral_is_ddim_with_eta_1():
    levels = LinearScheduler().levels(7)
    forms = [_transfer(make_plan(n, levels, eta=1.0)) for n in ("ddim", "euler_ancestral")]
    assert np.abs(forms[0] - forms[1]).max() == 0


def test_churn_0_is_no_churn(name):
    levels = KarrasScheduler().levels(5)
    assert make_plan(name, levels, churn=Churn()) is make_plan(name, levels)


def test_churn_follows_its_formula():
    """Euler with churn, written out by hand from Karras et al. 2022, algorithm 2."""
    sigmas = (10.0, 4.0, 1.0, 0.2, 0.0)
    churn = Churn(s_churn=1.0, s_tmin=0.5, s_tmax=5.0, s_noise=1.1)
    z = np.random.default_rng(0).standard_normal((2, MIXTURE.points.size))
    x, k = MIXTURE.points, 0
    for s, t in itertools.pairwise(sigmas):
        hat = s
        if 0.5 <= s <= 5.0:
            hat = s * (1 + min(1.0 / 4, math.sqrt(2) - 1))
            x = x + math.sqrt(hat**2 - s**2) * 1.1 * z[k]
            k += 1
        d = MIXTURE.denoise(x, VE.at(-math.log(hat)))
        x = x + (t - hat) * (x - d) / hat
    plan = make_plan("euler", Levels.from_sigmas(sigmas), churn=churn)
    assert len(plan.draws) == 2
    ours = execute(plan, MIXTURE.points, MIXTURE.denoise, lambda i: z[i])
    assert np.abs(ours - x).max() <= 1e-12


def test_from_pure_noise_the_first_step_is_ddim(name):
    """At alpha = 0 a method takes alpha_t d + sigma_t x, then starts afresh; not those in sigma."""
    if SOLVERS[name].from_pure_noise:
        return
    levels = FlowScheduler().levels(4)
    plan = make_plan(name, levels)
    assert plan.steps[0].level == levels[0]
    after = plan.steps[1]
    combine = next(op for op in after.operations if op.name == after.state)
    assert dict(combine.terms) == pytest.approx({"d1": 0.25, "x0": 0.75}, abs=1e-15)
    rest = make_plan(name, levels[1:])
    assert len(rest.steps) == len(plan.steps) - 1
    assert [s.level for s in rest.steps] == [s.level for s in plan.steps[1:]]


@pytest.mark.parametrize("path", [VP, FLOW], ids=str)
def test_order_from_pure_noise(name, path):
    """Methods in sigma have their order from alpha = 0 on; the others 2 at most."""
    solver = SOLVERS[name]
    if solver.stochastic or solver.order == 0:
        return
    errors = []
    for n in (8, 32, 64, 128):
        flow = FlowScheduler().levels(n + n // 8)[: n + 1]
        plan = make_plan(name, flow.on(path))
        t = plan.levels[-1]
        form = linear_form(plan, 0.7, 0.2)  # x0 is unit noise, and all that the end is made of
        spread = math.sqrt(t.alpha**2 * 0.2 + t.sigma**2)
        errors.append(max(abs(form[0] - t.alpha * 0.7), abs(form[1] - spread)))
    order = solver.order - 0.3 if solver.from_pure_noise else min(solver.order, 2) - 0.5
    assert errors[-1] <= max(errors[0] / 2 ** (4 * order), 1e-12), errors
    if name in ("rk4", "rk5"):  # a first step of DDIM would leave 1e-2
        assert errors[0] <= 1e-4


CHURNS = {  # steps, and the churn of Karras et al. 2022, table 5, or stronger
    "CIFAR-10": (18, Churn(30.0, 0.01, 1.0, 1.007)),
    "ImageNet": (256, Churn(40.0, 0.05, 50.0, 1.003)),
    "strong": (64, Churn(60.0, 0.05, 50.0)),
}


@pytest.mark.parametrize("case", CHURNS)
def test_churn_leaves_the_distribution(name, case):
    """A history that churn goes back to the levels of must not blow up: on Gaussian data the end
    keeps the deviation that it has without churn. (Those that draw noise themselves are not made
    for more of it, on steps this long: they only stay bounded.)"""
    steps, churn = CHURNS[case]
    if SOLVERS[name].order == 0 or SOLVERS[name].predictor:
        return
    levels = KarrasScheduler().levels(steps)
    spreads = []
    for c in (None, churn):
        form = linear_form(make_plan(name, levels, churn=c), 0.3, 0.25)
        spreads.append(math.hypot(form[1] * math.hypot(levels[0].sigma, 0.5), *form[2:]))
        assert abs(form[0] - 0.3) <= 0.3
    most = 8 if SOLVERS[name].stochastic else 1.75
    assert spreads[0] / 1.75 <= spreads[1] <= most * spreads[0]


def test_noise_on_overlapping_intervals_is_correlated():
    """dpmpp_sde draws on [s, m] and [s, t]: with the signal-to-noise ratio c as the path's clock
    their correlation is sqrt((c_m - c_s) / (c_t - c_s))."""
    levels = Levels.from_sigmas([4.0, 1.0])
    plan = make_plan("dpmpp_sde", levels)
    forms = []
    linear_form(plan, 0.0, 0.0, watch=lambda state, level: forms.append(state.copy()))
    middle, end = forms[-1][2:], linear_form(plan, 0.0, 0.0)[2:]
    correlation = middle @ end / math.sqrt((middle @ middle) * (end @ end))
    c_s, c_m, c_t = 1 / 16, 1 / 4, 1.0
    assert abs(correlation - math.sqrt((c_m - c_s) / (c_t - c_s))) <= 1e-12
    asked = make_plan("dpmpp_sde", levels, intervals=True)
    assert [(d.interval.start.sigma, d.interval.end.sigma) for d in asked.draws] == [
        (4.0, pytest.approx(2.0)),
        (4.0, 1.0),
    ]
