"""Programs written for k-diffusion 0.1.1 run unchanged and give its numbers.

The numbers were computed by that version, in float32, with the same networks and inputs.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import k_diffusion as K

BETAS = torch.linspace(8.5e-4**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
PRODUCTS = torch.cumprod(1 - BETAS, 0).float()
PLACES = torch.arange(36, dtype=torch.float64)
DATA = torch.sin(3 * PLACES + 1).reshape(2, 2, 3, 3).float()
NOISE = torch.cos(7 * PLACES).reshape(2, 2, 3, 3).float()
SIGMA = torch.tensor([0.05, 9.0])
SAMPLERS = ("euler", "heun", "dpm_2", "lms", "dpmpp_2m")


class Network(nn.Module):
    """A noise-predicting or v-predicting network, or one of two outputs, as programs have them."""

    def __init__(self, doubled: bool = False) -> None:
        super().__init__()
        self.alphas_cumprod = PRODUCTS
        self.doubled = doubled

    def forward(self, x, t):
        out = torch.sin(2 * x) + torch.cos(t.float() / 700).reshape(-1, 1, 1, 1) * x
        return torch.cat([out, out], 1) if self.doubled else out

    def apply_model(self, x, t, cond=None):
        out = self(x, t)
        return out if cond is None else out * cond.reshape(-1, 1, 1, 1)


def wrapped(name: str, quantize: bool):
    diffusion = SimpleNamespace(alphas_cumprod=PRODUCTS.double().numpy())
    return {
        "CompVisDenoiser": lambda: K.external.CompVisDenoiser(Network(), quantize=quantize),
        "CompVisVDenoiser": lambda: K.external.CompVisVDenoiser(Network(), quantize=quantize),
        "OpenAIDenoiser": lambda: K.external.OpenAIDenoiser(
            Network(True), diffusion, quantize=quantize
        ),
        "DiscreteEpsDDPMDenoiser": lambda: K.external.DiscreteEpsDDPMDenoiser(
            Network(), PRODUCTS, quantize
        ),
    }[name]()


# get_sigmas(4)[:4]; sigma_to_t of 0.05, 1.3, 9; four values of the estimate; both losses; two
# values of each sampler's result.
LEVELS = [14.61464, 2.918307, 0.932358, 0.02916754]
EPS = {
    False: [
        *LEVELS, 1.933846, 433.6334, 914.1709, 0.03577534, -0.0003762636, 1.57365, 4.087548,
        2.270889, 0.1297902, 6.190277e-08, -7.037885e-08, -0.04292757, -0.02588456, -0.03159225,
        -0.01909729, 0.5581664, 0.6151388, 0.1220052, 0.1648604,
    ],
    True: [
        *LEVELS, 2.0, 434.0, 914.0, 0.03577534, -0.0003762636, 1.575757, 4.089079, 2.270888,
        0.129889, 6.026166e-08, -6.850909e-08, -0.04292865, -0.02588508, -0.03157458, -0.01908934,
        0.5578079, 0.615061, 0.1218548, 0.1647997,
    ],
}  # fmt: skip
V = {
    False: [
        *LEVELS, 1.933846, 433.6334, 914.1709, 0.03567828, -0.0003752426, 1.057692, 1.094281,
        2.355423, 1.298615, 0.001038212, 0.0003241763, -0.03232148, -0.01147726, -0.04419489,
        -0.01535244, -0.009311479, -0.002657934, -0.1070198, -0.03682694,
    ],
    True: [
        *LEVELS, 2.0, 434.0, 914.0, 0.03567828, -0.0003752426, 1.057924, 1.09445, 2.355423,
        1.298923, 0.00103785, 0.0003240651, -0.03232144, -0.01147723, -0.0441897, -0.01535063,
        -0.009418011, -0.002699618, -0.1070526, -0.03683964,
    ],
}  # fmt: skip


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize(
    "name",
    ["CompVisDenoiser", "CompVisVDenoiser", "OpenAIDenoiser", "DiscreteEpsDDPMDenoiser"],
)
def test_the_established_numbers(name, quantize):
    model = wrapped(name, quantize)
    told = {"cond": torch.ones(2)} if name.startswith("CompVis") else {}
    sigmas = model.get_sigmas(8)
    got = [
        *model.get_sigmas(4).tolist()[:4],
        *model.sigma_to_t(torch.tensor([0.05, 1.3, 9.0])).tolist(),
        *model(DATA * SIGMA.view(-1, 1, 1, 1), SIGMA, **told).flatten()[[0, 7, 18, 35]].tolist(),
        *model.loss(DATA, NOISE, SIGMA, **told).tolist(),
    ]
    for sampler in SAMPLERS:
        sample = getattr(K.sampling, f"sample_{sampler}")
        result = sample(model, NOISE * sigmas[0], sigmas, extra_args=told, disable=True)
        got += result.flatten()[[3, 20]].tolist()
    known = (V if name == "CompVisVDenoiser" else EPS)[quantize]
    worst = max(abs(a - b) / max(abs(b), 0.1) for a, b in zip(got, known, strict=True))
    assert worst < 5e-6


class CFGDenoiser(nn.Module):
    """As such programs guide their model."""

    def __init__(self, model):
        super().__init__()
        self.inner_model = model

    def forward(self, x, sigma, uncond, cond, cond_scale):
        both = self.inner_model(torch.cat([x] * 2), torch.cat([sigma] * 2),
                                cond=torch.cat([uncond, cond]))  # fmt: skip
        uncond, cond = both.chunk(2)
        return uncond + (cond - uncond) * cond_scale


GUIDED = {
    "euler": [-0.02892274, 0.06701174, -0.06894296, -0.0720248],
    "dpmpp_2m": [-0.6731298, -0.2030053, -0.2592418, 2.191581],
}


@pytest.mark.parametrize("name", GUIDED)
def test_a_guided_program(name):
    wrap = K.external.CompVisDenoiser(Network())
    sigmas = K.sampling.get_sigmas_karras(6, wrap.sigma_min.item(), wrap.sigma_max.item())
    told = {"cond": torch.tensor([0.9, 0.7]), "uncond": torch.tensor([0.5, 0.5]), "cond_scale": 3}
    seen = []
    out = getattr(K.sampling, f"sample_{name}")(
        CFGDenoiser(wrap), NOISE * sigmas[0], sigmas, extra_args=told, disable=True,
        callback=lambda info: seen.append((info["i"], float(info["sigma"]))),
    )  # fmt: skip
    assert [i for i, _ in seen] == list(range(6))
    got = out.flatten()[[0, 3, 20, 35]].tolist()
    assert max(abs(a - b) for a, b in zip(got, GUIDED[name], strict=True)) < 5e-6
