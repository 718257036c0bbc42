"""Sixty unusual pictures: each is read right, to the pixel, or it is skipped, counted and named."""

from __future__ import annotations

import importlib.util
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from k_diffusion.training import DataError, Folder
from k_diffusion.training.archived import Archived
from k_diffusion.training.dataset import Stream

spec = importlib.util.spec_from_file_location(
    "unusual_pictures", Path(__file__).with_name("unusual_pictures.py")
)
assert spec is not None
assert spec.loader is not None
made = importlib.util.module_from_spec(spec)
spec.loader.exec_module(made)
READ, SKIPPED, SIDE, RED = made.READ, made.SKIPPED, made.SIDE, made.RED


@pytest.fixture(scope="module")
def unusual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("unusual")
    for name, make in READ.items():
        (root / name).write_bytes(make()[0])
    for name, (spoilt, _) in SKIPPED.items():
        (root / name).write_bytes(spoilt())
    return root


def test_there_are_sixty() -> None:
    assert len(READ) + len(SKIPPED) >= 60
    assert not READ.keys() & SKIPPED.keys()


@pytest.mark.parametrize("name", READ)
def test_each_is_read_right(unusual: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes((unusual / name).read_bytes())
    source = Folder(tmp_path, SIDE)
    assert not source.bad_files
    image = source[0][0]
    assert image.dtype == torch.uint8
    got = image.permute(1, 2, 0).numpy().astype(float)
    allowed = {"jpg": 2.0}.get(name[-3:], 0.5)
    allowed = 30.0 if name == "exif-6.jpg" else allowed  # a sharp edge, scaled down
    assert np.abs(got - READ[name]()[1]).max() <= allowed
    assert not source.bad_files


def test_all_together_in_workers_are_counted_and_named(unusual: Path) -> None:
    source = Folder(unusual, SIDE)
    seen: set[int] = set()
    for batch in Stream(source, 10, seed=0).batches(0, len(source) // 5, workers=2):
        seen |= set(batch.indices.tolist())
    bad = {Path(file).name: reason for file, reason in source.bad_files.items()}
    assert bad.keys() == SKIPPED.keys()
    for name, (_, reason) in SKIPPED.items():
        assert bad[name]
        assert reason in bad[name], name
        assert "\n" not in bad[name]
    assert {Path(source.name(i)).name for i in seen} == READ.keys()
    assert source.found == len(READ) + len(SKIPPED)


@pytest.mark.parametrize("channels", [1, 4])
def test_other_numbers_of_channels(unusual: Path, channels: int) -> None:
    source = Folder(unusual, SIDE, channels=channels)
    source.report(source.batch(torch.arange(len(source))).bad)
    assert {Path(file).name for file in source.bad_files} == SKIPPED.keys()
    names = {Path(source.name(i)).name: i for i in range(len(source))}
    assert source.shape == (channels, SIDE, SIDE)
    half = source[names["half-transparent.png"]][0][:, 0, 0].tolist()
    assert half == ([219] if channels == 1 else [255, 0, 0, 51])


# ------------------------------------------------------------ memory


def test_100_megapixels_that_are_allowed_take_bounded_memory(tmp_path: Path) -> None:
    """In a process of its own: what it takes at most, beside what an import takes."""
    Image.new("RGB", (10_000, 10_000), RED).save(tmp_path / "x.png", compress_level=1)
    script = (
        "import resource, sys\n"
        "from k_diffusion.training import Folder\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "source = Folder(sys.argv[1], 8, max_pixels=int(sys.argv[2]))\n"
        "image = source[0][0]\n"
        "after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "print(after - before, image[:, 0, 0].tolist(), flush=True)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    allowed = subprocess.run([*command, "100000000"], capture_output=True, text=True, check=True)
    kilobytes, _, pixel = allowed.stdout.strip().partition(" ")
    assert pixel == "[255, 0, 0]"
    assert int(kilobytes) * 1024 < 9 * 10**8  # two copies of 4 bytes a pixel, and a little
    with pytest.raises(DataError, match="only broken images .*10000 x 10000 pixels are more"):
        Folder(tmp_path, 8)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 < 4 * 10**9


def test_an_archive_reads_them_alike(unusual: Path, tmp_path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(unusual.iterdir()):
            archive.write(file, file.name)
    folder, packed = Folder(unusual, SIDE), Archived(tmp_path / "x.zip", SIDE)
    assert [Path(f).name for f in folder.bad_files] == [Path(f).name for f in packed.bad_files]
    whole = torch.arange(len(folder))
    ours, theirs = packed.batch(whole), folder.batch(whole)
    assert torch.equal(ours.images, theirs.images)
    assert ours.bad == theirs.bad
