"""How often real images are read: once as far as memory goes, and never where they are known."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from made_data import Pictures, Project, bars
from PIL import Image

from k_diffusion.evaluation import make_reference, reading, train_small
from k_diffusion.evaluation.reading import Reading, as_seen, data_sha256, smaller, spread
from k_diffusion.evaluation.small import SmallExtractor
from k_diffusion.training import Archived, Folder, Source, WebShards
from k_diffusion.utils.images import save_png


class Known(Pictures):
    """With a fingerprint."""

    mark = "one"

    def fingerprint(self) -> str:
        return self.mark


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "k_diffusion.evaluation.measuring.train_small",
        lambda *a, **k: train_small(*a, images_seen=300, **k),
    )


@pytest.mark.parametrize("extractor", ["small", "own"])
def test_all_is_taken_from_one_reading(tmp_path: Path, extractor: str) -> None:
    chosen: Any = Project(64) if extractor == "own" else extractor
    data = Pictures(*bars(200))
    make_reference(data, chosen, cache=tmp_path)
    assert data.read == 200
    # In memory there is no sign of them but themselves.
    make_reference(data, chosen, cache=tmp_path)
    assert data.read == 400
    known = Known(*bars(200))
    first = make_reference(known, chosen, cache=tmp_path)
    assert known.read == 200
    again = make_reference(known, chosen, cache=tmp_path)
    assert known.read == 200
    assert again.extractor.facts() == first.extractor.facts()
    assert torch.equal(again.statistics.features, first.statistics.features)
    # Another extractor: the hash is known, the images have to be read.
    make_reference(known, Project(64, seed=4), cache=tmp_path)
    assert known.read == 400


def test_what_memory_does_not_hold_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But never for the small extractor, which is shown it smaller."""
    images, labels = bars(200)
    large = images.repeat_interleave(8, -1).repeat_interleave(8, -2)
    whole = make_reference(Pictures(large, labels), cache=tmp_path / "a")
    monkeypatch.setattr(reading, "HELD", 2 * 64 * 64 * 64)  # of four parts two
    data = Pictures(large, labels)
    found = make_reference(data, cache=tmp_path / "b")
    assert data.read == 200 + 72
    assert found.extractor.facts() == whole.extractor.facts()
    assert torch.equal(found.statistics.features, whole.statistics.features)
    monkeypatch.setattr(reading, "HELD", 0)
    data = Pictures(large, labels)
    found = make_reference(data, cache=tmp_path / "c")
    assert data.read == 400
    assert found.extractor.facts() == whole.extractor.facts()


def test_what_is_learned_from_but_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer images are measured than a small extractor is trained on."""
    monkeypatch.setattr("k_diffusion.evaluation.measuring.TRAINED_ON", 50)
    images, labels = bars(100)
    seen: list[torch.Tensor] = []

    def train(images: torch.Tensor, labels: torch.Tensor, *a: Any, **k: Any) -> SmallExtractor:
        seen.append(images)
        return train_small(images, labels, *a, images_seen=100, **k)

    monkeypatch.setattr("k_diffusion.evaluation.measuring.train_small", train)
    for most in (100, 60, 10):
        reference = make_reference(Pictures(images, labels), most=most)
        assert reference.statistics.moments.count == most
    for shown in seen:
        assert torch.equal(shown, as_seen(images[spread(100, 50)]))


def test_parts_that_are_held_are_those_of_the_data() -> None:
    images, labels = bars(130)
    floats = torch.rand(130, 1, 8, 8) * 2 - 1
    sounds = torch.rand(130, 2, 9)
    for given in (images, floats, sounds):
        found = Reading(Pictures(given, labels), spread(130, 130))
        for _ in range(2):
            parts = [found.part(k) for k in range(3)]
            joined = torch.cat([as_seen(part.images) for part in parts])
            assert torch.equal(joined, as_seen(given))
            assert torch.equal(torch.cat([part.labels for part in parts]), labels)
    shown = Reading(Pictures(images, labels), spread(130, 130), torch.arange(0, 130, 3)).shown(1)
    assert torch.equal(shown.images, as_seen(images[66:128:3]))
    wide = torch.rand(2, 3, 40, 80)
    assert torch.equal(smaller(wide)[1:], smaller(wide[1:]))


@pytest.mark.parametrize(
    "content", ["", "[" * 99_999, "{}", "3", '{"sha256": 4}', '{"sha256": "' + "0" * 64 + '"}']
)
def test_a_damaged_note_of_the_hash_is_made_anew(tmp_path: Path, content: str) -> None:
    data = Known(*bars(70))
    known = Reading(data, spread(70, 70)).known_sha256(tmp_path)
    assert known == data_sha256(data, torch.arange(70))
    (path,) = tmp_path.glob("data-*.json")
    whole = path.read_text()
    assert json.loads(whole)["sha256"] == known
    path.write_text(content)
    data.read = 0
    assert Reading(data, spread(70, 70)).known_sha256(tmp_path) == known
    assert data.read == 70
    assert path.read_text() == whole


def test_a_note_is_of_a_fingerprint_and_of_the_images_measured(tmp_path: Path) -> None:
    data = Known(*bars(70))
    found = {Reading(data, spread(70, n)).known_sha256(tmp_path) for n in (70, 70, 35)}
    assert len(found) == 2
    data.mark = "two"
    data.images = data.images.flip(0)
    assert Reading(data, spread(70, 70)).known_sha256(tmp_path) not in found
    assert len(list(tmp_path.glob("data-*.json"))) == 3


# ---------------------------------------------------------------- fingerprints


def folder(root: Path) -> Path:
    for name, count in (("a", 3), ("b", 4)):
        (root / name).mkdir(parents=True)
        for k in range(count):
            save_png(root / name / f"{k}.png", torch.full((1, 8, 8), k / 4 - 0.5))
    return root


def zipped(root: Path, path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(root.rglob("*.png")):
            archive.write(file, file.relative_to(root))
    return path


def tarred(root: Path, path: Path) -> Path:
    import tarfile

    with tarfile.open(path, "w") as archive:
        for file in sorted(root.rglob("*.png")):
            archive.add(file, file.relative_to(root))
    return path


def test_a_folder_is_known_by_names_sizes_and_times(tmp_path: Path) -> None:
    root = folder(tmp_path / "pictures")

    def found(**options: Any) -> str | None:
        return Folder(root, **{"size": 8, "channels": 1, **options}).fingerprint()

    first = found()
    assert first is not None
    assert first == found() == found(flip=True, crop="random")  # which no measure sees
    others = [found(size=4), found(channels=3), found(classes="none"), found(bits=16)]
    root.rename(tmp_path / "elsewhere")
    root = tmp_path / "elsewhere"
    assert found() == first
    file = root / "a/0.png"
    content, times = file.read_bytes(), file.stat()
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns + 1))
    others.append(found())
    file.write_bytes(content + b" ")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    others.append(found())
    # Given back its size and its time it is known again: its content is not looked at.
    file.write_bytes(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert found() == first
    file.rename(root / "a/00.png")
    others.append(found())
    (root / "a/00.png").unlink()
    others.append(found())
    assert len({first, *others}) == len(others) + 1
    source = Folder(root, size=8)
    (root / "a/1.png").unlink()
    assert source.fingerprint() is None


def test_what_was_found_broken_is_known_without_decoding(tmp_path: Path) -> None:
    root = folder(tmp_path / "pictures")
    file = root / "a/1.png"
    pixels = torch.randint(256, (64, 64), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(file, "JPEG")
    file.write_bytes(file.read_bytes()[:-1000])  # which only decoding finds
    cold = Folder(root, size=8, channels=1)
    assert not cold.bad_files
    make_reference(cold, Project(64), cache=tmp_path / "kept")
    assert list(cold.bad_files) == [str(file)]
    warm = Folder(root, size=8, channels=1)
    make_reference(warm, Project(64), cache=tmp_path / "kept")
    assert warm.bad_files == cold.bad_files


def test_archives_are_known_by_checksums_or_times(tmp_path: Path) -> None:
    root = folder(tmp_path / "pictures")
    zips, tars = zipped(root, tmp_path / "a.zip"), tarred(root, tmp_path / "a.tar")
    kinds: list[tuple[Callable[..., Source], Path, Any]] = [
        (Archived, zips, zipped), (Archived, tars, tarred), (WebShards, tars, tarred),
    ]  # fmt: skip
    for make, path, pack in kinds:
        options = {"size": 8, "channels": 1}
        first = make(path, **options).fingerprint()
        assert first is not None
        assert make(path, **options).fingerprint() == first
        times = path.stat()
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns + 10**9))
        # A zip has checksums of its files, and needs no time.
        assert (make(path, **options).fingerprint() == first) == (pack is zipped)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        assert make(path, **options).fingerprint() == first
    file = root / "a/0.png"
    content, found = file.read_bytes(), set[str | None]()
    for last in (b"x", b"y"):  # of one size
        file.write_bytes(content + last)
        found.add(Archived(zipped(root, zips), 8).fingerprint())
    assert len(found) == 2


def test_a_warm_cache_decodes_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = folder(tmp_path / "pictures")
    decoded: list[int] = []
    real = Folder._image
    monkeypatch.setattr(
        Folder, "_image", lambda self, index, *a: decoded.append(index) or real(self, index, *a)
    )
    for turn in (1, 2):
        source = Folder(root, size=8, channels=1)
        make_reference(source, Project(64), cache=tmp_path / "cache", most=7)
        assert sorted(decoded) == list(range(7)), turn
