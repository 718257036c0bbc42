"""The role of an autoencoder, and the small one."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from k_diffusion.models import (
    AUTOENCODERS,
    Autoencoder,
    SmallAutoencoder,
    autoencoder_config,
    make_autoencoder,
)


class Halves(Autoencoder):
    """Means over 2 x 2 pixels, of which the second latent channel is a multiple."""

    def __init__(self) -> None:
        super().__init__(in_channels=1, latent_channels=2, factor=2)

    def encode_raw(self, x: Tensor) -> Tensor:
        z = torch.nn.functional.avg_pool2d(x, 2)
        return torch.cat([z, 5 * z + 3], 1)

    def decode_raw(self, z: Tensor) -> Tensor:
        return z[:, :1].repeat_interleave(2, 2).repeat_interleave(2, 3)


def test_measured_latents_have_mean_0_and_variance_1() -> None:
    autoencoder = Halves()
    x = torch.randn(6, 1, 4, 6, generator=torch.Generator().manual_seed(0)) * 0.3 + 0.7
    autoencoder.measure([x[:2], x[2:]])
    z = autoencoder.encode(x)
    assert z.shape == (6, 2, 2, 3)
    assert z.mean((0, 2, 3)).abs().max() < 1e-6
    assert (z.var((0, 2, 3), correction=0) - 1).abs().max() < 1e-5
    raw = autoencoder.encode_raw(x)
    assert (autoencoder.decode(z) - autoencoder.decode_raw(raw)).abs().max() < 1e-6
    by_hand = (raw - raw.mean((0, 2, 3), keepdim=True)) / raw.std(
        (0, 2, 3), correction=0, keepdim=True
    )
    assert (z - by_hand).abs().max() < 1e-5
    with pytest.raises(ValueError, match="a channel of the latents is constant"):
        autoencoder.measure([torch.ones(2, 1, 4, 4)])
    with pytest.raises(ValueError, match="there are no data to measure"):
        autoencoder.measure([])
    with pytest.raises(ValueError, match="the latents of these data are not finite"):
        autoencoder.measure([x, torch.full((1, 1, 4, 4), torch.nan)])


def test_shapes_are_refused_by_name() -> None:
    autoencoder = Halves()
    for shape in ((2, 3, 4, 4), (2, 1, 5, 4), (2, 1, 4, 5), (2, 1)):
        with pytest.raises(
            ValueError, match=r"this autoencoder takes \(B, 1, height, width\), both"
        ):
            autoencoder.encode(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"z has shape \(2, 1, 4, 4\); .* latents are \(B, 2"):
        autoencoder.decode(torch.zeros(2, 1, 4, 4))


@pytest.mark.parametrize("halvings", [0, 1, 3])
def test_small(halvings: int) -> None:
    torch.manual_seed(0)
    autoencoder = SmallAutoencoder(in_channels=2, latent_channels=3, channels=4, halvings=halvings)
    assert autoencoder.factor == 2**halvings
    x = torch.randn(2, 2, 8, 16)
    z = autoencoder.encode(x)
    assert z.shape == (2, 3, 8 >> halvings, 16 >> halvings)
    assert autoencoder.decode(z).shape == x.shape
    noise = torch.randn(z.shape)
    loss = autoencoder.loss(x, noise)
    assert loss.shape == (2,)
    loss.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in autoencoder.parameters())
    alone = torch.cat([autoencoder.loss(x[i : i + 1], noise[i : i + 1]) for i in range(2)])
    assert (alone - loss).abs().max() < 1e-5


def test_small_loss_by_definition() -> None:
    torch.manual_seed(0)
    autoencoder = SmallAutoencoder(
        in_channels=1, latent_channels=2, channels=4, halvings=1, kl_weight=0.3
    ).double()
    x, noise = torch.randn(3, 1, 4, 4).double(), torch.randn(3, 2, 2, 2).double()
    mean, log_variance = autoencoder.posterior(x)
    std = (log_variance / 2).exp()
    back = autoencoder.decode_raw(mean + std * noise)
    wanted = (back - x).square().mean((1, 2, 3))
    posterior = torch.distributions.Normal(mean, std)
    unit = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(std))
    wanted = wanted + 0.3 * torch.distributions.kl_divergence(posterior, unit).mean((1, 2, 3))
    assert (autoencoder.loss(x, noise) - wanted).abs().max() < 1e-12
    assert torch.equal(autoencoder.encode_raw(x), mean)


@pytest.mark.parametrize("log_variance", [-1e4, 1e4])
def test_small_loss_is_finite_whatever_the_variance(log_variance: float) -> None:
    torch.manual_seed(0)
    autoencoder = SmallAutoencoder(in_channels=1, latent_channels=2, channels=4, halvings=1)
    with torch.no_grad():
        autoencoder.encoder[-1].bias[2:] = log_variance
    assert autoencoder.loss(torch.zeros(1, 1, 4, 4), torch.ones(1, 2, 2, 2)).isfinite().all()


def test_by_name_and_back_through_json() -> None:
    made = make_autoencoder({"type": "small", "in_channels": 1, "halvings": 1})
    assert isinstance(made, SmallAutoencoder)
    plain = json.loads(json.dumps(autoencoder_config(made)))
    assert plain["halvings"] == 1
    assert autoencoder_config(make_autoencoder(plain)) == plain
    with pytest.raises(ValueError, match="Halves has no type: register it with register_autoenc"):
        autoencoder_config(Halves())


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"type": "smal"}, "unknown autoencoder type 'smal'; did you mean 'small'"),
        ({}, "the autoencoder's type is missing; known: small"),
        ("small", "an autoencoder's config must be a mapping, got str"),
        ({"type": "small", "channel": 3}, "channel = 3 is no option of this autoencoder; did you"),
        ({"type": "small", "channels": 0}, "channels = 0 is too small"),
        ({"type": "small", "halvings": -1}, "halvings = -1 is negative"),
        ({"type": "small", "kl_weight": -0.1}, "kl_weight = -0.1 is negative"),
        ({"type": "diffusers_kl"}, "path is missing: 'diffusers_kl' cannot do without"),
    ],
)
def test_configs_refused(config: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        AUTOENCODERS.settings(config)
