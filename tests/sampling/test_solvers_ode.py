"""Deterministic solvers: established names have the established formulas, written out here again in
a few lines on variance-exploding levels; and what they refuse."""

import itertools
import math

import numpy as np
import pytest
from formulas import EVEN_RATIO, GRIDS, UNEVEN, X, close, model, run, slope

from k_diffusion.sampling import SOLVERS, Levels, make_plan
from k_diffusion.sampling.plan_file import load_plan, save_plan


@GRIDS
def test_heunpp2(sigmas):
    x, end = X, sigmas[-1]
    for i, (s, t) in enumerate(itertools.pairwise(sigmas)):
        k1 = slope(x, s)
        if t == end:
            x = x + (t - s) * k1
            continue
        x2 = x + (t - s) * k1
        k2 = slope(x2, t)
        u = sigmas[i + 2]
        if u == end:
            w2 = t / (2 * sigmas[0])
            x = x + (t - s) * ((1 - w2) * k1 + w2 * k2)
        else:
            k3 = slope(x2 + (u - t) * k2, u)
            w2, w3 = t / (3 * sigmas[0]), u / (3 * sigmas[0])
            x = x + (t - s) * ((1 - w2 - w3) * k1 + w2 * k2 + w3 * k3)
    close(make_plan("heunpp2", Levels.from_sigmas(sigmas)), x)


def multistep(sigmas, order, coefficients, to_the_end=False):
    """x += step · (sum of coefficient · slope, newest first), first order into 0 unless told."""
    x, slopes = X, []
    for i, (s, t) in enumerate(itertools.pairwise(sigmas)):
        slopes = [slope(x, s), *slopes][:order]
        if t == 0 and not to_the_end:
            return x - s * slopes[0]
        steps = [t - s, *(sigmas[k] - sigmas[k - 1] for k in range(i, 0, -1))]
        c = coefficients(len(slopes), steps)
        x = x + (t - s) * sum(a * b for a, b in zip(c, slopes, strict=True))
    return x


@GRIDS
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_ipndm(sigmas, order):
    def coefficients(n, steps):
        return {
            1: [1],
            2: [1.5, -0.5],
            3: [23 / 12, -16 / 12, 5 / 12],
            4: [55 / 24, -59 / 24, 37 / 24, -9 / 24],
        }[n]

    close(
        make_plan("ipndm", Levels.from_sigmas(sigmas), order=order),
        multistep(sigmas, order, coefficients, to_the_end=True),
    )


def published_ipndm_v(n, steps):
    h, g, f, e = (*steps, 1.0, 1.0, 1.0)[:4]
    a = (1 - h / (3 * (h + g)) * (h * (h + g)) / (g * (g + f))) / 2
    b = (1 - h / (3 * (h + g))) / 2 + (1 - h / (2 * (h + g))) * h / (6 * (h + g + f))
    b *= h * (h + g) * (h + g + f) / (g * (g + f) * (g + f + e))
    q = g * (g + f) / (f * (f + e))
    return {
        1: [1],
        2: [1 + h / g / 2, -h / g / 2],
        3: [1 + h / g / 2 + a, -h / g / 2 - (1 + g / f) * a, a * g / f],
        4: [
            1 + h / g / 2 + a + b,
            -h / g / 2 - (1 + g / f) * a - (1 + g / f + q) * b,
            a * g / f + (g / f + q * (1 + f / e)) * b,
            -b * q * g / f,
        ],
    }[n]


@GRIDS
@pytest.mark.parametrize("order", [1, 2, 3])
def test_ipndm_v(sigmas, order):
    close(
        make_plan("ipndm_v", Levels.from_sigmas(sigmas), order=order),
        multistep(sigmas, order, published_ipndm_v),
    )


def test_ipndm_v_of_order_4_differs_by_the_coefficient_that_it_puts_right():
    """As published where steps have one ratio; elsewhere the published four do not sum to 1."""
    close(
        make_plan("ipndm_v", Levels.from_sigmas(EVEN_RATIO), order=4),
        multistep(EVEN_RATIO, 4, published_ipndm_v),
    )
    steps = [-0.7, -1.4, -1.5, -5.0]
    assert abs(sum(published_ipndm_v(4, steps)) - 1) > 0.01

    def repaired(n, steps):
        c = published_ipndm_v(n, steps)
        return c if n < 4 else [*c[:3], 1 - sum(c[:3])]

    close(make_plan("ipndm_v", Levels.from_sigmas(UNEVEN), order=4), multistep(UNEVEN, 4, repaired))


@GRIDS
@pytest.mark.parametrize("gamma", [1.0, 1.5, 2.0])
def test_gradient_estimation(sigmas, gamma):
    x, old = X, None
    for s, t in itertools.pairwise(sigmas):
        k = slope(x, s)
        mean = k if old is None else gamma * k + (1 - gamma) * old
        x, old = x + (t - s) * mean, k
    close(make_plan("gradient_estimation", Levels.from_sigmas(sigmas), gamma=gamma), x)


@GRIDS
def test_dpmpp_3m(sigmas):
    """As published: D1 and D2 of the last three estimates, the second a step of 2M (midpoint)."""
    x, old = X, []
    for s, t in itertools.pairwise(sigmas):
        d = model(x, s)
        if t == 0:
            x = d
            continue
        h, decay = math.log(s / t), -math.expm1(-math.log(s / t))
        x = t / s * x + decay * d
        if len(old) == 1:
            x = x + 0.5 * decay * (d - old[0][0]) * h / math.log(old[0][1] / s)
        elif old:
            (d2, s2), (d1, s1) = old
            r0, r1 = math.log(s1 / s) / h, math.log(s2 / s1) / h
            one, two = (d - d1) / r0, (d1 - d2) / r1
            first, second = one + r0 / (r0 + r1) * (one - two), (one - two) / (r0 + r1)
            x = x + (1 - decay / h) * first - ((1 - decay / h) / h - 0.5) * second
        old = [*old, (d, s)][-2:]
    close(make_plan("dpmpp_3m", Levels.from_sigmas(sigmas)), x)


@GRIDS
@pytest.mark.parametrize("name", ["res_multistep", "dpmpp_2m_heun"])
def test_res_multistep(sigmas, name):
    """φ-function form for RES; the Heun form of 2M is the same method."""
    x, old = X, None
    for s, t in itertools.pairwise(sigmas):
        d = model(x, s)
        if t == 0:
            x = d
        elif old is None:
            x = t / s * x + (1 - t / s) * d
        else:
            h, c2 = math.log(s / t), math.log(s / old[1]) / math.log(s / t)
            phi1 = math.expm1(-h) / -h
            phi2 = (phi1 - 1) / -h
            x = math.exp(-h) * x + h * ((phi1 - phi2 / c2) * d + phi2 / c2 * old[0])
        old = d, s
    close(make_plan(name, Levels.from_sigmas(sigmas)), x)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("exp_ab", {"order": 5}, "exp_ab's order must be one of 1, 2, 3, 4, got 5"),
        ("exp_ab_noise", {"order": 9}, "exp_ab_noise's order must be one of 1, 2, 3, 4, got 9"),
        ("ipndm", {"order": 5}, "ipndm's order must be one of 1, 2, 3, 4, got 5"),
        ("ipndm_v", {"order": 5}, "ipndm_v's order must be one of 1, 2, 3, 4, got 5"),
        ("unipc", {"order": 4}, "unipc's order must be one of 1, 2, 3, got 4"),
        ("deis", {"order": 5}, "deis's order must be one of 1, 2, 3, 4, got 5"),
        ("res_2s", {"c2": 0.0}, r"c2 must lie in \[0.001, 1\], got 0.0"),
        ("res_2s", {"c2": 1e-9}, r"res_2s: c2 must lie in \[0.001, 1\], got 1e-09"),
        ("res_3s", {"c3": 0.5}, "c2 and c3 must lie in .* apart or more: got 0.5 and 0.5"),
        (
            "res_3s",
            {"c3": 0.5 + 1e-10},
            "c2 and c3 must lie in .* apart or more: got 0.5 and 0.5000",
        ),
        ("res_3s", {"c3": 1e-10}, "res_3s: c2 and c3 must lie in .*: got 0.5 and 1e-10"),
        ("res_3s", {"c2": 2 / 3}, "no method with c2 = 2/3, and c2 = 0.666"),
        ("res_3s", {"c2": 2 / 3 + 1e-6}, "no method with c2 = 2/3, and c2 = 0.66666"),
        ("dpm_fast", {"tail": (4,)}, r"tail must hold orders of 1 to 3, got \(4,\)"),
        ("dpm_fast", {"tail": (1,) * 9}, r"more orders than there are intervals \(7\)"),
    ],
)
def test_options_that_cannot_be(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_plan(name, Levels.from_sigmas(UNEVEN), **options)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("res_2s", {"c2": 1e-3}),
        ("res_3s", {"c2": 1e-3}),
        ("res_3s", {"c3": 0.5011}),
        ("res_3s", {"c2": 0.6678}),
        ("seeds_2", {"r": 1e-3}),
        ("dpmpp_sde", {"r": 1e-3}),
    ],
)
def test_inner_stages_may_lie_as_near_as_a_thousandth(name, options):
    """There rounding is magnified by some thousands; nothing else is lost."""
    plan = make_plan(name, Levels.from_sigmas(UNEVEN), **options)
    terms = [abs(c) for op in plan.operations for _, c in getattr(op, "terms", ())]
    assert 100 < max(terms) < 1e5


def test_lms_takes_any_order():
    assert SOLVERS["lms"].any_order
    levels = Levels.from_sigmas(UNEVEN)
    orders = [make_plan("lms", levels, order=k).operations for k in (4, 6)]
    assert list(orders[0]) != list(orders[1])


def dpm_step(x, s, t, order):
    """DPM-Solver on noise estimates, in t = -log sigma."""
    h = math.log(s / t)
    e = slope(x, s)
    if order == 1:
        return x - t * math.expm1(h) * e
    if order == 2:
        m = s * math.exp(-h / 2)
        return x - t * math.expm1(h) * slope(x - m * math.expm1(h / 2) * e, m)
    m, n = s * math.exp(-h / 3), s * math.exp(-2 * h / 3)
    e1 = slope(x - m * math.expm1(h / 3) * e, m) - e
    y = x - n * math.expm1(2 * h / 3) * e
    y = y - n * 2 * (math.expm1(2 * h / 3) / (2 * h / 3) - 1) * e1
    e2 = slope(y, n) - e
    return x - t * math.expm1(h) * e - t * 1.5 * (math.expm1(h) / h - 1) * e2


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("tail", [(1,), (2, 1), (2,), ()])
def test_dpm_fast(eta, tail):
    """The ancestral level to step down to is not below the last one; the noise makes up for it."""
    sigmas = EVEN_RATIO
    orders = [3] * (len(sigmas) - 1 - len(tail)) + list(tail)
    z = np.random.default_rng(0).standard_normal((len(orders), X.size))
    x, drawn = X, []
    for (s, t), order, noise in zip(itertools.pairwise(sigmas), orders, z, strict=True):
        up = min(t, eta * t * math.sqrt(1 - (t / s) ** 2))
        down = max(math.sqrt(t * t - up * up), sigmas[-1])
        up = math.sqrt(t * t - down * down)
        x = dpm_step(x, s, down, order) + 1.1 * up * noise
        if up > 0:
            drawn.append(noise)
    plan = make_plan("dpm_fast", Levels.from_sigmas(sigmas), eta=eta, s_noise=1.1, tail=tail)
    assert len(plan.draws) == len(drawn) == (len(orders) - 1 if eta else 0)
    assert np.abs(run(plan, noise=drawn) - x).max() <= 1e-12 * np.abs(x).max()
    assert plan.evaluations == sum(orders)


def test_dpm_fast_of_third_order_throughout():
    levels = Levels.from_sigmas(EVEN_RATIO)
    ends = [run(make_plan("dpm_fast", levels, tail=())), run(make_plan("dpm_solver_3", levels))]
    assert np.abs(ends[0] - ends[1]).max() == 0


def test_orders_of_the_tail_are_kept_in_a_file(tmp_path):
    levels = Levels.from_sigmas(EVEN_RATIO)
    plan = make_plan("dpm_fast", levels, tail=[2, 1])  # as JSON has it
    assert plan is make_plan("dpm_fast", levels, tail=(2, 1))
    save_plan(plan, tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json").options == plan.options == (("tail", (2, 1)),)
