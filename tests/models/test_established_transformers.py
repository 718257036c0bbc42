"""The established transformers' own names, defaults and refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from k_diffusion import layers
from k_diffusion.models import ImageDenoiserModelV1
from k_diffusion.models.augment_wrapper import KarrasAugmentWrapper
from k_diffusion.models.established_transformers import (
    ImageTransformerV1,
    ImageTransformerV2,
    rounded,
)
from k_diffusion.sampling import KSampler

V1: dict[str, Any] = {"input_channels": 2, "patch_size": [2, 2], "width": 64, "depth": 1}
V2: dict[str, Any] = {
    "input_channels": 2,
    "patch_size": [2, 2],
    "widths": [32, 64],
    "depths": [1, 2],
    "mapping_width": 16,
    "mapping_depth": 1,
    "self_attns": [
        {"type": "shifted-window", "d_head": 16, "window_size": 4},
        {"type": "none"},
    ],
}


def awake(model: Any) -> Any:
    torch.manual_seed(0)
    for parameter in model.parameters():
        if not parameter.detach().any():
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def inputs(side: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 2, side, side, generator=generator), torch.tensor([0.1, 1.0, 30.0])


def test_names_of_version_2() -> None:
    network = ImageTransformerV2(**V2, num_classes=10, mapping_cond_dim=4)
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    mapping = {
        "time_emb.weight": (8, 1),
        "time_in_proj.weight": (16, 16),
        "aug_emb.weight": (8, 9),
        "aug_in_proj.weight": (16, 16),
        "class_emb.weight": (11, 16),
        "mapping_cond_in_proj.weight": (16, 4),
        "mapping.in_norm.scale": (16,),
        "mapping.blocks.0.norm.scale": (16,),
        "mapping.blocks.0.up_proj.weight": (96, 16),
        "mapping.blocks.0.down_proj.weight": (16, 48),
        "mapping.out_norm.scale": (16,),
        "patch_in.proj.weight": (32, 8),
        "merges.0.proj.weight": (64, 128),
        "splits.0.proj.weight": (128, 64),
        "splits.0.fac": (1,),
        "out_norm.scale": (32,),
        "patch_out.proj.weight": (8, 32),
    }
    blocks = {}
    for name, width in (("down_levels.0.0", 32), ("up_levels.0.0", 32), ("mid_level.0", 64),
                        ("mid_level.1", 64)):  # fmt: skip
        blocks |= {
            f"{name}.ff.norm.linear.weight": (width, 16),
            f"{name}.ff.up_proj.weight": (6 * width, width),
            f"{name}.ff.down_proj.weight": (width, 3 * width),
        }
        if width == 32:
            blocks |= {
                f"{name}.self_attn.norm.linear.weight": (32, 16),
                f"{name}.self_attn.qkv_proj.weight": (96, 32),
                f"{name}.self_attn.scale": (2,),
                f"{name}.self_attn.pos_emb.freqs": (2, 2),
                f"{name}.self_attn.out_proj.weight": (32, 32),
            }
    assert shapes == mapping | blocks


def test_version_2_takes_the_config_as_it_is() -> None:
    usual: Any = ImageTransformerV2(**{**V2, "widths": [64, 128], "self_attns": None})
    fine, coarse = usual.down_levels[0][0].self_attn, usual.mid_level[0].self_attn
    assert fine.mix.keywords["kernel_size"] == 7
    assert not hasattr(coarse.mix, "keywords")
    assert (fine.head_channels, coarse.head_channels) == (64, 64)
    given: Any = ImageTransformerV2(
        **{**V2, "d_ffs": [None, 50], "dropout_rate": [0.1, 0.0], "mapping_d_ff": 20},
        mapping_dropout_rate=0.3,
        checkpointing=True,
    )
    assert given.down_levels[0][0].ff.down_proj.weight.shape == (32, 96)
    assert given.mid_level[0].ff.down_proj.weight.shape == (64, 50)
    assert given.mapping.blocks[0].down_proj.weight.shape == (16, 20)
    assert (
        given.down_levels[0][0].ff.dropout.p == given.down_levels[0][0].self_attn.dropout.p == 0.1
    )
    assert given.mapping.blocks[0].dropout.p == 0.3
    assert given.checkpointing.policy is True


@pytest.mark.parametrize("version", [1, 2])
def test_absent_conditions(version: int) -> None:
    network: Any = awake(
        ImageTransformerV1(**V1, num_classes=10)
        if version == 1
        else ImageTransformerV2(**V2, num_classes=10, mapping_cond_dim=4)
    )
    x, sigma = inputs()
    plain = network(x, sigma)
    assert plain.shape == x.shape
    given = {"class_cond": torch.full((3,), 10), "aug_cond": torch.zeros(3, 9)}
    other = {"class_cond": torch.tensor([0, 4, 9]), "aug_cond": torch.ones(3, 9)}
    if version == 2:
        given["mapping_cond"], other["mapping_cond"] = torch.zeros(3, 4), torch.ones(3, 4)
    assert torch.equal(network(x, sigma, **given), plain)
    for name, value in other.items():
        assert (network(x, sigma, **{name: value}) - plain).abs().amax((1, 2, 3)).min() > 1e-4, name


def test_version_1_turns_by_neighbouring_channels() -> None:
    attention: Any = ImageTransformerV1(**V1).blocks[0].self_attn  # type: ignore[union-attr, index]
    qk, angles = torch.zeros(1, 1, 1, 2, 1, 64), torch.zeros(1, 1, 1, 32)
    qk[..., 0], qk[..., 4] = 1.0, 1.0
    angles[..., 2] = 0.3  # of channels 4 and 5
    turned = attention._cosine(qk, torch.tensor([9.0]), angles)[0, 0, 0, 0, 0]
    length = 3 / math.sqrt(2)  # √9, shared by two channels
    wanted = torch.zeros(64)
    wanted[0], wanted[4], wanted[5] = length, length * math.cos(0.3), length * math.sin(0.3)
    assert (turned - wanted).abs().max() < 1e-4


def test_version_1_bounds_the_scale_and_lets_it_come_back() -> None:
    norm: Any = ImageTransformerV1(**V1).blocks[0].self_attn.qk_norm  # type: ignore[union-attr, index]
    assert abs(norm().item() - 10) < 1e-5
    norm.scale.data.fill_(6.0)
    scale = norm()
    assert abs(scale.item() - 100) < 1e-4
    scale.backward()
    assert abs(norm.scale.grad.item() - 100) < 1e-4


def test_version_1_pixels_of_a_channel_lie_side_by_side() -> None:
    network: Any = ImageTransformerV1(**{**V1, "depth": 0, "patch_size": [1, 2], "width": 64})
    network.in_proj.weight.data.zero_()
    network.out_proj.weight.data.zero_()
    for i in range(4):  # from each pixel of a patch to itself, through the norm
        network.in_proj.weight.data[i, i] = network.out_proj.weight.data[i, i] = 1
    x = torch.zeros(1, 2, 2, 4)
    x[0, 1, 0, 3] = 5.0
    assert abs(network(x, torch.ones(1))[0, 1, 0, 3].item() - 8) < 1e-4  # √64
    network.in_proj.weight.data[3, 3] = 0  # channel 1, the right-hand one
    assert network(x, torch.ones(1)).abs().max() == 0


@pytest.mark.parametrize(("value", "wanted"), [(64 * 8 / 3, 176), (2048, 2048), (5, 5), (100, 96)])
def test_rounded(value: float, wanted: int) -> None:
    assert rounded(value) == wanted


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"self_attns": [{"type": "windows"}] * 2}, "unknown self_attns type 'windows'"),
        (
            {"self_attns": [{"type": "global", "head": 8}] * 2},
            "unknown key of global attention 'head'",
        ),
        (
            {"self_attns": [{"type": "shifted-window", "d_head": 16}] * 2},
            "has no window_size; give the side of a window",
        ),
        ({"self_attns": [{"type": "none"}]}, "attention = .* has 1 entries for the 2 levels"),
        ({"d_ffs": [3]}, r"d_ffs = \[3\] has 1 entries for the 2 levels"),
        ({"depths": [1, -2]}, r"depths = \(1, -2\) must give a number of blocks"),
    ],
)
def test_version_2_refuses(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        ImageTransformerV2(**{**V2, **options})


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"width": 100}, "width = 100 is no multiple of 64, the channels of a head; 128 works"),
        ({"depth": -1}, "depth = -1 is negative; give 0 for none"),
        ({"num_classes": -1}, "num_classes = -1 is negative"),
        ({"patch_size": [2]}, r"patch_size = \[2\] must be a height and a width"),
        ({"checkpointing": (1,)}, "names level 1, but the model has levels 0 to 0"),
    ],
)
def test_version_1_refuses(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        ImageTransformerV1(**{**V1, **options})


def test_version_1_refuses_sizes() -> None:
    with pytest.raises(ValueError, match="x is 16 x 15 pixels, which patches of 2 x 2 cannot"):
        ImageTransformerV1(**V1)(torch.zeros(1, 2, 16, 15), torch.ones(1))


WRONG: list[tuple[dict[str, Any], str]] = [
    (
        {"class_cond": torch.zeros(1, dtype=torch.long)},
        r"class_cond has shape \(1,\), but the batch",
    ),
    ({"class_cond": torch.zeros(3)}, "class_cond is of torch.float32; class indices are integers"),
    ({"class_cond": "cat"}, "class_cond must be a tensor, got str"),
    ({"mapping_cond": torch.zeros(3, 5)}, r"mapping_cond has shape \(3, 5\); .* take \(3, 4\)"),
    ({"mapping_cond": torch.zeros(1, 4)}, r"mapping_cond has shape \(1, 4\)"),
    ({"aug_cond": torch.zeros(3, 8)}, r"aug_cond has shape \(3, 8\); .* take \(3, 9\)"),
]
VALUES: list[tuple[dict[str, Any], str]] = [
    (
        {"class_cond": torch.tensor([0, 11, 1])},
        "class_cond holds 11; this model knows classes 0 to",
    ),
    ({"class_cond": torch.tensor([0, -1, 1])}, "class_cond holds -1"),
    ({"aug_cond": torch.full((3, 9), math.nan)}, "aug_cond holds values that are not finite"),
    ({"class_label": torch.zeros(3)}, "unknown condition 'class_label'"),
]


@pytest.mark.parametrize(("condition", "text"), WRONG)
def test_wrong_conditions_are_refused_by_every_call(condition: dict[str, Any], text: str) -> None:
    x, sigma = inputs()
    with pytest.raises(ValueError, match=text):
        ImageTransformerV2(**V2, num_classes=10, mapping_cond_dim=4)(x, sigma, **condition)
    if "mapping_cond" not in condition:
        with pytest.raises(ValueError, match=text):
            ImageTransformerV1(**V1, num_classes=10)(x, sigma, **condition)


@pytest.mark.parametrize("version", [1, 2])
def test_a_model_without_classes_is_told_of_none(version: int) -> None:
    network: Any = ImageTransformerV1(**V1) if version == 1 else ImageTransformerV2(**V2)
    x, sigma = inputs()
    with pytest.raises(ValueError, match="class_cond was given, but .* model with num_classes"):
        network(x, sigma, class_cond=torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"sigma has shape \(\); give one a sample"):
        network(x, sigma[0])
    with pytest.raises(ValueError, match=r"x has shape \(2, 16, 16\)"):
        network(x[0], sigma[:2])


def test_version_2_without_a_mapping_cond() -> None:
    with pytest.raises(ValueError, match="mapping_cond was given, .* with mapping_cond_dim"):
        ImageTransformerV2(**V2)(*inputs(), mapping_cond=torch.zeros(3, 4))


@pytest.mark.parametrize(("condition", "text"), [*WRONG, *VALUES])
def test_wrong_conditions_are_refused_before_a_run(condition: dict[str, Any], text: str) -> None:
    network = ImageTransformerV2(**V2, num_classes=10, mapping_cond_dim=4)
    sampler = KSampler(layers.Denoiser(network), "karras")
    with pytest.raises(ValueError, match=text):
        sampler.sample(inputs()[0], 1, condition=condition)


def test_the_established_unet_is_asked_before_a_run_too() -> None:
    network = ImageDenoiserModelV1(
        2, 16, [1, 1], [16, 32], [False, True], mapping_cond_dim=13, unet_cond_dim=2
    )
    denoiser = layers.Denoiser(KarrasAugmentWrapper(network))
    good = {"mapping_cond": torch.zeros(3, 4), "unet_cond": torch.zeros(3, 2, 8, 8)}
    denoiser.check_condition(3, **good, aug_cond=torch.zeros(3, 9))
    for condition, text in (
        ({"mapping_cond": torch.zeros(3, 13)}, r"mapping_cond has shape .* take \(3, 4\)"),
        ({"aug_cond": torch.zeros(3, 4)}, r"aug_cond has shape .* take \(3, 9\)"),
        ({"unet_cond": torch.full((3, 2, 8, 8), math.inf)}, "unet_cond holds values that are not"),
        ({"cross_cond": torch.zeros(3, 1, 2)}, "cross_cond was given, .* with cross_cond_dim"),
        ({"embedding": torch.zeros(3, 13)}, "unknown condition 'embedding'"),
    ):
        with pytest.raises(ValueError, match=text):
            denoiser.check_condition(3, **condition)
