"""The README's Python runs as it is written."""

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_there_are_blocks():
    assert len(BLOCKS) == 9


@pytest.mark.parametrize("block", range(9))
def test_a_block_runs(block, capsys):
    names = {}
    exec(compile(BLOCKS[block], f"README.md, block {block + 1}", "exec"), names)
    # Of the one that trains, what the last step lost.
    result = names["samples"] if "samples" in names else torch.tensor(names["state"].loss)
    assert result.isfinite().all()
