"""`kill -9` at random moments, in small; benchmarks/kill.py does it fifty times."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_a_run_killed_four_times_ends_bitwise_as_one_never_killed(tmp_path: Path) -> None:
    out = tmp_path / "kill.json"
    command = [sys.executable, str(ROOT / "benchmarks/kill.py"), "--kills", "4", "--fresh", "0"]
    more = ["--steps", "40", "--workers", "0", "--out", str(out)]
    ended = subprocess.run([*command, *more], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    (row,) = json.loads(out.read_text())["runs"]
    assert row["differing"] == []
    assert row["kills"] == 4
    assert ended.stdout.startswith("seed ")
