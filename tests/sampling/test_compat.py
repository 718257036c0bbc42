"""How programs call the established functions, and what those programs replace while they run."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import itertools
import math
import subprocess
import sys

import pytest
import torch

from k_diffusion import sampling
from k_diffusion.denoiser import FunctionDenoiser
from k_diffusion.sampling import SOLVERS, CallerNoise, Levels, Run, make_plan, solver
from k_diffusion.sampling.compat import make_function
from k_diffusion.sampling.established import EstablishedNoise
from k_diffusion.utils.levels import FLOW

ODE = ["sample_euler", "sample_heun", "sample_dpm_2", "sample_lms", "sample_dpmpp_2m"]
ANCESTRAL = ["sample_euler_ancestral", "sample_dpm_2_ancestral", "sample_dpmpp_2s_ancestral"]
SDE = ["sample_dpmpp_sde", "sample_dpmpp_2m_sde", "sample_dpmpp_3m_sde"]
ESTABLISHED = [*ODE, *ANCESTRAL, *SDE]
GENERATED = sorted(
    f"sample_{name}"
    for name in SOLVERS
    if f"sample_{name}" not in (*ESTABLISHED, "sample_dpm_fast")
)
SIGMAS = torch.tensor([10.0, 4.0, 1.5, 0.4, 0.0])


def model(x, sigma):
    s = sigma.view(-1, *[1] * (x.ndim - 1))
    return torch.tanh(x / (1 + s**2).sqrt() + 0.1)


def pair(x, sigma):
    return model(x, sigma), 0.5 * model(x, sigma)


def model_for(name):
    chosen = SOLVERS.get(name.removeprefix("sample_"))
    return pair if chosen is not None and chosen.outputs == 2 else model


def noise(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return 10 * torch.randn(2, 3, 4, generator=generator, dtype=dtype)


# --- names and parameters ------------------------------------------------------------------------

LEAD = "(model, x, sigmas, extra_args=None, callback=None, disable=None"
CHURN = ", s_churn=0.0, s_tmin=0.0, s_tmax=inf, s_noise=1.0)"
STOCHASTIC = ", eta=1.0, s_noise=1.0, noise_sampler=None"
SIGNATURES = {
    "sample_euler": LEAD + CHURN,
    "sample_heun": LEAD + CHURN,
    "sample_dpm_2": LEAD + CHURN,
    "sample_lms": LEAD + ", order=4)",
    "sample_dpmpp_2m": LEAD + ")",
    "sample_euler_ancestral": LEAD + STOCHASTIC + ")",
    "sample_dpm_2_ancestral": LEAD + STOCHASTIC + ")",
    "sample_dpmpp_2s_ancestral": LEAD + STOCHASTIC + ")",
    "sample_dpmpp_sde": LEAD + STOCHASTIC + ", r=0.5)",
    "sample_dpmpp_2m_sde": LEAD + STOCHASTIC + ", solver_type='midpoint')",
    "sample_dpmpp_3m_sde": LEAD + STOCHASTIC + ")",
    "sample_dpm_fast": "(model, x, sigma_min, sigma_max, n, extra_args=None, callback=None, "
    "disable=None, eta=0.0, s_noise=1.0, noise_sampler=None)",
    "sample_deis": LEAD + ", order=3, end_order=0" + CHURN,
    "sample_ddim": LEAD + ", eta=0.0, noise_sampler=None)",
    "sample_dpmpp_2m_sde_heun": LEAD + STOCHASTIC + ")",
}


def bare(function):
    parameters = inspect.signature(function).parameters.values()
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
    return str(inspect.Signature(plain))


@pytest.mark.parametrize("name", SIGNATURES)
def test_parameters_are_real(name):
    assert name in sampling.__dict__
    function = sampling.__dict__[name]
    assert bare(function) == SIGNATURES[name]
    assert function.__name__ == name
    assert len(function.__doc__) > 20


def test_every_registered_solver_has_a_function():
    for name in SOLVERS:
        assert callable(sampling.__dict__[f"sample_{name}"])


def test_a_solver_registered_later_gets_its_function():
    @solver(order=1, source="this test")
    def half_euler(x, levels, noise, *, share: float = 1.0):
        """Euler's method with a share of the data estimate."""
        for s, t in levels.pairs():
            d = yield x, s
            x = (t.sigma / s.sigma) * x + share * (1 - t.sigma / s.sigma) * d
        return x

    try:
        assert bare(sampling.sample_half_euler) == LEAD + ", share=1.0" + CHURN
        x = noise()
        expected = sampling.sample_euler(model, x, SIGMAS, disable=True)
        assert torch.allclose(
            sampling.sample_half_euler(model, x, SIGMAS, disable=True), expected, atol=1e-6
        )
        assert not torch.allclose(
            sampling.sample_half_euler(model, x, SIGMAS, disable=True, share=0.9), expected
        )
    finally:
        del SOLVERS["half_euler"]
        vars(sampling).pop("sample_half_euler", None)
    with pytest.raises(AttributeError, match="no attribute 'sample_half_euler'"):
        _ = sampling.sample_half_euler


def test_a_solver_that_corrects_its_predictions_takes_no_churn():
    chosen = dataclasses.replace(SOLVERS["heun"], name="guess", predictor=True)
    assert bare(make_function(chosen)) == LEAD + ")"


def test_the_modules_that_programs_reach_through_it():
    from k_diffusion import utils

    assert sampling.torch is torch
    assert sampling.nn is torch.nn
    assert sampling.math is math
    assert sampling.utils is utils
    assert sampling.tqdm.__name__ == "tqdm_asyncio"
    assert sampling.torchsde.BrownianTree.__name__ == "BrownianTree"
    with pytest.raises(AttributeError, match="no attribute 'sample_eulr'"):
        _ = sampling.sample_eulr


# --- what a model and a callback see -------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", ESTABLISHED)
def test_the_model_and_the_callback_see_what_they_ever_saw(name, dtype):
    levels = SIGMAS.double() if dtype == torch.float64 else SIGMAS
    x, calls, infos = noise().to(dtype), [], []

    def watched(x, sigma, scale, shift=0.0):
        assert (scale, shift) == (1.0, 0.5)
        assert not torch.is_grad_enabled()
        assert sigma.shape == (2,)
        assert sigma.is_contiguous()
        assert sigma.dtype == x.dtype == dtype
        calls.append((x.clone(), sigma.clone(), model(x, sigma)))
        return calls[-1][2]

    result = getattr(sampling, name)(
        watched,
        x,
        levels,
        extra_args={"scale": 1.0, "shift": 0.5},
        callback=lambda info: infos.append({**info, "x": info["x"].clone()}),
        disable=True,
    )
    assert result.dtype == dtype
    assert not result.requires_grad
    assert [info["i"] for info in infos] == [0, 1, 2, 3]
    for i, info in enumerate(infos):
        assert set(info) == {"x", "i", "sigma", "sigma_hat", "denoised"}
        assert info["sigma"].shape == info["sigma_hat"].shape == ()
        assert info["sigma"].dtype == levels.dtype
        assert info["sigma"] == info["sigma_hat"] == levels[i]
        first = next(call for call in calls if torch.equal(call[0], info["x"]))
        assert torch.equal(first[1], (levels[i] * x.new_ones(2)).to(dtype))
        assert torch.equal(info["denoised"], first[2])
        assert info["denoised"].dtype == info["x"].dtype == dtype
    assert torch.equal(infos[0]["x"], x)


def test_the_callback_comes_after_the_first_call_of_an_interval_and_before_the_second():
    order = []

    def watched(x, sigma):
        order.append(round(float(sigma[0]), 3))
        return model(x, sigma)

    sampling.sample_heun(
        watched, noise(), SIGMAS[1:], callback=lambda info: order.append(info["i"]), disable=True
    )
    assert order == [4.0, 0, 1.5, 1.5, 1, 0.4, 0.4, 2]


@pytest.mark.parametrize("name", ["sample_euler", "sample_heun", "sample_dpm_2", "sample_deis"])
def test_churn_is_told_and_drawn_at_every_interval(name):
    infos, shapes, plain = [], [], torch.randn_like

    class Torch:
        def __getattr__(self, name):
            return getattr(torch, name)

        def randn_like(self, x):
            shapes.append((x.shape, x.dtype))
            return plain(x)

    sampling.torch = Torch()
    try:
        options = {"s_tmin": 1.0, "s_tmax": 5.0, "callback": infos.append, "disable": True}
        run = getattr(sampling, name)
        run(model, noise().half(), SIGMAS, s_churn=1.0, **options)
        assert shapes == [((2, 3, 4), torch.float16)] * 4
        shapes.clear()
        run(model, noise(), SIGMAS, s_churn=0.0, **options)
        assert shapes == []
    finally:
        sampling.torch = torch
    for info in infos[:4]:
        raised = info["sigma"] in (SIGMAS[1], SIGMAS[2])
        assert float(info["sigma_hat"] / info["sigma"]) == pytest.approx(1.25 if raised else 1)
        assert info["sigma"] == SIGMAS[info["i"]]
    assert torch.equal(infos[0]["x"], noise().half())
    assert (infos[1]["x"] - infos[5]["x"]).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("name", ["sample_euler", "sample_dpmpp_2m", "sample_euler_ancestral"])
def test_what_a_callback_writes_into_its_tensors_counts(name, dtype):
    """A callback that paints over x or denoised is not undone: the method goes on from there."""

    def paint_x(info):
        if info["i"] == 2:
            info["x"].mul_(0.5)

    def paint_denoised(info):
        if info["i"] == 3:
            info["denoised"].zero_()

    run, keywords = getattr(sampling, name), {"disable": True}
    if name == "sample_euler_ancestral":
        keywords["eta"] = 0.0
    plain = run(model, noise().to(dtype), SIGMAS, **keywords)
    assert not torch.allclose(
        run(model, noise().to(dtype), SIGMAS[:4], callback=paint_x, **keywords),
        run(model, noise().to(dtype), SIGMAS[:4], **keywords),
        atol=0.1,
    )
    assert torch.equal(run(model, noise().to(dtype), SIGMAS, callback=len, **keywords), plain)
    painted = run(model, noise().to(dtype), SIGMAS, callback=paint_denoised, **keywords)
    assert painted.abs().max() < 1e-2  # the last step ends at the data estimate
    assert plain.abs().max() > 0.1


def test_what_a_callback_writes_into_a_rounded_answer_counts():
    def paint(info):
        if info["i"] == 3:
            info["denoised"][0] = 0.25

    answers = []

    def precise(x, sigma):
        answers.append(model(x.float(), sigma.float()))
        return answers[-1]

    result = sampling.sample_dpmpp_2m(precise, noise().half(), SIGMAS, callback=paint, disable=True)
    assert (result[0] == 0.25).all()
    assert torch.equal(result[1], answers[-1][1].half())


def test_half_precision_keeps_what_a_callback_leaves_alone():
    """Only what a callback has changed is taken from the rounded copy that it was shown."""
    x = noise().half()

    def touch(info):
        info["x"][0] += 1

    states = []

    def watched(x, sigma):
        states.append(x.clone())
        return model(x, sigma)

    touched = sampling.sample_euler(watched, x, SIGMAS, callback=touch, disable=True)
    plain = sampling.sample_euler(watched, x, SIGMAS, disable=True)
    assert torch.equal(states[0], states[4])
    assert torch.equal(touched[1], plain[1])
    assert not torch.equal(states[1][0], states[5][0])


@pytest.mark.parametrize("name", ODE)
def test_a_callback_that_only_looks_changes_no_bit(name):
    """The answer, finer than x, is shown rounded, but taken as it is."""
    run = getattr(sampling, name)

    def precise(x, sigma):
        return model(x.float(), sigma.float())

    x = noise().half()
    watched = run(precise, x, SIGMAS[:4], callback=lambda info: None, disable=True)
    assert torch.equal(watched, run(precise, x, SIGMAS[:4], disable=True))


def test_a_prediction_is_shown_to_a_callback_but_not_taken_back():
    @solver(order=1, source="this test", predictor=True)
    def foresees(x, levels, noise):
        """Euler's method, as if its states were predictions."""
        for s, t in levels.pairs():
            d = yield x, s
            x = (t.sigma / s.sigma) * x + (1 - t.sigma / s.sigma) * d
        return x

    def paint(info):
        info["x"].zero_()

    try:
        x = noise().half()
        plain = sampling.sample_foresees(model, x, SIGMAS, disable=True)
        painted = sampling.sample_foresees(model, x, SIGMAS, callback=paint, disable=True)
        assert torch.equal(plain, painted)
    finally:
        del SOLVERS["foresees"]
        vars(sampling).pop("sample_foresees", None)


def test_a_callback_may_end_it():
    class Interrupted(Exception):
        pass

    def stop(info):
        if info["i"] == 1:
            raise Interrupted

    with pytest.raises(Interrupted):
        sampling.sample_heun(model, noise(), SIGMAS, callback=stop, disable=True)


def test_extra_args_may_change_on_the_way():
    seen, extra = [], {"k": 0}

    def watched(x, sigma, k):
        seen.append(k)
        return model(x, sigma)

    sampling.sample_euler(
        watched, noise(), SIGMAS, extra, lambda info: extra.update(k=info["i"] + 1), True
    )
    assert seen == [0, 1, 2, 3]


def test_a_model_may_write_into_its_sigma():
    def careless(x, sigma):
        answer = model(x, sigma)
        sigma.zero_()
        return answer

    expected = sampling.sample_heun(model, noise(), SIGMAS, disable=True)
    assert torch.equal(sampling.sample_heun(careless, noise(), SIGMAS, disable=True), expected)


def test_nothing_of_the_callers_is_changed():
    x, levels = noise(), SIGMAS.clone()
    for name in ESTABLISHED:
        getattr(sampling, name)(model, x, levels, disable=True)
    assert torch.equal(x, noise())
    assert torch.equal(levels, SIGMAS)


# --- levels --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*ESTABLISHED, *GENERATED])
def test_one_sigma_is_nothing_to_do(name):
    x = noise()
    for one in (SIGMAS[:1], SIGMAS[-1:]):
        assert getattr(sampling, name)(model_for(name), x, one, disable=True) is x


@pytest.mark.parametrize("name", [*ESTABLISHED, *GENERATED])
def test_one_step_to_zero_is_right_in_all(name):
    """On clean data at one point every method gives that point."""
    c = torch.linspace(-1, 1, 24).view(2, 3, 4)
    point = (lambda x, s: (c, c)) if model_for(name) is pair else (lambda x, s: c)
    result = getattr(sampling, name)(point, c + noise(), torch.tensor([10.0, 0.0]), disable=True)
    assert (result - c).abs().max() < 1e-5


@pytest.mark.parametrize("name", [*ESTABLISHED, *GENERATED])
def test_repeated_sigmas_are_steps_of_no_length(name):
    doubled = torch.tensor([10.0, 4.0, 4.0, 1.5, 0.4, 0.0, 0.0])
    seen, run = [], getattr(sampling, name)

    def watch(info):
        seen.append((info["i"], float(info["sigma"])))

    keywords = {"disable": True}
    if "noise_sampler" in inspect.signature(run).parameters:
        keywords["noise_sampler"] = lambda s, t: torch.full((2, 3, 4), math.sin(float(s)))
    once = run(model_for(name), noise(), SIGMAS, **keywords)
    twice = run(model_for(name), noise(), doubled, callback=watch, **keywords)
    assert torch.equal(once, twice)
    if name in ESTABLISHED:
        assert [i for i, _ in seen] == [0, 2, 3, 4]
        assert all(sigma == float(doubled[i]) for i, sigma in seen)


@pytest.mark.parametrize("name", ODE)
def test_rising_sigmas_invert(name):
    """Up and down again on fine levels comes back."""
    up = torch.linspace(math.log(0.1), math.log(5.0), 400, dtype=torch.float64).exp()
    run, x = getattr(sampling, name), torch.linspace(-1, 1, 24, dtype=torch.float64).view(2, 3, 4)
    noised = run(model, x, up, disable=True)
    assert (noised - x).abs().max() > 1
    back = run(model, noised, up.flip(0), disable=True)
    assert (back - x).abs().max() < (2e-2 if name == "sample_euler" else 1e-4)


@pytest.mark.parametrize("name", [*ANCESTRAL, *SDE])
def test_rising_sigmas_are_refused_where_there_is_noise(name):
    with pytest.raises(ValueError, match=f"{name[7:]} draws noise"):
        getattr(sampling, name)(model, noise(), SIGMAS[:4].flip(0), disable=True)
    getattr(sampling, name)(model, noise(), SIGMAS[:4].flip(0), disable=True, eta=0.0)


@pytest.mark.parametrize(
    "levels",
    [
        [10.0, 4.0, 1.5, 0.4, 0.0],
        (10, 4, 1.5, 0.4, 0),
        SIGMAS.numpy(),
        SIGMAS.clone().requires_grad_(),
        SIGMAS.double(),
        torch.nn.Parameter(SIGMAS.clone()),
    ],
    ids=["list", "tuple", "numpy", "requires_grad", "float64", "parameter"],
)
def test_sigmas_of_other_kinds(levels):
    infos = []
    result = sampling.sample_heun(model, noise(), levels, callback=infos.append, disable=True)
    plain = sampling.sample_heun(model, noise(), SIGMAS, disable=True)
    assert (result - plain).abs().max() < 1e-6
    assert not result.requires_grad
    assert infos[0]["sigma"].is_floating_point()
    assert not infos[0]["sigma"].requires_grad


def test_a_list_is_as_precise_as_x():
    levels, x = [10.1, 4.1, 0.1], noise(dtype=torch.float64)
    exact = torch.tensor(levels, dtype=torch.float64)
    result = sampling.sample_heun(model, x, levels, disable=True)
    assert torch.equal(result, sampling.sample_heun(model, x, exact, disable=True))
    rounded = sampling.sample_heun(model, x, exact.float(), disable=True)
    assert not torch.equal(result, rounded)


def test_integer_sigmas():
    levels = torch.tensor([10, 5, 1, 0])
    result = sampling.sample_dpmpp_2m(model, noise(), levels, disable=True)
    assert torch.equal(
        result, sampling.sample_dpmpp_2m(model, noise(), levels.float(), disable=True)
    )


def test_a_flow_models_sigmas_are_in_its_own_coordinates():
    class Flow:
        path = FLOW

        def __call__(self, x, sigma):
            return torch.full_like(x, 2.0)

    eps, levels = torch.randn(2, 3, 4), torch.tensor([1.0, 0.75, 0.5, 0.25])
    result = sampling.sample_euler(Flow(), eps, levels, disable=True)
    assert (result - (0.75 * 2 + 0.25 * eps)).abs().max() < 1e-6


# --- noise ---------------------------------------------------------------------------------------


def asked(name, levels, **keywords):
    times = []

    def sampler(sigma, sigma_next):
        times.append((sigma, sigma_next))
        return torch.zeros(2, 3, 4)

    getattr(sampling, name)(model, noise(), levels, noise_sampler=sampler, disable=True, **keywords)
    return times


@pytest.mark.parametrize("eta", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("name", ANCESTRAL)
def test_ancestral_samplers_ask_once_for_each_interval_above_zero(name, eta):
    times = asked(name, SIGMAS, eta=eta)
    for (a, b), i in zip(times, range(3), strict=True):
        assert a.shape == b.shape == ()
        assert a.dtype == b.dtype == torch.float32
        assert (a, b) == (SIGMAS[i], SIGMAS[i + 1])
        assert a.data_ptr() == SIGMAS[i].data_ptr()  # the caller's own


@pytest.mark.parametrize("name", ["sample_dpmpp_2m_sde", "sample_dpmpp_3m_sde"])
def test_multistep_sde_samplers_ask_only_where_there_is_eta(name):
    assert asked(name, SIGMAS) == list(itertools.pairwise(SIGMAS[:4].unbind()))
    assert asked(name, SIGMAS, eta=0.0) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dpmpp_sde_asks_for_the_middle_and_the_whole(dtype):
    levels = SIGMAS.to(dtype)
    times = asked("sample_dpmpp_sde", levels, r=0.25)
    assert len(times) == 6
    for i, (middle, whole) in enumerate(zip(times[::2], times[1::2], strict=True)):
        s, t = levels[i].log().neg(), levels[i + 1].log().neg()
        assert middle[0] == whole[0] == s.neg().exp().clamp(0.4, 10.0)
        assert middle[1] == (s + (t - s) * 0.25).neg().exp()
        assert whole[1] == t.neg().exp().clamp(levels[3], levels[0])
        assert {time.dtype for time in (*middle, *whole)} == {dtype}
    low = min(float(time) for pair in times for time in pair)
    high = max(float(time) for pair in times for time in pair)
    assert low >= float(levels[3])
    assert high <= float(levels[0])


def test_no_noise_is_made_where_none_is_used(monkeypatch):
    def never(*args):
        raise AssertionError("made")

    monkeypatch.setattr(sampling, "BrownianTreeNoiseSampler", never)
    monkeypatch.setattr(sampling, "default_noise_sampler", never)
    state = torch.get_rng_state()
    for name in (*ANCESTRAL, *SDE):
        getattr(sampling, name)(model, noise(), SIGMAS, eta=0.0, disable=True)
    for name in ODE:
        getattr(sampling, name)(model, noise(), SIGMAS, disable=True)
    assert torch.equal(torch.get_rng_state(), state)


def test_noise_of_another_dtype_is_taken():
    result = sampling.sample_euler_ancestral(
        model,
        noise(),
        SIGMAS,
        noise_sampler=lambda s, t: torch.ones(2, 3, 4).double(),
        disable=True,
    )
    assert result.dtype == torch.float32
    level = Levels.from_sigmas([2.0])[0]
    source = EstablishedNoise(
        noise().half(), lambda s, t: torch.ones(2, 3, 4).half(), lambda iv: iv
    )
    assert source.draw((level, level)).dtype == torch.float32  # the state's


# --- what image editors replace ------------------------------------------------------------------


class PerImage:
    """torch, but with noise of one generator per image."""

    def __init__(self, seeds):
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __getattr__(self, name):
        return getattr(torch, name)

    def randn_like(self, x):
        each = [torch.randn(x.shape[1:], generator=g, dtype=x.dtype) for g in self.generators]
        return torch.stack(each)


@pytest.mark.parametrize("name", [*ANCESTRAL, "sample_euler", "sample_ddpm", "sample_ddim"])
def test_a_replaced_torch_gives_each_image_its_own_noise(name, monkeypatch):
    if name not in vars(sampling):
        pytest.skip("no such solver")
    run = getattr(sampling, name)
    keywords = {"sample_euler": {"s_churn": 2.0}, "sample_ddim": {"eta": 1.0}}.get(name, {})
    x = noise()
    monkeypatch.setattr(sampling, "torch", PerImage([1, 2]))
    both = run(model, x, SIGMAS, disable=True, **keywords)
    monkeypatch.setattr(sampling, "torch", PerImage([2]))
    second = run(model, x[1:], SIGMAS, disable=True, **keywords)
    assert torch.equal(both[1:], second)
    monkeypatch.setattr(sampling, "torch", PerImage([3]))
    assert not torch.equal(both[1:], run(model, x[1:], SIGMAS, disable=True, **keywords))


def test_a_replaced_noise_sampler_is_used(monkeypatch):
    made = []

    def constant(x):
        made.append(x.shape)
        return lambda sigma, sigma_next: torch.zeros_like(x)

    monkeypatch.setattr(sampling, "default_noise_sampler", constant)
    runs = [sampling.sample_euler_ancestral(model, noise(), SIGMAS, disable=True) for _ in "ab"]
    assert torch.equal(*runs)
    assert made == [(2, 3, 4)] * 2


@pytest.mark.parametrize("name", SDE)
def test_a_replaced_brownian_tree_is_used(name, monkeypatch):
    made, original = [], sampling.BrownianTreeNoiseSampler

    def seeded(x, sigma_min, sigma_max):
        made.append((sigma_min, sigma_max))
        return original(x, sigma_min, sigma_max, seed=[8, 9])

    torch.manual_seed(0)
    plain = getattr(sampling, name)(model, noise(), SIGMAS, disable=True)
    monkeypatch.setattr(sampling, "BrownianTreeNoiseSampler", seeded)
    runs = [getattr(sampling, name)(model, noise(), SIGMAS, disable=True) for _ in "ab"]
    assert torch.equal(*runs)
    assert not torch.equal(runs[0], plain)
    assert made == [(SIGMAS[3], SIGMAS[0])] * 2


def test_a_replaced_randn_of_torchsde_is_used(monkeypatch):
    import torchsde

    calls = []

    def randn(size, dtype, device, seed):
        calls.append(seed)
        return torch.zeros(size, dtype=dtype, device=device)

    module = torchsde._brownian.brownian_interval
    monkeypatch.setattr(module, "_randn", randn)
    sampler = sampling.BrownianTreeNoiseSampler(noise(), 0.1, 10.0, seed=1)
    assert not sampler(torch.tensor(5.0), torch.tensor(2.0)).any()
    assert calls


def test_a_replaced_trange_drives_the_loop(monkeypatch):
    seen = []

    def trange(*args, disable=None):
        seen.append((args, disable))
        for i in range(*args):
            seen.append(i)
            yield i

    monkeypatch.setattr(sampling, "trange", trange)
    for name in ESTABLISHED:
        seen.clear()
        getattr(sampling, name)(model, noise(), SIGMAS, disable=False)
        assert seen == [((4,), False), 0, 1, 2, 3]


@pytest.mark.parametrize("name", ESTABLISHED)
def test_a_trange_that_ends_early_gives_the_state_so_far(name, monkeypatch):
    inputs = []

    def watched(x, sigma):
        inputs.append((x.clone(), float(sigma[0])))
        return model(x, sigma)

    keywords = {"disable": True}
    if name not in ODE:
        keywords["noise_sampler"] = lambda s, t: torch.ones(2, 3, 4)
    getattr(sampling, name)(watched, noise(), SIGMAS, **keywords)
    third = [x for x, sigma in inputs if sigma == float(SIGMAS[2])][-1]  # heun asks there twice
    monkeypatch.setattr(sampling, "trange", lambda n, disable=None: range(2))
    result = getattr(sampling, name)(model, noise(), SIGMAS, **keywords)
    assert torch.equal(result, third)


@pytest.mark.parametrize("name", ESTABLISHED)
def test_a_trange_that_goes_on_changes_nothing(name, monkeypatch):
    options = {} if name in ODE else {"noise_sampler": lambda s, t: torch.ones(2, 3, 4)}
    plain = getattr(sampling, name)(model, noise(), SIGMAS, disable=True, **options)
    monkeypatch.setattr(sampling, "trange", lambda n, disable=None: range(n + 3))
    result = getattr(sampling, name)(model, noise(), SIGMAS, disable=True, **options)
    assert torch.equal(result, plain)


def test_replaced_tools_are_used_by_the_other_tools(monkeypatch):
    used = []

    class Tree(sampling.BatchedBrownianTree):
        def __init__(self, *args, **kwargs):
            used.append("tree")
            super().__init__(*args, **kwargs)

    class Torchsde:
        @staticmethod
        def BrownianTree(*args, **kwargs):
            used.append("torchsde")
            return lambda t0, t1: torch.ones(2, 3, 4)

    def append_zero(x):
        used.append("zero")
        return torch.cat([x, x.new_zeros(1)])

    monkeypatch.setattr(sampling, "BatchedBrownianTree", Tree)
    monkeypatch.setattr(sampling, "torchsde", Torchsde, raising=False)
    monkeypatch.setattr(sampling, "append_zero", append_zero)
    tree = sampling.BrownianTreeNoiseSampler(noise(), 0.1, 10.0, seed=1)
    assert used == ["tree", "torchsde"]
    assert torch.equal(tree(4.0, 0.0 + 3.0), -torch.ones(2, 3, 4))
    for kind in ("karras", "exponential", "polyexponential"):
        getattr(sampling, f"get_sigmas_{kind}")(3, 0.1, 10.0)
    sampling.get_sigmas_vp(3)
    assert used[2:] == ["zero"] * 4


def test_a_replaced_function_is_called(monkeypatch):
    monkeypatch.setattr(sampling, "sample_euler", lambda *args, **kwargs: "mine")
    assert sampling.sample_euler(model, noise(), SIGMAS) == "mine"


# --- progress ------------------------------------------------------------------------------------


def test_the_bar_counts_intervals():
    text = io.StringIO()
    with contextlib.redirect_stderr(text):
        sampling.sample_heun(model, noise(), SIGMAS)
        sampling.sample_heun(model, noise(), SIGMAS, disable=False)
    assert "4/4" in text.getvalue()
    text = io.StringIO()
    with contextlib.redirect_stderr(text):
        sampling.sample_heun(model, noise(), SIGMAS, disable=True)
    assert text.getvalue() == ""


def test_trange_is_tqdms():
    assert sampling.trange(3, disable=True) == range(3)  # no bar, and no tqdm
    bar = sampling.trange(2, 4, disable=True, desc="x")
    assert bar.total == 2
    assert list(bar) == [2, 3]


# --- dpm_fast ------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 4, 6, 7])
def test_dpm_fast_makes_n_calls_and_counts_them(n, monkeypatch):
    counted, calls, infos = [], [], []

    class Bar:
        def __init__(self, total, disable):
            counted.append((total, disable))

        def __enter__(self):
            return self

        def __exit__(self, *args):
            counted.append("closed")

        def update(self):
            counted.append(len(calls))

    def watched(x, sigma):
        calls.append(float(sigma[0]))
        return model(x, sigma)

    monkeypatch.setattr(sampling, "tqdm", Bar, raising=False)
    sampling.sample_dpm_fast(watched, noise(), 0.1, 10.0, n, None, infos.append, True)
    assert counted == [(n, True), *range(1, n + 1), "closed"]
    steps = n // 3 + 1
    assert [info["i"] for info in infos] == list(range(steps))
    for i, info in enumerate(infos):
        assert set(info) == {"x", "i", "t", "t_up", "sigma", "sigma_hat", "denoised"}
        assert float(info["sigma"]) == pytest.approx(10 * 0.01 ** (i / steps))
        assert float(info["t"]) == pytest.approx(-math.log(float(info["sigma"])), rel=1e-5)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_dpm_fast_asks_for_noise_in_every_step(eta):
    times = []

    def sampler(sigma, sigma_next):
        times.append((float(sigma), float(sigma_next)))
        return torch.zeros(2, 3, 4)

    keywords = {"eta": eta, "noise_sampler": sampler, "disable": True}
    sampling.sample_dpm_fast(model, noise(), 0.1, 10.0, 7, **keywords)
    ends = [10 * 0.01 ** (i / 3) for i in range(4)]
    assert times == [pytest.approx(pair, rel=1e-5) for pair in itertools.pairwise(ends)]


def test_dpm_fast_takes_tensors_and_goes_up():
    ends = torch.tensor(0.1), torch.tensor(10.0)
    plain = sampling.sample_dpm_fast(model, noise(), 0.1, 10.0, 7, disable=True)
    result = sampling.sample_dpm_fast(model, noise(), *ends, 7, disable=True)
    assert (result - plain).abs().max() < 1e-6
    x = torch.linspace(-1, 1, 24, dtype=torch.float64).view(2, 3, 4)
    noised = sampling.sample_dpm_fast(model, x, 10.0, 0.1, 300, disable=True)
    assert noised.abs().max() > 5
    back = sampling.sample_dpm_fast(model, noised, 0.1, 10.0, 300, disable=True)
    assert (back - x).abs().max() < 5e-4


# --- solvers without an established name ---------------------------------------------------------


@pytest.mark.parametrize("name", GENERATED)
def test_a_generated_function_is_its_plan(name):
    """The same numbers as a run of the plan by hand, and a callback for each first query."""
    chosen, x, infos = SOLVERS[name[7:]], noise(dtype=torch.float64), []
    levels = SIGMAS.double()

    def sampler(sigma, sigma_next):
        generator = torch.Generator().manual_seed(int(1e6 * float(sigma)) % 2**31)
        return torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)

    keywords = {"callback": infos.append, "disable": True}
    noisy = "noise_sampler" in inspect.signature(getattr(sampling, name)).parameters
    if noisy:
        keywords["noise_sampler"] = sampler
    result = getattr(sampling, name)(model_for(name), x, levels, **keywords)

    plan = make_plan(chosen, Levels.from_sigmas(levels.tolist()), intervals=True)
    run = Run(plan, x, CallerNoise(sampler, x))
    while not run.done:
        answers = model_for(name)(run.x, run.sigma)
        run.advance(*(answers if chosen.outputs == 2 else (answers,)))
    if not any(draw.interval.fresh for draw in plan.draws):
        assert torch.equal(result, run.result)
    starts = [step.level.sigma for step in plan.steps if step.start]
    assert [float(info["sigma"]) for info in infos] == starts
    assert [info["i"] for info in infos] == list(range(len(starts)))


def test_generated_functions_draw_on_atoms_where_the_noise_is_their_own(monkeypatch):
    """Overlapping intervals share a path, which independent draws for each would not."""
    made = []
    monkeypatch.setattr(
        sampling,
        "default_noise_sampler",
        lambda x: lambda *times: (made.append(tuple(map(float, times))), torch.zeros_like(x))[1],
    )
    chosen = SOLVERS["dpmpp_sde"]  # it asks for overlapping intervals
    make_function(chosen)(model, noise(), SIGMAS, disable=True)
    ends = [time for pair in made for time in pair]
    assert sorted(made, reverse=True) == made
    assert len(set(ends)) == 7  # three whole intervals, each cut once
    assert all(a[1] == b[0] for a, b in itertools.pairwise(made))
    asked = []

    def mine(*times):
        asked.append(tuple(map(float, times)))
        return torch.zeros(2, 3, 4)

    make_function(chosen)(model, noise(), SIGMAS, disable=True, noise_sampler=mine)
    assert [time for pair in asked[1::2] for time in pair] == pytest.approx(
        [10, 4, 4, 1.5, 1.5, 0.4]
    )
    assert [pair[0] for pair in asked[::2]] == [pair[0] for pair in asked[1::2]]


def test_generated_functions_take_positions_and_keywords():
    run = sampling.sample_deis
    by_position = run(model, noise(), SIGMAS, None, None, True, 2)
    assert torch.equal(by_position, run(model, noise(), SIGMAS, disable=True, order=2))
    assert not torch.equal(by_position, run(model, noise(), SIGMAS, disable=True, order=1))
    import numpy as np

    order, eta = np.int64(2), np.float32(0)
    assert torch.equal(by_position, run(model, noise(), SIGMAS, disable=True, order=order))
    assert torch.equal(
        sampling.sample_ddim(model, noise(), SIGMAS, disable=True, eta=eta),
        sampling.sample_ddim(model, noise(), SIGMAS, disable=True),
    )


@pytest.fixture
def two_outputs():
    @solver(order=1, source="this test", outputs=2)
    def guided_euler(x, levels, noise):
        """Euler's method with the noise of the second estimate."""
        for s, t in levels.pairs():
            d, u = yield x, s
            x = d + (t.sigma / s.sigma) * (x - u)
        return x

    yield "sample_guided_euler"
    del SOLVERS["guided_euler"]
    vars(sampling).pop("sample_guided_euler", None)


def test_two_outputs(two_outputs):
    run, x, infos = getattr(sampling, two_outputs), noise(), []
    result = run(pair, x, SIGMAS, callback=infos.append, disable=True)
    for s, t in itertools.pairwise(SIGMAS):
        d, u = pair(x, s * x.new_ones(2))
        x = d + (t / s) * (x - u)
    assert (result - x).abs().max() < 1e-6
    assert torch.equal(infos[0]["denoised"], model(noise(), SIGMAS[0] * torch.ones(2)))


@pytest.mark.parametrize("answer", [model, lambda x, s: [model(x, s)] * 3])
def test_two_outputs_are_asked_for_by_name(two_outputs, answer):
    with pytest.raises(TypeError, match=r"pair \(denoised, uncond_denoised\) for sample_guided"):
        getattr(sampling, two_outputs)(answer, noise(), SIGMAS, disable=True)


# --- imports -------------------------------------------------------------------------------------


def test_nothing_heavy_is_imported_until_it_is_used():
    script = (
        "import sys, torch; before = set(sys.modules)\n"
        "import k_diffusion.sampling as s\n"
        "x = torch.randn(1, 2)\n"
        "for name in ('euler', 'dpmpp_2m_sde', 'dpmpp_sde'):\n"
        "    eta = {} if name == 'euler' else {'eta': 0.0}\n"
        "    getattr(s, 'sample_' + name)(lambda x, s: x / 2, x, [9.0, 1.0], disable=True, **eta)\n"
        "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    brought = set(done.stdout.split())
    assert not brought & {"torchsde", "trampoline", "scipy", "tqdm", "torchdiffeq"}


# --- the caller's surroundings -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sample_heun", "sample_dpm_fast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_model_that_answers_in_one_buffer(name, dtype):
    x = noise().to(dtype)
    range_ = (0.4, 10.0, 7) if name == "sample_dpm_fast" else (SIGMAS,)
    buffer = torch.empty_like(x)

    def static(x, sigma):
        return buffer.copy_(model(x, sigma))

    function = getattr(sampling, name)
    assert torch.equal(
        function(static, x, *range_, disable=True), function(model, x, *range_, disable=True)
    )


@pytest.mark.parametrize("name", [*ESTABLISHED, "sample_dpm_fast", "sample_dpm_adaptive"])
def test_a_default_device_of_another_kind(name):
    x = noise()
    range_ = {"sample_dpm_fast": (0.4, 10.0, 7), "sample_dpm_adaptive": (0.4, 10.0)}
    levels = range_.get(name, (SIGMAS,))

    def run():
        torch.manual_seed(0)
        options = {} if name in ODE else {"noise_sampler": lambda s, t: torch.randn_like(x)}
        return getattr(sampling, name)(model, x, *levels, disable=True, **options)

    plain = run()
    with torch.device("meta"):
        assert torch.equal(run(), plain)


def test_levels_lie_where_they_are_asked_for_whatever_the_default_device():
    plain = sampling.get_sigmas_karras(5, 0.1, 10.0)
    with torch.device("meta"):
        assert torch.equal(sampling.get_sigmas_karras(5, 0.1, 10.0), plain)


def test_adaptive_pairs_under_a_default_device_of_another_kind():
    x, ends = noise(), (sampling.Level(1.0, 10.0), sampling.Level(1.0, 0.4))
    plain, _ = sampling.sample_adaptive(FunctionDenoiser(model), x, *ends)
    with torch.device("meta"):
        other, _ = sampling.sample_adaptive(FunctionDenoiser(model), x, *ends)
    assert torch.equal(other, plain)


@pytest.mark.parametrize("name", [*ESTABLISHED, "sample_ddim", "sample_unipc"])
def test_the_wrapped_function_keeps_gradients(name):
    # Programs differentiate through a sampler by its `__wrapped__`.
    sigmas = SIGMAS[1:].double()

    def run(function, x):
        torch.manual_seed(0)
        options = {} if name in ODE or name == "sample_unipc" else {"eta": 0.0}
        return function(model, x, sigmas, disable=True, **options)

    function = getattr(sampling, name)
    x = noise(dtype=torch.float64).requires_grad_()
    assert not run(function, x).requires_grad
    y = run(function.__wrapped__, x)
    assert torch.equal(y.detach(), run(function, x))
    assert inspect.signature(function.__wrapped__) == inspect.signature(function)
    way = noise(1, torch.float64)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    h = 1e-5
    with torch.no_grad():
        slope = (run(function, x + h * way) - run(function, x - h * way)).sum() / (2 * h)
    assert (gradient * way).sum() == pytest.approx(float(slope), rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("name", ["sample_dpm_fast", "sample_dpm_adaptive"])
def test_the_wrapped_functions_of_a_range_keep_gradients(name):
    x = noise(dtype=torch.float64).requires_grad_()
    count = (5,) if name == "sample_dpm_fast" else ()
    function = getattr(sampling, name)
    assert not function(model, x, 0.4, 4.0, *count, disable=True).requires_grad
    assert function.__wrapped__(model, x, 0.4, 4.0, *count, disable=True).requires_grad
    assert callable(sampling.log_likelihood.__wrapped__)


def test_a_star_import_holds_every_function():
    names: dict[str, object] = {}
    exec("from k_diffusion.sampling import *", names)
    assert {f"sample_{name}" for name in SOLVERS} <= names.keys()
