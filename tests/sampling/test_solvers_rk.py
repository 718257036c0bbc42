"""Runge-Kutta methods from tableaux, in sigma and exponential."""

import itertools
import math

import numpy as np
import pytest
from formulas import GRIDS, X, close, model, run, slope

from k_diffusion.sampling import FLOW, SOLVERS, VE, VP, Level, Levels, make_plan
from k_diffusion.sampling.solvers.exponential import NOISE
from k_diffusion.sampling.solvers.exponential_rk import (
    COX_MATTHEWS,
    ExponentialTableau,
    exponential_runge_kutta,
)
from k_diffusion.sampling.solvers.runge_kutta import CLASSICAL, RALSTON_3, Tableau, runge_kutta


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


@pytest.mark.parametrize(("c2", "c3"), [(0.5, 1.0), (1 / 3, 2 / 3), (0.4, 0.7), (1.0, 0.5)])
def test_res_3s_has_order_3_for_any_nodes(c2, c3):
    exact = run(make_plan("exp_ab", Levels.from_sigmas(list(np.geomspace(3, 1, 2000))), order=4))
    errors = []
    for n in (20, 40):
        levels = Levels.from_sigmas(list(np.geomspace(3, 1, n + 1)))
        errors.append(np.abs(run(make_plan("res_3s", levels, c2=c2, c3=c3)) - exact).max())
    assert math.log2(errors[0] / errors[1]) > 2.8


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
