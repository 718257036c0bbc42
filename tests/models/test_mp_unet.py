"""The block is that of figure 21; the network keeps magnitudes; configs; memory."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from backbones import saved_bytes, wake
from magnitudes import SMALL, gaussian, rms
from torch import Tensor, nn

from k_diffusion.denoiser import make_denoiser
from k_diffusion.models import MPUNet, make_model, recompute
from k_diffusion.models.mp_layers import (
    CosineAttention,
    DecoderBlock,
    EncoderBlock,
    MPMapping,
    UnitRows,
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# ---------------------------------------------------------------- blocks, as in figure 21


def block(kind: Any, inputs: int, outputs: int, **options: Any) -> Any:
    made = kind(inputs, outputs, 12, **options).double()
    nn.init.constant_(made.gain, 0.7)
    return made


def convolve(layer: UnitRows, x: Tensor) -> Tensor:
    weight = layer.weight / layer.weight.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
    return F.conv2d(x, weight, padding=weight.shape[-1] // 2)


def modulated(made: Any, x: Tensor, embedding: Tensor) -> Tensor:
    """The residual branch, written out."""
    direction = made.modulation.weight / made.modulation.weight.norm(dim=1, keepdim=True)
    scale = 1 + 0.7 * embedding @ direction.T
    h = convolve(made.conv1, F.silu(x) / 0.596) * scale[:, :, None, None]
    return convolve(made.conv2, F.silu(h) / 0.596)


def joined(x: Tensor, branch: Tensor) -> Tensor:
    return (0.7 * x + 0.3 * branch) / math.sqrt(0.7**2 + 0.3**2)


def test_the_encoders_block() -> None:
    made = block(EncoderBlock, 6, 8)
    x, embedding = gaussian(2, 6, 4, 4), gaussian(2, 12)
    h = convolve(made.skip, x)
    h = h / h.square().mean(1, keepdim=True).sqrt()
    assert (made(x, embedding) - joined(h, modulated(made, h, embedding))).abs().max() < 1e-12
    # Whatever comes, the norm of each pixel takes its size away.
    assert (made(x * 50, embedding) - made(x, embedding)).abs().max() < 1e-12


def test_the_decoders_block() -> None:
    made = block(DecoderBlock, 10, 8)
    x, mirrored, embedding = gaussian(2, 6, 4, 4), gaussian(2, 4, 4, 4), gaussian(2, 12)
    # Eq. 103 with equal shares: the square root of 10 / 2, over those of 6 and of 4.
    both = torch.cat([x * math.sqrt(5 / 6), mirrored * math.sqrt(5 / 4)], 1)
    wanted = joined(convolve(made.skip, both), modulated(made, both, embedding))
    assert (made(x, embedding, mirrored) - wanted).abs().max() < 1e-12


def test_resampling_is_by_blocks_of_four() -> None:
    embedding = gaussian(2, 12)
    coarse = gaussian(2, 8, 4, 6)
    fine = coarse.repeat_interleave(2, 2).repeat_interleave(2, 3)
    noise = gaussian(2, 8, 4, 6)[:, :, :, None, :, None] * torch.tensor([[1.0, -1.0]]).double()
    noise = noise.expand(2, 8, 4, 2, 6, 2).reshape(fine.shape)  # of mean zero in each block
    for kind, given, same in (
        (EncoderBlock, fine + noise, coarse),
        (DecoderBlock, coarse, fine),
    ):
        resampling, plain = block(kind, 8, 8, resamples=True), block(kind, 8, 8)
        plain.load_state_dict(resampling.state_dict())
        assert (resampling(given, embedding) - plain(same, embedding)).abs().max() < 1e-12


def test_an_embedding_speaks_through_the_gain_alone() -> None:
    made = EncoderBlock(8, 8, 12).double()
    x = gaussian(2, 8, 4, 4)
    assert made.gain.item() == 0
    assert torch.equal(made(x, gaussian(2, 12)), made(x, gaussian(2, 12)))


def test_attention_is_by_cosines() -> None:
    layer = CosineAttention(8, 4).double()
    x = gaussian(2, 8, 3, 5)
    tokens = x.flatten(2).transpose(1, 2)
    qkv = tokens @ (layer.qkv.weight / layer.qkv.weight.norm(dim=1, keepdim=True)).T
    q, k, v = qkv.unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4)
    # Vectors of length 2, the root of 4 channels: queries times keys are 4 times their cosine.
    cosines = F.cosine_similarity(q[..., :, None, :], k[..., None, :, :], dim=-1)
    v = v / v.norm(dim=-1, keepdim=True) * 2
    mixed = ((cosines * 2).softmax(-1) @ v).transpose(1, 2).flatten(2)
    mixed = mixed @ (layer.out.weight / layer.out.weight.norm(dim=1, keepdim=True)).T
    wanted = joined(x, mixed.transpose(1, 2).reshape(x.shape))
    assert (layer(x) - wanted).abs().max() < 1e-12


def test_activations_are_clipped() -> None:
    made = DecoderBlock(4, 4, 12)
    y = made(torch.randn(1, 4, 4, 4) * 1e4, torch.zeros(1, 12))
    assert y.abs().max() == 256


# ---------------------------------------------------------------- the network


@pytest.mark.parametrize(
    ("size", "millions"),
    [("xs", 125), ("s", 280), ("m", 498), ("l", 777), ("xl", 1119), ("xxl", 1523)],
)
def test_presets_have_the_sizes_of_the_paper(size: str, millions: int) -> None:
    with torch.device("meta"):
        model = make_model({"type": f"edm2_{size}", "in_channels": 4, "num_classes": 1000})
    # Of ours one class more, "no label"; and a gain for each block, as there.
    assert abs(sum(p.numel() for p in model.parameters()) / 1e6 - millions) < 0.6


def test_every_block_has_unit_magnitude_at_first() -> None:
    model = MPUNet(in_channels=3, num_classes=10, embedding_dim=4, channels=48, head_channels=48)
    nn.init.ones_(model.gain_out)
    for module in model.modules():
        if isinstance(module, (EncoderBlock, DecoderBlock)):
            nn.init.constant_(module.gain, 0.3)
    found: dict[str, float] = {}
    for name, module in model.named_modules():
        if isinstance(module, (EncoderBlock, DecoderBlock, MPMapping)) or "conv_" in name:
            module.register_forward_hook(
                lambda module, args, out, name=name: found.__setitem__(name, float(rms(out)))
            )
    with torch.no_grad():
        model(
            torch.randn(4, 3, 32, 32),
            torch.linspace(-1, 1, 4),
            class_label=torch.tensor([0, 3, 9, 10]),
            embedding=torch.randn(4, 4),
        )
    assert len(found) == 3 + 8 + 2 + 11
    # Attention averages over values, and zeros stand beside the borders: both take a little.
    assert min(found.values()) > 0.8, found
    assert max(found.values()) < 1.15, found


@pytest.mark.parametrize("scale", [0.0, 0.05, 1.0, 20.0])
def test_the_mapping_keeps_magnitude_whatever_is_told(scale: float) -> None:
    model = MPMapping(2048, 1.0, 2048, 50, {"embedding": 64, "augmentation": 9})
    t, label = torch.randn(40), torch.arange(40)
    with torch.no_grad():
        y = model(t, label, embedding=torch.randn(40, 64) * scale, augmentation=torch.zeros(40, 9))
    assert abs(float(rms(y)) - 1) < 0.03


@pytest.mark.parametrize("scale", [0.0, 0.05, 1.0, 20.0])
def test_the_entry_keeps_magnitude_whatever_the_image(scale: float) -> None:
    wide = {"channels": 256, "channel_mults": (1,), "attention": (False,), "head_channels": 256}
    model = MPUNet(image_channels=5, **{**SMALL, **wide}).double()
    x = gaussian(2, 2, 16, 16)
    image = gaussian(2, 5, 16, 16) * scale
    h = model._enter(torch.cat([x, image], 1))[:, :, 1:-1, 1:-1]
    assert (rms(h, (1, 2, 3)) - 1).abs().max() < 0.12


def test_its_output_is_zero_until_its_gain_is_not() -> None:
    model = MPUNet(**SMALL)
    x, t = torch.randn(2, 2, 8, 8), torch.zeros(2)
    assert model.gain_out.item() == 0
    assert model(x, t).abs().max() == 0
    nn.init.constant_(model.gain_out, 2.0)
    assert 1.5 < float(rms(model(x, t))) < 2.3


def test_attention_is_where_it_is_asked_for() -> None:
    model = MPUNet(**{**SMALL, "channel_mults": (1, 2, 1), "attention": (False, True, False)})
    down = [[b.attention is not None for b in level] for level in model.down]  # type: ignore[attr-defined]
    up = [[b.attention is not None for b in level] for level in model.up]  # type: ignore[attr-defined]
    assert down == [[False], [False, True], [False, False]]
    assert up == [[False, False], [False, True, True], [False, False, False]]
    assert [b.attention is not None for b in model.middle] == [True, False]


def test_frequencies_are_those_of_the_paper_for_log_sigma() -> None:
    assert MPUNet(**SMALL).mapping.scale == 1
    assert MPUNet(prediction="eps", **SMALL).mapping.scale == 1 / 250
    assert MPUNet(**SMALL).prediction == "edm"


# ---------------------------------------------------------------- uncertainty


def test_the_uncertainty_is_one_layer_on_features_of_the_time() -> None:
    model = MPUNet(has_uncertainty=True, **SMALL).double()
    t = torch.linspace(-1, 1, 5, dtype=torch.float64)
    u = model.uncertainty(t)
    head = model.log_variance
    assert head is not None
    weight = head.layer.weight[0]
    assert u.shape == (5,)
    assert (u - head.features(t) @ weight / weight.norm()).abs().max() < 1e-12
    u.sum().backward()
    touched = {name for name, p in model.named_parameters() if p.grad is not None}
    assert touched == {"log_variance.layer.weight"}
    assert model.bfloat16().uncertainty(torch.ones(1)).dtype == torch.bfloat16


def test_without_a_head_there_is_no_uncertainty() -> None:
    model = MPUNet(**SMALL)
    assert not any("log_variance" in name for name in model.state_dict())
    with pytest.raises(ValueError, match="has_uncertainty = False: .* has_uncertainty = true"):
        model.uncertainty(torch.zeros(1))


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        ({"chanels": 64}, ["chanels = 64 is no option", "did you mean channels?"]),
        ({"channels": 0}, ["channels = 0 is too small", "give at least 1"]),
        ({"blocks": -1}, ["blocks = -1 is too small", "give at least 1"]),
        ({"channel_mults": []}, ["channel_mults = () has no level", "such as (1, 2)"]),
        ({"channel_mults": [1, 0, 2]}, ["channel_mults = (1, 0, 2)", "at least 1"]),
        ({"channel_mults": [1, 2]}, ["has 3 entries", "makes 2 levels", "such as (False, True)"]),
        ({"channels": 40}, ["= 64 does not divide the 120 channels", "head_channels = 60 works"]),
        (
            {"channels": 40, "attention": [True, False, False]},
            ["= 64 does not divide the 40 channels", "head_channels = 40 works"],
        ),
        (
            {"channels": 40, "attention": [False] * 3},
            ["= 64 does not divide the 120 channels", "head_channels = 60 works"],
        ),
        ({"dropout": 1}, ["dropout = 1 is outside [0, 1)"]),
        ({"has_uncertainty": 1}, ["has_uncertainty = 1", "give true or false"]),
        ({"checkpointing": [3]}, ["names level 3", "levels 0 to 2"]),
        ({"context_dim": 4}, ["context_dim = 4 is no option"]),
        ({"dims": 3}, ["dims = 3 is no option"]),
    ],
)
def test_configs(config: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011  (the parts are matched below)
        MPUNet.from_config(config)
    text = str(error.value)
    assert "\n" not in text
    assert all(part in text for part in parts), text


def test_odd_sizes_are_padded_with_what_ends_them() -> None:
    model = MPUNet(**{**SMALL, "channel_mults": (1, 2, 2), "attention": (False, False, True)})
    nn.init.ones_(model.gain_out)
    for height, width in ((7, 8), (1, 5), (6, 9)):
        x, t = torch.randn(2, 2, height, width), torch.tensor([0.1, -0.3])
        more = (0, -width % 4, 0, -height % 4)
        y = model(x, t)
        assert y.shape == x.shape
        assert torch.equal(y, model(F.pad(x, more, mode="replicate"), t)[:, :, :height, :width])


def test_refused_shapes() -> None:
    model = MPUNet(**SMALL)
    for shape, wanted in (
        ((1, 2, 0, 8), "x has height 0, .*: give at least 1"),
        ((1, 2, 8), r"x has shape \(1, 2, 8\); this model takes \(batch, 2, height, width"),
        ((1, 3, 8, 8), "x has shape"),
    ):
        with pytest.raises(ValueError, match=wanted):
            model(torch.zeros(shape), torch.zeros(1))


def test_it_takes_no_context() -> None:
    with pytest.raises(ValueError, match="context was given, but this model takes none"):
        MPUNet(**SMALL)(torch.zeros(1, 2, 8, 8), torch.zeros(1), context=torch.zeros(1, 2, 3))


def test_it_becomes_a_denoiser() -> None:
    x, sigma = torch.randn(2, 2, 8, 8), torch.tensor([0.1, 5.0])
    denoised = make_denoiser(MPUNet(**SMALL))(x, sigma)
    skip = 0.25 / (sigma**2 + 0.25)
    assert (denoised - skip.reshape(2, 1, 1, 1) * x).abs().max() < 1e-6


# ---------------------------------------------------------------- memory


def test_all_features_are_channels_last() -> None:
    """The format in which convolutions are fastest, and tokens a view."""
    model, formats = MPUNet(**SMALL), []

    def watch(module: nn.Module, args: Any, output: Tensor) -> None:
        if output.ndim == 4:
            formats.append(output.is_contiguous(memory_format=torch.channels_last))

    for module in model.modules():
        if module is not model:
            module.register_forward_hook(watch)
    x = torch.randn(2, model.config.in_channels, 8, 8)
    assert model(x, torch.ones(2)).is_contiguous()
    assert len(formats) > 20
    assert all(formats)
    last = x.contiguous(memory_format=torch.channels_last)
    assert model(last, torch.ones(2)).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_before_convolutions_are_not_kept(
    monkeypatch: pytest.MonkeyPatch, checkpointing: bool
) -> None:
    """Gradients are the same bitwise, with dropout, too; and a sample keeps 0.58 of it."""
    wide = {**SMALL, "channels": 32, "head_channels": 32, "dropout": 0.3}
    kept, gradients = {}, []
    for small in (2**62, 0):
        monkeypatch.setattr(recompute, "SMALL", small)
        torch.manual_seed(0)
        model = MPUNet(checkpointing=checkpointing, **wide)
        wake(model)
        for batch in (2, 4):
            torch.manual_seed(1)
            x = torch.randn(batch, model.config.in_channels, 16, 16)
            kept[small, batch], y = saved_bytes(model, x, torch.ones(batch))
            y.square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    plain, spared = (kept[small, 4] - kept[small, 2] for small in (2**62, 0))
    assert spared <= (1.0 if checkpointing else 0.6) * plain
