"""Wrong input to the established functions: an error that names it, or the right answer."""

from __future__ import annotations

import math

import pytest
import torch

from k_diffusion import sampling
from k_diffusion.sampling import SOLVERS

SDE = ["sample_dpmpp_sde", "sample_dpmpp_2m_sde", "sample_dpmpp_3m_sde"]
NAMES = sorted(f"sample_{name}" for name in SOLVERS if name != "dpm_fast")
SIGMAS = torch.tensor([10.0, 4.0, 1.5, 0.4, 0.0])
X = torch.linspace(-10, 10, 24).view(2, 3, 4)


def model(x, sigma):
    return 0.5 * x


def never(x, sigma):
    raise AssertionError("called")


def refused(name, error, text, model=model, x=X, sigmas=SIGMAS, **keywords):
    with pytest.raises(error, match=text) as caught:
        getattr(sampling, name)(model, x, sigmas, disable=True, **keywords)
    assert "\n" not in str(caught.value)


BAD_SIGMAS = {
    "not monotone": ([10.0, 1.0, 4.0, 0.0], r"sigmas\[1\] is 1\.0 and sigmas\[2\] is 4\.0"),
    "up and down": ([1.0, 4.0, 1.0], "must go one way"),
    "rising from 0": ([0.0, 1.0, 4.0], "rise from 0"),
    "negative": ([10.0, -1.0, 0.0], r"sigmas\[1\] of .* is -1\.0"),
    "not a number": ([10.0, math.nan, 0.0], r"sigmas\[1\] of .* is nan"),
    "not a number first": ([math.nan, 1.0, 0.0], r"sigmas\[0\] of .* is nan"),
    "infinite": ([math.inf, 1.0, 0.0], r"sigmas\[0\] of .* is inf"),
    "one, not a number": ([math.nan], r"sigmas\[0\] of .* is nan"),
    "all zero": ([0.0, 0.0, 0.0], "are all 0"),
    "empty": ([], r"shape \(n,\) with n >= 1, got \(0,\)"),
    "2-D": ([[10.0, 1.0], [1.0, 0.0]], r"shape \(n,\) with n >= 1, got \(2, 2\)"),
    "0-D": (10.0, r"shape \(n,\) with n >= 1, got \(\)"),
}


@pytest.mark.parametrize("kind", BAD_SIGMAS)
def test_bad_sigmas(kind):
    values, text = BAD_SIGMAS[kind]
    for name in NAMES:
        refused(name, ValueError, f"sigmas.* of {name}", model=never, sigmas=torch.tensor(values))
        refused(name, ValueError, text, sigmas=torch.tensor(values))


@pytest.mark.parametrize(
    ("sigmas", "text"),
    [
        ("karras", "sequence of numbers"),
        (None, "sequence of numbers"),
        (["a", "b"], "sequence of numbers"),
        ([[1.0], [1.0, 2.0]], "sequence of numbers"),
        (torch.tensor([1j, 0j]), "real numbers, got torch.complex64"),
        (torch.tensor([True, False]), "real numbers, got torch.bool"),
    ],
)
def test_sigmas_of_no_use(sigmas, text):
    refused("sample_euler", TypeError, f"sigmas of sample_euler must be .*{text}", sigmas=sigmas)


BAD_X = {
    "NaN": (X.clone().index_fill_(0, torch.tensor([1]), math.nan), ValueError, "50.0%"),
    "inf": (X.clone().fill_(math.inf), ValueError, "x, the initial state of .*not finite"),
    "integers": (torch.ones(2, 3, dtype=torch.int64), TypeError, "x of .*got torch.int64"),
    "complex": (torch.ones(2, 3) + 0j, TypeError, "x of .*got torch.complex64"),
    "no tensor": ([1.0, 2.0], TypeError, "x of .*got list"),
    "no sample": (torch.ones(0, 3), ValueError, r"x of .*B >= 1, got \(0, 3\)"),
    "a number": (torch.tensor(1.0), ValueError, r"x of .*got \(\)"),
}


@pytest.mark.parametrize("kind", BAD_X)
def test_bad_x(kind):
    x, error, text = BAD_X[kind]
    for name in NAMES:
        refused(name, error, text, x=x)
        refused(name, error, name, model=never, x=x)


def test_a_model_that_cannot_be_called():
    refused("sample_heun", TypeError, "model of sample_heun must be callable, got str", model="x")


BAD_ANSWERS = {
    "one channel": (
        lambda x, s: x[:, :1],
        ValueError,
        r"of x's shape \(2, 3, 4\), got \(2, 1, 4\)",
    ),
    "one sample": (lambda x, s: x[:1], ValueError, r"got \(1, 3, 4\)"),
    "None": (lambda x, s: None, TypeError, "got NoneType"),
    "a tuple": (lambda x, s: (x, x), TypeError, "got tuple"),
    "integers": (lambda x, s: x.long(), TypeError, "got torch.int64"),
    "complex": (lambda x, s: x + 0j, TypeError, "got torch.complex64"),
    "elsewhere": (lambda x, s: x.to("meta"), ValueError, "on x's device cpu, got meta"),
}


@pytest.mark.parametrize("kind", BAD_ANSWERS)
@pytest.mark.parametrize("name", ["sample_euler", "sample_dpmpp_2m", "sample_dpmpp_3m_sde"])
def test_bad_answers(name, kind):
    answer, error, text = BAD_ANSWERS[kind]
    called = []
    refused(name, error, f"the model .*{name}.*{text}", model=answer, callback=called.append)
    assert called == []


def test_an_answer_of_another_float_dtype_is_taken():
    x = X.half()
    result = sampling.sample_heun(lambda x, s: 0.5 * x.float(), x, SIGMAS, disable=True)
    assert result.dtype == torch.float16
    plain = sampling.sample_heun(model, X, SIGMAS, disable=True)
    assert (result.float() - plain).abs().max() < 2e-3
    double = sampling.sample_heun(lambda x, s: 0.5 * x.double(), X, SIGMAS, disable=True)
    assert double.dtype == torch.float32


def test_a_result_that_is_not_finite_is_told():
    def broken(x, sigma):
        return torch.full_like(x, math.nan)

    with pytest.warns(RuntimeWarning, match="the result of sample_euler is not finite in 100.0%"):
        sampling.sample_euler(broken, X, SIGMAS, disable=True)
    with pytest.warns(RuntimeWarning, match="result of sample_dpm_fast") as told:
        sampling.sample_dpm_fast(broken, X, 0.1, 10.0, 3, disable=True)
    assert told[0].filename == __file__


@pytest.mark.parametrize("name", ["sample_euler_ancestral", *SDE, "sample_ddim"])
@pytest.mark.parametrize(
    ("made", "text"),
    [
        (torch.ones(2, 1, 4), r"noise_sampler returned \(2, 1, 4\).*\(2, 3, 4\)"),
        (None, "noise_sampler returned NoneType"),
        (X.to("meta"), "noise_sampler returned noise on meta for x on cpu: draw it there"),
    ],
)
def test_a_noise_sampler_of_another_shape(name, made, text):
    refused(name, ValueError, text, noise_sampler=lambda s, t: made, eta=1.0)


def test_a_replaced_randn_like_of_another_shape(monkeypatch):
    class Torch:
        def __getattr__(self, name):
            return getattr(torch, name)

        def randn_like(self, x):
            return torch.ones(1)

    monkeypatch.setattr(sampling, "torch", Torch())
    refused("sample_euler", ValueError, "torch.randn_like returned", s_churn=1.0)


def test_options():
    text = r"solver_type must be 'heun' or 'midpoint', got 'euler'"
    refused("sample_dpmpp_2m_sde", ValueError, text, solver_type="euler")
    refused("sample_dpmpp_2m_sde", ValueError, r"solver_type must be .* got \[\]", solver_type=[])
    refused("sample_euler", TypeError, "s_churn of sample_euler must be a number", s_churn=None)
    refused("sample_deis", TypeError, "s_tmin of sample_deis must be a number", s_tmin="a")
    refused("sample_lms", ValueError, "order must be 1 or more, got 0", order=0)
    refused("sample_lms", ValueError, "order must be of type int", order=1.5)
    refused("sample_euler", ValueError, "s_churn must be 0 or more, got -1.0", s_churn=-1)
    refused("sample_euler", ValueError, "s_churn must be 0 or more, got nan", s_churn=math.nan)
    refused("sample_euler", ValueError, "s_tmin must be 0 or more", s_churn=1, s_tmin=-1)
    refused("sample_euler_ancestral", ValueError, "eta must be 0 or more, got -1", eta=-1)
    refused("sample_dpmpp_sde", ValueError, "eta must be finite, got nan", eta=math.nan)
    refused("sample_dpmpp_sde", ValueError, "r must lie in", r=0.0)
    refused("sample_deis", TypeError, "sample_deis: got an unexpected keyword .*'odrer'", odrer=2)
    refused("sample_ddim", TypeError, "sample_ddim: .*'s_churn'", s_churn=1.0)
    with pytest.raises(TypeError, match="sample_deis: missing a required argument: 'sigmas'"):
        sampling.sample_deis(model, X)


def test_churn_is_no_matter_for_rising_sigmas():
    rising = SIGMAS[:4].flip(0)
    refused("sample_euler", ValueError, "euler draws noise", sigmas=rising, s_churn=1.0)


@pytest.mark.parametrize(
    ("low", "high", "n", "text"),
    [
        (0.0, 10.0, 5, "sigma_min of sample_dpm_fast must be finite and above 0, got 0.0"),
        (0.1, 0.0, 5, "sigma_max of sample_dpm_fast must be finite and above 0, got 0.0"),
        (-0.1, 10.0, 5, "sigma_min .* got -0.1"),
        (math.nan, 10.0, 5, "sigma_min .* got nan"),
        (0.1, math.inf, 5, "sigma_max .* got inf"),
        (2.0, 2.0, 5, "must differ, both are 2.0"),
        (0.1, 10.0, 0, "n of sample_dpm_fast, the calls of the model, must be 1 or more, got 0"),
    ],
)
def test_dpm_fast(low, high, n, text):
    with pytest.raises(ValueError, match=text):
        sampling.sample_dpm_fast(model, X, low, high, n, disable=True)


def test_dpm_fast_of_other_kinds():
    with pytest.raises(ValueError, match="eta of sample_dpm_fast must be 0 to go up from 0.1"):
        sampling.sample_dpm_fast(model, X, 10.0, 0.1, 5, eta=1.0, disable=True)
    with pytest.raises(TypeError, match="'float' object cannot be interpreted as an integer"):
        sampling.sample_dpm_fast(model, X, 0.1, 10.0, 5.5, disable=True)
    for x, error in ((X.long(), TypeError), (X * math.nan, ValueError)):
        with pytest.raises(error, match="sample_dpm_fast"):
            sampling.sample_dpm_fast(model, x, 0.1, 10.0, 5, disable=True)


@pytest.mark.parametrize("name", ["karras", "exponential", "polyexponential"])
def test_levels_below_their_range(name):
    function = getattr(sampling, f"get_sigmas_{name}")
    wanted = "0 or more" if name == "karras" else "above 0"
    with pytest.raises(
        ValueError, match=f"sigma_min of get_sigmas_{name} must be {wanted}, got -1.0"
    ):
        function(3, -1.0, 10.0)
    with pytest.raises(ValueError, match=f"sigma_max of get_sigmas_{name} .* got nan"):
        function(3, 1.0, math.nan)
    if name == "karras":
        assert function(3, 0.0, 10.0).tolist() == pytest.approx([10.0, 10 / 128, 0, 0])
    else:
        with pytest.raises(ValueError, match=f"sigma_min of .*{name} must be above 0, got 0.0"):
            function(3, 0.0, 10.0)


def test_a_slope_of_more_sigmas_than_dimensions():
    with pytest.raises(ValueError, match=r"sigma of to_d must .* \(2, 3, 4\), got \(2, 1, 1, 1\)"):
        sampling.to_d(X, torch.ones(2, 1, 1, 1), X)
