"""Exponential multistep methods: DEIS, exponential Adams, UniPC, and churn under them."""

import itertools
import math

import numpy as np
import pytest
from formulas import GRIDS, UNEVEN, X, close, integral, lagrange, model, run, slope
from scipy.integrate import quad

from k_diffusion.sampling import FLOW, SOLVERS, VE, VP, Churn, Levels, make_plan
from k_diffusion.sampling.solvers.exponential import DATA, NOISE, VELOCITY


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
@pytest.mark.parametrize("end_order", [0, 1, 2])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("name", "estimate", "sign"),
    [("unipc", model, -1), ("unipc_bh1", model, -1), ("unipc_noise", slope, 1)],
)
def test_unipc(name, estimate, sign, order, end_order, sigmas):
    """Algorithms 1 and 2 of the authors, who hold the old state."""
    if order not in SOLVERS[name].orders:
        return
    x, past, before = X, [], None
    for i, (s, t) in enumerate(itertools.pairwise(sigmas)):
        e = estimate(x, s)
        if before is not None:
            x = unified(*before, s, past, e, sign, name)
        # Their `lower_order_final`: by itself where the end is clean.
        last = end_order or (order if sigmas[-1] else 1)
        past = [*past, (s, e)][-min(order, last + len(sigmas) - 2 - i) :]
        before = x, s
        x = unified(x, s, t, past, None, sign, name)
    close(make_plan(name, Levels.from_sigmas(sigmas), order=order, end_order=end_order), x)


@pytest.mark.parametrize(
    ("name", "options", "full"),
    [("dpmpp_2m", {}, 2), ("dpmpp_2m_heun", {}, 2), ("dpmpp_3m", {}, 3)]
    + [("deis", {"order": k}, k) for k in (1, 2, 3, 4)],
)
def test_the_order_falls_to_end_order(name, options, full):
    """The last interval is a step of that order: with 1 one of DDIM, after a way whose order falls
    to 2; with the full order, or 0, nothing falls."""
    levels = Levels.from_sigmas(UNEVEN[:-1])
    plan = make_plan(name, levels, end_order=1, **options)
    s, t = levels.sigmas[-2:]
    before = run(make_plan(name, levels[:-1], end_order=2, **options))
    assert np.abs(run(plan) - (t / s * before + (1 - t / s) * model(before, s))).max() <= 1e-12
    whole = run(make_plan(name, levels, **options))
    assert np.abs(whole - run(make_plan(name, levels, end_order=full, **options))).max() == 0
    assert (np.abs(whole - run(plan)).max() > 1e-6) == (full > 1)
    with pytest.raises(ValueError, match="end_order must be 0 or more, got -1"):
        make_plan(name, levels, end_order=-1, **options)


@GRIDS
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_exp_abm_noise(order, sigmas):
    """Predicts by `order` noise estimates, corrects by as many (two at least) from the old state;
    the polynomials by Vandermonde, their integrals by quadrature."""

    def carried(x, s, t, estimates):
        lam = [-math.log(p) for p, _ in estimates]
        powers = np.vander(np.array(lam) + math.log(s), increasing=True)
        polynomial = np.linalg.solve(powers, np.array([e for _, e in estimates]))
        h = math.log(s / t)
        moments = [
            quad(lambda u, k=k: math.exp(-u) * u**k, 0, h, epsabs=0, epsrel=1e-13)[0]
            for k in range(len(lam))
        ]
        return x - s * np.array(moments) @ polynomial

    x, past, before, used = X, [], None, order
    for i, (s, t) in enumerate(itertools.pairwise(sigmas)):
        e = slope(x, s)
        if before is not None:
            x = carried(*before, s, [*past[-max(min(order, used + 1) - 1, 1) :], (s, e)])
        used = order if sigmas[-1] else min(order, len(sigmas) - 1 - i)
        past = [*past, (s, e)][-used:]
        before = x, s
        x = x - s * e if t == 0 else carried(x, s, t, past)
    close(make_plan("exp_abm_noise", Levels.from_sigmas(sigmas), order=order), x)


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
    """Its noise becomes that of the raised state, each time; its data estimate stays."""
    levels = Levels.from_sigmas([8.0, 2.5, 1.0, 0.3, 0.1])
    churn = Churn(s_churn=0.8, s_tmax=3.0)
    plan = make_plan("exp_ab_velocity_low", levels, churn=churn, order=4)
    z = np.random.default_rng(0).standard_normal((3, X.size))
    x, past = X, []  # of (level, data, noise)
    for k, (s, t) in enumerate(itertools.pairwise(levels.sigmas)):
        if k:
            new = math.sqrt(1 - 1 / 1.44) * z[k - 1]
            x, s = x + 1.2 * s * new, 1.2 * s
            past = [(level, d, eps / 1.2 + new) for level, d, eps in past]
        d = model(x, s)
        past.append((VE.at(-math.log(s)), d, (x - d) / s))
        end = VE.at(-math.log(t))
        w = VELOCITY.weights([level for level, _, _ in past], past[-1][0], end)
        x = (1 + t) / (1 + s) * x
        x = x + sum(c * (eps - d) for c, (_, d, eps) in zip(w, past, strict=True))
    assert np.abs(run(plan, noise=z) - x).max() <= 1e-12


@pytest.mark.parametrize("name", ["exp_ab", "exp_ab_noise", "exp_ab_velocity", "unipc", "unip"])
@pytest.mark.parametrize("raised", [1.9999, 2.0003, 2.2])
def test_an_estimate_near_the_raised_level_is_forgotten(name, raised):
    """Churn that goes back to where the last answer came from must not divide by the gap."""
    levels = Levels.from_sigmas([6.0, 2.0, raised / math.sqrt(2), 0.8])
    churn = Churn(s_churn=9.0, s_tmax=1.9)
    plan = make_plan(name, levels, churn=churn, order=2)
    assert max(abs(c) for op in plan.operations for _, c in getattr(op, "terms", ())) < 4


@pytest.mark.parametrize(("second", "corrected"), [(2.2, False), (1.95, True)])
@pytest.mark.parametrize("order", [1, 2])
def test_an_answer_from_the_former_half_of_a_step_corrects_nothing(order, second, corrected):
    """Churn raises the level by sqrt(2): to 0.42 and 0.52 of the step from sigma = 4. From 0.42 the
    run goes on as the predictor alone does."""
    levels = Levels.from_sigmas([4.0, second, 1.0])
    churn = Churn(s_churn=9.0, s_tmax=3.0)
    z = np.array([0.3, -0.4, 0.1, 1.0])
    both, alone = (
        run(make_plan(name, levels, churn=churn, order=order), noise=[z])
        for name in ("unipc", "unip")
    )
    if corrected:
        assert np.abs(both - alone).max() > 1e-3
    else:
        assert np.array_equal(both, alone)
