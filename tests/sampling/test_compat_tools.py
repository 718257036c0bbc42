"""The established helper functions and Brownian trees."""

from __future__ import annotations

import itertools
import math
import sys

import numpy as np
import pytest
import torch
from scipy.integrate import quad

from k_diffusion import sampling
from k_diffusion.sampling import (
    BatchedBrownianTree,
    BrownianTreeNoiseSampler,
    append_zero,
    default_noise_sampler,
    get_ancestral_step,
    get_sigmas_exponential,
    get_sigmas_karras,
    get_sigmas_polyexponential,
    get_sigmas_vp,
    linear_multistep_coeff,
    to_d,
)

# --- levels --------------------------------------------------------------------------------------


def close(sigmas, expected):
    assert sigmas.dtype == torch.float32
    assert sigmas[-1] == 0
    for sigma, value in zip(sigmas[:-1].tolist(), expected, strict=True):
        assert sigma == pytest.approx(value, rel=3e-6)


def test_karras():
    ends = [s ** (1 / 7) for s in (80.0, 0.002)]
    expected = [(ends[0] + k / 9 * (ends[1] - ends[0])) ** 7 for k in range(10)]
    close(get_sigmas_karras(10, 0.002, 80.0), expected)
    ends = [s ** (1 / 5) for s in (10.0, 0.1)]
    expected = [(ends[0] + k / 3 * (ends[1] - ends[0])) ** 5 for k in range(4)]
    close(get_sigmas_karras(4, 0.1, 10.0, 5.0, "cpu"), expected)
    close(get_sigmas_karras(1, 0.1, 10.0), [10.0])


def test_exponential():
    close(get_sigmas_exponential(5, 0.1, 10.0), [10 * 0.01 ** (k / 4) for k in range(5)])


@pytest.mark.parametrize("rho", [1.0, 2.0, 0.5])
def test_polyexponential(rho):
    expected = [0.1 * 100 ** ((1 - k / 4) ** rho) for k in range(5)]
    close(get_sigmas_polyexponential(5, 0.1, 10.0, rho), expected)


def test_polyexponential_of_rho_1_is_exponential():
    a, b = get_sigmas_polyexponential(8, 0.03, 14.6), get_sigmas_exponential(8, 0.03, 14.6)
    assert torch.allclose(a, b, rtol=1e-5)


def test_vp():
    def sigma(t, d=19.9, m=0.1):
        return math.sqrt(math.expm1(d * t**2 / 2 + m * t))

    times = [1 + k / 4 * (1e-3 - 1) for k in range(5)]
    sigmas = get_sigmas_vp(5)
    assert sigmas[0] == pytest.approx(sigma(1.0), rel=1e-5)
    for value, t in zip(sigmas[1:4].tolist(), times[1:4], strict=True):
        assert value == pytest.approx(sigma(t), rel=1e-4)
    assert sigmas[4] == pytest.approx(sigma(1e-3), rel=1e-2)  # float32 loses digits there
    assert sigmas[5] == 0
    assert get_sigmas_vp(3, 10.0, 0.2, 0.01)[0] == pytest.approx(sigma(1.0, 10.0, 0.2), rel=1e-5)


def test_append_zero():
    x = torch.tensor([2.0, 1.0], dtype=torch.float64)
    assert torch.equal(append_zero(x), torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64))


# --- steps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [torch.tensor(2.0), torch.tensor([2.0, 4.0])])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_to_d(sigma, dtype):
    x, denoised = torch.full((2, 3, 4), 5.0, dtype=dtype), torch.ones(2, 3, 4, dtype=dtype)
    d = to_d(x, sigma, denoised)
    assert d.dtype == dtype
    assert d[0].unique().tolist() == [2.0]
    assert d[1].unique().tolist() == [2.0 if sigma.ndim == 0 else 1.0]


@pytest.mark.parametrize("kind", [float, torch.tensor])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0, 2.0])
def test_ancestral_step(kind, eta):
    down, up = get_ancestral_step(kind(4.0), kind(2.0), eta)
    assert float(down) ** 2 + float(up) ** 2 == pytest.approx(4.0, rel=1e-6)
    assert float(up) == pytest.approx(min(2.0, eta * 2 * math.sqrt(1 - 1 / 4)), rel=1e-6)
    assert get_ancestral_step(kind(4.0), kind(2.0)) == get_ancestral_step(kind(4.0), kind(2.0), 1.0)
    down, up = get_ancestral_step(kind(4.0), kind(0.0), eta)
    assert (float(down), float(up)) == (0.0, 0.0)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_multistep_coefficients(order, kind):
    t = [10.0, 6.0, 3.0, 1.4, 0.5, 0.0]
    for i in range(order - 1, 5):
        nodes = [t[i - k] for k in range(order)]
        for j in range(order):

            def basis(u, j=j, nodes=nodes):
                others = (m for k, m in enumerate(nodes) if k != j)
                return math.prod((u - m) / (nodes[j] - m) for m in others)

            expected = quad(basis, t[i], t[i + 1])[0]
            coefficient = linear_multistep_coeff(order, kind(t), i, j)
            assert isinstance(coefficient, float)
            assert coefficient == pytest.approx(expected, rel=1e-6)


def test_multistep_coefficients_that_cannot_be():
    with pytest.raises(ValueError, match="order 3 is too high for step 1"):
        linear_multistep_coeff(3, [3.0, 2.0, 1.0], 1, 0)
    with pytest.raises(ValueError, match="equal nodes"):
        linear_multistep_coeff(2, [2.0, 2.0, 1.0], 1, 0)


# --- noise ---------------------------------------------------------------------------------------


def test_default_noise():
    x = torch.empty(2, 3, dtype=torch.float64)
    torch.manual_seed(3)
    noise = default_noise_sampler(x)(torch.tensor(2.0), torch.tensor(1.0))
    torch.manual_seed(3)
    assert torch.equal(noise, torch.randn_like(x))


SHAPE = (2, 64, 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tree_gives_unit_noise_of_one_path(dtype):
    x = torch.zeros(SHAPE, dtype=dtype)
    sampler = BrownianTreeNoiseSampler(x, 0.1, 10.0, seed=1)
    whole, first, second = sampler(10.0, 2.0), sampler(10.0, 5.0), sampler(5.0, 2.0)
    for noise in (whole, first, second):
        assert noise.dtype == dtype
        assert noise.shape == SHAPE
        assert noise.mean().abs() < 5 / math.sqrt(x.numel())
        assert (noise.std() - 1).abs() < 5 / math.sqrt(2 * x.numel())
    assert (first * second).mean().abs() < 5 / math.sqrt(x.numel())
    expected = (math.sqrt(5) * first + math.sqrt(3) * second) / math.sqrt(8)
    assert (whole - expected).abs().max() < 1e-4


def test_seeds():
    x = torch.zeros(2, 4, 4)
    times = torch.tensor(5.0), torch.tensor(2.0)

    def noise(seed):
        return BrownianTreeNoiseSampler(x, 0.1, 10.0, seed=seed)(*times)

    assert torch.equal(noise(4), noise(4))
    assert torch.equal(noise(4), noise(np.int64(4)))
    assert not torch.equal(noise(4), noise(5))
    both, other = noise([7, 8]), noise(torch.tensor([9, 8]))
    assert torch.equal(both[1], other[1])
    assert not torch.equal(both[0], other[0])
    torch.manual_seed(6)
    drawn = noise(None)
    torch.manual_seed(6)
    assert torch.equal(drawn, noise(torch.randint(0, 2**63 - 1, []).item()))
    assert BatchedBrownianTree(x, 0.0, 1.0, [1, 2]).batched
    assert not BatchedBrownianTree(x, 0.0, 1.0, 1).batched


def test_the_transform_is_the_paths_time():
    x = torch.zeros(2, 4, 4)
    logs = BrownianTreeNoiseSampler(x, 0.1, 10.0, seed=1, transform=lambda sigma: sigma.log())
    plain = BrownianTreeNoiseSampler(x, math.log(0.1), math.log(10.0), seed=1)
    times = torch.tensor(5.0), torch.tensor(2.0)
    assert torch.allclose(logs(*times), plain(*(t.log() for t in times)))


def test_a_tree_has_a_direction():
    x = torch.zeros(2, 4, 4)
    tree = BatchedBrownianTree(x, 0.0, 1.0, 1)
    assert torch.equal(tree(0.2, 0.7), -tree(0.7, 0.2))
    turned = BatchedBrownianTree(x, 1.0, 0.0, 1)
    assert torch.equal(turned(0.7, 0.2), tree(0.2, 0.7))
    assert BatchedBrownianTree.sort(2, 1) == (1, 2, -1)
    assert BatchedBrownianTree.sort(1, 2) == (1, 2, 1)


def test_float32_times_at_the_ends_are_inside():
    """torchsde rounds its ends to six digits, and warns of times that lie outside by less."""
    ends = torch.tensor(0.0291675), torch.tensor(14.6146)
    sampler = BrownianTreeNoiseSampler(torch.zeros(1, 2), *ends, seed=1)
    for a, b in itertools.permutations([*ends, torch.tensor(1.0)], 2):
        assert sampler(a, b).isfinite().all()


@pytest.mark.parametrize("low", [math.nan, math.inf, torch.tensor(math.nan)])
def test_trees_refuse_times_that_are_not_finite(low):
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="t0 is (nan|inf)"):
        BrownianTreeNoiseSampler(x, low, 10.0)
    with pytest.raises(ValueError, match="time is (nan|inf)"):
        BrownianTreeNoiseSampler(x, 0.1, 10.0)(low, 1.0)
    with pytest.raises(ValueError, match="t1 is (nan|inf)"):
        BatchedBrownianTree(x, 0.1, low)


def test_trees_refuse_what_has_no_meaning():
    x = torch.zeros(2, 4)
    with pytest.raises(ValueError, match="seed must be one number or one for each of 2 samples"):
        BatchedBrownianTree(x, 0.0, 1.0, [1, 2, 3])
    with pytest.raises(ValueError, match="ends of a Brownian tree must differ, both are 1.0"):
        BatchedBrownianTree(x, 1.0, 1.0)


def test_a_missing_torchsde_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchsde", None)
    x, sigmas = torch.ones(1, 2), torch.tensor([5.0, 1.0, 0.0])
    with pytest.raises(ImportError, match=r"needs torchsde: pip install 'k-diffusion\[torchsde\]'"):
        sampling.sample_dpmpp_2m_sde(lambda x, s: x / 2, x, sigmas, disable=True)
    with pytest.raises(ImportError, match="default_noise_sampler"):
        BatchedBrownianTree(x, 0.0, 1.0)
    sampling.sample_dpmpp_2m_sde(lambda x, s: x / 2, x, sigmas, disable=True, eta=0.0)
    mine = default_noise_sampler(x)
    sampling.sample_dpmpp_2m_sde(lambda x, s: x / 2, x, sigmas, disable=True, noise_sampler=mine)
