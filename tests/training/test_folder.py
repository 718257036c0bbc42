"""Folders of images: order, classes, colours, geometry, and files that are broken."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from k_diffusion.training.dataset import DataError, Stream, make_source
from k_diffusion.training.folder import Folder


def save(path: Path, colour: object = 0, size: tuple[int, int] = (8, 8), mode: str = "L") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)  # type: ignore[arg-type]
    return path


def classes(root: Path) -> Path:
    for name, colour in (("b", 200), ("a", 100), ("c/deep", 50)):
        for i in range(3):
            save(root / name / f"{i}.png", colour + i)
    save(root / ".hidden" / "0.png")
    (root / "notes.txt").write_text("no image")
    return root


def truncated_jpeg() -> bytes:
    """Its header is whole, so only decoding finds out."""
    noise = np.random.default_rng(0).integers(0, 255, (96, 96, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG")
    return buffer.getvalue()[: len(buffer.getvalue()) // 2]


def bomb() -> bytes:
    """A PNG that says it has 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 100))
        + chunk(b"IEND", b"")
    )


def test_classes_are_the_sorted_folder_names(tmp_path: Path) -> None:
    source = make_source("folder", path=classes(tmp_path), size=8, channels=1)
    assert source.class_names == ("a", "b", "c")
    pairs = [(int(image[0, 0, 0]), label) for image, label in (source[i] for i in range(9))]
    assert pairs == [(100, 0), (101, 0), (102, 0), (200, 1), (201, 1), (202, 1)] + [
        (50 + i, 2) for i in range(3)
    ]
    assert source[0][0].dtype == torch.uint8
    assert not source.bad_files


def test_without_classes(tmp_path: Path) -> None:
    source = Folder(classes(tmp_path), 8, classes="none")
    assert source.num_classes == 0
    assert len(source) == 9
    flat = tmp_path / "b"
    assert Folder(flat, 8).num_classes == 0
    with pytest.raises(DataError, match="no class folders"):
        Folder(flat, 8, classes="folders")


def test_loose_images_beside_class_folders_are_refused(tmp_path: Path) -> None:
    save(classes(tmp_path) / "loose.png")
    with pytest.raises(DataError, match=r"\(a\.\.\.\) and loose images \(loose\.png\.\.\.\)"):
        Folder(tmp_path, 8)
    assert len(Folder(tmp_path, 8, classes="none")) == 10


def test_a_folder_linked_into_itself_is_walked_once(tmp_path: Path) -> None:
    (classes(tmp_path) / "a" / "again").symlink_to(tmp_path, target_is_directory=True)
    assert len(Folder(tmp_path, 8)) == 9


def test_empty_folders_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"data folder {tmp_path} holds no images"):
        Folder(tmp_path, 8)
    with pytest.raises(DataError, match="nowhere is missing"):
        Folder(tmp_path / "nowhere", 8)
    (tmp_path / "x.png").write_bytes(b"junk")
    with pytest.raises(DataError, match=r"only broken images \(.*x\.png: cannot identify"):
        Folder(tmp_path, 8)
    with pytest.raises(DataError, match=r"x\.png is a file"):
        Folder(tmp_path / "x.png", 8)


@pytest.mark.parametrize(
    ("option", "value", "known"),
    [
        ("channels", 2, "1, 3, 4"),
        ("crop", "centre", "'center'"),
        ("classes", "folder", "'folders'"),
    ],
)
def test_unknown_options_are_refused(
    tmp_path: Path, option: str, value: object, known: str
) -> None:
    with pytest.raises(DataError, match=f"unknown {option} {value!r}.*{known}"):
        Folder(tmp_path, 8, **{option: value})  # type: ignore[arg-type]


def with_broken_files(root: Path) -> Path:
    classes(root)
    (root / "a" / "1b.png").write_bytes(b"not an image")
    (root / "b" / "empty.jpg").write_bytes(b"")
    (root / "b" / "bomb.png").write_bytes(bomb())
    half = save(root / "c" / "half.png", 3, (64, 64)).read_bytes()
    (root / "c" / "half.png").write_bytes(half[: len(half) // 2])
    (root / "a" / "0b.jpg").write_bytes(truncated_jpeg())
    return root


def test_broken_files_are_counted_and_named(tmp_path: Path) -> None:
    source = Folder(with_broken_files(tmp_path), 8, channels=1)
    assert set(source.bad_files) == {
        str(tmp_path / name) for name in ("a/1b.png", "b/empty.jpg", "b/bomb.png", "c/half.png")
    }
    assert all(source.bad_files.values())
    assert len(source) == 10  # the cut JPEG is found when it is decoded
    assert source.class_names == ("a", "b", "c")
    image, label = source[1]  # it stands in second place: the next good one is taken
    assert (int(image[0, 0, 0]), label) == (101, 0)
    assert "truncated" in source.bad_files[str(tmp_path / "a/0b.jpg")]
    assert len(source.bad_files) == 5


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_agree_on_broken_files(tmp_path: Path, workers: int) -> None:
    with_broken_files(tmp_path)
    once = Stream(Folder(tmp_path, 6, crop="random", flip=True), 4, seed=0)
    source = Folder(tmp_path, 6, crop="random", flip=True)
    got = list(Stream(source, 4, seed=0).batches(0, 6, workers))
    assert [str(f) for f in source.files] == [str(f) for f in once.source.files]  # type: ignore[attr-defined]
    for step, batch in enumerate(got):
        assert torch.equal(batch.images, once[step].images)
        assert torch.equal(batch.labels, once[step].labels)
        assert torch.equal(batch.indices, once[step].indices)
        assert 1 not in batch.indices
    assert str(tmp_path / "a/0b.jpg") in source.bad_files


def test_folder_in_which_nothing_decodes(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(truncated_jpeg())
    source = Folder(tmp_path, 8)
    with pytest.raises(DataError, match="none of its 3 images can be decoded"):
        source[0]


def test_pixel_limit(tmp_path: Path) -> None:
    save(tmp_path / "big.png", size=(101, 10))
    save(tmp_path / "fits.png", size=(100, 10))
    source = Folder(tmp_path, 8, max_pixels=1000)
    assert [f.name for f in source.files] == ["fits.png"]
    reason = "101 x 10 pixels are more than max_pixels 1000"
    assert source.bad_files == {str(tmp_path / "big.png"): reason}


def gradient(path: Path, width: int, height: int) -> Path:
    """The pixel in row y and column x is 10 y + x."""
    values = 10 * np.arange(height)[:, None] + np.arange(width)[None]
    Image.fromarray(values.astype(np.uint8)).save(path)
    return path


def test_crops_without_scaling_are_exact(tmp_path: Path) -> None:
    gradient(tmp_path / "wide.png", 9, 4)
    image = Folder(tmp_path, 4, channels=1)[0][0]
    assert image.tolist() == [[[10 * y + x for x in range(2, 6)] for y in range(4)]]
    assert Folder(tmp_path, (4, 9), channels=1)[0][0].shape == (1, 4, 9)


def test_random_crop_and_flip_follow_the_seed(tmp_path: Path) -> None:
    gradient(tmp_path / "wide.png", 6, 4)
    source = Folder(tmp_path, 4, channels=1, crop="random", flip=True)
    first = torch.zeros(400, dtype=torch.int64)
    batch = source.batch(torch.zeros(400, dtype=torch.int64), list(range(400)))
    kinds, counts = batch.images.unique(dim=0, return_counts=True)
    assert len(kinds) == 6  # three places, mirrored or not
    assert (counts / 400 - 1 / 6).abs().max() < 0.07
    again = source.batch(first[:3], [7, 5, 7])
    assert torch.equal(again.images[0], batch.images[7])
    assert torch.equal(again.images[1], batch.images[5])
    centre = source[0][0]
    assert centre.tolist() == [[[10 * y + x for x in range(1, 5)] for y in range(4)]]


def test_scaling_keeps_the_shape_of_things(tmp_path: Path) -> None:
    picture = Image.new("L", (64, 32), 0)
    picture.paste(255, (32, 0, 64, 32))  # right half white
    picture.save(tmp_path / "half.png")
    image = Folder(tmp_path, (8, 16), channels=1)[0][0][0]
    assert (image[:, :6] < 20).all()
    assert (image[:, 10:] > 235).all()
    small = Folder(tmp_path, 8, channels=1)[0][0][0]  # cropped to the middle
    assert (small[:, :2] < 20).all()
    assert (small[:, 6:] > 235).all()


def test_exif_orientation_is_honoured(tmp_path: Path) -> None:
    picture = Image.fromarray(np.array([[0, 0, 255, 255]] * 2, dtype=np.uint8).repeat(16, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise: left becomes top
    picture.resize((32, 32)).save(tmp_path / "turned.png", exif=exif)
    image = Folder(tmp_path, 32, channels=1)[0][0][0]
    assert (image[:8] == 0).all()
    assert (image[-8:] == 255).all()


def test_channels(tmp_path: Path) -> None:
    save(tmp_path / "0.png", (255, 0, 0, 255), mode="RGBA")
    save(tmp_path / "1.png", (255, 0, 0, 0), mode="RGBA")
    save(tmp_path / "2.png", 77, mode="L")
    Image.fromarray(np.full((8, 8), 128 * 257, dtype=np.uint16)).save(tmp_path / "3.png")
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.save(tmp_path / "4.png")

    def pixels(channels: int) -> list[list[int]]:
        source = Folder(tmp_path, 8, channels=channels)
        return [source[i][0][:, 4, 4].tolist() for i in range(5)]

    assert pixels(3) == [[255, 0, 0], [255, 255, 255], [77] * 3, [128] * 3, [10, 20, 30]]
    assert pixels(4)[1] == [255, 0, 0, 0]
    assert pixels(4)[2] == [77, 77, 77, 255]
    assert pixels(1) == [[76], [255], [77], [128], [18]]


def test_moments_of_a_folder(tmp_path: Path) -> None:
    save(tmp_path / "0.png", 0)
    save(tmp_path / "1.png", 255)
    source = Folder(tmp_path, 8, channels=1)
    assert (source.mean, source.std) == (0, 1)
