"""Samples in .npy and .npz files: layouts, numbers, classes, and what is refused."""

from __future__ import annotations

import io
import os
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from k_diffusion.training import DataError, Trainer
from k_diffusion.training.arrays import Arrays
from k_diffusion.training.dataset import Stream

RNG = np.random.default_rng(0)
BYTES = RNG.integers(0, 256, (10, 6, 5, 3), np.uint8)  # N, H, W, C


def npy(folder: Path, values: np.ndarray) -> Path:
    np.save(folder / "x.npy", values)
    return folder / "x.npy"


@pytest.mark.parametrize("by_column", [False, True])
def test_both_layouts_are_told_apart(tmp_path: Path, by_column: bool) -> None:
    wanted = torch.from_numpy(BYTES).permute(0, 3, 1, 2)
    for values in (BYTES, BYTES.transpose(0, 3, 1, 2)):
        values = np.asfortranarray(values) if by_column else np.ascontiguousarray(values)
        source = Arrays(npy(tmp_path, values))
        assert source.shape == (3, 6, 5)
        batch = source.batch(torch.tensor([7, 0, 7]))
        assert batch.images.dtype == torch.uint8
        assert torch.equal(batch.images, wanted[[7, 0, 7]])
        assert not source.class_names
        assert batch.labels.tolist() == [0, 0, 0]


def test_a_layout_that_the_shape_does_not_tell(tmp_path: Path) -> None:
    for shape in ((5, 4, 4, 3), (5, 8, 8, 8)):
        path = npy(tmp_path, np.zeros(shape, np.uint8))
        with pytest.raises(DataError, match="set layout to 'channels_first' or 'channels_last'"):
            Arrays(path)
        assert Arrays(path, layout="channels_first").shape == shape[1:]
        assert Arrays(path, layout="channels_last").shape == (shape[3], *shape[1:3])


@pytest.mark.parametrize(
    ("holds", "shape", "wanted"),
    [
        ("images", (4, 6, 5), (1, 6, 5)),
        ("sounds", (4, 100), (1, 100)),
        ("sounds", (4, 100, 2), (2, 100)),
        ("sounds", (4, 2, 100), (2, 100)),
        ("videos", (4, 7, 6, 5, 3), (3, 7, 6, 5)),
        ("videos", (4, 3, 7, 6, 5), (3, 7, 6, 5)),
        ("videos", (4, 7, 6, 5), (1, 7, 6, 5)),
    ],
)
def test_what_it_holds(tmp_path: Path, holds: str, shape: Any, wanted: Any) -> None:
    values = RNG.normal(size=shape)
    source = Arrays(npy(tmp_path, values), holds)
    assert source.shape == wanted
    sample = source[2][0]
    assert sample.dtype == torch.float32
    assert sorted(sample.flatten().tolist()) == sorted(values[2].astype(np.float32).flatten())
    with pytest.raises(DataError, match="axes are needed"):
        Arrays(npy(tmp_path, np.zeros((2, 2))), "videos")


def test_numbers(tmp_path: Path) -> None:
    def values(array: np.ndarray, **options: Any) -> list[float]:
        path = npy(tmp_path, array.reshape(1, -1))
        return Arrays(path, "sounds", **options)[0][0][0].tolist()

    assert values(np.array([0, 65535], np.uint16)) == [-1, 1]
    assert values(np.array([1, 2], np.uint16))[1] - values(np.array([1, 1], np.uint16))[1] > 2e-5
    assert values(np.array([-32768, 32767], np.int16)) == [-1, 1]
    assert values(np.array([-32768, 32767], ">i2")) == [-1, 1]
    assert values(np.array([-3.5, 0.25])) == [-3.5, 0.25]
    assert values(np.array([0, 0.5, 1]), value_range=(0, 1)) == [-1, 0, 1]
    assert values(np.array([0, 1], np.uint8), value_range=(0, 1)) == [-1, 1]
    assert values(np.array([0.5, 1], np.float16)) == [0.5, 1]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_with_labels(tmp_path: Path, save: Any) -> None:
    labels = np.array([0, 2, 1, 0, 2, 1, 0, 2, 1, 1], np.int32)
    onehot = np.eye(4)[labels]
    save(tmp_path / "x.npz", images=BYTES, labels=labels, onehot=onehot, other=BYTES[:, 1:])
    source = Arrays(tmp_path / "x.npz")
    assert source.class_names == ("0", "1", "2")
    batch = source.batch(torch.tensor([1, 9]))
    assert batch.labels.tolist() == [2, 1]
    assert torch.equal(batch.images, torch.from_numpy(BYTES[[1, 9]]).permute(0, 3, 1, 2))
    named = Arrays(tmp_path / "x.npz", class_names=["a", "b", "c"], key="other")
    assert named.class_names == ("a", "b", "c")
    assert named.shape == (3, 5, 5)
    assert Arrays(tmp_path / "x.npz", label_key="onehot").num_classes == 4
    assert Arrays(tmp_path / "x.npz", label_key="").num_classes == 0
    with pytest.raises(DataError, match=r"no array 'pictures', but 'images', 'labels', 'onehot'"):
        Arrays(tmp_path / "x.npz", key="pictures")
    with pytest.raises(DataError, match="has 3 classes, but 2 class_names"):
        Arrays(tmp_path / "x.npz", class_names=["a", "b"])


def test_what_is_stored_is_mapped_not_loaded(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", images=BYTES)
    np.savez_compressed(tmp_path / "y.npz", images=BYTES)
    for path in (npy(tmp_path, BYTES), tmp_path / "x.npz"):
        assert isinstance(Arrays(path)._values, np.memmap)
    assert not isinstance(Arrays(tmp_path / "y.npz")._values, np.memmap)


def test_one_array_of_any_name(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", BYTES)
    assert Arrays(tmp_path / "x.npz").shape == (3, 6, 5)


@pytest.mark.parametrize("labels", [[0, 1], [0.5] * 10, [-1] * 10, np.ones((10, 3), int)])
def test_labels_that_do_not_fit(tmp_path: Path, labels: Any) -> None:
    np.savez(tmp_path / "x.npz", images=BYTES, labels=np.array(labels))
    with pytest.raises(DataError, match=r"'labels' of .*x\.npz"):
        Arrays(tmp_path / "x.npz")


def test_samples_that_are_not_finite_are_replaced_and_named(tmp_path: Path) -> None:
    values = RNG.normal(size=(6, 8)).astype(np.float32)
    values[[2, 3], 5], values[5, 0] = np.nan, np.inf
    source = Arrays(npy(tmp_path, values), "sounds")
    batches = list(Stream(source, 6, seed=0).batches(0, 1, workers=1))
    assert set(batches[0].indices.tolist()) == {0, 1, 4}
    assert torch.equal(batches[0].images[:, 0], torch.from_numpy(values)[batches[0].indices])
    path = tmp_path / "x.npy"
    assert source.bad_files == {
        f"sample {i} of {path}": "it holds values that are not finite" for i in (2, 3, 5)
    }
    values[:] = np.nan
    with pytest.raises(DataError, match="no sample has finite values alone"):
        Arrays(npy(tmp_path, values), "sounds")[0]


def test_flip(tmp_path: Path) -> None:
    source = Arrays(npy(tmp_path, BYTES), flip=True)
    batch = source.batch(torch.zeros(50, dtype=torch.int64), list(range(50)))
    image = torch.from_numpy(BYTES[0]).permute(2, 0, 1)
    mirrored = [bool(torch.equal(one, image.flip(-1))) for one in batch.images]
    assert 10 < sum(mirrored) < 40
    assert all(m or torch.equal(one, image) for m, one in zip(mirrored, batch.images, strict=True))
    with pytest.raises(DataError, match="which a sound has not"):
        Arrays(npy(tmp_path, BYTES[..., 0, 0]), "sounds", flip=True)


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing\.npy is missing"):
        Arrays(tmp_path / "nothing.npy")
    objects = np.array([{"a": 1}] * 4, object)
    np.save(tmp_path / "o.npy", objects, allow_pickle=True)
    np.savez(tmp_path / "o.npz", images=objects)
    np.savez_compressed(tmp_path / "p.npz", images=objects)
    for name in ("o.npy", "o.npz", "p.npz"):
        with pytest.raises(DataError, match="is damaged or no array: .*[Oo]bject"):
            Arrays(tmp_path / name)
    whole = npy(tmp_path, BYTES).read_bytes()
    for cut in (0, 5, 40, 300):
        (tmp_path / "cut.npy").write_bytes(whole[:cut])
        with pytest.raises(DataError, match="is damaged or no array"):
            Arrays(tmp_path / "cut.npy")
    (tmp_path / "x.npz").write_bytes(whole)
    with pytest.raises(DataError, match="is damaged or no"):
        Arrays(tmp_path / "x.npz")
    with pytest.raises(DataError, match="is of int64: give uint8"):
        Arrays(npy(tmp_path, BYTES.astype(np.int64)))
    with pytest.raises(DataError, match="does not rise"):
        Arrays(npy(tmp_path, BYTES), value_range=(1, 0))
    with pytest.raises(DataError, match="unknown holds 'image'; did you mean 'images'"):
        Arrays(npy(tmp_path, BYTES), holds="image")


def _npy(shape: tuple[int, ...]) -> bytes:
    """The beginning of an array of bytes."""
    found = io.BytesIO()
    facts = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(found, facts)
    return found.getvalue()


HOSTILE = {
    "a text": (b"no array at all", "images.npy in it is no .npy"),
    "a pickle": (b"\x80\x04K\x01.", "images.npy in it is no .npy"),
    "too much": (_npy((2**60, 2)) + b"x", "says to hold more than there is memory for: save it"),
    "less than none": (_npy((-5, 8, 8)) + b"x", "negative dimensions are not allowed"),
    "a header without an end": (
        b"\x93NUMPY\1\0" + struct.pack("<H", 9000) + b"(" * 9000,
        "is damaged or no",
    ),
}


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED])
@pytest.mark.parametrize("name", HOSTILE)
def test_arrays_made_to_do_harm(tmp_path: Path, name: str, method: int) -> None:
    content, reason = HOSTILE[name]
    with zipfile.ZipFile(tmp_path / "x.npz", "w", method) as archive:
        archive.writestr("images.npy", content)
    with pytest.raises(DataError, match=reason if method else "damaged|negative|memory") as error:
        Arrays(tmp_path / "x.npz")
    assert "\n" not in str(error.value)


def test_a_packed_array_larger_than_memory_is_not_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.savez_compressed(tmp_path / "x.npz", images=np.zeros((300, 64, 64), np.uint8))
    assert len(Arrays(tmp_path / "x.npz")) == 300
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PAGE_SIZE": 1000}.get(name, 1228))
    with pytest.raises(DataError, match="more than there is memory for: save it by numpy.savez"):
        Arrays(tmp_path / "x.npz")


def test_every_flipped_byte_of_a_packed_array_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez_compressed(path, images=np.arange(4 * 64, dtype=np.uint8).reshape(4, 8, 8))
    whole = path.read_bytes()
    for place in range(40, len(whole) - 22, 5):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
        try:
            assert Arrays(path)._rows.tobytes() == bytes(range(256)), place
        except DataError:
            continue


def test_training_on_them(tmp_path: Path, make_run_config: Any) -> None:
    np.savez(tmp_path / "x.npz", images=BYTES[..., :1], labels=np.arange(10) % 2)
    model = {"type": "tiny", "num_classes": 2, "prediction": "edm", "time_convention": "log_sigma"}
    data = {"source": "arrays", "path": str(tmp_path / "x.npz")}
    trainer = Trainer(make_run_config(model=model, data=data, total_images=64))
    assert [state.step for state in trainer] == [1, 2]
    assert trainer.source.class_names == ("0", "1")
