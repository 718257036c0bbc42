"""Noise levels at random: against scipy's quantiles of the same uniform numbers."""

from __future__ import annotations

import math
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

from k_diffusion import utils

F64 = torch.float64
SHAPE = (3, 4000)


def drawn(name: str, dtype: torch.dtype = F64, **options: Any) -> Tensor:
    torch.manual_seed(11)
    return getattr(utils, name)(SHAPE, dtype=dtype, **options)


def uniform(dtype: torch.dtype = F64) -> Any:
    torch.manual_seed(11)
    return torch.rand(SHAPE, dtype=dtype).double().numpy()


def cut(distribution: Any, low: float, high: float) -> Tensor:
    """Quantiles of a distribution cut off below and above."""
    ends = distribution.cdf(low), distribution.cdf(high)
    return torch.from_numpy(distribution.ppf(ends[0] + uniform() * (ends[1] - ends[0])))


def worst(got: Tensor, expected: Tensor) -> float:
    assert got.shape == SHAPE
    return (got / expected - 1).abs().max().item()


def test_log_normal() -> None:
    u = uniform() * (1 - 2e-7) + 1e-7
    expected = torch.from_numpy(stats.lognorm(s=1.3, scale=math.exp(-1.2)).ppf(u))
    assert worst(drawn("rand_log_normal", loc=-1.2, scale=1.3), expected) < 1e-11
    plain = torch.from_numpy(stats.lognorm(s=1).ppf(u))
    assert worst(drawn("rand_log_normal"), plain) < 1e-11


def test_log_logistic() -> None:
    distribution = stats.fisk(c=1 / 0.5, scale=math.exp(0.3))
    whole = torch.from_numpy(distribution.ppf(uniform()))
    assert worst(drawn("rand_log_logistic", loc=0.3, scale=0.5), whole) < 1e-10
    options = {"loc": 0.3, "scale": 0.5, "min_value": 0.2, "max_value": 9.0}
    got = drawn("rand_log_logistic", **options)
    assert worst(got, cut(distribution, 0.2, 9.0)) < 1e-10
    assert got.min() >= 0.2
    assert got.max() <= 9
    # Its uniform numbers are float64 whatever the result is.
    assert torch.equal(drawn("rand_log_logistic", torch.float32, **options), got.float())


def test_log_uniform() -> None:
    expected = torch.from_numpy(stats.loguniform(0.02, 50).ppf(uniform()))
    got = drawn("rand_log_uniform", min_value=0.02, max_value=50)
    assert worst(got, expected) < 1e-12


def test_v_diffusion() -> None:
    """tan of a uniform angle: the absolute value of a Cauchy variable."""
    distribution = stats.halfcauchy(scale=0.6)
    whole = torch.from_numpy(distribution.ppf(uniform()))
    assert worst(drawn("rand_v_diffusion", sigma_data=0.6), whole) < 1e-10
    got = drawn("rand_v_diffusion", sigma_data=0.6, min_value=0.1, max_value=7.0)
    assert worst(got, cut(distribution, 0.1, 7.0)) < 1e-10


def test_cosine_interpolated() -> None:
    """At equal resolutions the cosine schedule; else log sigma goes from one's to the other's."""
    u = torch.from_numpy(uniform())
    ends = {"min_value": 0.01, "max_value": 90.0, "sigma_data": 0.5}

    def schedule(shift: float) -> Tensor:
        """sigma · shift is the tangent of an angle that goes evenly from most to least noise."""
        first, last = math.atan(180 * shift), math.atan(0.02 * shift)
        return torch.tan((1 - u) * first + u * last) / shift * 0.5

    options = {"image_d": 64, "noise_d_low": 64, "noise_d_high": 64}
    assert worst(drawn("rand_cosine_interpolated", **options, **ends), schedule(1)) < 1e-10
    options = {"image_d": 64, "noise_d_low": 32, "noise_d_high": 128}
    expected = schedule(0.5) ** (1 - u) * schedule(2) ** u
    got = drawn("rand_cosine_interpolated", **options, **ends)
    assert worst(got, expected) < 1e-10
    standard = drawn("rand_cosine_interpolated", image_d=1, noise_d_low=1, noise_d_high=1)
    first, last = math.atan(1e3), math.atan(1e-3)
    assert worst(standard, torch.tan((1 - u) * first + u * last)) < 1e-10


def test_split_log_normal() -> None:
    torch.manual_seed(11)
    normal = torch.randn(SHAPE, dtype=F64).abs()
    below = torch.rand(SHAPE, dtype=F64) < 0.2
    got = drawn("rand_split_log_normal", loc=0.3, scale_1=0.5, scale_2=2.0)
    expected = torch.exp(0.3 + torch.where(below, -0.5, 2.0) * normal)
    assert worst(got, expected) < 1e-12
    # The density is continuous at its mode: the sides' shares are as their widths.
    assert abs((got < math.exp(0.3)).double().mean().item() - 0.2) < 0.02


DENSITIES: dict[str, dict[str, float]] = {
    "rand_log_normal": {},
    "rand_log_logistic": {},
    "rand_log_uniform": {"min_value": 0.1, "max_value": 9.0},
    "rand_v_diffusion": {},
    "rand_cosine_interpolated": {"image_d": 64, "noise_d_low": 32, "noise_d_high": 64},
    "rand_split_log_normal": {"loc": 0.0, "scale_1": 1.0, "scale_2": 1.0},
}


@pytest.mark.parametrize("name", DENSITIES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_rounds_what_float32_draws(name: str, dtype: torch.dtype) -> None:
    low = drawn(name, dtype, **DENSITIES[name])
    assert low.dtype == dtype
    assert torch.equal(low, drawn(name, torch.float32, **DENSITIES[name]).to(dtype))


@pytest.mark.parametrize("name", DENSITIES)
def test_default_is_float32(name: str) -> None:
    torch.manual_seed(11)
    got = getattr(utils, name)((3, 4000), **DENSITIES[name])
    assert got.dtype == torch.float32
    assert got.device.type == "cpu"
    assert (got > 0).all()


# ---------------------------------------------------------------- stratified


def test_one_number_from_each_part() -> None:
    parts = []
    for group in range(3):
        torch.manual_seed(group)
        u = utils.stratified_uniform((2, 5), group, 3, dtype=F64)
        torch.manual_seed(group)
        rest = torch.rand((2, 5), dtype=F64)
        assert ((u * 15) % 1 - rest).abs().max() < 1e-12
        parts.append((u * 15).floor().long())
    assert parts[1][0].tolist() == [1, 4, 7, 10, 13]
    together = torch.cat(parts, dim=1).sort(dim=1).values
    assert together.tolist() == [list(range(15))] * 2


def test_a_number_below_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """n - 1 + (the largest float32 below 1) rounds to n: 1 would be an infinite level."""
    monkeypatch.setattr(torch, "rand", lambda shape, **k: torch.full(shape, 1 - 2.0**-24))
    u = utils.stratified_uniform((4096,), dtype=torch.float32)
    assert u.max().item() == 1 - 2.0**-24
    with utils.enable_stratified():
        assert (utils.rand_v_diffusion((4096,)) > 0).all()


def test_stratified_arguments() -> None:
    with pytest.raises(ValueError, match="groups must be at least 1, got 0"):
        utils.stratified_uniform((4,), 0, 0)
    for group in (-1, 3):
        with pytest.raises(ValueError, match=f"group must be one of 0 to 2, got {group}"):
            utils.stratified_uniform((4,), group, 3)


def test_settings_hold_within_their_block() -> None:
    def draw() -> Tensor:
        torch.manual_seed(5)
        return utils.stratified_with_settings((6,), dtype=F64)

    torch.manual_seed(5)
    independent = torch.rand(6, dtype=F64)
    assert torch.equal(draw(), independent)
    with utils.enable_stratified(1, 2):
        outer = draw()
        assert torch.equal(outer.mul(12).floor(), torch.arange(1, 12, 2, dtype=F64))
        with utils.enable_stratified():
            assert torch.equal(draw().mul(6).floor(), torch.arange(6, dtype=F64))
        assert torch.equal(draw(), outer)
        with utils.enable_stratified(disable=True):
            assert torch.equal(draw(), independent)
        elsewhere: list[Tensor] = []
        thread = threading.Thread(target=lambda: elsewhere.append(draw()))
        thread.start()
        thread.join()
        assert torch.equal(elsewhere[0], independent)
    assert torch.equal(draw(), independent)
    with pytest.raises(KeyError), utils.enable_stratified():
        raise KeyError
    assert vars(utils.stratified_settings) == {}


def test_settings_of_accelerate() -> None:
    """Process 1 of 2, in the third of 4 steps of accumulation: part 6 of 8."""
    accelerator = SimpleNamespace(
        process_index=1, num_processes=2, step=10, gradient_state=SimpleNamespace(num_steps=4)
    )
    with utils.enable_stratified_accelerate(accelerator):
        settings = vars(utils.stratified_settings)
        assert settings == {"disable": False, "group": 6, "groups": 8}
        u = utils.rand_v_diffusion((3,), dtype=F64).atan() * 2 / math.pi
        assert (u * 24).floor().tolist() == [6, 14, 22]
    with utils.enable_stratified_accelerate(accelerator, disable=True):
        assert utils.stratified_settings.disable
