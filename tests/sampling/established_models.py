"""The established functions by kind, and what the tests give them."""

from __future__ import annotations

import torch

from k_diffusion.sampling import SOLVERS

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
