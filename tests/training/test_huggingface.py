"""Data sets of Hugging Face: columns, classes, captions; where the datasets package is there."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from k_diffusion.training import DataError
from k_diffusion.training.dataset import Stream
from k_diffusion.training.huggingface import HuggingFace


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"needs the datasets package.* 'k-diffusion\[data\]'"):
        HuggingFace(tmp_path, 8)


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets: Any = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["cat", "dog"]),
            "says": datasets.Value("string"),
            "kind": datasets.Value("string"),
        }
    )
    rows = {
        "image": [Image.fromarray(np.full((8, 8), 20 * i, np.uint8)) for i in range(10)],
        "label": [i % 2 for i in range(10)],
        "says": [f"number {i}" for i in range(10)],
        "kind": ["b" if i < 5 else "a" for i in range(10)],
    }
    made = datasets.Dataset.from_dict(rows, features)
    made.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": made, "test": made.select([3])}).save_to_disk(tmp_path / "two")
    return tmp_path


def test_columns(saved: Path) -> None:
    source = HuggingFace(saved / "one", 8, channels=1, captions="metadata", caption_key="says")
    batch = source.batch(torch.arange(10))
    assert batch.images[:, 0, 0, 0].tolist() == [20 * i for i in range(10)]
    assert batch.labels.tolist() == [0, 1] * 5
    assert source.class_names == ("cat", "dog")
    assert batch.raws["text"] == [f"number {i}" for i in range(10)]
    named = HuggingFace(saved / "one", 8, label_key="kind")
    assert named.class_names == ("a", "b")
    assert named.batch(torch.arange(10)).labels.tolist() == [1] * 5 + [0] * 5
    assert HuggingFace(saved / "one", 8, classes="none").num_classes == 0
    assert HuggingFace(saved / "one", 8, label_key="").num_classes == 0
    assert len(HuggingFace(saved / "two", 8, split="test")) == 1
    with pytest.raises(DataError, match="no column 'picture', but 'image', 'label'"):
        HuggingFace(saved / "one", 8, image_key="picture")
    with pytest.raises(DataError, match="three does not exist: give a folder"):
        HuggingFace(saved / "three", 8)


def test_order_and_workers(saved: Path) -> None:
    stream = Stream(HuggingFace(saved / "one", 8), 4, seed=0)
    for step, batch in enumerate(Stream(HuggingFace(saved / "one", 8), 4, 0).batches(0, 5, 2)):
        assert torch.equal(batch.images, stream[step].images)


def test_broken_pictures_are_named(saved: Path) -> None:
    import datasets

    rows = datasets.load_from_disk(str(saved / "one")).cast_column(
        "image", datasets.Image(decode=False)
    )
    spoilt = rows.map(
        lambda row, i: {"image": {"bytes": b"junk", "path": None}} if i == 4 else row,
        with_indices=True,
    )
    spoilt.save_to_disk(saved / "spoilt")
    source = HuggingFace(saved / "spoilt", 8)
    assert len(source) == 9
    assert list(source.bad_files) == [f"{saved / 'spoilt'}[train]/4"]
