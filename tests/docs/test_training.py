"""docs/training.md and docs/extending.md say what the code does."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from k_diffusion.training.joining import blocks_of
from k_diffusion.training.muon import hidden_weights
from k_diffusion.training.sections import OptimizerConfig
from k_diffusion.training.weight_groups import weight_groups

ROOT = Path(__file__).parents[2]


def written_events() -> set[str]:
    """The first argument of each `write` of a log, and each literal {"event": ...}."""
    found = set()
    for path in (ROOT / "k_diffusion/training").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Call(func=ast.Attribute(value=holder, attr="write"), args=[event, *_]):
                    if ast.unparse(holder) in ("self", "log", "self.log", "self._log"):
                        assert isinstance(event, ast.Constant), ast.unparse(node)
                        found.add(event.value)
                case ast.Dict(keys=[ast.Constant(value="event"), *_], values=[first, *_]):
                    if isinstance(first, ast.Constant):
                        found.add(first.value)
    return found


def test_the_table_of_events_has_those_that_are_written() -> None:
    text = (ROOT / "docs/training.md").read_text()
    table = text.partition("| event | when | holds |")[2].partition("\n\n")[0]
    named = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    assert len(named) == len(set(named)) > 5
    assert set(named) == written_events()
    docstring = ast.get_docstring(ast.parse((ROOT / "k_diffusion/training/metrics.py").read_text()))
    assert set(re.findall(r'"event": "(\w+)"', docstring or "")) == written_events()


def test_what_a_network_may_declare() -> None:
    text = (ROOT / "docs/extending.md").read_text()
    part = text.partition("### What it may declare for training")[2].partition("\n## ")[0]
    made: dict[str, Any] = {}
    exec(part.partition("```python\n")[2].partition("```")[0], made)
    network: nn.Module = made["Net"]()
    assert hidden_weights(network) == ["blocks.1.weight", "blocks.2.weight"]
    assert blocks_of(network) == list(network.blocks)  # type: ignore[arg-type]
    config = OptimizerConfig(lr=0.3, weight_decay=0.1)
    groups = weight_groups(network, config)
    assert [(g["weight_decay"], round(g["lr_scale"], 6)) for g in groups] == [
        (0.1, 1.0), (0.0, 0.333333)
    ]  # fmt: skip
    held = [p for group in groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in network.parameters()}
    network.after_step()  # type: ignore[operator]
    assert all(torch.equal(block.bias, torch.ones(8)) for block in network.blocks)  # type: ignore[union-attr]
