"""The list, the table and the picture of the schedules."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from k_diffusion.cli import main
from k_diffusion.utils.scheduler import SCHEDULERS, KarrasScheduler, LinearScheduler


def test_without_a_name_there_is_a_line_for_each(capsys) -> None:
    assert main(["schedule"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == sorted(SCHEDULERS)
    assert all(SCHEDULERS[line.split()[0]].summary() in line for line in lines)
    assert main(["schedule", "--json"]) == 0
    entries = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert entries["karras"]["options"] == {"sigma_min": None, "sigma_max": None, "rho": 7.0}
    assert "2206.00364" in entries["karras"]["source"]


def test_the_table_holds_the_levels(capsys) -> None:
    argv = ["schedule", "karras", "--steps", "5", "--scheduler-options", "rho=5,sigma_max=40"]
    assert main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "karras: 5 steps on the ve path"
    assert lines[1].split() == ["step", "sigma", "alpha", "half", "log-SNR", "time"]
    scheduler = KarrasScheduler(sigma_max=40.0, rho=5.0)
    for i, (line, level) in enumerate(zip(lines[2:], scheduler.levels(5), strict=True)):
        shown = [float(cell) for cell in line.split()]
        time = scheduler.time(level.half_log_snr)
        assert shown == pytest.approx([i, level.sigma, 1.0, level.half_log_snr, time], rel=1e-5)
    assert len({len(line) for line in lines[1:]}) == 1


def test_the_head_counts_the_steps(capsys) -> None:
    def head(*argv: str) -> str:
        assert main(["schedule", *argv]) == 0
        return capsys.readouterr().out.splitlines()[0]

    assert head("karras", "--steps", "1") == "karras: 1 step on the ve path"
    why = "asked for: that is what its rule lays"
    assert (
        head("ddim_uniform", "--steps", "7")
        == f"ddim_uniform: 8 steps on the vp path, not the 7 {why}"
    )
    options = "alpha=0.01"
    beta = head("beta", "--steps", "5", "--scheduler-options", options)
    assert beta == f"beta: 2 steps on the vp path, not the 5 {why}"


def test_several_schedules_and_another_path(capsys) -> None:
    argv = ["schedule", "simple", "karras", "--steps", "3", "--path", "flow", "--json"]
    assert main([*argv, "--scheduler-options", "process=cosine,rho=5"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["simple", "karras"]
    for lines in found.values():
        assert [line["index"] for line in lines] == [0, 1, 2, 3]
        assert all(abs(line["alpha"] + line["sigma"] - 1) < 1e-12 for line in lines)
        assert lines[-1]["half_log_snr"] == "inf"
    assert found["simple"][0]["time"] == pytest.approx(0.9946, rel=1e-9)
    assert main(["schedule", "linear", "--steps", "2", "--json"]) == 0
    (lines,) = json.loads(capsys.readouterr().out).values()
    assert lines[0]["sigma"] == LinearScheduler().levels(2)[0].sigma


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["karas"], "unknown scheduler 'karas'; did you mean 'karras'?"),
        (["karras", "--steps", "0"], "--steps is 0; give a whole number of at least 1"),
        (["karras", "--scheduler-options", "roh=1"], "option of karras, 'roh'; did you mean 'rho'"),
        (["karras", "--scheduler-options", "rho=-1"], "rho must be above 0, got -1.0"),
        (["karras", "--scheduler-options", "rho=1e-3"], "rho 0.001 is too small"),
        (["simple", "--scheduler-options", "process=nope"], "unknown scheduler 'nope'"),
        (["karras", "--path", "vq"], "unknown path 'vq'"),
        (["flow", "--path", "ve"], "pure noise (alpha = 0) has no place"),
        (["karras", "--plot", "out.foo"], "--plot out.foo has no known ending: give .png"),
        (["karras", "--plot", "no/such/out.png"], "there is no folder no/such"),
        (["--plot", "out.png"], "name a schedule, as in k-diffusion schedule karras"),
        (["custom"], "exactly one of betas, alphas_cumprod, sigmas and function, got none"),
        (["trailing", "--steps", "2000"], "trailing cannot lay 2000 steps over the 1000 timesteps"),
    ],
)
def test_a_wrong_command_line_is_one_line(capsys, argv, line) -> None:
    assert main(["schedule", *argv]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert line in err
    assert err.count("\n") == 1


def test_custom_levels_from_the_command_line(capsys) -> None:
    argv = ["schedule", "custom", "--steps", "3", "--scheduler-options", "sigmas=[9.0, 3.0, 1, 0]"]
    assert main(argv) == 0
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()[2:]] == list("9310")


def test_the_picture(tmp_path, capsys) -> None:
    """A PNG of some size with a curve's colour for each schedule, that is not overwritten."""
    pytest.importorskip("matplotlib")
    picture = tmp_path / "out.png"
    argv = ["schedule", "karras", "flow", "beta", "--steps", "9", "--plot", str(picture)]
    assert main(argv) == 0
    with Image.open(picture) as image:
        assert image.format == "PNG"
        assert image.width >= 1000
        assert image.height >= 600
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3).astype(int)
    for colour in ((31, 119, 180), (255, 127, 14), (44, 160, 44)):  # the first three of tab10
        assert (np.abs(pixels - colour).max(axis=1) <= 2).sum() > 300
    before = picture.read_bytes()
    assert main(argv) == 2
    assert "is there already; another name, or --overwrite" in capsys.readouterr().err
    assert picture.read_bytes() == before
    assert main([*argv[:2], *argv[4:], "--overwrite"]) == 0
    assert picture.read_bytes() != before


def test_all_in_one_picture(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    names = [name for name in SCHEDULERS if name != "custom"]
    picture = tmp_path / "all.svg"
    assert main(["schedule", *names, "--steps", "1", "--plot", str(picture)]) == 0
    assert picture.stat().st_size > 10_000


def test_a_missing_matplotlib_is_one_line_that_names_the_extra(tmp_path) -> None:
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from k_diffusion.cli import main\n"
        f"sys.exit(main(['schedule', 'karras', '--plot', {str(tmp_path / 'out.png')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "matplotlib is not installed: pip install 'k-diffusion[plot]'" in done.stderr


def test_the_table_brings_in_neither_torch_nor_matplotlib() -> None:
    code = (
        "import sys, k_diffusion; before = set(sys.modules)\n"
        "from k_diffusion.cli import main; main(['schedule', 'karras'])\n"
        "roots = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print('brought', sorted({'torch', 'numpy', 'matplotlib', 'PIL', 'scipy'} & roots))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.endswith("brought []\n"), done.stdout + done.stderr
