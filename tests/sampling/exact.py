"""Exact denoisers for tests: a mixture on the line and Gaussians with a spectrum, on any path."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import torch

from k_diffusion.denoiser import FunctionDenoiser
from k_diffusion.utils.levels import VE

_HOST = Path(__file__).parents[1] / "invariants" / "host.py"
_spec = importlib.util.spec_from_file_location("invariants_host", _HOST)
host = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(host)


def level(path, ratio):
    """The level of a path at sigma / alpha."""
    return path.at(-math.log(ratio))


def _float64(function, path):
    denoiser = FunctionDenoiser(function, path)
    denoiser.float64_sigma = True
    return denoiser


class Mixture(host.Mixture):
    """The invariants' mixture, with its points where noise of 20 times the signal puts them."""

    points = host.Mixture.points * 20


MIXTURE = Mixture()


def mixture_denoiser(path=VE):
    weights, means, variances = (
        torch.tensor(a) for a in (MIXTURE.weights, MIXTURE.means, MIXTURE.variances)
    )

    def denoise(x, sigma):
        sigma = sigma.double().reshape(-1, *[1] * x.ndim)
        alpha = path.alpha(sigma)
        away = x.double().unsqueeze(-1) - alpha * means
        total = alpha**2 * variances + sigma**2
        share = ((weights / total.sqrt()).log() - away**2 / (2 * total)).softmax(-1)
        return (share * (means + alpha * variances / total * away)).sum(-1).to(x.dtype)

    return _float64(denoise, path)


def mixture_log_density(y, ratio):
    """log p of y = x0 + ratio · eps, summed over a sample's values."""
    total = torch.tensor(MIXTURE.variances) + ratio**2
    each = torch.tensor(MIXTURE.weights).log() - 0.5 * (2 * math.pi * total).log()
    each = each - (y.double().unsqueeze(-1) - torch.tensor(MIXTURE.means)) ** 2 / (2 * total)
    return each.logsumexp(-1).flatten(1).sum(1)


def gaussian_denoiser(path, mean, variance):
    """Data N(mean, variance), each a number or a tensor of a sample's shape."""

    def denoise(x, sigma):
        sigma = sigma.double().reshape(-1, *[1] * (x.ndim - 1))
        alpha = path.alpha(sigma)
        gain = alpha * variance / (alpha**2 * variance + sigma**2)
        return (mean + gain * (x.double() - alpha * mean)).to(x.dtype)

    return _float64(denoise, path)


def gaussian_flow(x, s, t, mean, variance):
    """Where the probability-flow ODE carries x from level s to level t on such data."""
    start = s.alpha**2 * variance + s.sigma**2
    end = t.alpha**2 * variance + t.sigma**2
    return t.alpha * mean + (x.double() - s.alpha * mean) * (end / start) ** 0.5


def shrink(x, sigma):
    return x / (1 + sigma.reshape(-1, *[1] * (x.ndim - 1)) ** 2)
