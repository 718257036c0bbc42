from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from k_diffusion.denoiser import (
    DENOISERS,
    Denoiser,
    EDMDenoiser,
    EpsDenoiser,
    FlowDenoiser,
    FunctionDenoiser,
    VDenoiser,
    X0Denoiser,
    make_denoiser,
)  # fmt: skip
from k_diffusion.utils.levels import FLOW, VE, VP
from k_diffusion.utils.scheduler import (
    CosineScheduler,
    FlowScheduler,
    KarrasScheduler,
    LinearScheduler,
)

SIGMA_DATA = 0.6


def underlying(x, ratio):
    """One x0 estimate, in coordinates with alpha = 1: what all the networks below stand for."""
    return torch.tanh(x / (1 + ratio)) + 0.1 * x / (1 + ratio**2)


class Network(nn.Module):
    """Predicts eps, v, x0, flow or EDM's target exactly, from its own input and its own time."""

    def __init__(self, kind, convention, process):
        super().__init__()
        self.prediction, self.time_convention, self.process = kind, convention, process
        self.sigma_data = SIGMA_DATA
        self.seen = []

    def forward(self, x, t, **condition):
        self.seen.append((x.dtype, t.dtype, condition))
        t = t.double()
        if self.time_convention == "log_sigma":
            snr = -4 * t
        else:
            scale = self.process.timesteps if self.time_convention == "timestep" else 1
            snr = self.process.half_log_snr(t / scale)
        path = DENOISERS[self.prediction].path
        sigma = path.sigma(snr).reshape(-1, 1)
        alpha = path.sigma(-snr).reshape(-1, 1) if path is not VE else torch.ones_like(sigma)
        if self.prediction == "edm":
            total = (sigma**2 + SIGMA_DATA**2).sqrt()
            noisy = x * total
            x0 = underlying(noisy, sigma)
            return (x0 - SIGMA_DATA**2 / total**2 * noisy) * total / (sigma * SIGMA_DATA)
        x0 = underlying(x / alpha, sigma / alpha)
        eps = (x - alpha * x0) / sigma
        return {"eps": eps, "v": alpha * eps - sigma * x0, "x0": x0, "flow": eps - x0}[
            self.prediction
        ]


PROCESSES = [LinearScheduler(), CosineScheduler(), FlowScheduler(shift=2.0)]


@pytest.mark.parametrize("kind", DENOISERS)
@pytest.mark.parametrize("convention", ["timestep", "unit", "log_sigma"])
@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: p.name)
def test_every_kind_gives_the_same_x0(kind, convention, process):
    """Discrete and continuous time, any process: one network, one estimate."""
    denoiser = make_denoiser(Network(kind, convention, process))
    assert isinstance(denoiser, DENOISERS[kind])
    x = torch.linspace(-2, 2, 12).reshape(4, 3)
    ratios = torch.tensor([0.02, 0.3, 2.0, 30.0], dtype=torch.float64)
    noisy = x + ratios[:, None].float() * torch.linspace(1, -1, 12).reshape(4, 3)
    expected = underlying(noisy.double(), ratios[:, None])
    sigma = denoiser.path.sigma(-ratios.log())
    alpha = sigma / ratios
    assert (denoiser.alpha(sigma) - alpha).abs().max() <= 1e-12
    got = denoiser((noisy * alpha[:, None]).float(), sigma)
    assert got.dtype == torch.float32
    assert (got - expected).abs().max() <= 1e-5
    alone = torch.cat(
        [denoiser((noisy * alpha[:, None]).float()[i : i + 1], sigma[i]) for i in range(4)]
    )
    assert (got - alone).abs().max() <= 1e-6


def test_edm_coefficients():
    """Unit-variance input, and c_out that bounds the error: Karras et al. 2022, table 1."""
    inputs = []

    class Zero(nn.Module):
        def forward(self, x, t):
            inputs.append((x, t))
            return torch.zeros_like(x)

    denoiser = EDMDenoiser(Zero(), SIGMA_DATA)
    sigma = torch.tensor([0.01, 1.0, 50.0])
    x = torch.ones(3, 1)
    out = denoiser(x, sigma)
    assert (out[:, 0] - SIGMA_DATA**2 / (sigma**2 + SIGMA_DATA**2)).abs().max() <= 1e-7
    ((seen, time),) = inputs
    assert (seen[:, 0] - (sigma**2 + SIGMA_DATA**2).rsqrt()).abs().max() <= 1e-6
    assert (time - sigma.log() / 4).abs().max() <= 1e-7


def test_time_of_a_level():
    linear = EpsDenoiser(nn.Identity(), LinearScheduler())
    snr = LinearScheduler().level(0.25).half_log_snr
    assert linear.time(snr) == pytest.approx(250.0, abs=1e-9)
    unit = nn.Identity()
    unit.time_convention = "unit"
    assert EpsDenoiser(unit, LinearScheduler()).time(snr) == pytest.approx(0.25, abs=1e-12)
    assert EDMDenoiser(nn.Identity()).time(math.log(2.0)) == pytest.approx(-math.log(2.0) / 4)


def test_flow_and_v_reach_pure_noise():
    """At alpha = 0 the estimate is x - F for flow, -F for v; both are finite."""
    x, one = torch.full((1, 2), 0.5), torch.ones(1)
    constant = nn.Module()
    constant.forward = lambda x, t: torch.full_like(x, 2.0)
    assert torch.equal(FlowDenoiser(constant)(x, one), x - 2.0)
    assert torch.equal(VDenoiser(constant)(x, one), torch.full_like(x, -2.0))


def test_sigma_may_be_a_number_but_not_of_another_shape():
    denoiser = X0Denoiser(nn.Identity(), LinearScheduler())
    denoiser.network.forward = lambda x, t: x * t.reshape(-1, 1)
    x = torch.ones(2, 3)
    assert torch.equal(denoiser(x, 0.5), denoiser(x, torch.tensor([0.5, 0.5])))
    for bad in (torch.ones(2, 1), torch.ones(3)):
        with pytest.raises(ValueError, match="sigma must have one value per sample"):
            denoiser(x, bad)


def test_precision_of_the_network_stays_inside():
    network = Network("x0", "unit", LinearScheduler())
    network.weight = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    out = X0Denoiser(network, LinearScheduler())(torch.ones(2, 3), torch.full((2,), 0.5))
    assert out.dtype == torch.float32
    assert network.seen[0][:2] == (torch.bfloat16, torch.float32)


def test_make_denoiser():
    def function(x, sigma):
        return x

    wrapped = make_denoiser(function)
    assert isinstance(wrapped, FunctionDenoiser)
    assert isinstance(wrapped, Denoiser)
    assert wrapped.path is VE
    assert make_denoiser(wrapped) is wrapped
    network = Network("eps", "timestep", None)
    assert make_denoiser(network, CosineScheduler()).process == CosineScheduler()
    network.process = LinearScheduler(timesteps=50)
    assert make_denoiser(network, CosineScheduler()).process == LinearScheduler(timesteps=50)
    assert make_denoiser(Network("edm", "log_sigma", None)).process == KarrasScheduler()
    assert {kind: d.path for kind, d in DENOISERS.items()} == {
        "edm": VE, "eps": VP, "v": VP, "x0": VP, "flow": FLOW
    }  # fmt: skip
    with pytest.raises(ValueError, match="unknown prediction 'epsilon'; did you mean 'eps'"):
        make_denoiser(Network("epsilon", "unit", None))
    with pytest.raises(ValueError, match="Identity carries no `prediction`"):
        make_denoiser(nn.Identity())
    with pytest.raises(TypeError, match="must be callable, got int"):
        make_denoiser(3)
    with pytest.raises(ValueError, match="unknown time_convention 'days'"):
        make_denoiser(Network("eps", "days", None))
    with pytest.raises(ValueError, match="sigma_data must be above 0"):
        EDMDenoiser(nn.Identity(), 0.0)


def test_what_no_network_may_return() -> None:
    """Broadcasting would make something of it."""

    class One(nn.Module):
        prediction = "v"

        def forward(
            self, x: torch.Tensor, t: torch.Tensor, nothing: bool = False
        ) -> torch.Tensor | None:
            return None if nothing else x[:, :1]

    denoiser = make_denoiser(One())
    with pytest.raises(ValueError, match=r"One returned shape \(2, 1, 4\); .* of x, \(2, 3, 4\)"):
        denoiser(torch.zeros(2, 3, 4), 0.5)
    with pytest.raises(TypeError, match="One returned NoneType; its forward must return a tensor"):
        denoiser(torch.zeros(2, 3, 4), 0.5, nothing=True)
