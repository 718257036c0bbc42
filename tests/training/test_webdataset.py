"""WebDataset's shards: samples, classes, captions, and the order of training, by place."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from k_diffusion.training import DataError
from k_diffusion.training.dataset import Stream
from k_diffusion.training.webdataset import WebShards, shards_of


def png(grey: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (8, 8), grey).save(buffer, "PNG")
    return buffer.getvalue()


def write(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three shards of four; sample i is of grey 10 i and class i % 3."""
    for shard in range(3):
        files: dict[str, bytes] = {"__notes__": b"nothing"}
        for i in range(4 * shard, 4 * shard + 4):
            files[f"x/{i:03}.cls"] = b"%d\n" % (i % 3)
            files[f"x/{i:03}.json"] = json.dumps({"says": f"grey {i}"}).encode()
            files[f"x/{i:03}.seg.png"] = png(255)
            files[f"x/{i:03}.png"] = png(10 * i)
            files[f"x/{i:03}.txt"] = f"text {i}".encode()
        write(tmp_path / f"{shard:05}.tar", files)
    return tmp_path


def test_samples_of_all_shards(shards: Path) -> None:
    for path in (shards, str(shards / "{00000..00002}.tar"), str(shards / "0000{0,1,2}.tar")):
        source = WebShards(path, 8, channels=1, captions="files")
        batch = source.batch(torch.arange(12))
        assert batch.images[:, 0, 0, 0].tolist() == [10 * i for i in range(12)]
        assert batch.labels.tolist() == [i % 3 for i in range(12)]
        assert batch.raws["text"] == [f"text {i}" for i in range(12)]
        assert source.class_names == ("0", "1", "2")
    assert WebShards(shards / "00001.tar", 8).found == 4
    assert source.name(5).endswith("00001.tar/x/005.png")
    source = WebShards(shards, 8, captions="metadata", caption_key="says", class_names=list("abc"))
    assert source.class_names == ("a", "b", "c")
    assert source.batch(torch.tensor([7])).raws["text"] == ["grey 7"]
    assert WebShards(shards, 8, classes="none").num_classes == 0


def test_order_is_a_function_of_seed_and_place(shards: Path) -> None:
    stream = Stream(WebShards(shards, 8), 5, seed=1)
    wanted = [stream[step].indices.tolist() for step in range(6)]
    assert sorted(i for step in wanted for i in step)[:5] != wanted[0]
    late = Stream(WebShards(shards, 8), 5, seed=1)
    got = [batch.indices.tolist() for batch in late.batches(3, 6, workers=2)]
    assert got == wanted[3:]


def test_broken_samples_are_left_out_and_named(shards: Path) -> None:
    write(shards / "00003.tar", {
        "a.png": png(1), "a.cls": b"two",
        "b.png": png(1),
        "c.png": png(1)[:40], "c.cls": b"1",
        "d.PNG": png(77), "d.CLS": b"2",
        "e.cls": b"2",
    })  # fmt: skip
    source = WebShards(shards, 8, channels=1)
    bad = {Path(file).name: reason for file, reason in source.bad_files.items()}
    assert set(bad) == {"a.png", "b.png", "c.png"}
    assert "no class" in bad["a.png"]
    assert "no class" in bad["b.png"]
    assert (len(source), source.found) == (13, 16)
    image, label = source[12]
    assert (int(image[0, 0, 0]), label) == (77, 2)


def test_what_is_refused(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there are 3 classes, but 2 class_names"):
        WebShards(shards, 8, class_names=["a", "b"])
    with pytest.raises(DataError, match="set classes to 'auto' or 'none'"):
        WebShards(shards, 8, classes="folders")
    with pytest.raises(DataError, match=r"00003\.tar cannot be read: No such file"):
        WebShards(str(shards / "{00000..00009}.tar"), 8)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no shards: give one with \.tar files"):
        WebShards(tmp_path / "empty", 8)
    with pytest.raises(DataError, match="leads outside"):
        WebShards(write(tmp_path / "x.tar", {"../a.png": png(1)}), 8)
    for wrong in ("{0..", "{1..0}", "{0..x}", "{{0..1}}"):
        with pytest.raises(DataError, match=r"braces do not match|no span|counts down"):
            shards_of(wrong)


# It leaves files open.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_the_webdataset_package_reads_the_same(shards: Path) -> None:
    web: Any = pytest.importorskip("webdataset")
    theirs = {
        sample["__key__"]: sample
        for sample in web.WebDataset(
            [str(path) for path in sorted(shards.glob("*.tar"))], shardshuffle=False
        )
        if "png" in sample
    }
    source = WebShards(shards, 8, channels=1, captions="files")
    batch = source.batch(torch.arange(12))
    assert len(theirs) == len(source)
    for i, sample in enumerate(theirs.values()):
        image = Image.open(io.BytesIO(sample["png"]))
        assert image.getpixel((0, 0)) == int(batch.images[i, 0, 0, 0])
        assert int(sample["cls"]) == int(batch.labels[i])
        assert sample["txt"].decode() == batch.raws["text"][i]
