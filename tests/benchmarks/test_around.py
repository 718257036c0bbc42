"""The figures of benchmarks/around.py: what they must be, and that the script still makes them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import around


def check(name: str, figures: dict[str, Any]) -> None:
    if name == "alone":
        assert figures["combinations"] >= 128
        assert figures["largest difference"] < 1e-4
    elif name == "batched":
        assert max(figures.values()) < 1e-5
    elif name == "interval":
        assert figures["made"] == figures["asked for"] < figures["without an interval"]
    elif name == "kept":
        assert set(figures.values()) == {0.0}
    elif name == "memory":
        assert (figures["drawn"], figures["twice"]) == (around.MANY, 0)
        assert figures["difference"] < 1e-6
    elif name == "kill -9":
        assert 0 < figures["there when killed"] < figures["at the end"] == around.MANY
        assert figures["drawn twice"] == 0
        assert figures["difference"] < 1e-6
    elif name == "likelihood":
        assert max(figures["ve"], figures["flow"]) < 1e-3
    else:
        assert figures["100 steps"] < 1e-3


@pytest.mark.parametrize("name", around.CHECKS)
def test_the_figures_that_are_told(name: str) -> None:
    told = json.loads(around.OUT.read_text())
    check(name, told[name])


@pytest.mark.parametrize("name", ["batched", "interval", "memory", "likelihood", "inversion"])
def test_they_are_still_made(name: str) -> None:
    check(name, around.CHECKS[name]())
