"""The established DPMSolver, sample_dpm_adaptive and log_likelihood, against k-diffusion 0.1.1.

adaptive_fixture.json holds what that gives; make_adaptive_fixture.py makes it.
"""

import inspect
import json
import math
from pathlib import Path

import pytest
import torch

from k_diffusion import sampling
from k_diffusion.sampling import (
    DPMSolver,
    Level,
    PIDStepSizeController,
    StepControl,
    log_likelihood,
    sample_adaptive,
    sample_dpm_adaptive,
)

CASES = [
    {"order": order, "eta": eta, "sigmas": sigmas, **more}
    for order in (2, 3)
    for eta in (0.0, 0.5, 1.0)
    for sigmas, more in (
        ((0.03, 20.0), {}),
        ((0.03, 20.0), {"rtol": 1e-3, "atol": 1e-4, "h_init": 2.0}),
        ((0.5, 2.0), {"pcoeff": 0.3, "icoeff": 0.4, "dcoeff": 0.1, "s_noise": 1.1}),
    )
] + [{"order": 3, "eta": 0.0, "sigmas": (20.0, 0.05)}]  # towards noise
FAST = [(n, eta) for n in (1, 2, 3, 5, 9, 10) for eta in (0.0, 0.7)]
LIKELIHOOD = (5.0, 50.0)


def state(scale, batch=1, dtype=torch.float64):
    x = torch.randn(batch, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return (x * scale).to(dtype)


def denoise(x, sigma, **condition):
    s = sigma.reshape(-1, *[1] * (x.ndim - 1))
    v = torch.linspace(0.05, 1.5, x[0].numel(), dtype=x.dtype).reshape(x.shape[1:])
    return (v * x + s**2 * torch.tanh(3 * x / (1 + s))) / (v + s**2)


def record(module, case):
    """A run's result and everything that its callback was told, as plain numbers."""
    case = dict(case)
    sigma_min, sigma_max = case.pop("sigmas")
    told = []
    torch.manual_seed(3)
    x, info = module.sample_dpm_adaptive(
        denoise,
        state(sigma_max),
        sigma_min,
        sigma_max,
        callback=told.append,
        disable=True,
        return_info=True,
        **case,
    )
    after = torch.rand(()).item()
    steps = [
        {
            key: value.flatten().tolist() if isinstance(value, torch.Tensor) else value
            for key, value in one.items()
            if key in ("sigma", "error", "h") or i == len(told) - 1
        }
        for i, one in enumerate(told)
    ]
    return {"x": x.flatten().tolist(), "info": info, "steps": steps, "after": after}


def fixture(name):
    return json.loads(Path(__file__).with_name("adaptive_fixture.json").read_text())[name]


def close(a, b, tolerance=1e-9):
    if isinstance(b, list):
        scale = max(map(abs, b)) + 1e-12
        return len(a) == len(b) and all(
            abs(u - v) <= tolerance * scale for u, v in zip(a, b, strict=True)
        )
    if isinstance(b, float):
        return abs(a - b) <= tolerance * (abs(b) + 1e-12)
    return a == b


@pytest.mark.parametrize("k", range(len(CASES)))
def test_a_batch_of_one_takes_the_established_steps(k):
    ours, theirs = record(sampling, CASES[k]), fixture("adaptive")[k]
    assert close(ours["x"], theirs["x"])
    assert ours["info"] == theirs["info"]
    assert ours["after"] == theirs["after"]  # as much noise drawn
    assert len(ours["steps"]) == len(theirs["steps"])
    for a, b in zip(ours["steps"], theirs["steps"], strict=True):
        assert a.keys() == b.keys()
        for key, value in b.items():
            assert close(a[key], value), key


def test_float32_keeps_its_own_error():
    for order in (2, 3):
        options = {"order": order, "disable": True, "rtol": 1e-3, "atol": 1e-4}
        exact = sample_dpm_adaptive(denoise, state(20.0), 0.03, 20.0, **options)
        single = sample_dpm_adaptive(
            denoise, state(20.0, dtype=torch.float32), 0.03, 20.0, **options
        )
        assert single.dtype == torch.float32
        assert (single - exact).abs().max() / exact.abs().max() < 1e-5


def test_the_signatures_are_the_established_ones():
    assert str(inspect.signature(sample_dpm_adaptive)).replace("'", "").split(" -> ")[0] == (
        "(model: Any, x: Tensor, sigma_min: float, sigma_max: float, "
        "extra_args: dict[str, Any] | None = None, "
        "callback: Callable[[dict[str, Any]], Any] | None = None, disable: bool | None = None, "
        "order: int = 3, rtol: float = 0.05, atol: float = 0.0078, h_init: float = 0.05, "
        "pcoeff: float = 0.0, icoeff: float = 1.0, dcoeff: float = 0.0, "
        "accept_safety: float = 0.81, eta: float = 0.0, s_noise: float = 1.0, "
        "noise_sampler: NoiseSampler | None = None, return_info: bool = False)"
    )
    names = list(inspect.signature(DPMSolver.dpm_solver_adaptive).parameters)
    assert names == [
        *[
            "self",
            "x",
            "t_start",
            "t_end",
            "order",
            "rtol",
            "atol",
            "h_init",
            "pcoeff",
            "icoeff",
            "dcoeff",
        ],
        *["accept_safety", "eta", "s_noise", "noise_sampler"],
    ]
    names = list(inspect.signature(DPMSolver.dpm_solver_fast).parameters)
    assert names == ["self", "x", "t_start", "t_end", "nfe", "eta", "s_noise", "noise_sampler"]
    names = list(inspect.signature(log_likelihood).parameters)
    assert names == ["model", "x", "sigma_min", "sigma_max", "extra_args", "atol", "rtol"]
    names = list(inspect.signature(PIDStepSizeController).parameters)
    assert names == ["h", "pcoeff", "icoeff", "dcoeff", "order", "accept_safety", "eps"]


def test_controller_by_hand():
    pid = PIDStepSizeController(0.5, 0.1, 0.7, 0.2, order=2)
    assert (pid.b1, pid.b2, pid.b3) == pytest.approx((0.5, -0.25, 0.1))
    assert pid.propose_step(1.0)
    assert pid.h == pytest.approx(0.5, rel=1e-7)
    assert pid.errs == pytest.approx([1.0, 1.0, 1.0], rel=1e-7)
    assert pid.propose_step(0.25)
    factor = 1 + math.atan(4**0.5 - 1)
    assert pid.h == pytest.approx(0.5 * factor, rel=1e-6)
    assert pid.errs == pytest.approx([4.0, 4.0, 1.0], rel=1e-6)
    assert not pid.propose_step(16.0)
    factor *= 1 + math.atan(0.0625**0.5 * 4**-0.25 - 1)
    assert pid.h == pytest.approx(0.5 * factor, rel=1e-6)
    assert pid.errs == pytest.approx([0.0625, 4.0, 1.0], rel=1e-6)  # history of accepted steps
    assert not PIDStepSizeController(0.5, 0.1, 0.7, 0.2).propose_step(math.nan)
    before = pid.h
    assert pid.retreat() is False
    assert pid.h == pytest.approx(before * (1 + math.atan(-1)))


def test_ours_and_the_established_one_are_the_same_method():
    for order, pair in ((2, "dpm_12"), (3, "dpm_23")):
        calls = []

        def counted(x, sigma, calls=calls):
            calls.append(len(x))
            return denoise(x, sigma)

        t0, t1 = (-torch.tensor(v, dtype=torch.float64).log() for v in (20.0, 0.03))
        tight = {"rtol": 1e-3, "atol": 1e-4, "h_init": 2.0}
        x, info = DPMSolver(counted).dpm_solver_adaptive(state(20.0), t0, t1, order, **tight)
        assert len(calls) == info["nfe"]
        control = StepControl(**tight)
        y, own = sample_adaptive(
            denoise, state(20.0), Level(1.0, 20.0), Level(1.0, 0.03), pair=pair, control=control
        )
        assert info["n_reject"] > 0
        # rtol and atol are float32 there.
        assert (x - y).abs().max() < 1e-6
        assert own.accepted[0] == info["n_accept"]
        assert own.nfe[0] == info["nfe"] - info["n_reject"]  # a refused step's first is kept


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("order", [2, 3])
def test_each_sample_steps_by_itself(order, eta):
    scale = torch.tensor([1.0, 0.01, 30.0, 3.0], dtype=torch.float64).reshape(-1, 1, 1)
    x = state(20.0, batch=4)

    def run(rows):
        lengths = []

        def model(x, sigma, scale):
            lengths.append((len(x), tuple(sigma.shape)))
            return torch.tanh(scale * x) * denoise(x, sigma)

        calls = []

        def noise(sigma, sigma_next):
            # A function of the interval and the sample, as a Brownian path is.
            calls.append((sigma, sigma_next))
            wave = torch.arange(6, dtype=x.dtype).reshape(2, 3) * (1e3 * sigma + sigma_next)
            return torch.stack([torch.sin(wave + i) for i in rows])

        told = []
        y, info = sample_dpm_adaptive(
            model, x[rows], 0.03, 20.0, {"scale": scale[rows]}, told.append, True, order,
            eta=eta, noise_sampler=noise, return_info=True,
        )  # fmt: skip
        assert set(lengths) == {(len(rows), (len(rows),))}
        assert len(lengths) == info["nfe"] == order * info["steps"] == order * len(told)
        assert all(a.shape == b.shape == () for a, b in calls)
        return y, info, told, calls

    whole, info, told, calls = run([0, 1, 2, 3])
    each = [run([i]) for i in range(4)]
    assert len({one["n_accept"] for _, one, _, _ in each}) > 1
    for i, (alone, *_) in enumerate(each):
        assert (alone - whole[i : i + 1]).abs().max() < 1e-9
    assert info["steps"] == max(one["steps"] for _, one, _, _ in each)
    assert info["n_accept"] == max(one["n_accept"] for _, one, _, _ in each)
    assert info["n_reject"] == max(one["n_reject"] for _, one, _, _ in each)
    if eta:
        assert len(calls) > max(one["n_accept"] for _, one, _, _ in each)
    for k, now in enumerate(told):
        assert now["sigma"].shape == now["t"].shape == now["error"].shape == ()
        at = [one[2][min(k, len(one[2]) - 1)] for one in each]
        assert now["sigma"] == max(one["sigma"] for one in at)
        running = [one for one, (_, its, _, _) in zip(at, each, strict=True) if its["steps"] > k]
        assert now["error"] == pytest.approx(max(float(one["error"]) for one in running), rel=1e-9)
        assert now["h"] == pytest.approx(max(one["h"] for one in running), rel=1e-9)


def test_patched_names_are_looked_up_when_called(monkeypatch):
    seen = []

    class Bar:
        def __init__(self, **options):
            seen.append(options)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def update(self):
            seen.append("call")

    def sampler(x):
        seen.append(x.dtype)
        return lambda sigma, sigma_next: torch.zeros_like(x)

    monkeypatch.setattr(sampling, "tqdm", Bar, raising=False)
    monkeypatch.setattr(sampling, "default_noise_sampler", sampler, raising=False)
    x = state(2.0, dtype=torch.float16)
    _, info = sample_dpm_adaptive(denoise, x, 0.5, 2.0, eta=1.0, return_info=True)
    assert seen == [{"disable": None}, torch.float16] + ["call"] * info["nfe"]


def test_half_precision_reaches_the_model_and_the_callback():
    seen, told = set(), []

    def model(x, sigma):
        seen.add((x.dtype, sigma.dtype))
        return denoise(x, sigma)

    x = state(2.0, dtype=torch.float16)
    y = sample_dpm_adaptive(model, x, 0.5, 2.0, callback=told.append, disable=True)
    assert y.dtype == torch.float16
    assert seen == {(torch.float16, torch.float16)}
    assert {one[key].dtype for one in told for key in ("x", "denoised")} == {torch.float16}


def test_double_clocks_leave_single_states_single():
    t0, t1 = (-torch.tensor(v, dtype=torch.float64).log() for v in (20.0, 0.03))
    x, _ = DPMSolver(denoise).dpm_solver_adaptive(state(20.0, 3, torch.float32), t0, t1)
    assert x.dtype == torch.float32


@pytest.mark.parametrize("k", range(len(FAST)))
def test_fast(k):
    n, eta = FAST[k]
    ends = [-torch.tensor(sigma).log() for sigma in (20.0, 0.05)]
    calls, told = [], []
    solver = DPMSolver(denoise, None, lambda: calls.append(1), told.append)
    torch.manual_seed(0)
    x = solver.dpm_solver_fast(state(20.0), *ends, n, eta=eta)
    assert close(x.flatten().tolist(), fixture("fast")[k])
    assert len(calls) == n
    assert [one["i"] for one in told] == list(range(len(told)))
    assert set(told[0]) == {"x", "i", "t", "t_up", "denoised"}


@pytest.mark.parametrize("k", range(len(LIKELIHOOD)))
def test_log_likelihood(k):
    fine, usual, fevals = fixture("likelihood")[k]
    torch.manual_seed(5)
    nats, info = log_likelihood(denoise, state(1.0), 0.01, LIKELIHOOD[k], {"unused": 1})
    assert set(info) == {"fevals"}
    assert 10 < info["fevals"] < 1.2 * fevals
    established = abs(usual[0] - fine[0])
    assert abs(nats.item() - fine[0]) < established
    torch.manual_seed(5)
    nats, _ = log_likelihood(denoise, state(1.0), 0.01, LIKELIHOOD[k], atol=1e-8, rtol=1e-8)
    assert abs(nats.item() - fine[0]) < 1e-7 * abs(fine[0])
    assert not nats.requires_grad


def test_log_likelihood_asks_in_the_dtype_of_x_and_for_the_whole_batch():
    seen = set()

    def model(x, sigma):
        seen.add((len(x), x.dtype, sigma.dtype))
        return denoise(x, sigma)

    x = state(1.0, 3)
    nats, _ = log_likelihood(model, x, 0.01, 20.0, atol=1e-8, rtol=1e-8)
    assert seen == {(3, torch.float64, torch.float64)}
    seen.clear()
    log_likelihood(model, x.half(), 0.05, 5.0, atol=1e-2, rtol=1e-2)
    assert seen == {(3, torch.float16, torch.float16)}
    assert nats.shape == (3,)


def broken(x, sigma):
    bad = (sigma < 1).reshape(-1, 1, 1) & (torch.arange(len(x)) == 1).reshape(-1, 1, 1)
    return torch.where(bad, math.nan, x / (1 + sigma.reshape(-1, 1, 1) ** 2))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sigma_min": 0.0}, ValueError, "sigma_min of sample_dpm_adaptive must be .* above 0"),
        ({"sigma_max": math.inf}, ValueError, "sigma_max of sample_dpm_adaptive must be finite"),
        ({"order": 4}, ValueError, "order of dpm_solver_adaptive must be 2 or 3, got 4"),
        ({"sigma_min": 9.0, "eta": 1.0}, ValueError, "eta must be 0 towards noise"),
        ({"x": torch.zeros(2, 2, 3, dtype=torch.long)}, TypeError, "x of sample_.*torch.int64"),
        ({"x": torch.zeros(0, 2, 3)}, ValueError, "x of sample_dpm_adaptive .*B >= 1"),
        ({"x": torch.full((2, 2, 3), math.nan)}, ValueError, "x, .* of sample_dpm_adaptive, is n"),
        ({"model": "x"}, TypeError, "model of sample_dpm_adaptive must be callable, got str"),
        ({"model": lambda x, s: x[:, :1]}, ValueError, r"DPMSolver.*\(2, 2, 3\), got \(2, 1, 3\)"),
        ({"model": lambda x, s: None}, TypeError, "denoised x for DPMSolver.*got NoneType"),
        ({"model": lambda x, s: (x, x)}, TypeError, "got tuple"),
        ({"model": lambda x, s: x.long()}, TypeError, "got torch.int64"),
        ({"model": lambda x, s: x + 0j}, TypeError, "got torch.complex128"),
        ({"model": lambda x, s: x.to("meta")}, ValueError, "on x's device cpu, got meta: move the"),
        ({"x": state(2.0, 2, torch.half), "model": lambda x, s: None}, TypeError,
         "denoised x for sample_dpm_adaptive.*got NoneType"),
        ({"eta": -1.0}, ValueError, "eta of dpm_solver_adaptive must be 0 or more, got -1.0"),
        ({"eta": math.nan}, ValueError, "eta of dpm_solver_adaptive must be finite, got nan"),
        ({"s_noise": math.inf}, ValueError, "s_noise of dpm_solver_adaptive must be finite"),
        ({"s_noise": -1.0}, ValueError, "s_noise of dpm_solver_adaptive must be 0 or more"),
        ({"rtol": math.nan}, ValueError, "rtol of dpm_solver_adaptive must be finite, got nan"),
        ({"rtol": -1.0}, ValueError, "rtol of dpm_solver_adaptive must be 0 or more, got -1.0"),
        ({"atol": -1.0}, ValueError, "atol of dpm_solver_adaptive must be 0 or more, got -1.0"),
        ({"rtol": 0, "atol": 0}, ValueError, "rtol and atol of .* are both 0"),
        ({"h_init": 0.0}, ValueError, "h_init of dpm_solver_adaptive, .* must not be 0"),
        ({"h_init": None}, TypeError, "h_init of dpm_solver_adaptive must be a number, got None"),
        ({"pcoeff": math.inf}, ValueError, "pcoeff of dpm_solver_adaptive must be finite"),
        ({"icoeff": "a"}, TypeError, "icoeff of dpm_solver_adaptive must be a number, got 'a'"),
        ({"dcoeff": math.nan}, ValueError, "dcoeff of dpm_solver_adaptive must be finite"),
        ({"accept_safety": 3.0}, ValueError, "accept_safety of .* at most 2.57.*got 3.0"),
        ({"eta": 1.0, "noise_sampler": lambda s, t: torch.ones(1)}, ValueError,
         r"noise_sampler returned \(1,\): .* x's shape \(2, 2, 3\)"),
        ({"eta": 1.0, "noise_sampler": lambda s, t: torch.ones(2, 2, 3, device="meta")}, ValueError,
         "noise_sampler returned noise on meta for x on cpu"),
        ({"model": broken}, FloatingPointError, "answer for sample 1 at sigma 0.*not finite"),
        ({"model": lambda x, s: torch.where(s.reshape(-1, 1, 1) < 2, math.nan, x)}, RuntimeError,
         "sample 0 is stuck at sigma 2"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name(options, error, message):
    given = {"model": denoise, "x": state(2.0, 2), "sigma_min": 0.1, "sigma_max": 2.0, **options}
    with pytest.raises(error, match=message):
        sample_dpm_adaptive(**given, disable=True)


def test_fast_with_noise_takes_ends_finer_than_its_clock():
    ends = [-torch.tensor(sigma, dtype=torch.float64).log() for sigma in (20.0, 0.05)]
    assert DPMSolver(denoise).dpm_solver_fast(state(20.0), *ends, 5, eta=0.7).isfinite().all()


def test_fast_needs_a_call_and_no_noise_backwards():
    t0, t1 = torch.tensor(-1.0), torch.tensor(1.0)
    with pytest.raises(ValueError, match="nfe, the calls of the model, must be 1 or more, got 0"):
        DPMSolver(denoise).dpm_solver_fast(state(1.0), t0, t1, 0)
    with pytest.raises(ValueError, match="eta must be 0 towards noise"):
        DPMSolver(denoise).dpm_solver_fast(state(1.0), t1, t0, 3, eta=1.0)


def test_an_exact_zero_within_a_relative_tolerance():
    x = torch.tensor([[1.0, 0.0]])
    y = sample_dpm_adaptive(lambda x, s: x * 0, x, 0.1, 5.0, disable=True, atol=0.0)
    assert y[0, 1] == 0
    assert y[0, 0] == pytest.approx(0.02, rel=1e-3)


def test_a_result_that_is_not_finite_is_told_once():
    def noise(sigma, sigma_next):
        return torch.full((1, 2, 3), math.nan, dtype=torch.float64)

    # The last step's noise: no later answer of the model shows it.
    with pytest.warns(RuntimeWarning, match="result of sample_dpm_adaptive is not fin") as warned:
        y = sample_dpm_adaptive(
            denoise, state(10.0), 9.9, 10.0, eta=1.0, noise_sampler=noise, disable=True
        )
    assert y.isnan().all()
    assert [one.filename for one in warned] == [__file__]


@pytest.mark.parametrize("order", [2, 3])
def test_states_of_any_number_of_dimensions(order):
    x = torch.tensor([-20.0, 4.0, 30.0], dtype=torch.float64)

    def run(x):
        def one(x, sigma):
            s = sigma.reshape(-1, *[1] * (x.ndim - 1))
            return torch.tanh(x) / (1 + s**2)

        return sample_dpm_adaptive(one, x, 0.03, 20.0, order=order, disable=True)

    flat = run(x)
    assert flat.shape == (3,)
    for shape in ((3, 1), (3, 1, 1, 1)):
        assert torch.equal(run(x.reshape(shape)).flatten(), flat)


def test_the_dtype_of_x_stays_whatever_the_model_answers_in():
    x = state(20.0, dtype=torch.float32)
    y = sample_dpm_adaptive(lambda x, s: denoise(x, s).double(), x, 0.03, 20.0, disable=True)
    assert y.dtype == torch.float32
    assert (y - sample_dpm_adaptive(denoise, x, 0.03, 20.0, disable=True)).abs().max() < 1e-5


def test_options_of_fast():
    t0, t1 = torch.tensor(-1.0), torch.tensor(1.0)
    solver = DPMSolver(denoise)
    with pytest.raises(ValueError, match="eta of dpm_solver_fast must be finite, got nan"):
        solver.dpm_solver_fast(state(1.0), t0, t1, 4, eta=math.nan)
    with pytest.raises(ValueError, match="s_noise of dpm_solver_fast must be 0 or more, got -1.0"):
        solver.dpm_solver_fast(state(1.0), t0, t1, 4, s_noise=-1)
    with pytest.raises(ValueError, match=r"noise_sampler returned \(1,\)"):
        solver.dpm_solver_fast(state(1.0), t0, t1, 4, noise_sampler=lambda s, t: torch.ones(1))


def test_the_replaced_class_makes_the_steps(monkeypatch):
    used = []

    class Watched(DPMSolver):
        def eps(self, *args, **kwargs):
            used.append(1)
            return super().eps(*args, **kwargs)

    monkeypatch.setattr(sampling, "DPMSolver", Watched)
    sample_dpm_adaptive(denoise, state(2.0), 0.5, 2.0, disable=True)
    assert used


def test_an_end_within_rounding_is_reached():
    # A clock one rounding short of its end takes no step of that length.
    t0 = torch.tensor(0.0, dtype=torch.float64)
    for t1, steps in ((9e-6, 0), (1.1e-5, 1), (-9e-6, 0), (-1.1e-5, 1)):
        end = torch.tensor(t1, dtype=torch.float64)
        x, info = DPMSolver(denoise).dpm_solver_adaptive(state(1.0), t0, end)
        assert info["steps"] == steps
        assert torch.equal(x, state(1.0)) == (steps == 0)


def test_the_tolerance_of_a_likelihood_has_a_floor():
    calls = []

    def model(x, sigma):
        calls.append(len(x))
        assert len(calls) < 20_000
        return denoise(x, sigma)

    x = state(1.0, dtype=torch.float32)
    torch.manual_seed(5)
    nats, _ = log_likelihood(model, x, 0.01, 5.0, atol=1e-12, rtol=1e-12)
    least = len(calls)
    torch.manual_seed(5)
    exact, _ = log_likelihood(denoise, x.double(), 0.01, 5.0, atol=1e-9, rtol=1e-9)
    assert abs(nats.double() - exact) < 1e-3
    calls.clear()
    floor = 500 * torch.finfo(torch.float32).eps
    torch.manual_seed(5)
    log_likelihood(model, x, 0.01, 5.0, atol=floor, rtol=floor)
    assert len(calls) == least
