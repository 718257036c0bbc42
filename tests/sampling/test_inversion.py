"""Plans from clean to noisy: what they are good for, and what they refuse."""

import itertools
import math

import numpy as np
import pytest

from k_diffusion.sampling import FLOW, SOLVERS, VE, VP, Churn, Levels, make_plan
from k_diffusion.sampling.plan import Combine
from k_diffusion.sampling.plan_file import plan_from_dict, plan_to_dict

VARIANCE = 0.3


def levels_on(path, n):
    return Levels([path.at(v) for v in np.linspace(-math.log(3.0), -math.log(0.1), n + 1)], path)


def carry(plan, x):
    """A start carried along a plan on the data N(0, VARIANCE), in float64."""
    values = {"x0": x}

    def perform(operations):
        for op in operations:
            assert isinstance(op, Combine)
            values[op.name] = sum(c * values[name] for name, c in op.terms)

    for step in plan.steps:
        perform(step.operations)
        alpha, sigma = step.level.alpha, step.level.sigma
        gain = alpha * VARIANCE / (alpha**2 * VARIANCE + sigma**2)
        values[step.answers[0]] = gain * values[step.state]
    perform(plan.last)
    return values[plan.result]


@pytest.mark.parametrize("path", [VE, VP, FLOW], ids=str)
@pytest.mark.parametrize(
    ("solver", "order"), [("ddim", 1), ("euler", 1), ("heun", 2), ("dpm_2", 2), ("dpmpp_2m", 2)]
)
def test_there_and_back_again(solver, order, path):
    """The way back undoes the way there up to the method's own error, whose order shows."""
    errors = []
    for n in (32, 64, 128):
        levels = levels_on(path, n)
        s, t = (v.alpha**2 * VARIANCE + v.sigma**2 for v in (levels[0], levels[-1]))
        end = carry(make_plan(solver, levels), 1.5)
        start = carry(make_plan(solver, levels.flipped()), end)
        errors.append(abs(start - 1.5))
        # And up alone ends where the exact flow does: the deviation grows as that of the marginal.
        up = carry(make_plan(solver, levels.flipped()), 0.7)
        assert up == pytest.approx(0.7 * math.sqrt(s / t), rel=(4 / n) ** order)
    assert errors[0] < 0.3
    slopes = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert all(order - 0.2 <= slope <= order + 1.2 for slope in slopes), (errors, slopes)


ODE = [name for name, s in SOLVERS.items() if not s.stochastic and s.outputs == 1]


@pytest.mark.parametrize("solver", ODE)
def test_every_solver_of_the_ode_goes_up(solver):
    errors = []
    for n in (32, 64, 128, 256):
        levels = levels_on(VP, n).flipped()
        s, t = (v.alpha**2 * VARIANCE + v.sigma**2 for v in (levels[0], levels[-1]))
        errors.append(abs(carry(make_plan(solver, levels), 0.7) - 0.7 * math.sqrt(t / s)))
    # Over two doublings and more: an error that changes its sign passes near 0 on the way.
    fall = 2 ** (2 * (SOLVERS[solver].order - 0.35))
    assert errors[-1] < max(max(errors[:2]) / fall, 1e-10), errors


def test_inversion_ends_at_pure_noise_where_the_path_does():
    levels = Levels.from_sigmas([1.0, 0.75, 0.5, 0.25, 0.1], FLOW).flipped()
    for solver in ("euler", "ddim"):
        plan = make_plan(solver, levels)
        assert math.isfinite(carry(plan, 0.4))


@pytest.mark.parametrize("solver", ["euler", "ddim", "heun", "dpmpp_2m", "unipc", "deis", "lms"])
def test_from_clean_data_there_is_no_way_up(solver):
    levels = Levels.from_sigmas([2.0, 1.0, 0.0]).flipped()
    with pytest.raises(ValueError, match=rf"{solver} cannot go up from clean data .*\[:-1\]\.flip"):
        make_plan(solver, levels)


@pytest.mark.parametrize(
    ("solver", "options", "churn"),
    [
        ("euler_ancestral", {}, None),
        ("dpmpp_sde", {}, None),
        ("dpmpp_2m_sde", {"eta": 0.5}, None),
        ("ddim", {"eta": 1.0}, None),
        ("euler", {}, Churn(s_churn=1.0)),
    ],
)
def test_noise_has_no_place_on_the_way_up(solver, options, churn):
    with pytest.raises(ValueError, match=f"{solver} draws noise with these options"):
        make_plan(solver, levels_on(VE, 5).flipped(), churn=churn, **options)


@pytest.mark.parametrize("solver", ["euler_ancestral", "dpmpp_2m_sde"])
def test_without_their_noise_stochastic_solvers_go_up(solver):
    plan = make_plan(solver, levels_on(VE, 64).flipped(), eta=0.0)
    s, t = (v.sigma**2 + VARIANCE for v in (plan.levels[0], plan.levels[-1]))
    assert carry(plan, 0.7) == pytest.approx(0.7 * math.sqrt(t / s), rel=0.1)


def test_a_plan_upwards_is_saved_whole():
    plan = make_plan("heun", levels_on(VP, 4).flipped())
    again = plan_from_dict(plan_to_dict(plan))
    assert again.levels == plan.levels
    assert again.levels.inverted
    assert again.steps == plan.steps
    down = plan_to_dict(make_plan("heun", levels_on(VP, 4)))
    del down["inverted"]  # as files were before
    assert not plan_from_dict(down).levels.inverted
