"""The table of samplers."""

import json

from k_diffusion.cli import main
from k_diffusion.cli.samplers import sampler_rows, table
from k_diffusion.sampling import ADAPTIVE, SOLVERS

NAMES = [*SOLVERS, *ADAPTIVE]


def test_known_rows() -> None:
    rows = {row.name: row for row in sampler_rows()}
    assert list(rows) == NAMES
    found = {
        name: (rows[name].order, rows[name].evaluations_per_step, rows[name].stochastic)
        for name in ("euler", "heun", "dpm_solver_3", "dpmpp_2m", "euler_ancestral")
    }
    assert found == {
        "euler": (1, 1, False),
        "heun": (2, 2, False),
        "dpm_solver_3": (3, 3, False),
        "dpmpp_2m": (2, 1, False),
        "euler_ancestral": (1, 1, True),
    }
    assert rows["dpmpp_2m"].live_tensors == 4
    assert rows["dpm_adaptive"].evaluations_per_step is None
    assert "(3 calls a step)" in rows["dpm_adaptive"].summary


def test_the_table_is_aligned_and_whole(capsys) -> None:
    assert main(["samplers"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(NAMES) + 1
    start = lines[0].index("source")
    sources = [s.source for s in SOLVERS.values()] + [a.pair.source for a in ADAPTIVE.values()]
    for line, name, source in zip(lines[1:], NAMES, sources, strict=True):
        assert line.startswith(name + " ")
        assert line[start:] == source
        assert line[start - 2 : start] == "  "
    assert table(sampler_rows()).splitlines() == lines


def test_json(capsys) -> None:
    assert main(["samplers", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == NAMES
    ddim = next(row for row in rows if row["name"] == "ddim")
    assert "eta" in ddim["options"]
