"""Damaged checkpoints: each is refused on one line that names it, and the one before is taken."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from k_diffusion.training import (
    latest_checkpoint,
    load_denoiser,
    read_info,
    run_training,
)
from k_diffusion.training.checkpoint import CheckpointError, read_checkpoint, save_checkpoint
from k_diffusion.training.tensor_file import (
    write_tensors,
)

Damage = Callable[[bytes, bytes], bytes]
"""From a whole checkpoint, and a whole one of another run, to the damaged one."""


# ---------------------------------------------------------------- files in pieces


def header_of(whole: bytes) -> dict[str, Any]:
    length = int.from_bytes(whole[:8], "little")
    return json.loads(whole[8 : 8 + length])


def begin_of(whole: bytes) -> int:
    return 8 + int.from_bytes(whole[:8], "little")


def with_header(whole: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    """The same tensors under a header that is changed in place."""
    header = header_of(whole)
    change(header)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + whole[begin_of(whole) :]


def flipped(whole: bytes, place: int, bit: int = 0) -> bytes:
    data = bytearray(whole)
    data[place] ^= 1 << bit
    return bytes(data)


def flip_in(what: bytes, offset: int = 0, bit: int = 0) -> Damage:
    """One bit, so far into the first occurrence of a text in the header."""

    def damage(whole: bytes, other: bytes) -> bytes:
        place = whole.index(what)
        assert place < begin_of(whole)
        return flipped(whole, place + offset, bit)

    return damage


def flip_tensor(name: str, bit: int) -> Damage:
    """One bit in the middle of a tensor."""

    def damage(whole: bytes, other: bytes) -> bytes:
        start, stop = header_of(whole)[name]["data_offsets"]
        assert stop > start
        return flipped(whole, begin_of(whole) + (start + stop) // 2, bit)

    return damage


def cut_to(share: float) -> Damage:
    return lambda whole, other: whole[: int(share * len(whole))]


def tensors_of(whole: bytes) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    return safetensors.torch.load(whole), header_of(whole)["__metadata__"]


def rebuilt(tensors: dict[str, torch.Tensor], texts: dict[str, str]) -> bytes:
    file = io.BytesIO()
    write_tensors(file, tensors, texts)
    return file.getvalue()


def mixed(take: str) -> Damage:
    """One piece of the other checkpoint in this one; both are whole by themselves."""

    def damage(whole: bytes, other: bytes) -> bytes:
        tensors, texts = tensors_of(whole)
        theirs, their_texts = tensors_of(other)
        assert set(tensors) == set(theirs)
        assert texts["manifest"] != their_texts["manifest"]
        if take in texts:
            texts[take] = their_texts[take]
        elif take == "everything said":
            texts = their_texts
        else:
            mine = {name for name in tensors if name.startswith(take)}
            assert any(not torch.equal(tensors[name], theirs[name]) for name in mine)
            tensors |= {name: theirs[name] for name in mine}
        return rebuilt(tensors, texts)

    return damage


def without(name: str) -> Damage:
    def damage(whole: bytes, other: bytes) -> bytes:
        tensors, texts = tensors_of(whole)
        del tensors[name]
        return rebuilt(tensors, texts)

    return damage


def with_one_more(whole: bytes, other: bytes) -> bytes:
    tensors, texts = tensors_of(whole)
    return rebuilt({**tensors, "model/more": torch.ones(2)}, texts)


def swapped(whole: bytes, other: bytes) -> bytes:
    tensors, texts = tensors_of(whole)
    one, two = "model/enter.weight", "ema/enter.weight"
    return rebuilt({**tensors, one: tensors[two], two: tensors[one]}, texts)


def longer_than_the_file(whole: bytes, other: bytes) -> bytes:
    def change(header: dict[str, Any]) -> None:
        last = max((n for n in header if n[0] != "_"), key=lambda n: header[n]["data_offsets"][1])
        assert header[last]["dtype"] == "F32"
        header[last]["shape"] = [torch.Size(header[last]["shape"]).numel() + 1]
        header[last]["data_offsets"][1] += 4

    return with_header(whole, change)


def other_dtype(whole: bytes, other: bytes) -> bytes:
    return with_header(whole, lambda h: h["model/enter.weight"].update(dtype="I32"))


def overlapping(whole: bytes, other: bytes) -> bytes:
    def change(header: dict[str, Any]) -> None:
        header["ema/enter.weight"]["data_offsets"] = header["model/enter.weight"]["data_offsets"]

    return with_header(whole, change)


def header_of_length(length: int) -> Damage:
    return lambda whole, other: length.to_bytes(8, "little") + whole[8:]


def a_pickle(whole: bytes, other: bytes) -> bytes:
    class Bomb:
        def __reduce__(self) -> Any:
            return os.abort, ()

    return pickle.dumps(Bomb())


def of_torch_save(whole: bytes, other: bytes) -> bytes:
    file = io.BytesIO()
    torch.save({"model": torch.ones(3)}, file)
    return file.getvalue()


def a_zip(whole: bytes, other: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("checkpoint.safetensors", whole)
    return file.getvalue()


DAMAGES: dict[str, Damage] = {
    "of zero length": lambda whole, other: b"",
    "cut within the header's length": lambda whole, other: whole[:5],
    "cut after the header's length": lambda whole, other: whole[:8],
    "cut within the header": cut_to(0.05),
    "cut after the header": lambda whole, other: whole[: begin_of(whole)],
    "cut at a half": cut_to(0.5),
    "cut at nine tenths": cut_to(0.9),
    "cut by one byte": lambda whole, other: whole[:-1],
    "one byte longer": lambda whole, other: whole + b"\0",
    "zeros at its end, of a lost write": lambda whole, other: whole[:-512] + bytes(512),
    "a bit of the header's length, low": lambda whole, other: flipped(whole, 0, 3),
    "a bit of the header's length, high": lambda whole, other: flipped(whole, 7, 6),
    "a bit of the header's first brace": lambda whole, other: flipped(whole, 8, 0),
    "a bit of the header's last byte": lambda whole, other: flipped(whole, begin_of(whole) - 1, 0),
    "a bit of a tensor's name": flip_in(b"model/enter.weight", 7),
    "a bit of a tensor's shape": flip_in(b'"shape":[', 9),
    "a bit of a tensor's place": flip_in(b'"data_offsets":[', 16),
    "a bit of a dtype": flip_in(b'"dtype":"F32"', 10, 2),
    "a bit of the record's key": flip_in(b"record", 2),
    "a bit of images_seen": flip_in(b'\\"images_seen\\":', 16),
    "a bit of the config": flip_in(b"batch_size", 11),
    "a bit of the manifest": flip_in(b'manifest":"{', 40),
    "a bit of the seal": flip_in(b'"sha256":"', 12),
    "a bit of the format's name": flip_in(b"k_diffusion", 3),
    "a bit of the version": flip_in(b'"version":"1', 11),
    "a bit of the weights": flip_tensor("model/enter.weight", 0),
    "a high bit of the weights": flip_tensor("model/leave.weight", 6),
    "a bit of the average": flip_tensor("ema/time.weight", 3),
    "a bit of a buffer": flip_tensor("model/calls", 0),
    "a bit of the optimiser": flip_tensor("optimizer/enter.weight/exp_avg_sq", 7),
    "a bit of the last byte": lambda whole, other: flipped(whole, len(whole) - 1, 7),
    "weights of another checkpoint": mixed("model/"),
    "the average of another checkpoint": mixed("ema/"),
    "one tensor of another checkpoint": mixed("optimizer/enter.weight/exp_avg_sq"),
    "the manifest of another checkpoint": mixed("manifest"),
    "the record of another checkpoint": mixed("record"),
    "all that is said of another checkpoint": mixed("everything said"),
    "two tensors swapped": swapped,
    "a tensor removed": without("ema/enter.weight"),
    "one of the optimiser's tensors removed": without("optimizer/enter.weight/exp_avg"),
    "a tensor added": with_one_more,
    "a tensor longer than the file": longer_than_the_file,
    "a tensor of another dtype": other_dtype,
    "two tensors in one place": overlapping,
    "a header longer than the file": header_of_length(1 << 20),
    "a header of absurd length": header_of_length((1 << 64) - 1),
    "a pickle": a_pickle,
    "a file of torch.save": of_torch_save,
    "a zip": a_zip,
    "a text": lambda whole, other: b"The checkpoint is in the other folder.\n",
    "the weights of another program": lambda whole, other: safetensors.torch.save(
        {"weight": torch.ones(2)}, {"format": "pt"}
    ),
}


def test_there_are_forty_and_more() -> None:
    assert len(DAMAGES) >= 40


_MADE: list[bytes] = []


@pytest.fixture
def run_bytes(
    tmp_path_factory: pytest.TempPathFactory, make_run_config: Any
) -> tuple[bytes, bytes, bytes]:
    """The first and the last checkpoint of a run, and the last one of another seed; made once."""
    if not _MADE:
        folder = tmp_path_factory.mktemp("runs")
        for seed in (3, 4):
            config = make_run_config(
                out=str(folder / str(seed)), seed=seed, total_images=128, checkpoint_every_images=64
            )
            run_training(config, progress=False)
            _MADE.extend(path.read_bytes() for path in sorted(Path(config.out).glob("*.safe*")))
    assert len(_MADE) == 4
    return _MADE[0], _MADE[1], _MADE[3]


@pytest.fixture
def folder(tmp_path: Path, run_bytes: tuple[bytes, bytes, bytes]) -> Path:
    """A run's folder with both of its checkpoints."""
    out = tmp_path / "run"
    out.mkdir()
    (out / "checkpoint-000000000064.safetensors").write_bytes(run_bytes[0])
    (out / "checkpoint-000000000128.safetensors").write_bytes(run_bytes[1])
    return out


READERS: list[Callable[[Path], object]] = [
    read_info,
    load_denoiser,
    lambda path: read_checkpoint(path, ["model", "ema", "optimizer"]),
]


@pytest.mark.parametrize("name", DAMAGES)
def test_it_is_refused_and_the_one_before_taken(
    name: str, folder: Path, run_bytes: tuple[bytes, bytes, bytes]
) -> None:
    before, newest = sorted(folder.iterdir())
    assert latest_checkpoint(folder) == newest
    newest.write_bytes(DAMAGES[name](run_bytes[1], run_bytes[2]))
    assert newest.read_bytes() != run_bytes[1]
    lines = set()
    for read in READERS:
        with pytest.raises(CheckpointError) as caught:
            read(newest)
        lines.add(str(caught.value))
    (line,) = lines
    assert str(newest) in line
    assert "\n" not in line
    assert len(line) < 400
    said: list[str] = []
    assert latest_checkpoint(folder, said.append) == before
    assert said == [f"passing over {line}"]


@pytest.mark.parametrize("name", ["cut at a half", "a bit of the optimiser", "a pickle"])
def test_a_run_goes_on_from_the_one_before(
    name: str, folder: Path, run_bytes: tuple[bytes, bytes, bytes], make_run_config: Any
) -> None:
    before, newest = sorted(folder.iterdir())
    newest.write_bytes(DAMAGES[name](run_bytes[1], run_bytes[2]))
    config = make_run_config(total_images=128, checkpoint_every_images=64)
    said: list[str] = []
    result = run_training(config, resume="auto", progress=False, say=said.append)
    assert result.resumed_from == before
    assert len(said) == 2  # and that it is given up
    assert newest.name in said[1]
    assert said[0].startswith(f"passing over checkpoint {newest} ")
    assert read_info(newest).sha256 == result.sha256
    ours, theirs = tensors_of(newest.read_bytes())[0], tensors_of(run_bytes[1])[0]
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    with pytest.raises(CheckpointError, match=r"checkpoint .*nowhere\.safetensors does not exist"):
        run_training(config, resume=folder / "nowhere.safetensors", progress=False)


def test_a_folder_in_its_place(folder: Path) -> None:
    before, newest = sorted(folder.iterdir())
    newest.unlink()
    newest.mkdir()
    with pytest.raises(CheckpointError, match=f"{newest.name} is a folder"):
        read_info(newest)
    said: list[str] = []
    assert latest_checkpoint(folder, said.append) == before
    assert len(said) == 1


def test_a_tampered_file_with_a_right_seal_is_refused_too(folder: Path) -> None:
    """Sealed anew, a record that this library does not write is no crash."""
    from k_diffusion.training.seals import seal_of

    path = max(folder.iterdir())
    tensors, texts = tensors_of(path.read_bytes())
    for key, value in (("record", "{}"), ("record", "[]"), ("manifest", "[]"), ("record", "{")):
        changed = {**texts, key: value}
        changed["sha256"] = seal_of(changed)
        path.write_bytes(rebuilt(tensors, changed))
        with pytest.raises(CheckpointError, match="its record is not one that k_diffusion writes"):
            read_info(path)


@pytest.mark.parametrize("length", [0x380, 0x480, 0x4B50])
def test_a_header_may_begin_like_a_pickle_or_a_zip(tmp_path: Path, length: int) -> None:
    """Its length in bytes is the file's beginning: 80 03, 80 04, or "PK"."""
    path = tmp_path / "a.safetensors"
    for pad in range(length):
        save_checkpoint(
            path,
            {"model": {"w": torch.ones(2)}},
            config={"note": "x" * max(0, length - 700 + 8 * pad)},
            images_seen=0,
            step=0,
        )
        if begin_of(path.read_bytes()) >= 8 + length:
            break
    assert begin_of(path.read_bytes()) == 8 + length
    assert read_info(path).step == 0
