"""`k-diffusion doctor` and `k-diffusion plot` as commands."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from k_diffusion.cli import main

from ..training.made_runs import course, line, start, write


def read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def colour_count(pixels: np.ndarray, colour: tuple[int, int, int]) -> int:
    return int((np.abs(pixels.reshape(-1, 3) - colour).max(axis=1) <= 2).sum())


BLUE, ORANGE, GREEN = (31, 119, 180), (255, 127, 14), (44, 160, 44)  # the first three of tab10


# ---------------------------------------------------------------- doctor


def test_findings_with_what_to_try(tmp_path, capsys) -> None:
    facts = [start(), *(line(10 * k, grad_norm=5.0) for k in range(1, 61))]
    run = write(tmp_path / "run", facts)
    assert main(["doctor", str(run)]) == 0
    out, err = capsys.readouterr()
    assert not err
    assert out.startswith(f"{run}, 19,200 images seen: 1 thing is off\n\n- gradient clipping: the ")
    assert "\n  try: grad_clip = 10, twice the usual norm\n" in out
    assert "\nfine: diverging, skipped steps, data statistics," in out
    assert (
        "- average measured, conditioning, steps in sampling: the run has no checkpoint yet" in out
    )
    assert "- batch size: the gradient noise scale is not measured: noise_scale_decay = 0.99" in out
    assert max(map(len, out.splitlines())) <= max(96, len(str(run)) + 50)
    assert main(["doctor", str(run), "--metrics-only"]) == 0
    assert "the weights were left out, as asked" in capsys.readouterr().out


def test_nothing_is_off(tmp_path, capsys) -> None:
    assert main(["doctor", str(write(tmp_path, course()))]) == 0
    assert "nothing is off\n" in capsys.readouterr().out


def test_json(trained, capsys) -> None:
    """A real run of four steps: nothing that needs the checkpoint fails to be computed."""
    assert main(["doctor", str(trained.parent), "--json", "--images", "16"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"run", "images_seen", "findings", "fine", "unseen"}
    assert found["images_seen"] == 32
    assert not [why for why in found["unseen"].values() if "could not" in why or "cannot" in why]
    looked = {*found["fine"], *(finding["check"] for finding in found["findings"])}
    assert {"average measured", "conditioning", "steps in sampling"} <= looked
    for finding in found["findings"]:
        assert set(finding) == {"check", "says", "change", "figures"}


def test_the_folder_stays_as_it_is(trained, capsys) -> None:
    def contents() -> dict[str, bytes]:
        return {p.name: p.read_bytes() for p in trained.parent.iterdir() if p.suffix != ".png"}

    before = contents()
    assert main(["doctor", str(trained.parent), "--images", "4"]) == 0
    assert contents() == before


@pytest.mark.parametrize("command", ["doctor", "plot"])
def test_no_run_is_one_line(tmp_path, capsys, command) -> None:
    for path, why in ((tmp_path, "it holds no metrics.jsonl"), (tmp_path / "a", "no such folder")):
        assert main([command, str(path)]) == 2
        out, err = capsys.readouterr()
        assert not out
        assert err.count("\n") == 1
        assert f"{path} is no run (" in err
        assert why in err
    assert main([command]) == 2


def test_too_few_images(tmp_path, capsys) -> None:
    assert main(["doctor", str(write(tmp_path, course())), "--images", "1"]) == 2
    assert "--images is 1; give a whole number of at least 2" in capsys.readouterr().err


# ---------------------------------------------------------------- plot


def test_a_run(tmp_path, capsys) -> None:
    pytest.importorskip("matplotlib")
    run = write(tmp_path / "run", course())
    assert main(["plot", str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'plot.png'} shows run\n"
    plain = read(run / "plot.png")
    assert plain.shape[0] > 1000
    assert plain.shape[1] > 1500
    assert colour_count(plain, BLUE) > 1000
    # It is replaced: the run goes on. What is measured too, and marks, change the picture.
    marks = [
        {"event": "spike", "step": 300, "images_seen": 9600, "loss": 2.0, "median": 1.0},
        {"event": "skipped", "step": 400, "images_seen": 12800},
        {"event": "roll_back", "step": 250, "images_seen": 8000, "passed_over": [300, 301]},
    ]
    after = [line(10 * k, noise_scale=50.0) for k in range(26, 61)]
    write(run, [*course(), *marks, *after])
    assert main(["plot", str(run)]) == 0
    assert (read(run / "plot.png") != plain).any(-1).mean() > 0.01


def evaluated(step: int, fid: float, **facts: Any) -> dict[str, Any]:
    figures = {"fid": fid, "kid": 0.1, "kid_error": 0.02, "recall": 0.5}
    said = {"extractor": "small-1", "samples": 50, "figures": figures, **facts}
    return {"event": "evaluate", "step": step, "images_seen": 32 * step, **said}


def test_what_evaluations_found_is_drawn(tmp_path, capsys) -> None:
    """Each curve's points, on axes of the test's own."""
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    from k_diffusion.cli.figures_picture import figure_panels
    from k_diffusion.training.history import read_history

    facts = [*course(), *(evaluated(100 * k, 90.0 / k) for k in (1, 2, 3, 4))]
    plain = write(tmp_path / "plain", course())
    one = write(tmp_path / "one", facts)
    two = write(tmp_path / "two", [*facts, evaluated(500, 7.0, extractor="other")])
    runs = {path.name: read_history(path) for path in (plain, one, two)}
    assert figure_panels({"plain": runs["plain"]}) == []
    panels = figure_panels({"one": runs["one"]})
    drawn = [Figure().subplots() for _ in panels]
    for panel, axes in zip(panels, drawn, strict=True):
        panel(axes, runs)
    points = [(3200 * k, 90.0 / k) for k in (1, 2, 3, 4)]
    fid, kid, shares = drawn
    assert [tuple(point) for point in fid.lines[0].get_xydata()] == points
    assert fid.get_title(loc="left") == "FID, 50 samples by small-1"
    assert fid.get_ylim()[0] == 0.0
    assert [text.get_text() for text in fid.texts] == ["22.5"]
    band = kid.collections[0].get_paths()[0].get_extents()
    assert (round(band.y0, 6), round(band.y1, 6)) == (0.08, 0.12)
    assert kid.lines[0].get_ydata().tolist() == [0.1] * 4
    assert shares.lines[0].get_ydata().tolist() == [0.5] * 4
    assert [text.get_text() for text in shares.get_legend().get_texts()] == ["recall"]
    # Figures by two extractors are two curves; each run has its own.
    axes = Figure().subplots()
    figure_panels(runs)[0](axes, runs)
    said = [text.get_text() for text in axes.get_legend().get_texts()]
    small, other = "50 samples by small-1", "50 samples by other"
    assert said == [f"one, {small}", f"two, {small}", f"two, {other}"]
    assert [len(line.get_xdata()) for line in axes.lines] == [4, 4, 1]
    assert not axes.texts
    # And they make the picture longer.
    heights = []
    for path in (plain, one):
        assert main(["plot", str(path)]) == 0
        heights.append(read(path / "plot.png").shape[0])
    assert heights[1] > heights[0] + 300
    capsys.readouterr()


@pytest.mark.parametrize("command", ["plot", "schedule"])
def test_a_picture_is_written_whole_or_not_at_all(tmp_path, monkeypatch, command) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    run = write(tmp_path / "run", course())
    path = run / "plot.png"
    path.write_bytes(b"the one before")
    words = [command, str(run)] if command == "plot" else [command, "karras", "--plot", str(path)]

    def fails(self: Any, file: Any, **options: Any) -> None:
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Figure, "savefig", fails)
        assert main(words) != 0
    assert path.read_bytes() == b"the one before"
    assert sorted(p.name for p in run.iterdir()) == ["metrics.jsonl", "plot.png"]
    for ending in (".svg", ".pdf", ".PNG"):
        out = tmp_path / f"a{ending}"
        assert main(["plot", str(run), "-o", str(out)]) == 0
        assert out.read_bytes()[:4] in (b"<?xm", b"%PDF", b"\x89PNG")


def test_an_error_that_ended_it_is_told(tmp_path, capsys) -> None:
    facts = {"images_seen": 19_200, "checkpoint": "checkpoint-a", "bad_files": {}, "sha256": "0"}
    end = {"event": "end", "stopped_by": None, "seconds": 1.0, **facts}
    words = ["doctor", "--metrics-only"]
    assert main([*words, str(write(tmp_path / "well", [*course(), end]))]) == 0
    assert "an error ended it" not in capsys.readouterr().out
    broken = write(tmp_path / "broken", [*course(), {**end, "reason": "the disk is gone"}])
    assert main([*words, str(broken)]) == 0
    out = capsys.readouterr().out
    assert "an error ended it at 19,200 images: the disk is gone" in out
    assert "put that right; --resume goes on from checkpoint-a" in out


def test_several_runs(tmp_path, capsys) -> None:
    pytest.importorskip("matplotlib")
    runs = [write(tmp_path / name / "run", course(count)) for name, count in (("a", 60), ("b", 30))]
    runs.append(write(tmp_path / "c", [line(4)]))  # old, and of one line
    out = tmp_path / "all.png"
    assert main(["plot", *map(str, runs), "-o", str(out)]) == 0
    assert capsys.readouterr().out.endswith("shows a/run, b/run, " + f"{tmp_path.name}/c\n")
    pixels = read(out)
    assert all(colour_count(pixels, colour) > 30 for colour in (BLUE, ORANGE, GREEN))
    assert main(["plot", *map(str, runs), "-o", str(out)]) == 2
    assert "is there already; another name, or --overwrite" in capsys.readouterr().err
    assert main(["plot", *map(str, runs), "-o", str(out), "--overwrite"]) == 0


@pytest.mark.parametrize(
    "facts",
    [
        [start()],
        [line(4, loss=None)],
        [start(), line(8, loss=-1.0, bands=[None] * 8), line(16)],
    ],
)
def test_runs_that_have_hardly_begun(tmp_path, facts) -> None:
    pytest.importorskip("matplotlib")
    assert main(["plot", str(write(tmp_path, facts))]) == 0
    assert (tmp_path / "plot.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["-o", "run.foo"], "-o run.foo has no known ending: give .png, .svg or .pdf"),
        (["-o", "no/such/run.png"], "-o no/such/run.png: there is no folder no/such"),
        (["AGAIN"], "several runs lie in no one folder: say where to draw, by -o"),
        (["AGAIN", "-o", "run.png"], "a run is given twice"),
    ],
)
def test_a_wrong_command_line_is_one_line(tmp_path, capsys, monkeypatch, argv, message) -> None:
    run = write(tmp_path / "run", course())
    monkeypatch.chdir(tmp_path)
    argv = [str(run) if word == "AGAIN" else word for word in argv]
    assert main(["plot", str(run), *argv]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("**/*.png"))


def test_plot_needs_no_torch_and_names_the_extra(tmp_path) -> None:
    run = write(tmp_path, course())
    code = (
        "import sys, k_diffusion; before = set(sys.modules)\n"
        "from k_diffusion.cli import main\n"
        f"assert main(['plot', {str(run)!r}]) == 0\n"
        "roots = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print('brought', sorted({'torch', 'pydantic', 'accelerate'} & roots))"
    )
    if pytest.importorskip("matplotlib"):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.stdout.endswith("brought []\n"), done.stdout + done.stderr
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from k_diffusion.cli import main\n"
        f"sys.exit(main(['plot', {str(run)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "matplotlib is not installed: pip install 'k-diffusion[plot]'" in done.stderr
