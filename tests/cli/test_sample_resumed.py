"""`k-diffusion sample` after kill -9, or in several processes: the same files, once."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from k_diffusion.cli import main
from k_diffusion.sampling import KSampler
from k_diffusion.utils.images import load_png

COUNT = 8
ROOT = str(Path(__file__).parents[2])
# Stops for good in the middle of writing the fourth file.
STOPS = """
import sys, time
from PIL.Image import Image
from k_diffusion.cli import main

save, saved = Image.save, []

def slow(self, name, **options):
    saved.append(name)
    if len(saved) == 4:
        name.write_bytes(b"half a file")
        print("writing", flush=True)
        time.sleep(60)
    return save(self, name, **options)

Image.save = slow
main(sys.argv[1:])
"""


def command(trained, out, *more) -> list[str]:
    argv = ["sample", str(trained), "--sampler", "euler_ancestral", "--steps", "3"]
    # One at a time, so that how they are batched cannot change the last bit.
    return [*argv, "-n", str(COUNT), "--batch-size", "1", "--out", str(out), *more]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def unbroken(trained, tmp_path_factory) -> dict[str, bytes]:
    """All files of one process that nothing ended."""
    out = tmp_path_factory.mktemp("unbroken")
    assert main(command(trained, out)) == 0
    found = contents(out)
    assert len(found) == COUNT + 1
    assert len({load_png(out / name)[0].numpy().tobytes() for name in found}) == COUNT + 1
    return found


@pytest.fixture
def drawn(monkeypatch) -> list[int]:
    """The seeds that this process draws."""
    sample, seeds = KSampler.sample, []

    def noted(self, *arguments, **options):
        seeds.extend(options["seeds"])
        return sample(self, *arguments, **options)

    noted.__wrapped__ = sample  # its signature
    monkeypatch.setattr(KSampler, "sample", noted)
    return seeds


def test_killed_while_it_writes_the_same_command_completes_the_same_files(
    trained, tmp_path, unbroken, drawn, capsys
) -> None:
    argv = command(trained, tmp_path)
    environment = {**os.environ, "PYTHONPATH": ROOT}
    with subprocess.Popen(
        [sys.executable, "-c", STOPS, *argv], stdout=subprocess.PIPE, env=environment, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        os.kill(process.pid, signal.SIGKILL)
    left = contents(tmp_path)
    whole = [name for name in left if not name.startswith(".")]
    assert sorted(whole) == sorted(unbroken)[1:4]  # the grid comes first
    assert [name[-4:] for name in left if name.startswith(".")] == [".tmp"]
    before = {name: (tmp_path / name).stat().st_mtime_ns for name in whole}

    assert main(argv) == 0
    assert drawn == list(range(3, COUNT))
    assert contents(tmp_path) == unbroken
    assert before == {name: (tmp_path / name).stat().st_mtime_ns for name in whole}
    said = f"{COUNT} images and grid.png are in {tmp_path}; 3 of them were there\n"
    assert capsys.readouterr().out == said

    drawn.clear()
    assert main(argv) == 0
    assert not drawn
    assert contents(tmp_path) == unbroken


def test_two_processes_draw_what_one_draws(trained, tmp_path, unbroken) -> None:
    (tmp_path / ".seed000002_class2.png.7.tmp").write_bytes(b"half a file")
    processes = []
    for rank in range(2):
        place = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "k_diffusion.cli", *command(trained, tmp_path)],
                env={**os.environ, "PYTHONPATH": ROOT, **place},
                stdout=subprocess.PIPE,
                text=True,
            )
        )
    said = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert contents(tmp_path) == unbroken
    assert f"{COUNT} images and grid.png are in {tmp_path}\n" in said  # by the last to end


def test_each_process_draws_its_share_alone(
    trained, tmp_path, unbroken, drawn, monkeypatch, capsys
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in (2, 0, 1):
        monkeypatch.setenv("RANK", str(rank))
        drawn.clear()
        assert main(command(trained, tmp_path)) == 0
        assert drawn == list(range(rank, COUNT, 3))
        assert (tmp_path / "grid.png").exists() == (rank == 1)
        assert bool(capsys.readouterr().out) == (rank == 1)
    assert contents(tmp_path) == unbroken


def test_a_set_grows(trained, tmp_path, unbroken, drawn) -> None:
    argv = command(trained, tmp_path)
    argv[argv.index("-n") + 1] = "5"
    assert main(argv) == 0
    assert contents(tmp_path).keys() < unbroken.keys()
    drawn.clear()
    assert main(command(trained, tmp_path)) == 0
    assert drawn == [5, 6, 7]
    assert contents(tmp_path) == unbroken


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--steps", "4"], "drawn with steps 3, not 4; give another folder, or --overwrite"),
        (["--sampler-options", "eta=0.5"], "drawn with sampler options none, not eta=0.5"),
        (["--noise", "path"], "drawn with noise none, not path"),
        (["--weights", "last"], "drawn with weights ema, not last"),
        (["--guidance", "2"], "drawn with guidance none, not 2.0"),
    ],
)
def test_images_of_other_settings_are_not_mixed(trained, tmp_path, capsys, more, said) -> None:
    argv = command(trained, tmp_path)
    argv[argv.index("-n") + 1] = "2"
    assert main(argv) == 0
    before = contents(tmp_path)
    capsys.readouterr()
    assert main([*argv, *more]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "holds seed000000_class0.png already (3 of 3 files), " + said in line
    assert contents(tmp_path) == before
    # What is left of a killed run of other settings is as little mixed.
    (tmp_path / "grid.png").unlink()
    assert main([*argv, *more]) == 2
    assert "(2 of 3 files)" in capsys.readouterr().err


def test_the_grid_of_other_seeds_is_not_replaced_unasked(trained, tmp_path, capsys) -> None:
    argv = command(trained, tmp_path)
    argv[argv.index("-n") + 1] = "2"
    assert main(argv) == 0
    capsys.readouterr()
    assert main([*argv, "--seed", "2"]) == 2
    assert "holds grid.png already (1 of 3 files), drawn with seed 0, not 2" in (
        capsys.readouterr().err
    )


def test_where_memory_runs_out_the_batch_is_halved(
    trained, tmp_path, unbroken, monkeypatch, drawn
) -> None:
    sample = KSampler.sample

    def limited(self, *arguments, **options):
        if len(options["seeds"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return sample(self, *arguments, **options)

    limited.__wrapped__ = sample
    monkeypatch.setattr(KSampler, "sample", limited)
    argv = command(trained, tmp_path, "--batch-size", "auto")
    assert main(argv) == 0
    assert drawn == list(range(COUNT))
    assert contents(tmp_path).keys() == unbroken.keys()
    for name in unbroken:
        found, text = load_png(tmp_path / name)
        (tmp_path / "other").write_bytes(unbroken[name])
        wanted, said = load_png(tmp_path / "other")
        assert (found.int() - wanted.int()).abs().max() <= 1  # a last bit may cross an edge
        assert text == said
