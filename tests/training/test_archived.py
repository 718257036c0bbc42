"""Pictures in archives: the same as the pictures of the folder that was packed."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from k_diffusion.training import Archived, DataError, Folder
from k_diffusion.training.dataset import Stream

from .packing import packed


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    root = tmp_path / "set"
    generator = torch.Generator().manual_seed(0)
    for kind in ("cats", "dogs"):
        (root / kind).mkdir(parents=True)
        for i in range(6):
            pixels = torch.randint(256, (9, 12, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(root / kind / f"{i}.png")
    (root / "dogs" / "notes.txt").write_text("no picture")
    (root / "cats" / "broken.png").write_bytes((root / "cats" / "0.png").read_bytes()[:60])
    return root


@pytest.mark.parametrize("name", ["set.zip", "set.tar"])
@pytest.mark.parametrize("above", ["", "downloaded/set/"])
def test_the_same_stream_as_from_the_folder(pictures, tmp_path, name, above):
    folder = Folder(pictures, 8, crop="random", flip=True)
    archive = Archived(packed(pictures, tmp_path / name, above), 8, crop="random", flip=True)
    assert archive.class_names == folder.class_names == ("cats", "dogs")
    assert len(archive) == len(folder) == 12
    ours, theirs = Stream(archive, 5, seed=1), Stream(folder, 5, seed=1)
    for step in range(4):
        for a, b in zip(ours[step], theirs[step], strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    assert archive.moments == folder.moments
    assert [Path(file).name for file in archive.bad_files] == ["broken.png"]
    assert archive.name(0).endswith("cats/0.png")


def test_shards_in_a_folder_are_one_set(pictures, tmp_path):
    shards = tmp_path / "shards"
    shards.mkdir()
    packed(pictures / "cats", shards / "0.zip", "cats/")
    packed(pictures / "dogs", shards / "1.tar", "dogs/")
    archive = Archived(shards, 8)
    assert archive.class_names == ("cats", "dogs")
    folder = Folder(pictures, 8)
    assert torch.equal(
        archive.batch(torch.arange(12)).images, folder.batch(torch.arange(12)).images
    )
    assert archive.labels == folder.labels


def test_a_file_that_is_damaged_later_is_replaced_and_named(pictures, tmp_path):
    path = packed(pictures, tmp_path / "set.zip")
    archive = Archived(path, 8)
    content = path.read_bytes()
    at = content.index((pictures / "cats" / "2.png").read_bytes()) + 50
    path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    batch = archive.batch(torch.tensor([1, 2, 3]))
    assert batch.indices.tolist() == [1, 3, 3]
    assert [(index, "checksum" in reason) for index, reason in batch.bad] == [(2, True)]


def test_what_is_no_picture_is_named_alike_each_time(pictures, tmp_path):
    """Without the address of anything in memory, which a file of latents would keep."""
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(pictures / "dogs" / "0.png", "good.png")
        archive.writestr("text.png", "no picture")
    reason = Archived(path, 8).bad_files[f"{path}/text.png"]
    assert reason == "cannot identify it as any of BMP, GIF, JPEG, PNG, PPM, TIFF, WEBP"


def test_without_workers_and_with(pictures, tmp_path):
    archive = Archived(packed(pictures, tmp_path / "set.zip"), 8)
    alone = list(Stream(archive, 4, seed=0).batches(0, 5))
    shared = list(Stream(archive, 4, seed=0).batches(0, 5, workers=2))
    assert all(torch.equal(a.images, b.images) for a, b in zip(alone, shared, strict=True))


def test_what_is_refused(tmp_path):
    with pytest.raises(DataError, match="holds no archives: give one with .zip or .tar"):
        Archived(tmp_path, 8)
    empty = tmp_path / "x.zip"
    with zipfile.ZipFile(empty, "w") as archive:
        archive.writestr("notes.txt", "nothing")
    with pytest.raises(DataError, match=r"x\.zip holds no images"):
        Archived(empty, 8)
