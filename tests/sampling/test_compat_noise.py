"""When the established functions ask for noise, and what programs replace while they run."""

from __future__ import annotations

import itertools

import pytest
import torch
from established_models import ANCESTRAL, ESTABLISHED, ODE, SDE, SIGMAS, model, noise

from k_diffusion import sampling
from k_diffusion.sampling import Levels
from k_diffusion.sampling.established import EstablishedNoise

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
