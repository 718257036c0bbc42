"""Solvers that draw noise or take two answers, each against its formula written out by hand."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad

from k_diffusion.sampling import (
    FLOW,
    VP,
    Levels,
    Run,
    make_plan,
)  # fmt: skip

from .by_hand import SIGMAS, X, Z, adams, check, d_of, down_up, ours, u_of

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
