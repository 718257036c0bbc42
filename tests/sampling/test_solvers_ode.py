"""Deterministic solvers: established names have the established formulas, written out here again in
a few lines on variance-exploding levels; and what they refuse."""

import itertools
import math

import numpy as np
import pytest

from k_diffusion.sampling import FLOW, SOLVERS, VE, VP, Churn, Level, Levels, make_plan
from k_diffusion.sampling.plan import Combine
from k_diffusion.sampling.solvers.exponential import DATA, NOISE, VELOCITY
from k_diffusion.sampling.solvers.exponential_rk import (
    COX_MATTHEWS,
    ExponentialTableau,
    exponential_runge_kutta,
)
from k_diffusion.sampling.solvers.runge_kutta import CLASSICAL, RALSTON_3, Tableau, runge_kutta

UNEVEN = (14.0, 9.0, 4.0, 2.5, 1.1, 0.4, 0.3, 0.0)
EVEN_RATIO = (16.0, 8.0, 4.0, 2.0, 1.0, 0.5, 0.25)
X = np.array([-20.0, -3.0, 1.0, 15.0])
GRIDS = pytest.mark.parametrize("sigmas", [UNEVEN, UNEVEN[:-1], UNEVEN[:2], EVEN_RATIO])


def model(x, sigma):
    """Any smooth function will do: formulas are compared, not accuracy."""
    return np.tanh(x / (1 + sigma)) + 0.1 * np.sin(x + sigma)


def run(plan, x=X, noise=()):
    """The plan, executed plainly."""
    values, given = {"x0": x}, iter(noise)
    for step in (*plan.steps, None):
        for op in step.operations if step else plan.last:
            if isinstance(op, Combine):
                values[op.name] = sum(c * values[n] for n, c in op.terms)
            else:
                values[op.name] = next(given)
        if step:
            answer = model(values[step.state], step.level.ratio)
            values[step.answers[0]] = answer
    return values[plan.result]


def close(plan, expected):
    assert np.abs(run(plan) - expected).max() <= 1e-12 * max(1.0, np.abs(expected).max())


def slope(x, sigma):
    return (x - model(x, sigma)) / sigma


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


def multistep(sigmas, order, coefficients):
    """x += step · (sum of coefficient · slope, newest first), first order into 0."""
    x, slopes = X, []
    for i, (s, t) in enumerate(itertools.pairwise(sigmas)):
        slopes = [slope(x, s), *slopes][:order]
        if t == 0:
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
        multistep(sigmas, order, coefficients),
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
        mean = k if old is None or t == 0 else gamma * k + (1 - gamma) * old
        x, old = x + (t - s) * mean, k
    close(make_plan("gradient_estimation", Levels.from_sigmas(sigmas), gamma=gamma), x)


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


def integral(f, a, b):
    """Gauss-Legendre with 100 points, by numpy."""
    x, w = np.polynomial.legendre.leggauss(100)
    return (
        (b - a) / 2 * sum(q * f((a + b) / 2 + (b - a) / 2 * p) for p, q in zip(x, w, strict=True))
    )


def lagrange(nodes, j, u):
    return math.prod((u - m) / (nodes[j] - m) for k, m in enumerate(nodes) if k != j)


def adams(sigmas, order, estimate, clock, factor, kernel, variable):
    """x_t = factor · x + sum of estimate · (integral of kernel · Lagrange polynomial)."""
    x, past = X, []
    for s, t in itertools.pairwise(sigmas):
        past = [*past, (clock(s), estimate(x, s))][-order:]
        nodes = [u for u, _ in past]
        if t == 0:
            return model(x, s)
        weights = [
            integral(
                lambda v, j=j, t=t, nodes=nodes: kernel(v, t) * lagrange(nodes, j, variable(v)),
                *(math.log(1 / s), math.log(1 / t)),
            )
            for j in range(len(nodes))
        ]
        x = factor(s, t) * x + sum(w * e for w, (_, e) in zip(weights, past, strict=True))
    return x


def vp_time(lam):
    """The time of the linear VP process through rho = 80 at 1 and 0.002 at 0.001."""
    low, high = math.log1p(0.002**2), math.log1p(80.0**2)
    beta_d = 2 * (low / 1e-3 - high) / (1e-3 - 1)
    beta_min = high - beta_d / 2
    return (
        math.sqrt(beta_min**2 + 2 * beta_d * math.log1p(math.exp(-2 * lam))) - beta_min
    ) / beta_d


CLOCKS = {"deis": lambda v: v, "deis_rhoab": lambda v: math.exp(-v), "deis_tab": vp_time}


@GRIDS
@pytest.mark.parametrize("name", CLOCKS)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_deis(sigmas, name, order):
    """x gains the integral of drho times the noise estimate, a polynomial in the method's time."""
    clock = CLOCKS[name]
    expected = adams(
        sigmas,
        order,
        slope,
        lambda s: clock(-math.log(s)),
        lambda s, t: 1.0,
        lambda v, t: -math.exp(-v),
        clock,
    )
    close(make_plan(name, Levels.from_sigmas(sigmas), order=order), expected)


def test_vp_time_of_deis_tab():
    assert vp_time(-math.log(80.0)) == pytest.approx(1.0, abs=1e-12)
    assert vp_time(-math.log(0.002)) == pytest.approx(1e-3, abs=1e-12)


@GRIDS
@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("name", ["exp_ab_low", "deis", "exp_ab_velocity_low"])
def test_exponential_adams(sigmas, name, order):
    estimate, factor, kernel = {
        "exp_ab_low": (model, lambda s, t: t / s, lambda v, t: t * math.exp(v)),
        "deis": (slope, lambda s, t: 1.0, lambda v, t: -math.exp(-v)),
        "exp_ab_velocity_low": (
            lambda x, s: slope(x, s) - model(x, s),
            lambda s, t: (1 + t) / (1 + s),
            lambda v, t: -(1 + t) / (2 + math.exp(v) + math.exp(-v)),
        ),
    }[name]
    expected = adams(sigmas, order, estimate, lambda s: -math.log(s), factor, kernel, lambda v: v)
    close(make_plan(name, Levels.from_sigmas(sigmas), order=order), expected)


@pytest.mark.parametrize("prediction", [DATA, NOISE, VELOCITY])
@pytest.mark.parametrize("path", [VE, VP, FLOW], ids=str)
@pytest.mark.parametrize("h", [1e-7, 1e-3, 0.5, 3.0, 9.0])
def test_weights_integrate_what_they_should(prediction, path, h):
    """Estimates that are a parabola in half log-SNR: against an integral by another rule."""
    lam = -1.3
    s, t = path.at(lam), path.at(lam + h)
    nodes = [path.at(lam - 2.1 * h), path.at(lam - 0.4 * h), s]
    weights = prediction.weights(nodes, s, t)
    kernel = {
        DATA: lambda v: t.alpha * math.exp(v - t.half_log_snr),
        NOISE: lambda v: -t.sigma * math.exp(t.half_log_snr - v),
        VELOCITY: lambda v: -(t.alpha + t.sigma) / (2 + math.exp(v) + math.exp(-v)),
    }[prediction]
    for k in range(3):
        exact = h * integral(lambda u, k=k: kernel(lam + h * u) * u**k, 0, 1)
        ours = [w * ((n.half_log_snr - lam) / h) ** k for w, n in zip(weights, nodes, strict=True)]
        # At h = 1e-7 the nodes themselves are known to 1e-9 of a step only.
        assert abs(sum(ours) - exact) <= (1e-12 + 1e-15 / h) * max(map(abs, ours))


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("name", ["exp_ab", "exp_ab_noise", "exp_ab_velocity"])
def test_the_start_costs_what_the_order_needs(name, order):
    for sigmas in (UNEVEN, UNEVEN[:2], UNEVEN[-2:]):
        levels = Levels.from_sigmas(sigmas)
        intervals = len(levels) - 1
        extra = 0 if sigmas == UNEVEN[-2:] else max(order - 2, 0)
        assert make_plan(name, levels, order=order).evaluations == intervals + extra
    levels = Levels.from_sigmas(UNEVEN)
    assert make_plan("exp_ab_low", levels, order=order).evaluations == len(levels) - 1


@pytest.mark.parametrize("name", ["exp_ab", "exp_ab_noise", "exp_ab_velocity", "unipc_noise"])
@pytest.mark.parametrize("path", [VE, VP, FLOW], ids=str)
def test_a_thousand_steps_keep_their_digits(name, path):
    """Data at 0.8 in 1000 steps: neither small steps nor many of them lose what float64 has."""
    marks = np.linspace(-4.0, 4.0, 1001)
    levels = Levels([path.at(float(v)) for v in marks], path)
    plan = make_plan(name, levels, order=3)
    x = np.array([levels[0].alpha * 0.8, levels[0].sigma])
    values = {"x0": x}
    for step in (*plan.steps, None):
        for op in step.operations if step else plan.last:
            values[op.name] = sum(c * values[n] for n, c in op.terms)
        if step:
            values[step.answers[0]] = np.array([0.8, 0.0])
    error = values[plan.result] - [levels[-1].alpha * 0.8, levels[-1].sigma]
    assert np.abs(error).max() <= 1e-11


@GRIDS
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize(
    ("name", "estimate", "sign"),
    [("unipc", model, -1), ("unipc_bh1", model, -1), ("unipc_noise", slope, 1)],
)
def test_unipc(name, estimate, sign, order, sigmas):
    """Algorithms 1 and 2 of the authors, who hold the old state."""
    x, past, before = X, [], None
    for s, t in itertools.pairwise(sigmas):
        e = estimate(x, s)
        if before is not None:
            x = unified(*before, s, past, e, sign, name)
        past = [*past, (s, e)][-order:]
        before = x, s
        x = unified(x, s, t, past, None, sign, name)
    close(make_plan(name, Levels.from_sigmas(sigmas), order=order), x)


def unified(x, s, t, past, new, sign, name):
    if t == 0:
        return past[-1][1] if sign < 0 else x - s * past[-1][1]
    h = math.log(s / t)
    hh = sign * h
    b = hh if name == "unipc_bh1" else math.expm1(hh)
    now = past[-1][1]
    ratios = [math.log(s / p) / h for p, _ in past[:-1]]
    changes = [(e - now) / r for r, (_, e) in zip(ratios, past[:-1], strict=True)]
    if new is not None:
        ratios, changes = [*ratios, 1.0], [*changes, new - now]
    step = t / s * x - math.expm1(hh) * now if sign < 0 else x - t * math.expm1(hh) * now
    if not ratios:
        return step
    phi, right = math.expm1(hh) / hh - 1, []
    for k in range(1, len(ratios) + 1):
        right.append(phi * math.factorial(k) / b)
        phi = phi / hh - 1 / math.factorial(k + 1)
    rows = [[r**k for r in ratios] for k in range(len(ratios))]
    weights = [0.5] if len(ratios) == 1 else np.linalg.solve(rows, right)
    correction = b * sum(w * c for w, c in zip(weights, changes, strict=True))
    return step - (1 if sign < 0 else t) * correction


def test_unipc_under_churn():
    """One churned level: the correction is weighted for the level that was asked, and scaled by
    alpha; the noise under the state stays."""
    levels = Levels.from_sigmas([0.9, 0.7, 0.5], FLOW)
    churn = Churn(s_churn=0.5, s_tmax=2.4)
    plan = make_plan("unipc", levels, churn=churn, order=1)
    s, t, u = levels
    raised = FLOW.at(t.half_log_snr - math.log1p(0.25))
    assert [step.level for step in plan.steps] == [s, raised]
    z = np.array([0.3, -0.4, 0.1, 1.0])
    d = model(X, s.ratio)
    predicted = t.sigma / s.sigma * X + (t.alpha - s.alpha * t.sigma / s.sigma) * d
    asked = raised.alpha / t.alpha * predicted
    asked = asked + raised.sigma * math.sqrt(1 - (t.ratio / raised.ratio) ** 2) * z
    new = model(asked, raised.ratio)
    h = t.half_log_snr - s.half_log_snr
    share = (raised.half_log_snr - s.half_log_snr) / h
    correction = -math.expm1(-h) * t.alpha * 0.5 / share * (new - d)
    x = asked + raised.alpha / t.alpha * correction
    x = u.sigma / raised.sigma * x + (u.alpha - raised.alpha * u.sigma / raised.sigma) * new
    assert np.abs(run(plan, noise=[z]) - x).max() <= 1e-12


def test_a_remembered_velocity_under_churn():
    """Its noise becomes that of the raised state; its data estimate stays."""
    levels = Levels.from_sigmas([4.0, 2.0, 1.0])
    plan = make_plan("exp_ab_velocity", levels, churn=Churn(s_churn=0.4, s_tmax=3.0), order=2)
    z = np.array([0.3, -0.4, 0.1, 1.0])
    d = model(X, 4.0)
    eps = (X - d) / 4
    x = X - 2 * eps
    k = 1 / 1.2
    x = x + 2.4 * math.sqrt(1 - k * k) * z
    eps = k * eps + math.sqrt(1 - k * k) * z
    d2 = model(x, 2.4)
    s, t = VE.at(-math.log(2.4)), VE.at(0.0)
    w = VELOCITY.weights([VE.at(-math.log(4.0)), s], s, t)
    x = 2 / 3.4 * x + w[0] * (eps - d) + w[1] * ((x - d2) / 2.4 - d2)
    assert np.abs(run(plan, noise=[z]) - x).max() <= 1e-12


@pytest.mark.parametrize("name", ["exp_ab", "exp_ab_noise", "exp_ab_velocity", "unipc", "unip"])
@pytest.mark.parametrize("raised", [1.9999, 2.0003, 2.2])
def test_an_estimate_near_the_raised_level_is_forgotten(name, raised):
    """Churn that goes back to where the last answer came from must not divide by the gap."""
    levels = Levels.from_sigmas([6.0, 2.0, raised / math.sqrt(2), 0.8])
    churn = Churn(s_churn=9.0, s_tmax=1.9)
    plan = make_plan(name, levels, churn=churn, order=2)
    assert max(abs(c) for op in plan.operations for _, c in getattr(op, "terms", ())) < 4


@pytest.mark.parametrize(
    ("name", "tableau"), [("rk4", CLASSICAL), ("heun", Tableau(2, ((1.0,),), (0.5, 0.5)))]
)
@GRIDS
def test_runge_kutta_in_sigma(name, tableau, sigmas):
    x = X
    for s, t in itertools.pairwise(sigmas):
        if t == 0:
            x = model(x, s)
            continue
        slopes = []
        for c, row in zip(tableau.nodes, ((), *tableau.rows), strict=True):
            y = x + (t - s) * sum(a * k for a, k in zip(row, slopes, strict=True))
            slopes.append(slope(y, s + c * (t - s)))
        x = x + (t - s) * sum(b * k for b, k in zip(tableau.weights, slopes, strict=True))
    close(make_plan(name, Levels.from_sigmas(sigmas)), x)


@pytest.mark.parametrize("name", ["euler", "heun"])
def test_tableaux_of_known_methods(name, monkeypatch):
    tableau = {"euler": Tableau(1, (), (1.0,)), "heun": Tableau(2, ((1.0,),), (0.5, 0.5))}[name]
    monkeypatch.setattr("k_diffusion.sampling.registry.SOLVERS", dict(SOLVERS))
    mine = runge_kutta("mine", tableau, "a test")
    for path in (VE, VP, FLOW):
        levels = Levels.from_sigmas([0.95, 0.6, 0.3, 0.0], path)
        ends = [run(make_plan(solver, levels)) for solver in (mine, name)]
        assert np.abs(ends[0] - ends[1]).max() <= 1e-12


def test_a_solver_from_one_s_own_tableau(monkeypatch):
    known = dict(SOLVERS)
    monkeypatch.setattr("k_diffusion.sampling.registry.SOLVERS", known)
    mine = runge_kutta("ralston_3", RALSTON_3, "Ralston 1962", "Ralston's method of order 3")
    assert known["ralston_3"] is mine
    assert (mine.order, mine.source) == (3, "Ralston 1962")
    assert mine.summary.startswith("Ralston's method of order 3: 3 evaluations a step")
    assert "ralston_3" not in SOLVERS
    other = exponential_runge_kutta("etd_noise", COX_MATTHEWS, "a test", prediction=NOISE)
    levels = Levels.from_sigmas([2.0 * 0.95**k for k in range(50)])
    ends = [run(make_plan(solver, levels)) for solver in (mine, other, "rk4")]
    assert np.abs(ends[0] - ends[2]).max() <= 1e-5
    assert np.abs(ends[1] - ends[2]).max() <= 1e-7
    with pytest.raises(ValueError, match="named 'rk4' is registered already"):
        runge_kutta("rk4", CLASSICAL, "a test")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((2, ((1.0, 2.0),), (0.5, 0.5)), r"row 1 of a tableau needs 1 weights, got \(1.0, 2.0\)"),
        ((2, ((1.0,),), (1.0,)), "a tableau of 2 stages needs as many weights"),
        ((2, ((1.0,),), (0.5, 0.4)), r"must sum to 1: \(0.5, 0.4\)"),
        ((2, ((1.5,),), (0.5, 0.5)), r"must lie within the step, not at \(0.0, 1.5\)"),
    ],
)
def test_tableaux_in_error_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Tableau(*arguments)


def test_exponential_tableaux_in_error_are_refused():
    one = ((1.0, 1, 1.0),)
    with pytest.raises(ValueError, match="needs rows of 1 to 1 weights"):
        ExponentialTableau(1, (0.0, 1.0), (), (one,))
    with pytest.raises(ValueError, match="must lie within the step"):
        ExponentialTableau(1, (0.0, 1.5), ((one,),), (one, ()))
    with pytest.raises(ValueError, match=r"stage at 1.0 must sum to 1 φ_1\(1 z\)"):
        ExponentialTableau(1, (0.0, 1.0), ((((2.0, 1, 1.0),),),), (one, ()))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("exp_ab", {"order": 5}, "exp_ab: order must be 1 to 4, got 5"),
        ("exp_ab_noise", {"order": 9}, "exp_ab_noise: order must be 1 to 4, got 9"),
        ("ipndm", {"order": 5}, "ipndm: order must be 1 to 4, got 5"),
        ("ipndm_v", {"order": 5}, "ipndm_v: order must be 1 to 4, got 5"),
        ("res_2s", {"c2": 0.0}, r"c2 must lie in \(0, 1\], got 0.0"),
        ("res_3s", {"c3": 0.5}, "c2 and c3 must lie in .* and differ, got 0.5 and 0.5"),
        ("res_3s", {"c2": 2 / 3}, "no method with c2 = 0.666"),
        ("dpm_fast", {"tail": (4,)}, r"tail must hold orders of 1 to 3, got \(4,\)"),
        ("dpm_fast", {"tail": (1,) * 9}, r"more orders than there are intervals \(7\)"),
    ],
)
def test_options_that_cannot_be(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_plan(name, Levels.from_sigmas(UNEVEN), **options)


@pytest.mark.parametrize(("c2", "c3"), [(0.5, 1.0), (1 / 3, 2 / 3), (0.4, 0.7), (1.0, 0.5)])
def test_res_3s_has_order_3_for_any_nodes(c2, c3):
    exact = run(make_plan("exp_ab", Levels.from_sigmas(list(np.geomspace(3, 1, 2000))), order=4))
    errors = []
    for n in (20, 40):
        levels = Levels.from_sigmas(list(np.geomspace(3, 1, n + 1)))
        errors.append(np.abs(run(make_plan("res_3s", levels, c2=c2, c3=c3)) - exact).max())
    assert math.log2(errors[0] / errors[1]) > 2.8


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


@pytest.mark.parametrize("name", ["rk4", "rk5", "midpoint"])
def test_stages_off_the_path_are_asked_on_it(name):
    """On the chord of a variance-preserving path a stage is scaled to the path's level."""
    levels = Levels.from_sigmas([0.95, 0.4, 0.1], VP)
    for step in make_plan(name, levels).steps:
        assert step.level.alpha**2 + step.level.sigma**2 == pytest.approx(1.0, abs=1e-14)
    first, second = make_plan("midpoint", levels).steps[:2]
    s, t = levels[0], levels[1]
    middle = Level((s.alpha + t.alpha) / 2, (s.sigma + t.sigma) / 2)
    assert first.level == s
    assert second.level.half_log_snr == pytest.approx(middle.half_log_snr, abs=1e-12)
