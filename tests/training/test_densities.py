"""Densities of noise levels: their quantiles, and what stratification does to a batch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scipy import integrate, optimize, stats
from torch import Tensor

from k_diffusion.training import densities, make_density
from k_diffusion.training.named import Table
from k_diffusion.utils.scheduler import CosineScheduler, FlowScheduler, LinearScheduler

F64 = torch.float64
U = torch.linspace(0, 1, 203, dtype=F64)[1:-1]
NEEDED: dict[str, dict[str, float]] = {
    "split_lognormal": {"mode": -0.4, "std_below": 1.0, "std_above": 2.0},
    "cosine_interpolated": {"image_d": 64},
}


def levels(name: str, process: Any = None, u: Tensor = U, **options: Any) -> Tensor:
    """log r at quantiles, in rising order whichever way the density goes."""
    h = make_density(name, process, **{**NEEDED.get(name, {}), **options})(u)
    assert h.dtype == F64
    return (-h).sort().values


def worst(got: Tensor, expected: Any) -> float:
    return (got - torch.as_tensor(expected, dtype=F64)).abs().max().item()


def cut(distribution: Any, low: float, high: float) -> Any:
    ends = distribution.cdf(low), distribution.cdf(high)
    return distribution.ppf(ends[0] + U.numpy() * (ends[1] - ends[0]))


def test_quantiles_of_lognormal_and_loguniform() -> None:
    assert worst(levels("lognormal"), stats.norm(-1.2, 1.2).ppf(U)) < 1e-12
    assert worst(levels("lognormal", mean=0.5, std=0.7), stats.norm(0.5, 0.7).ppf(U)) < 1e-12
    even = stats.uniform(math.log(0.002), math.log(80 / 0.002))
    assert worst(levels("loguniform"), even.ppf(U)) < 1e-12


def test_quantiles_of_loglogistic() -> None:
    assert worst(levels("loglogistic"), stats.logistic(0, 0.5).ppf(U)) < 1e-12
    got = levels("loglogistic", sigma_data=0.3, scale=0.8)
    assert worst(got, stats.logistic(math.log(0.3), 0.8).ppf(U)) < 1e-12
    got = levels("loglogistic", loc=0.2, min=0.05, max=7.0)
    assert worst(got, cut(stats.logistic(0.2, 0.5), math.log(0.05), math.log(7))) < 1e-11


def test_quantiles_of_v_diffusion() -> None:
    for options in ({}, {"min": 0.02, "max": 30.0}, {"sigma_data": 0.4}):
        ends = options.get("min", 1e-3), options.get("max", 1e3)
        distribution = stats.halfcauchy(scale=options.get("sigma_data", 1.0))
        assert (
            worst(levels("v_diffusion", **options), torch.tensor(cut(distribution, *ends)).log())
            < 1e-9
        )
    # The time of the cosine schedule, up to its ends.
    low, high = math.atan(1e-3), math.atan(1e3)
    angle = levels("v_diffusion").exp().atan()
    assert worst((angle - low) / (high - low), U) < 1e-12


def split_pdf(log_r: float, mode: float, below: float, above: float) -> float:
    width = below if log_r < mode else above
    height = math.sqrt(2 / math.pi) / (below + above)
    return height * math.exp(-((log_r - mode) ** 2) / (2 * width**2))


@pytest.mark.parametrize(("below", "above"), [(1.0, 2.0), (1.5, 0.4)])
def test_quantiles_of_split_lognormal(below: float, above: float) -> None:
    """The density is that of one continuous curve: its integral up to the quantile is u."""
    options = {"mode": -0.4, "std_below": below, "std_above": above}
    got = levels("split_lognormal", **options)
    for u, log_r in list(zip(U.tolist(), got.tolist(), strict=True))[::10]:
        share, _ = integrate.quad(
            split_pdf, -20, log_r, args=(-0.4, below, above), points=[-0.4], epsabs=1e-12
        )
        assert abs(share - u) < 1e-9
    even = levels("split_lognormal", mode=0.3, std_below=0.8, std_above=0.8)
    assert worst(even, stats.norm(0.3, 0.8).ppf(U)) < 1e-12


def test_quantiles_of_cosine_interpolated() -> None:
    """By numeric inversion of the log-SNRs of two shifted cosine schedules, mixed by time."""

    def log_r(time: float, d: float, low: float, high: float, image_d: float) -> float:
        shift = d / image_d
        ends = math.atan(low * shift), math.atan(high * shift)
        return math.log(math.tan(ends[0] + time * (ends[1] - ends[0])) / shift)

    def mixed(time: float, image_d: float, noisy: float, clean: float, std: float) -> float:
        ends = 1e-3 / std, 1e3 / std
        one, other = (log_r(time, d, *ends, image_d) for d in (noisy, clean))
        return time * one + (1 - time) * other + math.log(std)

    for options, args in (
        ({}, (64, 32, 64, 1.0)),
        ({"noise_d_low": 16, "noise_d_high": 256, "sigma_data": 0.5}, (64, 16, 256, 0.5)),
    ):
        got = levels("cosine_interpolated", **options)
        for u, value in list(zip(U.tolist(), got.tolist(), strict=True))[::10]:
            found = optimize.brentq(
                lambda t, v=value, a=args: mixed(t, *a) - v, 1e-9, 1 - 1e-9, xtol=1e-14
            )
            assert abs(found - u) < 1e-9
    equal = levels("cosine_interpolated", noise_d_low=64, noise_d_high=64)
    assert worst(equal, levels("v_diffusion")) < 1e-9


@pytest.mark.parametrize("process", [FlowScheduler(), LinearScheduler(), CosineScheduler()])
def test_quantiles_of_time(process: Any) -> None:
    def share(h: Tensor) -> Tensor:
        low, high = process.time_min, process.time_max
        return (process.time(h) - low) / (high - low)

    assert worst(share(make_density("uniform_time", process)(U)), U) < 1e-6
    got = share(make_density("logit_normal", process, mean=0.5, std=0.8)(U))
    assert worst(torch.logit(got), stats.norm(0.5, 0.8).ppf(U)) < 1e-5


# ---------------------------------------------------------------- drawn


@pytest.mark.parametrize("name", densities.DENSITIES)
def test_every_density_is_monotone_and_finite_to_the_ends(name: str) -> None:
    ends = torch.tensor([2.0**-53, 1 - 2.0**-53], dtype=F64)
    u = torch.cat([ends[:1], U, ends[1:]])
    h = make_density(name, FlowScheduler(), **NEEDED.get(name, {}))(u)
    assert h.isfinite().all()
    steps = h.diff()
    assert (steps <= 0).all()  # clean to noisy
    assert (steps[1:-1] < 0).all()


@pytest.mark.parametrize("name", densities.DENSITIES)
def test_stratified_has_one_level_in_each_part_in_random_order(name: str) -> None:
    density = make_density(name, FlowScheduler(), **NEEDED.get(name, {}))
    generator = torch.Generator().manual_seed(1)
    edges = density(torch.arange(1, 64, dtype=F64) / 64).flip(0)  # rising
    first = []
    for _ in range(30):
        h = densities.draw_half_log_snr(density, 64, generator, stratified=True)
        parts = torch.searchsorted(edges, h)
        assert torch.equal(parts.sort().values, torch.arange(64))
        first.append(int(parts[0]))
    assert len(set(first)) > 15  # the first sample's level is as random as any


@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize("name", densities.DENSITIES)
def test_the_mean_of_a_batch_is_unbiased(name: str, stratified: bool) -> None:
    """Over many batches, of a bounded function of the level, to 4 standard errors."""
    density = make_density(name, FlowScheduler(), **NEEDED.get(name, {}))
    fine = (torch.arange(200_000, dtype=F64) + 0.5) / 200_000
    expected = torch.tanh(density(fine)).mean()
    generator = torch.Generator().manual_seed(2)
    means = torch.stack(
        [
            torch.tanh(
                densities.draw_half_log_snr(density, 16, generator, stratified=stratified)
            ).mean()
            for _ in range(2000)
        ]
    )
    assert (means.mean() - expected).abs() < 4 * means.std() / 2000**0.5
    alone = torch.tanh(density(fine)).std() / 4
    ratio = (means.std() / alone).item()
    assert ratio < 0.3 if stratified else 0.9 < ratio < 1.1


def test_first_sample_has_the_density() -> None:
    """Each place of a stratified batch, not only all of them together."""
    density = make_density("lognormal")
    generator = torch.Generator().manual_seed(3)
    first = torch.stack(
        [
            densities.draw_half_log_snr(density, 8, generator, stratified=True)[0]
            for _ in range(4000)
        ]
    )
    distance = stats.kstest(first.numpy(), stats.norm(1.2, 1.2).cdf).statistic
    assert distance * 4000**0.5 < 1.95  # exceeded once in a thousand


def test_extreme_uniforms_stay_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = torch.tensor([0.0, 1.0], dtype=F64)
    monkeypatch.setattr(torch, "rand", lambda *a, **k: ends)
    for name in densities.DENSITIES:
        density = make_density(name, FlowScheduler(), **NEEDED.get(name, {}))
        h = densities.draw_half_log_snr(density, 2, torch.Generator())
        assert h.isfinite().all(), name


# ---------------------------------------------------------------- by name


def test_unknown_names_and_options_offer_the_nearest() -> None:
    with pytest.raises(ValueError, match="unknown density 'log_normal'; did you mean 'lognormal'"):
        make_density("log_normal")
    with pytest.raises(ValueError, match="option of density 'lognormal', 'menn'"):
        make_density("lognormal", menn=3)
    with pytest.raises(ValueError, match="give a process"):
        make_density("uniform_time")
    with pytest.raises(ValueError, match="option image_d of density 'cosine_interpolated' is miss"):
        make_density("cosine_interpolated")
    with pytest.raises(ValueError, match=r"density 'lognormal' .* has no levels: change them"):
        make_density("lognormal", std=math.inf, mean=-math.inf)
    for name in ("loguniform", "v_diffusion", "cosine_interpolated"):
        with pytest.raises(ValueError, match=r"min = 0.0 and max = .*; give 0 < min < max"):
            make_density(name, **{**NEEDED.get(name, {}), "min": 0.0})
    with pytest.raises(ValueError, match=r"min = 2.0 and max = 1.0 .* give 0 <= min < max"):
        make_density("loglogistic", min=2.0, max=1.0)


def test_registered_functions_are_known_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    table = Table("density")
    monkeypatch.setattr(densities, "DENSITIES", table)

    @densities.register_density("one")
    def one(u: Tensor, process: Any) -> Tensor:
        return torch.zeros_like(u)

    density = make_density("one")
    assert (densities.draw_half_log_snr(density, 3, torch.Generator()) == 0).all()
