"""Weightings against closed forms, and in the output space of every kind of network."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from k_diffusion.training import loss, make_weighting
from k_diffusion.training.named import Table

H = torch.linspace(-5, 5, 41, dtype=torch.float64)
SNR = torch.exp(2 * H)
R = torch.exp(-H)
STD = 0.6


def worst(got: Tensor, expected: Tensor) -> float:
    return ((got - expected) / expected).abs().max().item()


def test_weightings_are_their_closed_forms() -> None:
    closed = {
        "edm": (R**2 + STD**2) / (R * STD) ** 2,
        "snr": R**-2,
        "eps": R**-2,
        "v": R**-2 + 1,
        "x0": R**0,
        "flow": (1 + 1 / R) ** 2,
        "min_snr": torch.minimum(R**-2, torch.tensor(5.0)),
        # snr·gamma / (snr + gamma) with gamma = 1 / sigma_data²
        "soft_min_snr": R**-2 / STD**2 / (R**-2 + STD**-2),
        "sigmoid": SNR / (1 + SNR),
        "p2": SNR / (1 + SNR),
    }
    assert set(closed) == set(loss.WEIGHTINGS)
    for name, expected in closed.items():
        assert worst(make_weighting(name, STD)(H), expected) < 1e-12, name


def test_options_of_weightings() -> None:
    four = make_weighting("soft_min_snr", 9.0, gamma=4.0)(H)
    assert worst(four, make_weighting("soft_min_snr", 0.5)(H)) < 1e-12
    assert make_weighting("min_snr", gamma=2.0)(H).max() == 2
    # sigmoid(bias - log snr) in eps, which is soft_min_snr with gamma = exp(bias).
    in_eps = make_weighting("sigmoid", bias=-1.5)(H) / SNR
    assert worst(in_eps, torch.sigmoid(-1.5 - SNR.log())) < 1e-12
    same = make_weighting("soft_min_snr", gamma=math.exp(-1.5))(H)
    assert worst(make_weighting("sigmoid", bias=-1.5)(H), same) < 1e-12
    assert worst(make_weighting("p2", gamma=0.0)(H), SNR) < 1e-12
    in_eps = make_weighting("p2", gamma=0.5, k=3.0)(H) / SNR
    assert worst(in_eps, (3 + SNR) ** -0.5) < 1e-12


LITERATURE = {
    # What papers say of the network's own error.
    ("min_snr", "eps"): torch.minimum(SNR, torch.tensor(5.0)) / SNR,
    ("min_snr", "v"): torch.minimum(SNR, torch.tensor(5.0)) / (SNR + 1),
    ("min_snr", "x0"): torch.minimum(SNR, torch.tensor(5.0)),
    ("snr", "eps"): torch.ones_like(SNR),
    ("snr", "v"): SNR / (SNR + 1),
    ("v", "v"): torch.ones_like(SNR),
    ("flow", "flow"): torch.ones_like(SNR),
    ("edm", "edm"): torch.ones_like(SNR),
    ("soft_min_snr", "edm"): (R * STD) ** 2 / (R**2 + STD**2) ** 2,
    ("snr", "edm"): STD**2 / (R**2 + STD**2),
    ("v", "flow"): (R**2 + 1) / (R + 1) ** 2,
}


@pytest.mark.parametrize(("name", "prediction"), LITERATURE)
def test_weight_in_what_the_network_predicts(name: str, prediction: str) -> None:
    """|error of x0|² is |error of the prediction|² over the prediction's own weighting."""
    generator = torch.Generator().manual_seed(0)
    error = torch.randn(len(H), 50, generator=generator, dtype=torch.float64)  # of the prediction
    alpha, sigma = (H * 2).sigmoid().sqrt(), (-H * 2).sigmoid().sqrt()
    of_x0 = {  # d x0 / d prediction at the level, in coordinates that do not matter
        "eps": sigma / alpha,
        "v": sigma,
        "x0": torch.ones_like(H),
        "flow": R / (1 + R),  # sigma in the flow's own coordinates, where alpha + sigma = 1
        "edm": R * STD / (R**2 + STD**2).sqrt(),
    }[prediction]
    square = (of_x0[:, None] * error).square().mean(1)
    got = make_weighting(name, STD)(H) * square
    assert worst(got, LITERATURE[name, prediction] * error.square().mean(1)) < 1e-6


def test_unknown_names_and_options_offer_the_nearest() -> None:
    with pytest.raises(ValueError, match="unknown weighting 'min_snrr'; did you mean 'min_snr'"):
        make_weighting("min_snrr")
    with pytest.raises(ValueError, match=r"option of weighting 'min_snr', 'gama'.*'gamma'"):
        make_weighting("min_snr", gama=3)
    with pytest.raises(ValueError, match="option gamma of weighting 'min_snr' is 'a'; give a num"):
        make_weighting("min_snr", gamma="a")
    assert loss.check_options("weighting", "min_snr", {"gamma": 3}) is loss.WEIGHTINGS["min_snr"]


def test_registered_functions_are_known_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    table = Table("weighting")
    table.update(loss.WEIGHTINGS)
    monkeypatch.setattr("k_diffusion.training.weightings.WEIGHTINGS", table)

    @loss.register_weighting("twice")
    def twice(half_log_snr: Tensor, sigma_data: float, *, times: float = 2.0) -> Tensor:
        return times * torch.ones_like(half_log_snr)

    assert (make_weighting("twice", times=3.0)(H) == 3).all()
    assert loss.register_weighting("twice")(twice) is twice  # a file read again
    with pytest.raises(ValueError, match=r"weighting 'v' is taken by .*weightings\.v: register"):

        @loss.register_weighting("v")
        def other(half_log_snr: Tensor, sigma_data: float) -> Tensor:
            return half_log_snr


def test_a_table_checks_what_it_is_given() -> None:
    table = Table("thing", reserved=("weight",))

    @table.register("all")
    def all_kinds(*, must: Any, flag: bool = True, word: str = "a", number: float = 1.0) -> None:
        pass

    assert table.find("all", {"must": 1, "flag": False, "word": "b", "number": 2}) is all_kinds
    for options, message in (
        ({}, "option must of thing 'all' is missing"),
        ({"must": 1, "flag": 1}, "option flag of thing 'all' is 1; give true or false"),
        ({"must": 1, "word": 1}, "option word of thing 'all' is 1; give text"),
        ({"must": 1, "number": True}, "option number of thing 'all' is True; give a number"),
    ):
        with pytest.raises(ValueError, match=message):
            table.find("all", options)
    with pytest.raises(ValueError, match="'heavy' has an option 'weight', which every thing"):

        @table.register("heavy")
        def heavy(*, weight: float) -> None:
            pass
