"""The established module `config`: what it reads, makes and refuses."""

from __future__ import annotations

import copy
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import k_diffusion as K
from k_diffusion.models.augment_wrapper import KarrasAugmentWrapper
from k_diffusion.models.image_transformer_v2 import ImageTransformerDenoiserModelV2
from tests.established_configs import T1, T2, V1, config

# ---------------------------------------------------------------- reading


def test_defaults_of_image_v1() -> None:
    given = config(V1)
    before = copy.deepcopy(given)
    whole = K.config.load_config(given)
    assert given == before
    assert whole == {
        "model": {
            **V1,
            "patch_size": 1,
            "augment_wrapper": True,
            "mapping_cond_dim": 0,
            "unet_cond_dim": 0,
            "cross_cond_dim": 0,
            "cross_attn_depths": None,
            "skip_stages": 0,
            "has_variance": False,
            "dropout_rate": 0.0,
            "augment_prob": 0.0,
            "loss_config": "karras",
            "loss_weighting": "karras",
            "loss_scales": 1,
        },
        "dataset": {"type": "imagefolder", "num_classes": 0, "cond_dropout_rate": 0.1},
        "optimizer": {
            "type": "adamw", "lr": 1e-4, "betas": [0.95, 0.999], "eps": 1e-6, "weight_decay": 1e-3,
        },
        "lr_sched": {"type": "constant", "warmup": 0.0},
        "ema_sched": {"type": "inverse", "power": 0.6667, "max_value": 0.9999},
    }  # fmt: skip
    assert K.config.load_config(whole) == whole


COMMON = {
    "sigma_data": 1.0, "augment_prob": 0.0, "loss_config": "karras", "loss_weighting": "karras",
    "loss_scales": 1, "augment_wrapper": False, "skip_stages": 0, "has_variance": False,
}  # fmt: skip


def test_defaults_of_the_transformers() -> None:
    first = K.config.load_config(config(T1))
    assert first["model"] == {**COMMON, **T1, "d_ff": 176, "dropout_rate": 0.0}
    optimizer = {
        "type": "adamw", "lr": 5e-4, "betas": [0.9, 0.99], "eps": 1e-8, "weight_decay": 1e-4,
    }  # fmt: skip
    second = K.config.load_config(config(T2))
    assert second["optimizer"] == first["optimizer"] == optimizer
    assert second["model"] == {
        **COMMON,
        **T2,
        "mapping_width": 256,
        "mapping_depth": 2,
        "mapping_d_ff": 768,
        "mapping_cond_dim": 0,
        "mapping_dropout_rate": 0.0,
        "d_ffs": [192, 384],
        "self_attns": [
            {"type": "neighborhood", "d_head": 64, "kernel_size": 7},
            {"type": "global", "d_head": 64},
        ],
        "dropout_rate": [0.0, 0.0],
    }
    assert K.config.load_config(second) == second
    for rate in (0.25, [0.25, 0.25]):
        model = K.config.load_config(config(T2, dropout_rate=rate))["model"]
        assert model["dropout_rate"] == [0.25, 0.25]
    assert K.config.load_config(config(T2, dropout_rate=0))["model"]["dropout_rate"] == [0.0, 0.0]
    assert K.config.load_config(config(T1, d_ff=100))["model"]["d_ff"] == 100


def test_what_is_given_counts_key_by_key() -> None:
    given = {
        "model": V1,
        "optimizer": {"lr": 3.0, "betas": [0.5, 0.6]},
        "dataset": {"type": "huggingface", "image_key": "image"},
        "mine": {"free": [1, None]},
    }
    whole = K.config.load_config(given)
    assert whole["optimizer"]["lr"] == 3.0
    assert whole["optimizer"]["betas"] == [0.5, 0.6]
    assert whole["optimizer"]["eps"] == 1e-6
    assert whole["dataset"]["image_key"] == "image"
    assert whole["mine"] == {"free": [1, None]}
    whole["model"]["depths"].append(7)
    whole["mine"]["free"].append(7)
    assert given["mine"] == {"free": [1, None]}
    assert V1["depths"] == [1, 1]


def test_from_files(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config(V1)))
    expected = K.config.load_config(config(V1))
    assert K.config.load_config(path) == K.config.load_config(str(path)) == expected
    weights = tmp_path / "weights.safetensors"
    save_file({"a": torch.zeros(1)}, weights, {"config": json.dumps(config(V1))})
    assert K.config.load_config(weights) == expected
    save_file({"a": torch.zeros(1)}, weights)
    with pytest.raises(ValueError, match=r"weights.safetensors holds no config in its metadata"):
        K.config.load_config(weights)
    for text in ("{'model': 1}", "__import__('os')", ""):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"config.json is no JSON .*configs are plain data"):
            K.config.load_config(path)
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"config.json is no JSON "):
        K.config.load_config(path)
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(ValueError, match=r"config.json is no text in UTF-8: give a JSON file"):
        K.config.load_config(path)
    path.write_text("[1]")
    with pytest.raises(ValueError, match=r"a config is an object, {...}, got list"):
        K.config.load_config(path)


@pytest.mark.parametrize(
    ("x", "tol", "rounded"),
    [
        (64 * 8 / 3, 0.05, 176),
        (128 * 8 / 3, 0.05, 352),
        (768 * 8 / 3, 0.05, 2048),
        (100, 0.0, 100),
        (100, 0.04, 96),
        (100, 0.3, 128),
        (2.4, 0.01, 2),
    ],
)
def test_round_to_power_of_two(x: float, tol: float, rounded: int) -> None:
    assert K.config.round_to_power_of_two(x, tol) == rounded


def test_what_cannot_be_rounded() -> None:
    for x in (1, 0, -3.0, math.nan, "8"):
        with pytest.raises(ValueError, match="give a number above 1"):
            K.config.round_to_power_of_two(x, 0.05)


# ---------------------------------------------------------------- refusals of configs


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ({}, ["model.type is missing", "image_v1, image_transformer_v1, image_transformer_v2"]),
        ({"model": 3}, ["model = 3 does not fit", "give an object"]),
        ({"model": V1, "optimizer": []}, ["optimizer = [] does not fit"]),
        (config(V1, type="image_v2"), ["unknown model.type 'image_v2'", "image_v1"]),
        (config(V1, type=["image_v1"]), ["unknown model.type"]),
        (config(V1, depths=...), ["model.depths is missing", "image_v1 needs a list"]),
        (config(V1, mapping_out=...), ["model.mapping_out is missing", "whole number"]),
        (config(T1, width=...), ["model.width is missing", "image_transformer_v1 needs"]),
        (config(T2, widths=...), ["model.widths is missing", "image_transformer_v2 needs"]),
        (
            config(V1, depths=..., dept=[2]),
            ["model.dept = [2] is no key: did you mean depths?"],
        ),
        (config(V1, dropout=0.1), ["model.dropout = 0.1 is no key: did you mean dropout_rate?"]),
        (config(V1, channels="16"), ["model.channels = '16' does not fit", "give a list"]),
        (
            config(V1, channels=[8, 16.0]),
            ["model.channels = [8, 16.0]", "whole number of at least 1"],
        ),
        (config(V1, depths=[-1, 1]), ["model.depths = [-1, 1]", "at least 1"]),
        (config(V1, depths=[]), ["model.depths = [] does not fit"]),
        (config(V1, depths=[1]), ["depths = (1,) has 1 entries", "one a level"]),
        (config(V1, self_attn_depths=[1, 0]), ["model.self_attn_depths = [1, 0]", "true or false"]),
        (config(V1, self_attn_depths=[True]), ["self_attn_depths = (True,) has 1 entries"]),
        (config(V1, mapping_out=15), ["mapping_out = 15 is no number of cosines and sines"]),
        (config(V1, has_variance=1), ["model.has_variance = 1", "true or false"]),
        (config(V1, patch_size=[2, 2]), ["model.patch_size = [2, 2]", "whole number"]),
        (config(V1, dropout_rate=1), ["model.dropout_rate = 1 ", "below 1"]),
        (config(V1, dropout_rate=math.nan), ["model.dropout_rate = nan"]),
        (config(V1, sigma_data=0), ["model.sigma_data = 0 ", "above 0"]),
        (config(V1, sigma_min=90), ["model.sigma_min = 90 is not below sigma_max = 80"]),
        (config(V1, skip_stages=2), ["skip_stages = 2 leaves none of 2 levels"]),
        (config(V1, cross_cond_dim=4), ["cross_attn_depths = None, but cross_cond_dim = 4"]),
        (config(V1, cross_attn_depths=[False, True]), ["but cross_cond_dim = 0: give both"]),
        (
            config(V1, {"num_classes": 10}),
            ["dataset.num_classes = 10", "image_v1 knows no classes"],
        ),
        (config(V1, {"num_classes": -1}), ["dataset.num_classes = -1", "at least 0"]),
        (config(V1, loss_config="l1"), ["model.loss_config = 'l1'", "karras, simple"]),
        (config(V1, loss_weighting="min-snr"), ["loss_weighting = 'min-snr'", "soft-min-snr"]),
        (config(T1, has_variance=True), ["model.has_variance = True", "give false"]),
        (config(T1, skip_stages=1), ["model.skip_stages = 1", "give 0"]),
        (config(T1, patch_size=4), ["model.patch_size = 4", "a list of 2"]),
        (config(T1, width=100), ["width = 100 is no multiple of 64"]),
        (config(T1, depth=-2), ["model.depth = -2"]),
        (config(T2, depths=[1]), ["model.depths = [1] has 1 entries", "2 levels"]),
        (config(T2, d_ffs=[1, 2, 3]), ["model.d_ffs = [1, 2, 3] has 3 entries"]),
        (config(T2, dropout_rate=[0.1]), ["model.dropout_rate = [0.1] has 1 entries"]),
        (config(T2, mapping_width=0), ["model.mapping_width = 0"]),
        (
            config(T2, self_attns=[{"type": "local"}, {"type": "global"}]),
            ["unknown model.self_attns[0].type 'local'", "global"],
        ),
        (
            config(T2, self_attns=[{"d_head": 64}, {"type": "global"}]),
            ["unknown model.self_attns[0].type None"],
        ),
        (
            config(T2, self_attns=[{"type": "global", "d_head": 48}, {"type": "global"}]),
            ["model.self_attns[0].d_head = 48 does not divide model.widths[0] = 64"],
        ),
        (
            config(T2, self_attns=[{"type": "shifted-window"}, {"type": "global"}]),
            ["model.self_attns[0].window_size is missing"],
        ),
        (
            config(T2, self_attns=[{"type": "neighborhood", "kernel_sise": 5}, {"type": "global"}]),
            ["self_attns[0].kernel_sise = 5 is no key: did you mean kernel_size?"],
        ),
        (
            config(T2, self_attns=[{"type": "neighborhood", "kernel_size": 4}, {"type": "global"}]),
            ["kernel_size"],
        ),
    ],
)
def test_configs_that_are_refused(given: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ValueError, match=re.escape(parts[0])) as error:
        K.config.make_model(given)
    text = str(error.value)
    assert "\n" not in text
    for part in parts:
        assert part in text


def test_a_foreign_key_is_kept_and_said_to_have_no_effect() -> None:
    with pytest.warns(UserWarning, match=r"model.noise_perturbation_factor = 0.1 has no effect"):
        whole = K.config.load_config(config(V1, noise_perturbation_factor=0.1))
    assert whole["model"]["noise_perturbation_factor"] == 0.1


# ---------------------------------------------------------------- making


def test_models_are_of_the_established_classes() -> None:
    first = K.config.make_model(config(V1, patch_size=2, dropout_rate=0.1, mapping_cond_dim=4))
    assert isinstance(first, KarrasAugmentWrapper)
    assert isinstance(first.inner_model, K.models.ImageDenoiserModelV1)
    assert first.inner_model.mapping_cond.in_features == 9 + 4
    assert first.inner_model.config.dropout == 0.1
    assert first.inner_model.config.patch_size == 2
    bare = K.config.make_model(config(V1, augment_wrapper=False, skip_stages=1, has_variance=True))
    assert isinstance(bare, K.models.ImageDenoiserModelV1)
    assert bare.config.skip_stages == 1
    assert bare.config.has_variance
    second = K.config.make_model(config(T1, {"num_classes": 10}, dropout_rate=0.1, depth=3))
    assert isinstance(second, K.models.ImageTransformerDenoiserModelV1)
    assert second.class_emb.weight.shape == (11, 64)  # the last: no class
    assert len(second.blocks) == 3
    assert {m.p for m in second.modules() if isinstance(m, nn.Dropout)} == {0.1}


def test_every_key_of_an_hourglass_arrives() -> None:
    attention = [
        {"type": "shifted-window", "d_head": 32, "window_size": 4},
        {"type": "none"},
        {"type": "neighborhood", "d_head": 16, "kernel_size": 5},
        {"type": "global", "d_head": 32},
    ]
    given = config(
        T2,
        widths=[64, 32, 32, 64],
        depths=[1, 2, 1, 1],
        d_ffs=[11, 22, 33, 44],
        self_attns=attention,
        dropout_rate=[0.1, 0.2, 0.3, 0.4],
        mapping_width=24,
        mapping_depth=3,
        mapping_d_ff=17,
        mapping_cond_dim=5,
        mapping_dropout_rate=0.05,
        patch_size=[2, 1],
    )
    model = K.config.make_model({**given, "dataset": {"num_classes": 7}})
    assert isinstance(model, ImageTransformerDenoiserModelV2)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert shapes["patch_in.proj.weight"] == (64, 3 * 2)
    assert shapes["class_emb.weight"] == (8, 24)
    assert shapes["mapping_cond_in_proj.weight"] == (24, 5)
    assert shapes["mapping.blocks.2.down_proj.weight"] == (24, 17)
    assert "mapping.blocks.3.down_proj.weight" not in shapes
    assert shapes["down_levels.0.0.ff.down_proj.weight"] == (64, 11)
    assert shapes["down_levels.1.1.ff.down_proj.weight"] == (32, 22)
    assert shapes["mid_level.0.ff.down_proj.weight"] == (64, 44)
    assert shapes["down_levels.0.0.self_attn.scale"] == (2,)
    assert shapes["down_levels.2.0.self_attn.scale"] == (2,)
    assert not any(name.startswith("down_levels.1") and "attn" in name for name in shapes)
    rates = {m.p for m in model.modules() if isinstance(m, nn.Dropout)}
    assert rates >= {0.1, 0.2, 0.3, 0.4, 0.05}
    x = torch.randn(1, 3, 64, 32)
    with torch.no_grad():
        assert model.eval()(x, torch.ones(1), class_cond=torch.tensor([7])).shape == x.shape


def test_param_groups_of_the_transformers() -> None:
    for made in (config(T1, {"num_classes": 3}), config(T2, {"num_classes": 3})):
        model: Any = K.config.make_model(made)
        groups = model.param_groups(3e-4)
        assert [g["lr"] for g in groups] == [3e-4, 3e-4, pytest.approx(1e-4), pytest.approx(1e-4)]
        assert [g.get("weight_decay") for g in groups] == [None, 0.0, None, 0.0]
        names = {id(p): name for name, p in model.named_parameters()}
        each = [{names[id(p)] for p in g["params"]} for g in groups]
        assert sum(map(len, each)) == len(names)
        assert set.union(*each) == set(names.values())
        for name in set(names.values()):
            maps = name.startswith("mapping.") or name.endswith("norm.linear.weight")
            outer = (
                "time_in_proj",
                "aug_in_proj",
                "class_emb",
                "in_proj.weight",
                "out_proj.weight",
            )
            matrix = name.endswith(("proj.weight", "linear.weight"))
            decays = matrix and not name.startswith(outer)
            assert name in each[2 * maps + (not decays)], name


def test_the_factors_of_cosines_come_back() -> None:
    model: Any = K.config.make_model(config(T1))
    scale = model.blocks[0].self_attn.qk_norm.scale
    before = scale.detach().clone()
    model.proj_()
    assert torch.equal(scale, before)
    scale.data += 10
    model.proj_()
    assert (scale - math.log(100)).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("model", "kind", "expected"),
    [
        ({}, K.layers.Denoiser, {"sigma_data": 1.0, "scales": 1}),
        (
            {"sigma_data": 0.3, "loss_scales": 4},
            K.layers.Denoiser,
            {"sigma_data": 0.3, "scales": 4},
        ),
        ({"has_variance": True}, K.layers.DenoiserWithVariance, {"scales": 1}),
        ({"loss_config": "simple"}, K.layers.SimpleLossDenoiser, {}),
    ],
)
def test_wrappers(model: dict[str, Any], kind: type, expected: dict[str, Any]) -> None:
    denoiser = K.config.make_denoiser_wrapper({"model": model})(nn.Identity())
    assert type(denoiser) is kind
    assert {key: getattr(denoiser, key) for key in expected} == expected


def test_weightings_arrive() -> None:
    sigma = torch.tensor([0.5, 3.0])
    for name in ("karras", "soft-min-snr", "snr"):
        for has_variance in (False, True):
            model = {"loss_weighting": name, "has_variance": has_variance, "sigma_data": 0.5}
            wrapped = K.config.make_denoiser_wrapper({"model": model})(nn.Identity())
            expected = K.layers.Denoiser(nn.Identity(), 0.5, name).weighting(sigma)
            assert torch.equal(wrapped.weighting(sigma), expected)


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (
            {"loss_config": "simple", "has_variance": True},
            "'simple' has no use for .*give 'karras'",
        ),
        ({"loss_config": "other"}, "model.loss_config = 'other' does not fit"),
        ({"loss_weighting": "karas"}, "model.loss_weighting = 'karas' does not fit"),
        ({"sigma_data": -1}, "model.sigma_data = -1 does not fit"),
        ({"loss_scales": None}, "model.loss_scales = None does not fit"),
    ],
)
def test_wrappers_that_are_refused(model: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        K.config.make_denoiser_wrapper({"model": model})
