"""Solvers in half log-SNR, lambda = log(alpha / sigma): the ODE's linear part is solved exactly.

With data prediction d, x / sigma gains the integral of exp(lambda) d; with noise prediction eps,
x / alpha loses the integral of exp(-lambda) eps (Lu et al. 2022, arXiv:2206.00927, eq. 3.4, and
arXiv:2211.01095, section 4.1). The methods differ in how they interpolate d or eps. Into clean data
(sigma = 0, lambda infinite) no interpolation reaches, and each takes one first-order step.
"""

from __future__ import annotations

from functools import partial
from math import exp, expm1, factorial
from typing import Any

from k_diffusion.sampling.expr import Expr
from k_diffusion.sampling.registry import Trace, solver
from k_diffusion.sampling.solvers.linear import noise_in
from k_diffusion.utils.levels import Level
from k_diffusion.utils.maths import lagrange_integrals, solve_linear


def data_step(x: Expr, d: Expr, s: Level, t: Level) -> Expr:
    """The exact step for a constant data estimate; also DDIM, and Euler in sigma."""
    ratio = t.sigma / s.sigma
    return ratio * x + (t.alpha - s.alpha * ratio) * d


def noise_step(x: Expr, eps: Expr, s: Level, t: Level) -> Expr:
    """The exact step for a constant noise estimate: the same as `data_step`, by other terms."""
    ratio = t.alpha / s.alpha
    return ratio * x + (t.sigma - s.sigma * ratio) * eps


def _exp_difference(sign: int, end: float, u: float) -> float:
    """The weight exp(±(u - end)) under the integrals above."""
    return exp(sign * (u - end))


@solver(order=1, source="Lu et al. 2022, arXiv:2206.00927, eq. 3.7 (the same as DDIM)")
def dpm_solver_1(x: Expr, levels: Any, noise: Any) -> Trace:
    """DPM-Solver-1: the noise estimate is constant over a step."""
    for s, t in levels.pairs():
        d = yield x, s
        x = noise_step(x, noise_in(x, d, s), s, t)
    return x


@solver(order=2, source="Lu et al. 2022, arXiv:2206.00927, algorithm 1 (r1 = 1/2)")
def dpm_solver_2(x: Expr, levels: Any, noise: Any) -> Trace:
    """DPM-Solver-2: one more noise estimate, half-way in log-SNR."""
    for s, t in levels.pairs():
        d = yield x, s
        eps = noise_in(x, d, s)
        if t.sigma > 0:
            m = levels.at((s.half_log_snr + t.half_log_snr) / 2)
            u = noise_step(x, eps, s, m)
            d = yield u, m
            eps = noise_in(u, d, m)
        x = noise_step(x, eps, s, t)
    return x


@solver(order=3, source="Lu et al. 2022, arXiv:2206.00927, algorithm 2 (r1 = 1/3, r2 = 2/3)")
def dpm_solver_3(x: Expr, levels: Any, noise: Any) -> Trace:
    """DPM-Solver-3: two more noise estimates, at one and two thirds in log-SNR."""
    r1, r2 = 1 / 3, 2 / 3
    for s, t in levels.pairs():
        d = yield x, s
        eps = noise_in(x, d, s)
        if not t.sigma > 0:
            x = noise_step(x, eps, s, t)
            continue
        h = t.half_log_snr - s.half_log_snr
        m1 = levels.at(s.half_log_snr + r1 * h)
        m2 = levels.at(s.half_log_snr + r2 * h)
        u1 = noise_step(x, eps, s, m1)
        d1 = yield u1, m1
        change1 = noise_in(u1, d1, m1) - eps
        u2 = noise_step(x, eps, s, m2)
        u2 = u2 - m2.sigma * (r2 / r1) * (expm1(r2 * h) / (r2 * h) - 1) * change1
        d2 = yield u2, m2
        change2 = noise_in(u2, d2, m2) - eps
        x = noise_step(x, eps, s, t) - t.sigma / r2 * (expm1(h) / h - 1) * change2
    return x


@solver(order=2, source="Lu et al. 2022, arXiv:2211.01095, algorithm 1 (r = 1/2)")
def dpmpp_2s(x: Expr, levels: Any, noise: Any) -> Trace:
    """DPM-Solver++(2S): one more data estimate, half-way in log-SNR."""
    for s, t in levels.pairs():
        d = yield x, s
        if t.sigma > 0:
            m = levels.at((s.half_log_snr + t.half_log_snr) / 2)
            d = yield data_step(x, d, s, m), m
        x = data_step(x, d, s, t)
    return x


@solver(order=2, source="Lu et al. 2022, arXiv:2211.01095, algorithm 2")
def dpmpp_2m(x: Expr, levels: Any, noise: Any) -> Trace:
    """DPM-Solver++(2M): extrapolates the data estimate from the last two."""
    last: tuple[Expr, float] | None = None
    for s, t in levels.pairs():
        d = yield x, s
        e = d
        if last is not None and t.sigma > 0:
            h = t.half_log_snr - s.half_log_snr
            e = d + h / (2 * (s.half_log_snr - last[1])) * (d - last[0])
        x = data_step(x, e, s, t)
        last = d, s.half_log_snr
    return x


def third_order_terms(
    d: Expr, h: float, past: list[tuple[float, Expr]], lam: float
) -> tuple[Expr, Expr]:
    """First and second differences of the data estimate in units of h, from the last three."""
    (l1, d1), (l2, d2) = past[-1], past[-2]
    r0, r1 = (lam - l1) / h, (l1 - l2) / h
    first, second = (d - d1) / r0, (d1 - d2) / r1
    return (
        first + r0 / (r0 + r1) * (first - second),
        (first - second) / (r0 + r1),
    )


@solver(order=2, claimed=3, source="Lu et al. 2022, arXiv:2211.01095, as in its published code")
def dpmpp_3m(x: Expr, levels: Any, noise: Any) -> Trace:
    """DPM-Solver++(3M) as it is in use: of order 2, since its second difference has half the
    weight that a Taylor expansion gives it; `exp_ab3` has order 3."""
    past: list[tuple[float, Expr]] = []
    for s, t in levels.pairs():
        d = yield x, s
        step = data_step(x, d, s, t)
        if past and t.sigma > 0:
            h = t.half_log_snr - s.half_log_snr
            phi2 = expm1(-h) / h + 1
            if len(past) == 1:
                r = (s.half_log_snr - past[-1][0]) / h
                step = step + t.alpha * phi2 * (d - past[-1][1]) / r
            else:
                first, second = third_order_terms(d, h, past, s.half_log_snr)
                step = step + t.alpha * (phi2 * first - (phi2 / h - 0.5) * second)
        x = step
        past = [*past, (s.half_log_snr, d)][-2:]
    return x


@solver(order=3, source="Hochbruck and Ostermann 2010, doi:10.1017/S0962492910000048, section 2.5")
def exp_ab3(x: Expr, levels: Any, noise: Any) -> Trace:
    """Exponential Adams-Bashforth of order 3: the data estimate is the parabola in log-SNR through
    the last three, integrated exactly on uneven steps.

    The first interval is a DPM-Solver++(2S) step (one evaluation more), whose order the method
    needs to start with.
    """
    past: list[tuple[float, Expr]] = []
    for s, t in levels.pairs():
        d = yield x, s
        past = [*past, (s.half_log_snr, d)][-3:]
        if not t.sigma > 0:
            x = data_step(x, d, s, t)
        elif len(past) == 1:
            m = levels.at((s.half_log_snr + t.half_log_snr) / 2)
            middle = yield data_step(x, d, s, m), m
            x = data_step(x, middle, s, t)
        else:
            lam = t.half_log_snr
            weights = lagrange_integrals(
                [p for p, _ in past],
                s.half_log_snr,
                lam,
                -expm1(s.half_log_snr - lam),
                partial(_exp_difference, 1, lam),
            )
            parts = (w * d for w, (_, d) in zip(weights, past, strict=True))
            x = (t.sigma / s.sigma) * x + t.alpha * sum(parts)
    return x


@solver(
    order={1: 1, 2: 2, 3: 2}, source="Zhang and Chen 2022, arXiv:2204.13902, polynomials in log rho"
)
def deis(x: Expr, levels: Any, noise: Any, *, order: int = 3) -> Trace:
    """DEIS: exponential Adams-Bashforth on the noise estimate, a polynomial in log-SNR.

    The order grows by one with each step from 1 on; that start makes the method one of order 2.
    """
    past: list[tuple[float, Expr]] = []
    for s, t in levels.pairs():
        d = yield x, s
        eps = noise_in(x, d, s)
        past = [*past, (s.half_log_snr, eps)][-order:]
        if not t.sigma > 0:
            x = noise_step(x, eps, s, t)
            continue
        lam = t.half_log_snr
        weights = lagrange_integrals(
            [p for p, _ in past],
            s.half_log_snr,
            lam,
            expm1(lam - s.half_log_snr),
            partial(_exp_difference, -1, lam),
        )
        parts = (w * e for w, (_, e) in zip(weights, past, strict=True))
        x = (t.alpha / s.alpha) * x - t.sigma * sum(parts)
    return x


@solver(
    order={1: 2, 2: 3, 3: 3},
    source="Zhao et al. 2023, arXiv:2302.04867, algorithms 1 and 2, B2(h)",
    predictor=True,
)
def unipc(x: Expr, levels: Any, noise: Any, *, order: int = 3) -> Trace:
    """UniPC: a multistep predictor whose result is corrected by the answer that the next step needs
    anyway, on data estimates.

    The order grows by one with each step from 1 on. The last state is predicted only, and with it
    the order given.
    """
    past: list[tuple[float, Expr]] = []
    before: tuple[Expr, Level] | None = None
    for s, t in levels.pairs():
        d = yield x, s
        if before is not None:
            x = _unified(*before, s, past, d)
        past = [*past, (s.half_log_snr, d)][-order:]
        before = x, s
        x = _unified(x, s, t, past, None)
    return x


def _unified(
    x: Expr, s: Level, t: Level, past: list[tuple[float, Expr]], answer: Expr | None
) -> Expr:
    """UniP from s to t by the estimates in `past`, the last of them at s; UniC with `answer`, the
    estimate at t."""
    lam, d = past[-1]
    step = data_step(x, d, s, t)
    if not t.sigma > 0:
        return step
    h = t.half_log_snr - lam
    ratios = [(p - lam) / h for p, _ in past[:-1]]
    changes = [(e - d) / r for r, (_, e) in zip(ratios, past[:-1], strict=True)]
    if answer is not None:
        ratios, changes = [*ratios, 1.0], [*changes, answer - d]
    if not changes:
        return step
    b = expm1(-h)
    phi, rows, right = b / -h - 1, [], []
    for k in range(1, len(ratios) + 1):
        rows.append([r ** (k - 1) for r in ratios])
        right.append(phi * factorial(k) / b)
        phi = phi / -h - 1 / factorial(k + 1)
    # With one unknown the authors set 1/2, which agrees with the solution to the order needed.
    weights = [0.5] if len(ratios) == 1 else solve_linear(rows, right)
    return step - t.alpha * b * sum(w * c for w, c in zip(weights, changes, strict=True))
