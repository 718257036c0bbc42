"""Files of the safetensors format: what the package reads and writes, and no other."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from k_diffusion.training import tensor_file
from k_diffusion.training.checkpoint import read_checkpoint, save_checkpoint
from k_diffusion.training.tensor_file import (
    DTYPES,
    FormatError,
    look_at_tensor,
    read_header,
    read_tensor,
    write_tensors,
)


def file_of(tensors: dict[str, torch.Tensor], texts: dict[str, str]) -> bytes:
    file = io.BytesIO()
    write_tensors(file, tensors, texts)
    return file.getvalue()


def test_the_same_contents_give_the_same_bytes() -> None:
    one = {"b": torch.ones(2), "a": torch.arange(3), "c": torch.ones(1, dtype=torch.float16)}
    other = dict(reversed(one.items()))
    texts = {key: key * 3 for key in ("format", "version", "manifest", "record", "sha256")}
    assert file_of(one, texts) == file_of(other, texts)
    _, entries = read_header(io.BytesIO(file_of(one, texts)))
    assert [entry.name for entry in entries] == ["a", "b", "c"]  # the widest elements first


def test_a_dtype_that_the_format_lacks_is_named() -> None:
    with pytest.raises(ValueError, match="tensor a is torch.complex128, which safetensors does"):
        file_of({"a": torch.ones(1, dtype=torch.complex128)}, {})


def test_every_dtype_of_the_format_is_read(tmp_path: Path) -> None:
    """By the package what is written here, and here what the package writes."""
    tensors = {
        name: torch.arange(12, dtype=torch.uint8).repeat(dtype.itemsize).view(dtype)[:10]
        for name, dtype in DTYPES.items()
        if name != "BOOL"
    }
    tensors |= {"BOOL": torch.tensor([True, False]), "none": torch.zeros(0, 3)}
    tensors["scalar"] = torch.tensor(2.5)
    whole = file_of(tensors, {"a": "é\n"})
    assert int.from_bytes(whole[:8], "little") % 8 == 0  # so that mapped tensors are aligned
    back = safetensors.torch.load(whole)
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        assert back[name].shape == tensor.shape
        assert torch.equal(
            back[name].view(torch.uint8) if tensor.ndim else back[name],
            tensor.view(torch.uint8) if tensor.ndim else tensor,
        ), name
    texts, entries = read_header(io.BytesIO(safetensors.torch.save(tensors, {"a": "é\n"})))
    assert texts == {"a": "é\n"}
    assert {(e.name, e.dtype, e.shape) for e in entries} == {
        (name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()
    }


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda h: {"a": h, "b": h}, "does not begin where the one before ends"),
        (lambda h: {"a": {**h, "data_offsets": [4, 12]}}, "does not begin where"),
        (lambda h: {"a": {**h, "data_offsets": [0, 4], "shape": [1]}}, "accounts for"),
        (lambda h: {"a": {**h, "shape": [3]}}, "says of tensor a what cannot be"),
        (lambda h: {"a": {**h, "shape": [-2, -1]}}, "what cannot be"),
        (lambda h: {"a": {**h, "shape": [2.0]}}, "what cannot be"),
        (lambda h: {"a": {**h, "shape": [True, 2]}}, "what cannot be"),
        (lambda h: {"a": {**h, "dtype": "F3"}}, "what cannot be"),
        (lambda h: {"a": {**h, "more": 1}}, "what cannot be"),
        (lambda h: {"a": [h]}, "what cannot be"),
        (
            lambda h: {"a": h, "z": {**h, "shape": [0, 2**61], "data_offsets": [8, 8]}},
            "of tensor z",
        ),
        (lambda h: {"a": h, "__metadata__": {"a": 1}}, "its metadata is no table of texts"),
        (lambda h: [h], "its header is no table"),
        (lambda h: "deep", "its header is no JSON"),
        (lambda h: "twice", "its header is no JSON"),
    ],
)
def test_a_header_that_does_not_account_for_every_byte(change: Any, said: str) -> None:
    good = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    made = change(good)
    texts = {"deep": "[" * 100_000, "twice": '{"a":%s,"a":%s}' % ((json.dumps(good),) * 2)}
    text = (texts[made] if isinstance(made, str) else json.dumps(made)).encode()
    with pytest.raises(FormatError, match=said):
        read_header(io.BytesIO(len(text).to_bytes(8, "little") + text + bytes(8)))
    whole = json.dumps({"a": good}).encode()
    file = io.BytesIO(len(whole).to_bytes(8, "little") + whole + bytes(8))
    assert read_header(file)[1][0].shape == (2,)


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(file_of({"a": torch.ones(1000), "b": torch.ones(1000)}, {}))
    with path.open("rb") as file:
        _, entries = read_header(file)
        os.truncate(path, 5000)
        for read in (read_tensor, look_at_tensor):
            seen: list[int] = []
            read(file, entries[0], lambda piece, seen=seen: seen.append(len(piece)))
            assert sum(seen) == 4000
            with pytest.raises(FormatError, match="it ends within tensor b"):
                read(file, entries[1], lambda piece: None)


def test_reading_holds_no_more_than_what_is_asked(tmp_path: Path) -> None:
    """Of 64 MiB, 1 is wanted; the others pass through a piece of memory."""
    path = tmp_path / "a.safetensors"
    parts = {"model": {"w": torch.ones(1 << 18)}, "optimizer": {"m": torch.ones(63 << 18)}}
    save_checkpoint(path, parts, config={}, images_seen=0, step=0)
    sizes: list[int] = []
    empty, array = torch.empty, bytearray
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch, "empty", lambda shape, **o: sizes.append(4 * shape[0]) or empty(shape, **o)
        )
        patch.setattr(
            tensor_file, "bytearray", lambda n: sizes.append(n) or array(n), raising=False
        )
        _, kept = read_checkpoint(path, ["model"])
    assert kept["model"]["w"].sum() == 1 << 18
    assert sorted(size for size in sizes if size) == [1 << 20, 1 << 20]
