"""The example for those who come from k-diffusion runs as it is written."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "from-k-diffusion.md"


def test_the_example_runs(capsys):
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    names = {}
    exec(compile(block, PAGE.name, "exec"), names)
    assert names["samples"].shape == (2, 3, 32, 32)
    assert names["samples"].isfinite().all()
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == [str(i) for i in range(20)]
