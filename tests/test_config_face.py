"""The established module `config`: what it reads, makes and refuses; trained weights."""

from __future__ import annotations

import copy
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import k_diffusion as K
from k_diffusion.models.augment_wrapper import KarrasAugmentWrapper
from k_diffusion.models.image_transformer_v2 import ImageTransformerDenoiserModelV2
from k_diffusion.training.checkpoint import save_checkpoint

FIXTURES = Path(__file__).parent / "fixtures" / "established"

V1: dict[str, Any] = {
    "type": "image_v1",
    "input_channels": 3,
    "input_size": [16, 8],
    "mapping_out": 16,
    "depths": [1, 1],
    "channels": [8, 16],
    "self_attn_depths": [False, True],
    "sigma_data": 0.5,
    "sigma_min": 0.01,
    "sigma_max": 80,
    "sigma_sample_density": {"type": "lognormal", "mean": -1.2, "std": 1.2},
}
T1: dict[str, Any] = {
    "type": "image_transformer_v1", "input_channels": 3, "patch_size": [4, 4], "width": 64,
    "depth": 1,
}  # fmt: skip
T2: dict[str, Any] = {
    "type": "image_transformer_v2", "input_channels": 3, "patch_size": [4, 4],
    "widths": [64, 128], "depths": [1, 2],
}  # fmt: skip


def config(model: dict[str, Any] = V1, /, dataset: Any = None, **more: Any) -> dict[str, Any]:
    """A config with some of its model's keys changed; those that are None are left out."""
    changed = {key: value for key, value in {**model, **more}.items() if value is not ...}
    return {"model": changed} | ({"dataset": dataset} if dataset else {})


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


# ---------------------------------------------------------------- noise levels


@pytest.mark.parametrize(
    ("density", "draw", "expected"),
    [
        ({"type": "lognormal", "mean": -1, "std": 1.1}, "log_normal", {"loc": -1, "scale": 1.1}),
        ({"type": "lognormal", "loc": 0, "scale": 2}, "log_normal", {"loc": 0, "scale": 2}),
        (
            {"type": "loglogistic"},
            "log_logistic",
            {"loc": math.log(0.5), "scale": 0.5, "min_value": 0.0, "max_value": math.inf},
        ),
        (
            {"type": "loglogistic", "loc": 1, "scale": 2, "min_value": 0.1, "max_value": 9},
            "log_logistic",
            {"loc": 1, "scale": 2, "min_value": 0.1, "max_value": 9},
        ),
        ({"type": "loguniform"}, "log_uniform", {"min_value": 0.01, "max_value": 80}),
        (
            {"type": "loguniform", "min_value": 0.1, "max_value": 1},
            "log_uniform",
            {"min_value": 0.1, "max_value": 1},
        ),
        (
            {"type": "v-diffusion"},
            "v_diffusion",
            {"sigma_data": 0.5, "min_value": 1e-3, "max_value": 1e3},
        ),
        (
            {"type": "cosine", "min_value": 0, "max_value": 50},
            "v_diffusion",
            {"sigma_data": 0.5, "min_value": 0, "max_value": 50},
        ),
        (
            {"type": "split-lognormal", "mean": 0, "std_1": 1, "std_2": 2},
            "split_log_normal",
            {"loc": 0, "scale_1": 1, "scale_2": 2},
        ),
        (
            {"type": "split-lognormal", "loc": 0, "scale_1": 1, "scale_2": 2},
            "split_log_normal",
            {"loc": 0, "scale_1": 1, "scale_2": 2},
        ),
        (
            {"type": "cosine-interpolated"},
            "cosine_interpolated",
            {
                "image_d": 16, "noise_d_low": 32, "noise_d_high": 16, "sigma_data": 0.5,
                "min_value": 1e-3, "max_value": 1e3,
            },
        ),
        (
            {"type": "cosine-interpolated", "image_d": 64, "noise_d_low": 8, "noise_d_high": 128},
            "cosine_interpolated",
            {
                "image_d": 64, "noise_d_low": 8, "noise_d_high": 128, "sigma_data": 0.5,
                "min_value": 1e-3, "max_value": 1e3,
            },
        ),
    ],
)  # fmt: skip
def test_densities(density: dict[str, Any], draw: str, expected: dict[str, Any]) -> None:
    model = K.config.load_config(config(V1, sigma_sample_density=density))["model"]
    made: Any = K.config.make_sample_density(model)
    assert made.func is getattr(K.utils, f"rand_{draw}")
    assert made.keywords == expected
    torch.manual_seed(0)
    sigma = made([100], device="cpu")
    assert sigma.shape == (100,)
    assert sigma.min() > 0
    assert sigma.isfinite().all()


def test_a_wide_range_widens_the_interpolated_cosine() -> None:
    wide = {**V1, "sigma_min": 1e-4, "sigma_max": 1e4}
    wide["sigma_sample_density"] = {"type": "cosine-interpolated"}
    made: Any = K.config.make_sample_density(wide)
    assert (made.keywords["min_value"], made.keywords["max_value"]) == (1e-4, 1e4)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"sigma_sample_density": ...}, r"model.sigma_sample_density is missing"),
        ({"sigma_sample_density": {"type": "uniform"}}, r"unknown sigma_sample_density.type 'unif"),
        ({"sigma_sample_density": {}}, r"unknown sigma_sample_density.type None"),
        ({"sigma_sample_density": "lognormal"}, r"sigma_sample_density = 'lognormal' does not fit"),
        (
            {"sigma_sample_density": {"type": "lognormal", "std": 1}},
            r"loc is missing: .*or as mean",
        ),
        (
            {"sigma_sample_density": {"type": "lognormal", "mean": 0, "loc": 0, "std": 1}},
            r"loc is there twice",
        ),
        (
            {"sigma_sample_density": {"type": "lognormal", "mean": 0, "std": 0}},
            r"sigma_sample_density.scale = 0 does not fit: give a number above 0",
        ),
        (
            {"sigma_sample_density": {"type": "loguniform", "min_valeu": 1}},
            r"min_valeu = 1 is no key: did you mean min_value",
        ),
        (
            {"sigma_sample_density": {"type": "loguniform", "min_value": 0}},
            r"min_value = 0 does not fit: give a number above 0",
        ),
        (
            {"sigma_sample_density": {"type": "loguniform", "min_value": 90}},
            r"min_value = 90 is not below max_value = 80",
        ),
        (
            {"sigma_sample_density": {"type": "loguniform"}, "sigma_min": ...},
            r"model.sigma_min is missing",
        ),
        (
            {"sigma_sample_density": {"type": "cosine-interpolated"}, "input_size": ...},
            r"model.input_size is missing",
        ),
    ],
)
def test_densities_that_are_refused(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text) as error:
        K.config.make_sample_density(config(V1, **changes)["model"])
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- trained weights


def inference_file(path: Path, name: str = "image_v1_cross", half: bool = False) -> Path:
    """A file as the established programs write it for inference."""
    source = FIXTURES / f"{name}.safetensors"
    weights = {
        key.removeprefix("weights/"): value.half() if half and value.is_floating_point() else value
        for key, value in load_file(source).items()
        if key.startswith("weights/")
    }
    raw = (K.utils.get_safetensors_metadata(source) or {})["config"]
    save_file(weights, path, {"config": raw})
    return path


def test_a_trained_model_samples(tmp_path: Path) -> None:
    denoiser = K.config.load_model(inference_file(tmp_path / "m.safetensors"))
    assert type(denoiser) is K.layers.Denoiser
    assert not denoiser.training
    assert not any(p.requires_grad for p in denoiser.parameters())
    recorded = load_file(FIXTURES / "image_v1_cross.safetensors")
    sigma = recorded["input/sigma"]
    told = {key: recorded[f"input/{key}"] for key in ("cross_cond", "cross_cond_padding")}
    x = recorded["input/x"] * sigma[:, None, None, None]
    assert (denoiser(x, sigma, **told) - recorded["output/denoised"]).abs().max() <= 1e-5

    noise = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    sampler = K.sampling.KSampler(denoiser, "karras", "heun")
    levels = sampler.levels(4)
    assert levels[0].sigma == pytest.approx(80)  # of the model's config
    assert levels[3].sigma == pytest.approx(0.01)
    sigmas = K.sampling.get_sigmas_karras(4, 0.01, 80)
    ours = sampler.sample(noise, 4, condition=told)
    theirs = K.sampling.sample_heun(denoiser, noise * 80, sigmas, extra_args=told, disable=True)
    assert (ours - theirs).abs().max() < 1e-4
    plain = K.sampling.sample_heun(denoiser, noise * 80, sigmas, disable=True)
    assert (plain - theirs).abs().max() > 1e-3


def test_half_precision_files_become_float32(tmp_path: Path) -> None:
    denoiser = K.config.load_model(inference_file(tmp_path / "m.safetensors", half=True))
    assert {p.dtype for p in denoiser.parameters()} == {torch.float32}


def test_a_training_checkpoint(tmp_path: Path) -> None:
    file = inference_file(tmp_path / "m.safetensors", "image_v1_variance_patch2")
    averaged = load_file(file)
    held = {
        "config": K.config.load_config(file),
        "model": {key: torch.zeros_like(value) for key, value in averaged.items()},
        "model_ema": averaged,
        "epoch": 3,
    }
    path = tmp_path / "m.pth"
    torch.save(held, path)
    denoiser = K.config.load_model(path)
    assert type(denoiser) is K.layers.DenoiserWithVariance
    for key, value in denoiser.inner_model.state_dict().items():
        assert torch.equal(value, averaged[key])
    torch.save({"model": averaged}, path)
    with pytest.raises(ValueError, match=r"m.pth is no training checkpoint: it holds no model_ema"):
        K.config.load_model(path)
    torch.save({"model_ema": averaged}, path)
    with pytest.raises(ValueError, match=r"m.pth holds no config: give it"):
        K.config.load_model(path)
    assert K.config.load_model(path, held["config"]).sigma_data == 0.5


class Harmful:
    ran = False

    def __reduce__(self) -> Any:
        return (setattr, (Harmful, "ran", True))


def test_a_checkpoint_runs_no_code(tmp_path: Path) -> None:
    path = tmp_path / "m.pth"
    torch.save({"model_ema": Harmful()}, path)
    with pytest.raises(ValueError, match=r"m.pth holds more than weights .*\.safetensors") as said:
        K.config.load_model(path, config(V1))
    assert not Harmful.ran
    assert "weights_only" not in str(said.value)  # torch advises to load it all the same
    with pytest.raises(FileNotFoundError):
        K.config.load_model(tmp_path / "none.pth")


@pytest.mark.parametrize("left", [0, 5, 100, -1])
def test_a_part_of_a_file_is_refused(tmp_path: Path, left: int) -> None:
    path = inference_file(tmp_path / "m.safetensors")
    path.write_bytes(path.read_bytes()[:left])
    for load in (K.config.load_config, K.config.load_model):
        with pytest.raises(ValueError, match=r"m.safetensors is truncated, damaged or no"):
            load(path)


@pytest.mark.parametrize("averaged", [3, {"a": 3}])
def test_averaged_weights_are_a_state_dict(tmp_path: Path, averaged: Any) -> None:
    torch.save({"model_ema": averaged, "config": config(V1)}, tmp_path / "m.pth")
    with pytest.raises(ValueError, match=r"m.pth .*: its model_ema is no state dict"):
        K.config.load_model(tmp_path / "m.pth")


def test_weights_of_another_config_are_refused(tmp_path: Path) -> None:
    file = inference_file(tmp_path / "m.safetensors")
    other = K.config.load_config(file)
    other["model"]["channels"] = [32, 64]
    with pytest.raises(ValueError, match=r"m.safetensors does not fit this config") as error:
        K.config.load_model(file, other)
    text = str(error.value)
    assert "\n" not in text
    assert "model.channels is [32, 32] there, [32, 64] here" in text
    assert "u_net.d_blocks.1.1.main.2.weight has shape (32, 32, 3, 3) there, (64, " in text
    assert "missing u_net.d_blocks.1.1.skip.weight" in text
    other = K.config.load_config(file)
    other["model"]["cross_attn_depths"] = [True, True]
    with pytest.raises(ValueError, match=r"missing u_net.d_blocks.0.2.kv_proj.bias"):
        K.config.load_model(file, other)
    other["model"] |= {"cross_attn_depths": None, "cross_cond_dim": 0}
    with pytest.raises(ValueError, match=r"no place for u_net.d_blocks.1.2.kv_proj.bias"):
        K.config.load_model(file, other)


def test_a_checkpoint_of_ours_is_pointed_to_its_reader(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    weights = {"a": torch.zeros(1)}
    config = {"model": {"type": "unet"}}
    save_checkpoint(path, {"ema": weights}, config=config, images_seen=1, step=1)
    with pytest.raises(ValueError, match=r"load it with training.load_denoiser"):
        K.config.load_model(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"m.safetensors holds no config: give it"):
        K.config.load_model(path)
