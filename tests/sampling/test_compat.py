"""How programs call the established functions: names, parameters, levels, imports, surroundings."""

from __future__ import annotations

import dataclasses
import inspect
import math
import subprocess
import sys

import pytest
import torch
from established_models import (
    ANCESTRAL,
    ESTABLISHED,
    GENERATED,
    ODE,
    SDE,
    SIGMAS,
    model,
    model_for,
    noise,
    pair,
)

from k_diffusion import sampling
from k_diffusion.denoiser import FunctionDenoiser
from k_diffusion.sampling import SOLVERS, solver
from k_diffusion.sampling.compat import make_function
from k_diffusion.utils.levels import FLOW

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
