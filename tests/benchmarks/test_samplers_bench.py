"""The benchmark's own figures: exact solutions, counted calls, live tensors, ratios."""

import importlib
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from sampler_bench import measure, peer_ours, report, summary
from sampler_bench.library import Method, Model, unit
from sampler_bench.problems import Problem, digits, load_problem, spectrum

ENDS = (math.inf, 80.0, 1.0, 0.002, 0.0)


@pytest.fixture(scope="module")
def mixture():
    return digits(samples=4)


def test_integration_agrees_with_the_closed_form_of_a_gaussian():
    generator = np.random.default_rng(1)
    mean, variances = generator.standard_normal((1, 6)), np.array([[2.0, 1, 0.3, 0.04, 4e-3, 1e-3]])
    eps = generator.standard_normal((3, 1, 2, 3))
    closed = Problem("closed", np.ones(1), mean, None, variances, eps)
    basis, _ = np.linalg.qr(generator.standard_normal((6, 6)))
    # The same Gaussian in turned coordinates, which is integrated as any mixture is.
    turned = Problem(
        "turned", np.ones(1), mean @ basis.T, basis[None], variances,
        (eps.reshape(3, 6) @ basis.T).reshape(eps.shape),
    )  # fmt: skip
    assert closed.closed
    assert not turned.closed
    exact, found = closed.curve(ENDS), turned.curve(ENDS)
    assert list(exact) == list(found) == list(ENDS)
    for ratio in ENDS:
        back = (found[ratio].reshape(3, 6) @ basis).reshape(eps.shape)
        assert np.abs(back - exact[ratio]).max() <= 1e-9


def test_the_mixture_s_reference_by_a_second_method(mixture):
    """Runge-Kutta in another variable, by the denoiser and not the score, extrapolated."""
    curve = mixture.curve(ENDS)
    start, end = 80.0, 0.002
    states = []
    for n in (400, 800):
        y = torch.from_numpy(curve[start]) / unit(start)
        h = (math.log(end) - math.log(start)) / n

        def slope(y, at):
            return y - mixture.denoise(y, 1.0, math.exp(at))

        for k in range(n):
            at = math.log(start) + k * h
            k1 = slope(y, at)
            k2 = slope(y + h / 2 * k1, at + h / 2)
            k3 = slope(y + h / 2 * k2, at + h / 2)
            y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + slope(y + h * k3, at + h))
        states.append(y.numpy())
    better = (16 * states[1] - states[0]) / 15
    exact = curve[end] / unit(end)
    assert np.abs(better - exact).max() <= 1e-9
    assert np.abs(states[1] - exact).max() > 1e-11  # so that the bound above says something


def test_the_denoiser_is_one_in_all_coordinates(mixture):
    y = torch.from_numpy(mixture.eps) * 0.7
    for ratio in (5.0, 0.3, 0.01):
        d = mixture.denoise(y, 1.0, ratio)
        assert (d - (y - ratio**2 * mixture.pull(y, ratio))).abs().max() <= 1e-11
        alpha = 1 / (1 + ratio)
        other = mixture.denoise(alpha * y, alpha, alpha * ratio)
        assert (d - other).abs().max() <= 1e-11
    far = mixture.denoise(y, 0.0, 1.0)
    mean = torch.from_numpy(mixture.weights @ mixture.means).reshape(1, 1, 8, 8)
    assert (far - mean).abs().max() <= 1e-12


def test_the_mixture_is_that_of_the_images(mixture):
    from sklearn.datasets import load_digits

    images = load_digits().data / 8 - 1
    assert np.abs(mixture.weights @ mixture.means - images.mean(0)).max() <= 1e-12
    away = mixture.means - images.mean(0)
    covariance = np.einsum(
        "k,kij,kj,klj->il", mixture.weights, mixture.bases, mixture.variances, mixture.bases
    ) + np.einsum("k,ki,kj->ij", mixture.weights, away, away)
    rounding = np.eye(64) * (1 / 8) ** 2 / 12
    assert np.abs(covariance - np.cov(images.T, bias=True) - rounding).max() <= 1e-12


def test_problems_come_back_from_a_file(mixture, tmp_path):
    for problem in (spectrum(), mixture):
        problem.save(tmp_path / "problem.npz", problem.curve([80.0, 0.0]))
        again, states = load_problem(tmp_path / "problem.npz")
        assert list(states) == [80.0, 0.0]
        x = torch.from_numpy(problem.eps)
        assert torch.equal(again.denoise(x, 0.6, 0.8), problem.denoise(x, 0.6, 0.8))


OURS = {method.name: method for method in peer_ours.methods() if method.exact}


@pytest.mark.parametrize(
    ("name", "ending", "budget", "steps", "calls"),
    [
        ("euler", "clean", 5, 5, 5),
        ("heun", "clean", 5, 3, 5),
        ("heun", "open", 5, 2, 4),
        ("heun", "clean", 6, 3, 5),
        ("dpm_solver_3", "clean", 6, 2, 4),
        ("dpm_solver_3", "open", 2, None, None),
    ],
)
def test_calls_are_counted(name, ending, budget, steps, calls):
    cache = {}
    assert measure.steps_within(OURS[name], budget, ending, cache) == steps
    if steps:
        assert measure.evaluations(OURS[name], steps, ending) == calls
        assert cache[name, steps, ending] == calls


def test_every_solver_of_ours_is_measured():
    """By itself, with every order that it has, and on flow levels where that differs."""
    names = {name.split(" ")[0].split(",")[0] for name in OURS}
    assert {"euler", "dpmpp_2m_sde", "unipc", "ddim"} <= names
    assert {"unipc order=1", "unipc order=2", "unipc order=3"} <= set(OURS)
    assert OURS["dpmpp_2m_sde eta=0"].like == "dpmpp_2m_sde"
    assert "heun, flow levels" in OURS
    assert "dpmpp_2m, flow levels" not in OURS


def test_an_error_is_the_distance_to_the_exact_end():
    problem = spectrum()
    curve = {r: torch.from_numpy(state) for r, state in problem.curve([80.0, 0.5]).items()}

    def shifted(model, z, ratios):
        model(z, 1.0, ratios[0])
        return curve.get(ratios[-1], z) / unit(ratios[-1]) + 0.25

    found = measure.error_of(Method("shifted", exact=shifted), problem, curve, [80.0, 0.5])
    assert found == (pytest.approx(0.25, abs=1e-14), 1)
    levels = {"any": {"open": {1: [80.0, 0.5]}}}
    rows = measure.errors(Method("s", exact=shifted), problem, curve, levels, [1], {})
    assert [(r["ending"], r["steps"], r["evaluations"]) for r in rows] == [("open", 1, 1)]


def test_errors_of_our_samplers_fall_with_their_order():
    problem = spectrum()
    ratios = {n: [80 * (0.002 / 80) ** (k / n) for k in range(n + 1)] for n in (40, 80)}
    curve = {
        r: torch.from_numpy(s)
        for r, s in problem.curve([80.0, *(v[-1] for v in ratios.values())]).items()
    }
    for name, order in (("euler", 1), ("dpmpp_2m", 2)):
        errors = [measure.error_of(OURS[name], problem, curve, ratios[n])[0] for n in (40, 80)]
        assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.25)


def test_live_tensors_and_waits_are_counted():
    def quick(x, model, steps):
        levels = torch.linspace(1, 0.1, steps)
        model.hold(levels)

        def call():
            kept, state = [], x
            for k in range(steps):
                answer = model(state, None)
                kept = [*kept, answer][-3:]
                if levels[k] > 0:  # reads the device
                    state = state + 0.1 * answer
            return state, torch.ones(3).sum().item()  # reads the host

        return call

    found = measure.cost(Method("greedy", quick=quick), (2, 3, 8, 8), 10)
    # x, the state, three answers, and the product before it is added: 6; with the new state 7.
    assert found == {"live": 7, "waits a step": 1.0}


def test_what_the_rows_say():
    def row(library, method, error, like="", budget=5, schedule="karras"):
        return {"problem": "digits", "ending": "clean", "library": library, "method": method,
                "like": like, "budget": budget, "schedule": schedule, "error": error}  # fmt: skip

    rows = [
        row(summary.OURS, "a", 0.3, "a"),
        row(summary.OURS, "b", 0.2, schedule="other"),
        row("p", "A", 0.2, "a"),
        row("q", "B", 0.4, "a", schedule="other"),
        row("q", "C", 0.1, budget=6),
        {**row("q", "D", 0), "failed": "so"},
    ]
    del rows[-1]["error"]
    found = summary.of_errors(rows, [5, 6])
    assert [c.get("ours / best of theirs") for c in found["best"]] == [1.0, None]
    (pair,) = found["same method"]
    assert (pair["ours"], pair["library"], pair["cases"]) == ("a", "p", 1)
    assert pair["largest"] == pytest.approx(1.5)
    assert found["failed"] == {"q: D, clean": "so"}
    assert found["methods"]["digits"]["clean"][summary.OURS]["b"] == {"5": [0.2, "other"]}


def test_what_the_times_say_and_which_goals_are_missed():
    def row(library, method, like, microseconds):
        return {"library": library, "method": method, "like": like, "shape": (1, 4),
                "microseconds": microseconds}  # fmt: skip

    rows = [
        row(summary.OURS, "euler", "euler", 20.0),
        row("k-diffusion", "sample_euler", "euler", 100.0),
        row("diffusers", "Euler", "euler", 80.0),
        row("azula", "EulerSampler", "euler", 1.0),
        row(summary.OURS, "heun", "heun", 70.0),
        row("diffusers", "Heun", "heun", 70.0),
        row(summary.OURS, "dpmpp_sde", "dpmpp_sde", 100.0),
        row(summary.OURS, "dpmpp_sde, refinable path", "dpmpp_sde", 400.0),
        row(summary.OURS, "sample_dpmpp_sde", "dpmpp_sde", 1000.0),
        row("k-diffusion", "sample_dpmpp_sde", "dpmpp_sde", 1000.0),
        row("diffusers", "DPMSolverSDE", "dpmpp_sde", 10.0),
        row(summary.OURS, "alone", "alone", 1.0),
    ]
    found = summary.of_times(rows)
    assert [r["ratio"] for r in found["ratios"]] == [0.25, 1.0, 0.1, 0.4, 1.0]
    means = found["means"]
    assert means["all others, 1×4"]["geometric mean"] == pytest.approx(0.5)
    assert means["all others, 1×4"]["largest of"] == "heun"
    assert means["with a Brownian tree there, 1×4"]["geometric mean"] == pytest.approx(0.1)
    cost = {"library": summary.OURS, "stochastic": True, "waits a step": 0.0}
    results = {
        "errors": {
            "best": [{"problem": "digits", "ending": "clean", "budget": 5,
                      "ours / best of theirs": 0.9}],
            "same method": [],
        },
        "times": found,
        "costs": [
            {**cost, "method": "dpmpp_sde", "live": 9, "least of theirs": {"live": 50}},
            {**cost, "method": "dpmpp_sde, refinable path", "live": 20,
             "least of theirs": {"live": 50}},
        ],
    }  # fmt: skip
    lines = {line.split(" | ")[0][2:]: line for line in report.goals(results).splitlines()}
    for goal, text in {
        "best error, ours over the best of theirs": "0.9 (digits, clean, 5 evaluations) | met",
        "time, all others, 1×4: geometric mean": "| at most 0.25 | 0.5 | missed by 100.0%",
        "time, all others, 1×4: largest": "| at most 0.6 | 1 (heun) | missed by 66.7%",
        "time, with a Brownian tree there, 1×4: geometric mean": "| at most 0.05 | 0.1 | missed",
        "time, with a Brownian tree there, ours on a refinable path, 1×4: geometric mean":
            "| at most 0.35 | 0.4 | missed by 14.3%",
        "live tensors, ours less theirs": "-41 (dpmpp_sde) | met",
        "live tensors, stochastic": "| at most 8 | 9 (dpmpp_sde) | missed by 12.5%",
        "live tensors, on a refinable path": "20 (dpmpp_sde, refinable path) | met",
        "waits for the device a step": "| 0 | met",
    }.items():  # fmt: skip
        assert text in lines[goal]


def test_schedules_are_laid_once_and_cover_the_way():
    bench = importlib.import_module("samplers")

    class Fake:
        def __init__(self, name, schedules):
            self.name, self.about = name, {"name": name}
            self._schedules = schedules

        def ask(self, do, steps):
            assert do == "schedules"
            return {
                name: {str(n): lay(n) for n in range(1, steps + 1)}
                for name, lay in self._schedules.items()
            }

    def even(high, low):
        return lambda n: [high * (low / high) ** (k / max(1, n - 1)) for k in range(n)]

    levels = bench.lay(
        [
            Fake("ours", {"even": even(80.0, 0.002), "short": even(80.0, 0.02)}),
            Fake("peer", {"same": even(80.0000001, 0.002), "low": even(14.0, 0.002)}),
        ],
        4,
    )
    assert set(levels) == {"even", "short"}
    assert set(levels["even"]) == {"clean", "open"}
    assert set(levels["short"]) == {"clean"}
    assert levels["even"]["clean"][3] == [*even(80.0, 0.002)(3)[:2], 0.002, 0.0]
    assert levels["even"]["open"][3][-1] == 0.002
    assert len(levels["even"]["open"][3]) == 4


def test_a_model_counts_its_calls():
    model = Model(lambda x, alpha, sigma: x)
    model(torch.ones(1), 1.0, 1.0)
    assert model.calls == 1
