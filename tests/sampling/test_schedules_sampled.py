"""Every registered schedule, by name, in KSampler with each kind of model."""

import pytest
import torch
from torch import nn

from k_diffusion.denoiser import EpsDenoiser, FlowDenoiser, VDenoiser
from k_diffusion.sampling import VE, KSampler
from k_diffusion.utils.scheduler import (
    SCHEDULERS,
    LinearScheduler,
    SimpleScheduler,
    Spacing,
    ZeroTerminalScheduler,
)

NAMES = [name for name in SCHEDULERS if name != "custom"]
FLOWS = {"flow", "flow_dynamic", "flow_dynamic_linear"}
PURE_NOISE = FLOWS | {"zero_terminal_snr"}
X = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))


class Network(nn.Module):
    """A stand-in that answers with the share of its input that unit Gaussian data asks for."""

    def __init__(self, prediction):
        super().__init__()
        self.prediction = prediction
        self.times = []

    def forward(self, x, time):
        self.times.append(time)
        return 0.5 * x


def edm(x, sigma):
    return x / (1 + sigma.reshape(-1, 1, 1) ** 2)


@pytest.mark.parametrize("name", NAMES)
def test_a_function_of_the_edm_kind(name):
    sampler = KSampler(edm, scheduler=name)
    if name in PURE_NOISE:
        with pytest.raises(ValueError, match="pure noise .* no place among variance-exploding"):
            sampler.sample(X, 7)
        return
    levels = sampler.levels(7)
    assert levels[-1].sigma == 0
    if isinstance(sampler.scheduler, Spacing) and name not in ("leading", "ddim_uniform"):
        assert levels[0].sigma == pytest.approx(80.0, rel=1e-12)  # the usual range of such a model
    assert levels == sampler.scheduler.levels(7).on(VE)
    result = sampler.sample(X, 300)
    # Unit Gaussian data: x goes to x / sqrt(1 + sigma²) from the first level's unit noise.
    first = sampler.levels(300)[0].sigma
    expected = X * first / (1 + first**2) ** 0.5
    worst = 0.5 if name == "linear_quadratic" else 0.06  # which is made for another kind of path
    assert (result - expected).abs().max() <= worst * X.abs().max()


@pytest.mark.parametrize("name", NAMES)
def test_an_eps_network(name):
    denoiser = EpsDenoiser(Network("eps"))
    sampler = KSampler(denoiser, scheduler=name)
    if name in PURE_NOISE:
        with pytest.raises(ValueError, match="begins at pure noise .* begin lower"):
            sampler.sample(X, 7)
        return
    assert torch.isfinite(sampler.sample(X, 7)).all()
    assert denoiser.process == LinearScheduler()  # its time stays that of its own process
    if issubclass(SCHEDULERS[name], Spacing):
        assert sampler.scheduler.process == LinearScheduler()


@pytest.mark.parametrize("name", NAMES)
def test_a_flow_network(name):
    network = Network("flow")
    sampler = KSampler(FlowDenoiser(network), scheduler=name)
    levels = sampler.levels(7)
    assert (levels[0].alpha == 0) == (
        name in PURE_NOISE
        or (issubclass(SCHEDULERS[name], Spacing) and name not in ("leading", "ddim_uniform"))
    )
    assert torch.isfinite(sampler.sample(X, 7)).all()
    # The network's time is sigma of its flow, however the levels were laid.
    assert network.times[0][0].item() == pytest.approx(1000 * levels[0].sigma, rel=1e-6)


def test_pure_noise_suits_a_v_network():
    sampler = KSampler(VDenoiser(Network("v"), LinearScheduler()), scheduler="zero_terminal_snr")
    assert sampler.scheduler == ZeroTerminalScheduler(LinearScheduler())
    assert sampler.levels(7)[0].alpha == 0
    assert torch.isfinite(sampler.sample(X, 7)).all()


def test_a_bare_network_learns_no_spacing():
    """What only lays levels is not taken for the process of a network that carries none."""
    assert KSampler(Network("v"), scheduler="simple").denoiser.process == LinearScheduler()
    over = SimpleScheduler(process="scaled_linear")
    assert KSampler(Network("v"), scheduler=over).denoiser.process == over.process
    assert KSampler(Network("v"), scheduler="cosine").denoiser.process.name == "cosine"
    assert KSampler(Network("v"), scheduler="karras").denoiser.process == LinearScheduler()
    with pytest.raises(ValueError, match="SimpleScheduler only lays levels over a process"):
        VDenoiser(Network("v"), SimpleScheduler())
