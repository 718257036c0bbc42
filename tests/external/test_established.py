"""The established wrappers: against closed forms, and against our own denoisers at equal levels."""

from __future__ import annotations

import copy
import inspect
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from k_diffusion import external
from k_diffusion.denoiser import Denoiser, EpsDenoiser, VDenoiser, make_denoiser
from k_diffusion.sampling import KSampler, sample_euler
from k_diffusion.utils.levels import VE
from k_diffusion.utils.scheduler import CustomScheduler, KarrasScheduler

F64 = torch.float64


def alphas_cumprod(n: int = 1000, dtype: torch.dtype = F64) -> Tensor:
    """Stable Diffusion's: betas whose roots are even."""
    return torch.cumprod(1 - torch.linspace(8.5e-4**0.5, 0.012**0.5, n, dtype=F64) ** 2, 0).to(
        dtype
    )


class Network(nn.Module):
    """A smooth function of x and t; remembers what it was given. `apply_model` is CompVis's."""

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.alphas_cumprod = alphas_cumprod()
        if dtype is not None:
            self.weight = nn.Parameter(torch.ones(1, dtype=dtype))

    def forward(self, x: Tensor, t: Tensor, shift: float = 0.0) -> Tensor:
        self.seen = x, t
        time = (t / 700).to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
        return torch.sin(2 * x) + torch.cos(time) * x + shift

    def apply_model(self, x: Tensor, t: Tensor, cond: float = 0.0) -> Tensor:
        return self(x, t, shift=cond)


def data(sigma: Tensor, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (len(sigma), 2, 3, 3)
    x0 = torch.randn(shape, generator=generator, dtype=F64) * 0.7
    return x0.to(dtype), torch.randn(shape, generator=generator, dtype=F64).to(dtype)


def wide(values: Tensor) -> Tensor:
    return values.reshape(-1, 1, 1, 1)


# ---------------------------------------------------------------- levels and times


def test_sigmas_of_a_schedule() -> None:
    products = alphas_cumprod()
    schedule = external.DiscreteEpsDDPMDenoiser(Network(), products, False)
    expected = ((1 - products) / products).sqrt()
    assert (schedule.sigmas / expected - 1).abs().max() < 1e-14
    assert schedule.sigma_min == schedule.sigmas[0]
    assert schedule.sigma_max == schedule.sigmas[-1]
    assert schedule.sigma_min.shape == ()
    assert set(schedule.state_dict()) == {"sigmas", "log_sigmas"}
    assert (schedule.state_dict()["log_sigmas"] - expected.log()).abs().max() < 1e-14


SIGMAS = torch.tensor([0.1, 0.2, 0.8, 1.6, 12.8], dtype=F64)  # powers of 2, unevenly


def test_times_between_levels() -> None:
    """Linear in log sigma between places; the ends beyond them, at 0 and infinity too."""
    schedule = external.DiscreteSchedule(SIGMAS, False)
    sigma = torch.tensor(
        [0.0, 0.05, 0.1, 0.1 * 2**0.25, 0.2, 0.4, 3.2, 12.8, 50.0, math.inf], dtype=F64
    )
    expected = torch.tensor([0, 0, 0, 0.25, 1, 1.5, 3 + 1 / 3, 4, 4, 4], dtype=F64)
    assert (schedule.sigma_to_t(sigma) - expected).abs().max() < 1e-12
    inside = expected[2:8]
    assert (schedule.t_to_sigma(inside) / sigma[2:8] - 1).abs().max() < 1e-12
    whole = schedule.t_to_sigma(torch.tensor([0, 3]))
    assert (whole - SIGMAS[[0, 3]]).abs().max() < 1e-12
    assert schedule.sigma_to_t(torch.tensor(0.4)).shape == ()
    assert schedule.sigma_to_t(sigma.reshape(2, 5).T).shape == (5, 2)
    assert schedule.sigma_to_t(torch.tensor([math.nan])).isnan().all()


def test_float64_is_kept_with_a_float32_list() -> None:
    schedule = external.DiscreteSchedule(SIGMAS.float(), False)
    sigma = torch.tensor([0.4, 0.4 * (1 + 1e-10)], dtype=F64)
    t = schedule.sigma_to_t(sigma)
    assert (t[1] - t[0]).item() == pytest.approx(1e-10 / math.log(4), rel=1e-3)
    assert (schedule.t_to_sigma(t) / sigma - 1).abs().max() < 1e-7


def test_nearest_times() -> None:
    schedule = external.DiscreteSchedule(SIGMAS, True)
    sigma = torch.tensor([0.0, 0.13, 0.15, 0.39, 0.41, 1.6, 4.5, 4.6, 99.0, math.inf], dtype=F64)
    t = schedule.sigma_to_t(sigma)
    assert t.dtype == torch.int64
    assert t.tolist() == [0, 0, 1, 1, 2, 3, 3, 4, 4, 4]
    assert schedule.sigma_to_t(sigma, quantize=False)[3] < 1.5
    free = external.DiscreteSchedule(SIGMAS, False)
    assert free.sigma_to_t(sigma, quantize=True).tolist() == t.tolist()


def test_an_infinite_last_level_keeps_the_others_finite() -> None:
    """Zero terminal SNR: times and levels below the end are as they were."""
    endless = torch.cat([SIGMAS, torch.tensor([math.inf], dtype=F64)])
    schedule = external.DiscreteSchedule(endless, False)
    t = schedule.sigma_to_t(torch.tensor([0.4, 12.8, 100.0, math.inf], dtype=F64))
    assert (t - torch.tensor([1.5, 4.0, 4.0, 5.0], dtype=F64)).abs().max() < 1e-12
    sigma = schedule.t_to_sigma(torch.tensor([1.5, 4.0, 5.0]))
    assert (sigma[:2] - torch.tensor([0.4, 12.8])).abs().max() < 1e-6
    assert sigma[2] == math.inf
    last = schedule.sigma_to_t(torch.tensor([30.0, math.inf], dtype=F64), quantize=True)
    assert last.tolist() == [4, 5]
    assert schedule.process.level(schedule.process.time_max).ratio == pytest.approx(12.8)


def test_repeated_levels_give_a_time() -> None:
    doubled = external.DiscreteSchedule(torch.tensor([0.1, 0.2, 0.2], dtype=F64), False)
    t = doubled.sigma_to_t(torch.tensor([0.2, 0.3], dtype=F64))
    assert t.tolist() == [2.0, 2.0]


def test_get_sigmas() -> None:
    schedule = external.DiscreteSchedule(SIGMAS, False)
    assert schedule.get_sigmas().tolist() == [*SIGMAS.flip(0).tolist(), 0.0]
    assert schedule.get_sigmas(3).tolist() == pytest.approx([12.8, 0.8, 0.1, 0.0], abs=1e-6)
    even = schedule.get_sigmas(9)
    assert even[1].item() == pytest.approx((12.8 * 1.6) ** 0.5, rel=1e-6)


def test_continuous_time_of_v() -> None:
    wrapper = external.VDenoiser(Network())
    t = torch.linspace(0, 0.99, 12, dtype=F64)
    assert (wrapper.sigma_to_t(torch.tan(t * math.pi / 2)) - t).abs().max() < 1e-14
    assert (wrapper.t_to_sigma(t) - torch.tan(t * math.pi / 2)).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("sigmas", "message"),
    [
        (torch.ones(()), "at least 2 levels, got shape \\(\\)"),
        (torch.ones(1), "at least 2 levels, got shape \\(1,\\)"),
        (torch.ones(2, 2), "at least 2 levels"),
        (torch.tensor([0.0, 1.0]), "must be above 0, but the least is 0.0"),
        (torch.tensor([1.0, math.nan]), "must be above 0, but the least is nan"),
        (torch.tensor([2.0, 1.0]), "must go from clean to noisy"),
    ],
)
def test_refused_levels(sigmas: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        external.DiscreteSchedule(sigmas, False)


# ---------------------------------------------------------------- estimates and losses


def wrappers() -> dict[str, Any]:
    products, network = alphas_cumprod(), Network()
    diffusion = SimpleNamespace(alphas_cumprod=products.numpy())
    return {
        "eps": external.DiscreteEpsDDPMDenoiser(network, products, False),
        "openai": external.OpenAIDenoiser(network, diffusion, has_learned_sigmas=False),
        "compvis": external.CompVisDenoiser(network),
        "v": external.DiscreteVDDPMDenoiser(network, products, False),
        "compvis v": external.CompVisVDenoiser(network),
        "continuous v": external.VDenoiser(network),
    }


@pytest.mark.parametrize("name", wrappers())
def test_estimate_and_loss_are_their_closed_forms(name: str) -> None:
    wrapper = wrappers()[name]
    sigma = torch.tensor([0.03, 0.5, 2.0, 14.0], dtype=F64)
    x0, noise = data(sigma)
    x = x0 + wide(sigma) * noise
    total = wide(sigma**2 + 1)
    kwargs = {"cond" if name.startswith("compvis") else "shift": 0.25}
    got = wrapper(x, sigma, **kwargs)
    seen, t = wrapper.inner_model.seen
    assert (seen - x / total.sqrt()).abs().max() < 1e-12
    assert torch.equal(t, wrapper.sigma_to_t(sigma))
    output = wrapper.inner_model(x / total.sqrt(), t, shift=0.25)
    if name.endswith("v"):
        # v = alpha eps - sigma x0 with alpha = 1 / sqrt(sigma² + 1), at x / sqrt(sigma² + 1).
        expected = x / total - wide(sigma) / total.sqrt() * output
        target = (noise - wide(sigma) * x0) / total.sqrt()
    else:
        expected, target = x - wide(sigma) * output, noise
    assert (got - expected).abs().max() < 1e-11
    loss = wrapper.loss(x0, noise, sigma, **kwargs)
    assert loss.shape == (4,)
    assert (loss / (output - target).square().mean((1, 2, 3)) - 1).abs().max() < 1e-9


def test_learned_variance_is_left_out() -> None:
    class Both(Network):
        def forward(self, x: Tensor, t: Tensor, shift: float = 0.0) -> Tensor:
            return torch.cat([super().forward(x, t, shift), torch.full_like(x, 7.0)], dim=1)

    diffusion = SimpleNamespace(alphas_cumprod=alphas_cumprod().numpy())
    sigma = torch.tensor([0.5, 2.0])
    x, _ = data(sigma, torch.float32)
    both = external.OpenAIDenoiser(Both(), diffusion)
    alone = external.OpenAIDenoiser(Network(), diffusion, has_learned_sigmas=False)
    assert torch.equal(both(x, sigma), alone(x, sigma))
    assert both.sigmas.dtype == torch.float32


def test_subclasses_override_their_parts() -> None:
    class Doubled(external.DiscreteEpsDDPMDenoiser):
        def get_eps(self, x: Tensor, t: Tensor, *, factor: float) -> Tensor:
            return factor * self.inner_model(x, t)

        def get_scalings(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
            return -2 * sigma, torch.ones_like(sigma)

        def sigma_to_t(self, sigma: Tensor, quantize: bool | None = None) -> Tensor:
            return 10 * sigma

    class Negative(external.DiscreteVDDPMDenoiser):
        def get_v(self, x: Tensor, t: Tensor) -> Tensor:
            return -x

    network = Network()
    sigma = torch.tensor([0.5, 2.0], dtype=F64)
    x, noise = data(sigma)
    got = Doubled(network, alphas_cumprod(), False)(x, sigma, factor=3.0)
    assert (got - (x - 6 * wide(sigma) * network(x, 10 * sigma))).abs().max() < 1e-12
    negative = Negative(network, alphas_cumprod(), False)
    total = wide(sigma**2 + 1)
    assert (negative(x, sigma) - (1 + wide(sigma)) * x / total).abs().max() < 1e-12
    noisy = x + wide(sigma) * noise
    error = -noisy / total.sqrt() - (noise - wide(sigma) * x) / total.sqrt()
    assert (negative.loss(x, noise, sigma) - error.square().mean((1, 2, 3))).abs().max() < 1e-12


def test_other_arguments_keep_their_place() -> None:
    """Programs give them by position."""
    expected = {
        "VDenoiser": ["inner_model"],
        "DiscreteSchedule": ["sigmas", "quantize"],
        "DiscreteEpsDDPMDenoiser": ["model", "alphas_cumprod", "quantize"],
        "DiscreteVDDPMDenoiser": ["model", "alphas_cumprod", "quantize"],
        "OpenAIDenoiser": ["model", "diffusion", "quantize", "has_learned_sigmas", "device"],
        "CompVisDenoiser": ["model", "quantize", "device"],
        "CompVisVDenoiser": ["model", "quantize", "device"],
    }
    assert set(expected) < set(external.__all__)
    for name, parameters in expected.items():
        assert list(inspect.signature(getattr(external, name)).parameters) == parameters


# ---------------------------------------------------------------- precision and devices


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halving_keeps_the_schedule(dtype: torch.dtype) -> None:
    wrapper = external.DiscreteEpsDDPMDenoiser(Network(F64), alphas_cumprod(), False)
    before = copy.deepcopy(wrapper.state_dict())
    halved = wrapper.to(dtype)
    assert halved.inner_model.weight.dtype == dtype
    for name in ("sigmas", "log_sigmas"):
        assert torch.equal(getattr(halved, name), before[name].float())
    moved = wrapper.to("meta")
    assert moved.sigmas.device.type == moved.log_sigmas.device.type == "meta"
    there = external.DiscreteSchedule(SIGMAS, False).to("meta", dtype)
    assert there.sigmas.device.type == there.log_sigmas.device.type == "meta"
    assert external.DiscreteSchedule(SIGMAS.to(dtype), False).log_sigmas.dtype == torch.float32
    products = alphas_cumprod(dtype=torch.float16)
    low = external.DiscreteEpsDDPMDenoiser(Network(), products, False)
    assert (low.sigmas - (1 / products.double() - 1).sqrt()).abs().max() < 1e-5
    with pytest.raises(ValueError, match="in low precision it rounds to 1: give float32"):
        external.DiscreteEpsDDPMDenoiser(Network(), alphas_cumprod(dtype=torch.bfloat16), False)


@pytest.mark.parametrize("name", wrappers())
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_in_and_out(name: str, dtype: torch.dtype) -> None:
    """The network sees x in x's dtype and a discrete time in float32; the error stays rounding."""
    wrapper = wrappers()[name].to(dtype)
    sigma = torch.tensor([0.25, 2.0, 12.0], dtype=dtype)
    x0, noise = data(sigma, dtype)
    x = x0 + wide(sigma) * noise
    got = wrapper(x, sigma) if name != "compvis v" else wrapper(x, sigma, cond=0.0)
    seen, t = wrapper.inner_model.seen
    assert got.dtype == seen.dtype == dtype
    continuous = name == "continuous v"
    assert t.dtype == (dtype if continuous else torch.float32)
    exact = wrapper.sigma_to_t(sigma.double())
    assert (t - exact).abs().max() <= (torch.finfo(dtype).eps / 4 if continuous else 1e-3)
    back = wrapper.t_to_sigma(t)
    assert back.dtype == t.dtype
    kwargs = {"cond": 0.0} if name == "compvis v" else {}
    reference = wrapper(x.double(), sigma.double(), **kwargs)
    scale = wide(sigma.double()) + 1
    assert ((got.double() - reference) / scale).abs().max() < 16 * torch.finfo(dtype).eps
    loss = wrapper.loss(x0, noise, sigma, **kwargs)
    assert loss.dtype == torch.float32
    exact = wrapper.loss(x0.double(), noise.double(), sigma.double(), **kwargs)
    assert (loss / exact - 1).abs().max() < 64 * torch.finfo(dtype).eps


def test_half_precision_scalings_do_not_overflow() -> None:
    """sigma² would be infinite from 256 on, and the network's input 0."""
    wrapper = external.VDenoiser(Network())
    sigma = torch.tensor([1000.0], dtype=torch.float16)
    x = torch.full((1, 2, 3, 3), 500.0, dtype=torch.float16)
    wrapper(x, sigma)
    assert (wrapper.inner_model.seen[0] - 0.5).abs().max() < 1e-3


@pytest.mark.parametrize("kind", [external.CompVisDenoiser, external.CompVisVDenoiser])
def test_network_of_another_precision(kind: Any) -> None:
    """float32 x (the state between calls) to a network in half precision, and the reverse."""
    sigma = torch.tensor([0.5, 2.0])
    x, noise = data(sigma, torch.float32)
    for inside, outside in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        wrapper = kind(Network(inside))
        got = wrapper(x.to(outside), sigma.to(outside), cond=0.5)
        assert wrapper.inner_model.seen[0].dtype == inside
        assert got.dtype == outside
        wrapper.loss(x.to(outside), noise.to(outside), sigma.to(outside), cond=0.5)
        assert wrapper.inner_model.seen[0].dtype == inside


def test_a_network_that_sees_to_its_precision_itself() -> None:
    sigma = torch.tensor([0.5, 2.0])
    x, _ = data(sigma, torch.float32)
    mixed = Network(torch.float16)
    mixed.other = nn.Parameter(torch.ones(1))
    mixed_wrapper = external.CompVisDenoiser(mixed)
    mixed_wrapper(x, sigma)
    assert mixed.seen[0].dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        auto = external.CompVisDenoiser(Network(torch.bfloat16))
        auto(x, sigma)
    assert auto.inner_model.seen[0].dtype == torch.float32


@pytest.mark.parametrize("name", wrappers())
def test_sigma_and_levels_on_another_device_follow_x(name: str) -> None:
    """The device "meta" computes nothing, but refuses to be mixed with another."""
    wrapper = wrappers()[name]
    kwargs = {"cond": 0.0} if name == "compvis v" else {}
    x = torch.empty(2, 2, 3, 3, device="meta")
    sigma = torch.tensor([0.5, 2.0])
    assert wrapper(x, sigma, **kwargs).device.type == "meta"
    assert wrapper.inner_model.seen[1].device.type == "meta"
    assert wrapper.loss(x, x, sigma, **kwargs).device.type == "meta"
    assert external.DiscreteSchedule(torch.empty(3, device="meta"), False).sigmas.is_meta
    there = torch.empty(2, device="meta")
    assert wrapper.sigma_to_t(there).device.type == "meta"
    assert wrapper.t_to_sigma(there).device.type == "meta"


# ---------------------------------------------------------------- as our own Denoisers


@pytest.mark.parametrize("name", wrappers())
def test_protocol(name: str) -> None:
    wrapper = wrappers()[name]
    assert isinstance(wrapper, Denoiser)
    assert wrapper.path is VE
    assert make_denoiser(wrapper) is wrapper
    assert wrapper.alpha(3.0) == 1
    assert wrapper.alpha(torch.tensor([1.0, 2.0])).tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("established", "ours"),
    [
        (external.DiscreteEpsDDPMDenoiser, EpsDenoiser),
        (external.DiscreteVDDPMDenoiser, VDenoiser),
    ],
)
def test_our_denoiser_at_equal_levels(established: Any, ours: Any) -> None:
    """The same network as variance-exploding and as variance-preserving Denoiser."""
    process = CustomScheduler(alphas_cumprod=alphas_cumprod().tolist())
    wrapper = established(Network(), alphas_cumprod(), False)
    own = ours(Network(), process)
    sigma = torch.tensor([0.03, 0.5, 2.0, 14.0], dtype=F64)
    x0, noise = data(sigma)
    x = x0 + wide(sigma) * noise
    alpha = 1 / (sigma**2 + 1).sqrt()
    # Ours hands the time over in float32, with 3e-5 at time 999.
    assert (wrapper(x, sigma) - own(wide(alpha) * x, alpha * sigma)).abs().max() < 1e-5

    noise = noise[:2].float()
    for scheduler in (KarrasScheduler(), "exponential", None):
        a, b = KSampler(wrapper, scheduler), KSampler(own, scheduler)
        ratios = [level.ratio for level in b.levels(8)]
        assert list(a.levels(8).sigmas) == pytest.approx(ratios, rel=1e-9)
        # Each begins at sigma · noise; at equal levels these are the same.
        assert (a.sample(noise, 8) - b.sample(noise, 8)).abs().max() < 1e-4


def test_open_ends_come_from_the_models_own_levels() -> None:
    wrapper = external.CompVisDenoiser(Network())
    levels = KSampler(wrapper, "karras").levels(10)
    assert levels.path is VE
    assert levels[0].sigma == pytest.approx(wrapper.sigma_max.item(), rel=1e-12)
    assert levels[-2].sigma == pytest.approx(wrapper.sigma_min.item(), rel=1e-12)
    assert levels[-1].sigma == 0
    own = KSampler(wrapper).levels(10)
    assert list(own.sigmas) == pytest.approx(wrapper.get_sigmas(10).tolist(), rel=1e-5)
    assert KSampler(external.VDenoiser(Network()), "karras").levels(3)[0].sigma == pytest.approx(80)
    x = torch.zeros(2, 2, 3, 3)
    conditioned = KSampler(wrapper, "karras").sample(x, 3, {"cond": 0.5})
    assert (conditioned - KSampler(wrapper, "karras").sample(x, 3)).abs().min() > 1e-3


def test_names() -> None:
    assert set(external.__all__) <= set(dir(external))
    with pytest.raises(AttributeError, match="no attribute 'CompVisDenoise'"):
        _ = external.CompVisDenoise


class Owner(external.CompVisDenoiser):
    """A program's wrapper with attributes of its own by the names that ours have."""

    def __init__(self, **own: Any) -> None:
        super().__init__(Network())
        for name, value in own.items():
            setattr(self, name, value)


OWN = {
    "a string": lambda: "a string",
    "nothing": lambda: None,
    "a module": lambda: nn.Linear(2, 2),
    "a parameter": lambda: nn.Parameter(torch.arange(3.0)),
}


@pytest.mark.parametrize("name", ["process", "path", "alpha"])
@pytest.mark.parametrize("kind", OWN)
def test_a_subclass_keeps_its_own_attributes(name, kind):
    value = OWN[kind]()
    wrapper = Owner(**{name: value})
    assert getattr(wrapper, name) is value
    assert (f"{name}.weight" in wrapper.state_dict()) == (kind == "a module")
    assert (name in wrapper.state_dict()) == (kind == "a parameter")
    assert type(getattr(copy.deepcopy(wrapper), name)) is type(value)

    if (name, kind) == ("alpha", "nothing"):
        with pytest.raises(ValueError, match="wrap it in .* FunctionDenoiser"):
            KSampler(wrapper)
        return

    # To sample with, such a wrapper is what it was.
    x = torch.randn(2, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    sampler, plain = KSampler(wrapper, "karras"), KSampler(Owner(), "karras")
    if name == "process":  # which is then open, but for an explicit range
        assert sampler.levels(3)[0].sigma == pytest.approx(80)
    else:
        assert sampler.levels(3) == plain.levels(3)
        assert torch.equal(sampler.sample(x, 3), plain.sample(x, 3))
    sigmas = torch.tensor([10.0, 1.0, 0.0])
    assert torch.equal(
        sample_euler(wrapper, x, sigmas, disable=True),
        sample_euler(Owner(), x, sigmas, disable=True),
    )


@pytest.mark.parametrize("name", ["process", "path", "alpha"])
def test_a_subclass_registers_by_those_names(name):
    wrapper = Owner()
    wrapper.register_buffer(name, torch.arange(3.0), persistent=False)
    assert getattr(wrapper, name).tolist() == [0, 1, 2]
    wrapper = Owner()
    wrapper.add_module(name, linear := nn.Linear(2, 2))
    assert getattr(wrapper, name) is linear
    wrapper = Owner()
    wrapper.register_parameter(name, weight := nn.Parameter(torch.ones(2)))
    assert getattr(wrapper, name) is weight
    plain = Owner()
    assert plain.path is VE
    assert plain.alpha(3.0) == 1
    assert isinstance(plain.process, CustomScheduler)
    with pytest.raises(KeyError, match="already exists"):
        plain.register_buffer("get_eps", torch.ones(1))


def test_a_path_that_is_none_leaves_the_model_its_device():
    wrapper = Owner(path="a file", weight=nn.Parameter(torch.ones(1, device="meta")))
    with pytest.raises(ValueError, match="x is on cpu but the model on meta"):
        KSampler(wrapper, "karras").sample(torch.ones(1, 3), 2)
