"""docs/evaluation.md says what the code does."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from k_diffusion.cli.evaluate import Evaluate
from k_diffusion.evaluation import train_small
from k_diffusion.evaluation.measuring import EXTRACTORS, METRICS
from k_diffusion.training.config_file import read_file
from k_diffusion.training.sections import EvaluateConfig

TEXT = (Path(__file__).parents[2] / "docs/evaluation.md").read_text()


def part(title: str) -> str:
    return TEXT.partition(f"## {title}\n")[2].partition("\n## ")[0]


def test_every_figure_and_extractor_is_told() -> None:
    named = re.findall(r"^\| `(\w+)` \|", part("The figures"), re.MULTILINE)
    assert set(METRICS) <= {*named}
    assert {*named} - {"kid_error"} <= {*METRICS}
    assert tuple(re.findall(r"^\| `(\w+)`", part("Extractors"), re.MULTILINE)) == EXTRACTORS
    header = part("Measured").partition("| `k-diffusion evaluate runs/digits` ... |")[2]
    columns = header.partition("\n")[0].replace("`", "").replace(" ", "").strip("|").split("|")
    assert {*columns} == {*METRICS, "kid_error"}


def test_the_commands_have_such_options() -> None:
    known = {"--" + name.replace("_", "-") for name in Evaluate.__dataclass_fields__}
    known |= {"-n", "--n", "--nproc-per-node", "--no-python"}
    commands = [line for line in TEXT.splitlines() if "k-diffusion evaluate " in line]
    told = [word for line in commands for word in re.findall(r"(?<![\w-])--?[a-z][a-z-]*", line)]
    told += [w for w in shlex.split(" ".join(re.findall(r"`(--[^`]*)`", TEXT))) if w[:2] == "--"]
    assert len(told) > 10
    assert {*told} - known - {"--explain"} == set()


def test_the_section_of_a_config(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(
        part("In a run").partition("```toml\n")[2].partition("```")[0], encoding="utf-8"
    )
    found = read_file(tmp_path / "a.toml")
    assert EvaluateConfig(**found["evaluate"]).every_images == 100_000


def test_the_example_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "k_diffusion.evaluation.measuring.train_small"
    monkeypatch.setattr(name, lambda *a, **k: train_small(*a, images_seen=300, **k))
    exec(part("In Python").partition("```python\n")[2].partition("```")[0], {})
    assert "'fid': " in capsys.readouterr().out
