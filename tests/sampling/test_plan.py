"""Tracing: what solvers may do, what they are told when they do wrong, and what a plan costs."""

import math

import numpy as np
import pytest
import torch

from k_diffusion.denoiser import EpsDenoiser
from k_diffusion.sampling import (
    FLOW,
    SOLVERS,
    VE,
    VP,
    CallerNoise,
    Churn,
    KSampler,
    Levels,
    Run,
    Solver,
    make_plan,
)  # fmt: skip
from k_diffusion.sampling.compat import make_function
from k_diffusion.sampling.plan_file import load_plan, save_plan
from k_diffusion.sampling.registry import solver
from k_diffusion.utils.levels import CLEAN
from k_diffusion.utils.maths import lagrange_integrals
from k_diffusion.utils.scheduler import KarrasScheduler, LinearScheduler

LEVELS = Levels.from_sigmas([4.0, 2.0, 1.0, 0.5])
NO_SOURCE = "a test"


def own(function, **facts):
    """A solver that is not registered."""
    return Solver(function.__name__, function, 1, NO_SOURCE, **facts)


def execute_linear(plan, x0, point):
    """(weights of the noise, mean) of the result on data at one point, in a few lines."""
    values = {"x0": np.concatenate([[0.0, 1.0], np.zeros(len(plan.draws))])}
    for step in (*plan.steps, None):
        for op in step.operations if step else plan.last:
            if hasattr(op, "terms"):
                values[op.name] = sum(c * values[n] for n, c in op.terms)
            else:
                values[op.name] = np.eye(2 + len(plan.draws))[1 + int(op.name[1:])]
        if step:
            constant = np.zeros(2 + len(plan.draws))
            constant[0] = point
            values.update(dict.fromkeys(step.answers, constant))
    return values[plan.result]


ETAS = [name for name, s in SOLVERS.items() if "eta" in s.options]


@pytest.mark.parametrize("name", ETAS)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0, 1.7])
@pytest.mark.parametrize("path", [VE, VP, FLOW], ids=str)
def test_any_eta_keeps_the_noise_of_each_level(name, eta, path):
    levels = LEVELS.on(path)
    form = execute_linear(make_plan(name, levels, eta=eta), None, 0.8)
    first, last = levels[0], levels[-1]
    assert abs(form[0] + form[1] * first.alpha * 0.8 - last.alpha * 0.8) <= 1e-12
    spread = math.sqrt((form[1] * first.sigma) ** 2 + np.sum(form[2:] ** 2))
    assert abs(spread - last.sigma) <= 1e-12


@pytest.mark.parametrize("name", [n for n in ETAS if "s_noise" in SOLVERS[n].options])
def test_s_noise_scales_the_added_noise_and_nothing_else(name):
    plain, half = (
        execute_linear(make_plan(name, LEVELS, s_noise=v, eta=0.5), None, 0.8) for v in (1.0, 0.5)
    )
    assert np.abs(half[2:] - plain[2:] / 2).max() <= 1e-14
    assert np.abs(half[:2] - plain[:2]).max() <= 1e-14
    assert np.abs(plain[2:]).max() > 0.05


def test_the_noise_variance_of_each_formula():
    """eta² in the ancestral ones, eta in the SDE ones: one step from 4 to 1, ratio² = 1/16."""
    step = Levels.from_sigmas([4.0, 1.0])
    for name, share in [("ddim", 0.25), ("euler_ancestral", 0.25)]:
        form = execute_linear(make_plan(name, step, eta=0.5), None, 0.0)
        assert abs(form[2] ** 2 - share * (1 - 1 / 16)) <= 1e-14
    for name in ("dpmpp_2m_sde", "dpmpp_3m_sde"):
        form = execute_linear(make_plan(name, step, eta=0.5), None, 0.0)
        assert abs(form[2] ** 2 - (1 - 1 / 4)) <= 1e-14  # 1 - exp(-2 eta h), h = log 4


@pytest.mark.parametrize("option", ["eta", "s_noise"])
def test_negative_noise_is_refused(option):
    for name in ETAS:
        if option in SOLVERS[name].options:
            with pytest.raises(ValueError, match=f"{name}'s {option} must be 0 or more, got -0.5"):
                make_plan(name, LEVELS, **{option: -0.5})


def test_unipc_by_hand():
    """Order 2 on three even intervals: B2 = e^-h - 1, and 1/2 for a single unknown."""
    h = math.log(2.0)
    plan = make_plan("unipc", LEVELS, order=2)
    d = np.array([0.3, -0.2, 0.7])
    b = math.expm1(-h)
    x = x1 = 1.0
    x1 = x / 2 - b * d[0]
    corrected = x / 2 - b * d[0] - b * 0.5 * (d[1] - d[0])
    x2 = corrected / 2 - b * d[1] - b * 0.5 * (d[0] - d[1]) / -1.0
    phi2 = b / -h - 1
    right = [phi2 / b, 2 * (phi2 / -h - 0.5) / b]
    w = np.linalg.solve([[1.0, 1.0], [-1.0, 1.0]], right)
    corrected = corrected / 2 - b * d[1] - b * (w[0] * (d[0] - d[1]) / -1.0 + w[1] * (d[2] - d[1]))
    x3 = corrected / 2 - b * d[2] - b * 0.5 * (d[1] - d[2]) / -1.0
    run = Run(plan, torch.ones(1, 1, dtype=torch.float64))
    seen = []
    for k in range(3):
        seen.append(run.x.item())
        run.advance(torch.full((1, 1), d[k], dtype=torch.float64))
    assert seen == pytest.approx([1.0, x1, x2], abs=1e-14)
    assert run.result.item() == pytest.approx(x3, abs=1e-14)


def test_churn_is_capped():
    for amount in (3 * (math.sqrt(2) - 1), 50.0):
        plan = make_plan("euler", LEVELS, churn=Churn(s_churn=amount))
        assert plan.steps[0].level.sigma == pytest.approx(4.0 * math.sqrt(2), rel=1e-14)


def test_churn_counts_all_intervals_from_pure_noise_too():
    plan = make_plan("euler", Levels.from_sigmas([1.0, 0.5, 0.25, 0.0], FLOW), churn=Churn(0.3))
    assert plan.steps[1].level.ratio == pytest.approx(1.1, rel=1e-12)


def remembers_states(x, levels, noise):
    before = None
    for s, t in levels.pairs():
        d = yield x, s
        if before is not None:
            x = x + 0.1 * before
        before = x
        x = (t.sigma / s.sigma) * x + (1 - t.sigma / s.sigma) * d
    return x


def reads_ahead(x, levels, noise):
    for s, t in list(levels.pairs()):
        d = yield x, s
        x = (t.sigma / s.sigma) * x + (1 - t.sigma / s.sigma) * d
    return x


def queries_a_copy(x, levels, noise):
    for s, t in levels.pairs():
        y = x
        d = yield 1.0 * y, s
        x = (t.sigma / s.sigma) * x + (1 - t.sigma / s.sigma) * d
    return x


def test_churn_refuses_solvers_that_it_would_break():
    churn = Churn(s_churn=1.0)
    with pytest.raises(ValueError, match="reads_ahead: it reads levels ahead"):
        make_plan(own(reads_ahead), LEVELS, churn=churn)
    for function in (queries_a_copy, remembers_states):
        with pytest.raises(ValueError, match=f"{function.__name__}: it goes back to an earlier"):
            make_plan(own(function), LEVELS, churn=churn)
    assert make_plan(own(reads_ahead), LEVELS).evaluations == 3
    assert make_plan(own(queries_a_copy), LEVELS).evaluations == 3


def test_a_solver_of_mere_predictions_takes_no_churn_and_no_edit():
    chosen = own(reads_ahead, predictor=True)
    with pytest.raises(ValueError, match="reads_ahead queries predictions .* churn has no place"):
        make_plan(chosen, LEVELS, churn=Churn(s_churn=1.0))
    run = Run(make_plan(chosen, LEVELS), torch.ones(1, 1))
    with pytest.raises(ValueError, match="reads_ahead queries predictions .* would be undone"):
        run.x = torch.zeros(1, 1)


@pytest.fixture
def guessing():
    """A registered solver that is said to query mere predictions."""
    yield solver(order=1, source=NO_SOURCE, predictor=True)(reads_ahead)
    del SOLVERS["reads_ahead"]


def test_a_registered_solver_of_mere_predictions(guessing, tmp_path):
    """Its flag goes with the plan, into a file and back; a callback's edit of x has no effect."""
    plan = make_plan("reads_ahead", LEVELS)
    save_plan(plan, tmp_path / "plan.json")
    with pytest.raises(ValueError, match="reads_ahead queries predictions .* no place"):
        KSampler(lambda x, sigma: x, "karras", "reads_ahead", churn=Churn(1.0)).plan(3)
    for made in (plan, load_plan(tmp_path / "plan.json")):
        run = Run(made, torch.ones(1, 1))
        with pytest.raises(ValueError, match="reads_ahead queries .* would be undone"):
            run.x = torch.zeros(1, 1)
    x = torch.ones(1, 2, dtype=torch.float16)  # the state is float32: the callback is shown a copy
    sample, sigmas = make_function(guessing), torch.tensor(LEVELS.sigmas)
    results = [
        sample(lambda x, sigma: 0 * x, x, sigmas, disable=True, callback=each)
        for each in (None, lambda told: told["x"].zero_())
    ]
    assert torch.equal(*results)
    assert results[0].abs().max() > 0


def bad_division(x, levels, noise):
    for k, (s, _) in enumerate(levels.pairs()):
        d = yield x, s
        x = x + d / (0.0 if k == 1 else 1.0)
    return x


def float_division(x, levels, noise):
    for s, _ in levels.pairs():
        d = yield x, s
        x = x + (1.0 / (s.sigma - s.sigma)) * d
    return x


def returns_nothing(x, levels, noise):
    for s, _ in levels.pairs():
        yield x, s


def yields_a_state_alone(x, levels, noise):
    yield x
    return x


def cancels(x, levels, noise):
    d = yield x, levels[0]
    return d - d


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            bad_division,
            r"no finite coefficients after the query at level .*sigma 2\) \(query 2 of 3",
        ),
        (float_division, "float_division .* after 1 queries: float division by zero"),
        (returns_nothing, "returns_nothing must return its final state, got None"),
        (yields_a_state_alone, "yields_a_state_alone .* in error after 0 queries"),
        (cancels, "cancels forms a state in which all terms cancel"),
    ],
)
def test_solvers_in_error_are_named(function, message):
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        make_plan(own(function), LEVELS)
    assert "\n" not in str(caught.value)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="euler needs at least two levels, got 1"):
        make_plan("euler", LEVELS[:1])
    with pytest.raises(TypeError, match="levels must be Levels, got list"):
        make_plan("euler", [1.0, 0.0])
    with pytest.raises(TypeError, match=r"churn must be a Churn, got 3.0: Churn\(s_churn=3.0\)"):
        make_plan("euler", LEVELS, churn=3.0)
    with pytest.raises(ValueError, match=r"unknown sampler \['euler'\]"):
        make_plan(["euler"], LEVELS)
    with pytest.raises(ValueError, match="a solver named 'euler' is registered already"):
        solver(order=1, source=NO_SOURCE)(SOLVERS["euler"].function)

    def undecided(x, levels, noise, *, eta):
        return x

    with pytest.raises(TypeError, match="option 'eta' of solver 'undecided' needs a default"):
        solver(order=1, source=NO_SOURCE)(undecided)
    assert "undecided" not in SOLVERS


def two_answers(x, levels, noise):
    for s, t in levels.pairs():
        d, u = yield x, s
        x = (t.sigma / s.sigma) * (x - s.alpha * u) + t.alpha * d
    return x


@pytest.mark.parametrize("levels", [LEVELS, Levels.from_sigmas([1.0, 0.6, 0.0], FLOW)])
def test_two_answers(levels):
    plan = make_plan(own(two_answers, outputs=2), levels)
    x = y = torch.tensor([[0.7]], dtype=torch.float64)
    run = Run(plan, x)
    for s, t in levels.pairs():
        d, u = torch.cos(y), torch.sin(y)
        if s.alpha == 0:
            y = t.alpha * d + t.sigma * y
        else:
            y = t.sigma / s.sigma * (y - s.alpha * u) + t.alpha * d
        run.advance(torch.cos(run.x), torch.sin(run.x))
    assert (run.result - y).abs().max() <= 1e-14
    with pytest.raises(ValueError, match="takes 2 answers for each query, got 1"):
        Run(plan, x).advance(x)


def draws_in_vain(x, levels, noise):
    for s, t in levels.pairs():
        d = yield x, s
        noise(s, t)
        x = (t.sigma / s.sigma) * x + (1 - t.sigma / s.sigma) * d
    return x


def test_unused_noise_is_asked_of_a_caller_but_held_by_nobody():
    asked = make_plan(own(draws_in_vain), LEVELS, intervals=True)
    assert len(asked.draws) == 3
    assert all(draw.drop == (draw.name,) for draw in asked.draws)
    assert not make_plan(own(draws_in_vain), LEVELS).stochastic


def noise_to_clean(x, levels, noise):
    s, m, t = levels
    d = yield x, s
    short = noise(s, m)
    whole = noise(s, t)
    y = (m.sigma / s.sigma) * x + (1 - m.sigma / s.sigma) * d + short
    d = yield y, m
    return d + whole


def test_noise_up_to_clean_data_belongs_to_its_last_part():
    """The path is infinitely long there: what lies before counts for nothing."""
    plan = make_plan(own(noise_to_clean), Levels([VE.at(-1.0), VE.at(0.0), CLEAN]))
    (last,) = [op for op in plan.last if op.name == plan.result]
    assert [c for n, c in last.terms if n.startswith("z")] == [1.0]
    assert len(plan.draws) == 2


# Terms of all operations in 10 Karras steps: what the inlining saves must not come back.
OPERATIONS = {"euler": 19, "heun": 55, "dpm_2": 46, "dpmpp_2m": 27, "dpm_solver_3": 91, "unipc": 64}


@pytest.mark.parametrize("name", OPERATIONS)
def test_no_operation_more_than_needed(name):
    plan = make_plan(name, KarrasScheduler().levels(10))
    assert sum(len(op.terms) for op in plan.operations if hasattr(op, "terms")) <= OPERATIONS[name]


def test_plans_are_cached_by_their_arguments():
    levels = KarrasScheduler().levels(5)
    again = KarrasScheduler().levels(5)
    assert make_plan("ddim", levels) is make_plan("ddim", again)
    assert make_plan("ddim", levels, eta=0.5) is not make_plan("ddim", levels)
    assert make_plan("ddim", levels.on(FLOW)) is not make_plan("ddim", levels)


def test_a_plan_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "plan.json"
    save_plan(make_plan("euler", LEVELS), path)
    before = path.read_text()

    def fail(*args):
        raise OSError("no space left")

    monkeypatch.setattr("k_diffusion.sampling.plan_file.os.replace", fail)
    with pytest.raises(OSError, match="no space"):
        save_plan(make_plan("heun", LEVELS), path)
    assert path.read_text() == before
    assert load_plan(path).solver == "euler"


def test_fresh_noise_is_not_asked_of_a_caller_s_path():
    asked = []

    def sampler(sigma, sigma_next):
        asked.append((sigma, sigma_next))
        return torch.zeros(2, 3)

    x = torch.zeros(2, 3)
    plan = make_plan("euler_ancestral", LEVELS, churn=Churn(1.0), intervals=True)
    run = Run(plan, x, CallerNoise(sampler, x))
    while not run.done:
        run.advance(run.x)
    assert len(plan.draws) == 6
    assert len(asked) == 3
    assert all(a > b for a, b in asked)
    source = CallerNoise(lambda a, b: torch.zeros(3), x)
    with pytest.raises(ValueError, match=r"noise_sampler returned shape \(3,\)"):
        source.draw(plan.draws[1].interval)


def test_a_constant_is_integrated_exactly():
    nodes = [math.exp(-k / 3) for k in range(5)]
    total = -math.expm1(-0.7)
    weights = lagrange_integrals(nodes, 1.1, 0.4, total, lambda u: math.exp(u - 0.4))
    assert math.fsum(weights) == pytest.approx(total, rel=2e-16, abs=1e-16)


def test_alpha_is_known_near_pure_noise():
    """At sigma within 2e-5 of 1 the estimate still has alpha to 1e-6: float32 would lose it."""
    level = LinearScheduler().levels(1)[0]

    class Zero(torch.nn.Module):
        prediction, time_convention = "eps", "timestep"

        def forward(self, x, t):
            return torch.zeros_like(x)

    seen = []
    sampler = KSampler(EpsDenoiser(Zero(), LinearScheduler()), solver="euler")
    sampler.sample(torch.ones(1, 1), 1, callback=lambda k, x, sigma, d: seen.append((x, d)))
    ((x, d),) = seen
    assert abs(d.item() * level.alpha / x.item() - 1) <= 1e-6


def test_x_and_model_on_two_devices():
    model = torch.nn.Linear(2, 2)
    model.prediction = "x0"
    with pytest.raises(ValueError, match="x is on meta but the model on cpu"):
        KSampler(model).sample(torch.empty(1, 2, device="meta"), 2)


def test_the_result_is_not_the_model_s_own_buffer():
    buffer = torch.zeros(1, 3)

    def denoise(x, sigma):
        return buffer.add_(1)

    sampler = KSampler(denoise, "karras", "euler")
    first = sampler.sample(torch.randn(1, 3), 2)
    kept = first.clone()
    sampler.sample(torch.randn(1, 3), 2)
    assert torch.equal(first, kept)


def test_whole_numbers_of_numpy_will_do():
    sampler = KSampler(lambda x, s: x / 2, "karras", "euler_ancestral")
    x = torch.randn(2, 3)
    assert torch.equal(
        sampler.sample(x, np.int64(3), seed=np.int64(1)), sampler.sample(x, 3, seed=1)
    )
    assert torch.equal(
        sampler.sample(x, 3, seed=list(np.array([1, 2]))), sampler.sample(x, 3, seed=1)
    )
    with pytest.raises(TypeError, match="seed must be a whole number"):
        KSampler(lambda x, s: x / 2, "karras", "euler").sample(x, 3, seed="banana")


def test_karras_levels_are_no_process_of_a_noise_predicting_network():
    class Net(torch.nn.Module):
        prediction, time_convention = "eps", "timestep"

        def forward(self, x, t):
            return x

    sampler = KSampler(Net(), "karras")
    assert sampler.denoiser.process == LinearScheduler()
    assert sampler.scheduler.path is VE
    assert KSampler(Net(), LinearScheduler(timesteps=50)).denoiser.process.timesteps == 50
