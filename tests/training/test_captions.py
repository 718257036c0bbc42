"""Captions: beside files, in tables of a folder, in archives; and how a conditioner gets them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from k_diffusion.models import CONDITIONERS, Conditioner
from k_diffusion.training import Archived, DataError, Folder, Trainer
from k_diffusion.training.dataset import Stream

from .packing import packed


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Two folders of three; the text beside each says where it stands."""
    root = tmp_path / "set"
    for kind in ("cats", "dogs"):
        (root / kind).mkdir(parents=True)
        for i in range(3):
            Image.new("L", (8, 8), 10 * i).save(root / kind / f"{i}.png")
            (root / kind / f"{i}.txt").write_text(f"{kind} {i}\n", encoding="utf-8-sig")
    return root


def places(pictures: Path, tmp_path: Path) -> dict[str, tuple[type, Path]]:
    return {
        "folder": (Folder, pictures),
        "zip": (Archived, packed(pictures, tmp_path / "x.zip", "")),
        "tar": (Archived, packed(pictures, tmp_path / "x.tar", "a/b/")),
    }


def told(source: Any) -> list[str]:
    return source.batch(torch.arange(len(source))).raws["text"]


WANTED = [f"{kind} {i}" for kind in ("cats", "dogs") for i in range(3)]


@pytest.mark.parametrize("place", ["folder", "zip", "tar"])
def test_texts_beside_files(pictures: Path, tmp_path: Path, place: str) -> None:
    kind, path = places(pictures, tmp_path)[place]
    source = kind(path, 8, captions="files")
    assert source.class_names == ("cats", "dogs")
    assert told(source) == WANTED
    stream = Stream(source, 4, seed=0)
    for step, batch in enumerate(stream.batches(0, 4, workers=2)):
        assert batch.raws["text"] == [WANTED[i] for i in batch.indices.tolist()]
        assert batch.raws == stream[step].raws
    assert kind(path, 8).batch(torch.tensor([0])).raws == {}


@pytest.mark.parametrize("place", ["folder", "zip", "tar"])
@pytest.mark.parametrize("table", ["metadata.jsonl", "metadata.csv"])
@pytest.mark.parametrize("above", [True, False])
def test_texts_in_tables(
    pictures: Path, tmp_path: Path, place: str, table: str, above: bool
) -> None:
    rows = [
        {"file_name": f"{kind}/{i}.png", "says": f'{kind}, "{i}"\nof 3'}
        for kind in ("cats", "dogs")
        for i in range(3)
    ]
    for folder in [""] if above else ["cats", "dogs"]:
        inside = [
            row | {"file_name": row["file_name"].removeprefix(f"{folder}/")}
            for row in rows
            if row["file_name"].startswith(folder)
        ]
        if table.endswith("jsonl"):
            text = "\n".join(map(json.dumps, inside)) + "\n\n"
        else:
            quoted = [row["says"].replace('"', '""') for row in inside]
            lines = [f'{r["file_name"]},"{q}"' for r, q in zip(inside, quoted, strict=True)]
            text = "file_name,says\n" + "\n".join(lines)
        (pictures / folder / table).write_text(text)
    kind, path = places(pictures, tmp_path)[place]
    if above and place == "tar":
        # Its folder is that of the pictures, wherever these lie in the archive.
        assert (pictures / table).exists()
    source = kind(path, 8, captions="metadata", caption_key="says")
    assert told(source) == [row["says"] for row in rows]


@pytest.mark.parametrize("captions", ["files", "metadata"])
def test_a_picture_without_its_caption_is_left_out_and_named(pictures: Path, captions: str) -> None:
    (pictures / "cats/1.txt").unlink()
    rows = [{"file_name": f"{w.split()[0]}/{w.split()[1]}.png", "text": w} for w in WANTED]
    del rows[1]
    (pictures / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = Folder(pictures, 8, captions=captions)
    assert told(source) == [WANTED[0], *WANTED[2:]]
    assert list(source.bad_files) == [str(pictures / "cats/1.png")]
    assert "no caption" in source.bad_files[str(pictures / "cats/1.png")]
    assert source.found == 6


def test_captions_that_cannot_be_read(pictures: Path) -> None:
    (pictures / "cats/0.txt").write_bytes(b"\xff\xfe\xff")
    (pictures / "cats/1.txt").write_bytes(b"a" * (1 << 20) + b"a")
    (pictures / "cats/2.txt").write_bytes(b"")  # says nothing, which is something to say
    source = Folder(pictures, 8, captions="files")
    reasons = [source.bad_files[str(pictures / f"cats/{i}.png")] for i in (0, 1)]
    assert reasons == ["its caption is no text in UTF-8", "its caption has 1048577 bytes, more "
                       "than 1048576"]  # fmt: skip
    assert told(source)[0] == ""
    (pictures / "dogs/0.txt").write_bytes(b"\xff\xff")  # after the scan
    batch = source.batch(torch.tensor([1]))
    assert batch.raws["text"] == ["dogs 1"]
    assert batch.bad == ((1, "its caption is no text in UTF-8"),)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"file_name": "a.png"}', r"metadata\.jsonl, line 1: no text as 'text', but 'file_name'"),
        ('\n{"text": 3, "file_name": "a"}', "line 2: no text as 'text'"),
        ('{"file_name": ', "line 1 is no JSON"),
        ("[1]", "line 1 is no object"),
    ],
)
def test_tables_that_cannot_be_read(pictures: Path, content: str, reason: str) -> None:
    (pictures / "metadata.jsonl").write_text(content)
    with pytest.raises(DataError, match=reason):
        Folder(pictures, 8, captions="metadata")
    with pytest.raises(DataError, match="unknown captions 'file'; did you mean 'files'"):
        Folder(pictures, 8, captions="file")


@dataclass(frozen=True, kw_only=True)
class LettersConfig:
    reads: str = "text"


class Letters(Conditioner):
    """The class is the caption's last digit."""

    Config = LettersConfig
    keywords = ("class_label",)
    read_texts: list[str] = []  # noqa: RUF012 (what it was given, for the test)

    def forward(self, raw: Any) -> dict[str, Tensor]:
        self.read_texts.extend(raw)
        return {"class_label": torch.tensor([int(text[-1]) for text in raw])}

    def null(self, batch: int, like: Any = None) -> dict[str, Tensor]:
        return {"class_label": torch.full((batch,), 10)}


def test_they_reach_the_conditioner(
    pictures: Path, make_run_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CONDITIONERS, "letters", Letters)
    model = {"type": "tiny", "num_classes": 10, "prediction": "edm"}
    model |= {"time_convention": "log_sigma"}
    data = {"source": "folder", "path": str(pictures), "size": 8, "channels": 1}
    data |= {"captions": "files"}
    config = make_run_config(
        model=model, data=data, conditioner={"type": "letters"}, total_images=12, batch_size=6
    )
    losses = [state.loss for state in Trainer(config)]
    assert len(losses) == 2
    assert set(Letters.read_texts) == set(WANTED)
