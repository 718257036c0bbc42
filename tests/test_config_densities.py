"""The established module `config`: densities of noise levels."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import k_diffusion as K
from tests.established_configs import V1, config


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
