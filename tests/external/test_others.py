"""Networks of other programs: told the level as they are used to, and nothing is guessed."""

from __future__ import annotations

import enum
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from k_diffusion.external import compvis_denoiser, function_denoiser, openai_denoiser
from k_diffusion.sampling import KSampler
from k_diffusion.utils.scheduler import FlowScheduler, LinearScheduler

PROCESS = LinearScheduler()
PRODUCTS = [PROCESS.level(i / 1000).alpha ** 2 for i in range(1000)]


class Mean(enum.Enum):
    EPSILON = 1
    START_X = 2
    PREVIOUS_X = 3


class Recording(nn.Module):
    """Remembers the times it is told; predicts the noise of data that is one point, 0.5."""

    def __init__(self, doubled: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.times: list[torch.Tensor] = []
        self.doubled = doubled
        self.told: list[object] = []

    def forward(self, x, timesteps, y=None):
        self.times.append(timesteps.clone())
        self.told.append(y)
        alpha = torch.tensor(PRODUCTS, dtype=torch.float64)[timesteps.round().long()].sqrt()
        alpha = alpha.to(x).reshape(-1, 1, 1, 1)
        eps = (x - alpha * 0.5) / (1 - alpha**2).sqrt()
        return torch.cat([eps, torch.full_like(eps, 9.0)], 1) if self.doubled else eps

    def apply_model(self, x, t, cond):
        return self(x, t, cond)


def _diffusion(**changed):
    said = {"alphas_cumprod": PRODUCTS, "model_mean_type": Mean.EPSILON}
    return SimpleNamespace(**{**said, **changed})


@pytest.mark.parametrize("doubled", [False, True])
def test_a_guided_diffusion_network_gives_its_point_and_its_timesteps(doubled):
    model = Recording(doubled)
    denoiser = openai_denoiser(model, _diffusion())
    level = PROCESS.level(0.4)
    x = 0.5 * level.alpha + level.sigma * torch.randn(3, 2, 4, 4)
    got = denoiser(x, torch.full((3,), level.sigma, dtype=torch.float64), y=torch.tensor([1, 2, 3]))
    assert (got - 0.5).abs().max() < 1e-5
    assert (model.times[0] - 400).abs().max() < 1e-3
    assert model.told[0].tolist() == [1, 2, 3]


def test_a_respaced_one_is_told_the_timesteps_of_the_whole_process():
    kept = list(range(0, 1000, 20))
    respaced = _diffusion(
        alphas_cumprod=[PRODUCTS[i] for i in kept],
        timestep_map=kept,
        original_num_steps=1000,
        rescale_timesteps=True,
    )
    model = Recording()
    denoiser = openai_denoiser(model, respaced)
    for index, timestep in ((7, 140), (49, 980)):
        sigma = (1 - PRODUCTS[timestep]) ** 0.5
        denoiser(torch.randn(1, 1, 2, 2), torch.tensor([sigma], dtype=torch.float64))
        assert abs(model.times[-1].item() - timestep) < 1e-2, index


def test_rescaled_timesteps_count_to_1000():
    model = Recording()
    few = _diffusion(alphas_cumprod=PRODUCTS[::10], rescale_timesteps=True)
    denoiser = openai_denoiser(model, few)
    sigma = (1 - PRODUCTS[500]) ** 0.5
    denoiser(torch.randn(1, 1, 2, 2), torch.tensor([sigma], dtype=torch.float64))
    assert abs(model.times[-1].item() - 500) < 1e-2


def test_a_latent_diffusion_model_is_asked_by_apply_model():
    model = Recording()
    model.alphas_cumprod = torch.tensor(PRODUCTS, dtype=torch.float64)
    denoiser = compvis_denoiser(model)
    samples = KSampler(denoiser, solver="ddim").sample(
        torch.randn(2, 1, 4, 4), steps=5, condition={"cond": {"c_crossattn": ["text"]}}
    )
    assert (samples - 0.5).abs().max() < 1e-4
    assert model.told[0] == {"c_crossattn": ["text"]}
    assert list(denoiser.parameters()), "its parameters tell dtype and device"


def test_a_plain_function_of_stated_conventions():
    times = []

    def velocity(x, time):
        times.append(time)
        return (x - 0.25) / time.reshape(-1, 1, 1, 1)  # eps - x0 of data that is one point

    denoiser = function_denoiser(velocity, "flow", FlowScheduler(), time_convention="unit")
    samples = KSampler(denoiser, solver="euler").sample(torch.randn(2, 1, 3, 3), steps=4)
    assert (samples - 0.25).abs().max() < 1e-6
    assert [round(t[0].item(), 6) for t in times] == [1.0, 0.75, 0.5, 0.25]


def test_what_is_not_known_is_refused_by_name():
    with pytest.raises(ValueError, match="unknown model_mean_type 'PREVIOUS_X'"):
        openai_denoiser(Recording(), _diffusion(model_mean_type=Mean.PREVIOUS_X))
    with pytest.raises(TypeError, match="Linear has no apply_model"):
        compvis_denoiser(nn.Linear(1, 1))
    model = Recording()
    model.parameterization = "score"
    with pytest.raises(ValueError, match="unknown parameterization 'score'"):
        compvis_denoiser(model)
    with pytest.raises(ValueError, match="unknown prediction 'noise'"):
        function_denoiser(lambda x, t: x, "noise", "linear")
    with pytest.raises(TypeError, match=r"a function of \(x, time\) is needed, got int"):
        function_denoiser(3, "eps", "linear")
