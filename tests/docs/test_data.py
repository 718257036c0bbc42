"""docs/data.md: its code runs, its tables fit a config, and it names every kind of data."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from k_diffusion.training import make_config, make_source
from k_diffusion.training.config_file import make_data
from k_diffusion.training.data_sections import KINDS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TEXT = (Path(__file__).parents[2] / "docs/data.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
TOML = re.findall(r"```toml\n(.*?)```", TEXT, re.DOTALL)


def test_every_kind_is_named() -> None:
    table = TEXT.partition("| `source` |")[2].partition("\n\n")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == set(KINDS)


@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_the_code_runs(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made: dict[str, Any] = {"__name__": "data_md"}
    exec(compile(PYTHON[number], f"docs/data.md, {number}", "exec"), made)


@pytest.mark.parametrize("number", range(len(TOML)))
def test_the_tables_fit(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    for i, shape in enumerate([(30, 20, 3), (20, 30, 3), (25, 25, 3)]):
        Image.fromarray(np.full(shape, 40 * i, np.uint8)).save(f"pictures/{i}.png")
    source = make_source(**make_data(tomllib.loads(TOML[number])["data"]))
    assert len(source) == 3


def test_what_is_said_of_defaults() -> None:
    data = {"source": "digits"}
    model = {"type": "unet", "prediction": "edm"}
    config = make_config({"model": model, "data": data, "total_images": 1})
    assert f"`max_bad_share` of\n  them ({config.max_bad_share}" in TEXT
