"""docs/losses.md: its tables have every name with its options, and its code runs."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from k_diffusion.training import Outcome, make_density, make_weighting
from k_diffusion.training.densities import DENSITIES
from k_diffusion.training.extra_losses import LOSSES, ExtraLoss
from k_diffusion.training.named import Table, options_of
from k_diffusion.training.weightings import WEIGHTINGS

TEXT = (Path(__file__).parents[2] / "docs/losses.md").read_text()


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    before = [(table, dict(table)) for table in (WEIGHTINGS, DENSITIES, LOSSES)]
    yield
    for table, kept in before:
        table.clear()
        table.update(kept)


@pytest.mark.parametrize(("title", "table"), [("Weightings", WEIGHTINGS), ("Densities", DENSITIES)])
def test_tables_have_all_there_is(title: str, table: Table) -> None:
    section = TEXT.split(f"## {title}\n")[1].split("\n## ")[0]
    rows = [re.split(r"(?<!\\)\|", line) for line in re.findall(r"^\| `.*$", section, re.MULTILINE)]
    listed = {name: row[-3].strip() for row in rows for name in re.findall(r"`(\w+)`", row[1])}
    assert set(listed) == set(table)
    for name, options in listed.items():
        own = options_of(table[name])
        said = [part.split(" = ") for part in options.split(", ") if part]
        assert [part[0] for part in said] == [o for o in own if o != "sigma_data"], name
        for option, *value in said:
            if value and re.fullmatch(r"-?[\d.]+|inf", value[0]):
                assert own[option].default == float(value[0]), name
            else:  # it depends, or must be given
                assert own[option].default in (None, inspect.Parameter.empty), name


def test_the_code_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    exec(compile(code, "docs/losses.md", "exec"), {"__name__": "losses_md"})
    h = torch.tensor([-1.0, 2.0], dtype=torch.float64)
    assert torch.allclose(make_weighting("power", exponent=0.5)(h), h.exp())
    u = torch.tensor([0.0, 0.5], dtype=torch.float64)
    expected = torch.tensor([0.0, math.log(2) / 2], dtype=torch.float64)
    assert torch.allclose(make_density("exponential", rate=2.0)(u), expected)
    ones = torch.ones(2, 3)
    outcome = Outcome(ones, 3 * ones, ones, ones, h, h, h)
    assert torch.equal(ExtraLoss("absolute", power=2.0)(outcome), torch.full((2,), 4.0))
