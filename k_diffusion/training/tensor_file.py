"""Files of the safetensors format, written and read one tensor at a time.

The format (github.com/huggingface/safetensors, README, "Format"): eight bytes of a number n, little
end first; n bytes of JSON, which gives each tensor's dtype, shape and place, and texts under
"__metadata__"; then the tensors' bytes, without gaps. The safetensors package reads what is written
here and the other way round.

Beside the package, because a checkpoint asks for more: the same tensors and texts give the same
bytes; a full disk is an OSError with its number; a tensor is read once, to where it stays, and
looked at on the way; a file that shrinks meanwhile is an error, where mapped memory would end the
program.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The format's name -> dtype."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_TEXTS = "__metadata__"
_LONGEST_HEADER = 100_000_000  # the package's limit too
_MOST_NUMBERS = 1 << 60  # of an empty tensor too: torch multiplies its other sizes
_PIECE = 1 << 20


class FormatError(ValueError):
    """A file that is not of the format; the message is one line, without the file's name."""


@dataclass(frozen=True)
class Entry:
    """A tensor in a file.

    Attributes:
        name: of the tensor.
        dtype, shape: of the tensor.
        start, stop: its bytes in the file.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor on the CPU; of a contiguous one its own memory, not a copy."""
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data


# ---------------------------------------------------------------- writing


def write_tensors(
    file: BinaryIO, tensors: Mapping[str, Tensor], texts: Mapping[str, str] | None = None
) -> None:
    """Write a whole file. Large elements come first, so that every tensor is aligned.

    Args:
        file: at its beginning.
        tensors: name -> tensor on the CPU.
        texts: the metadata.

    Raises:
        OSError: the file cannot take it.
        ValueError: the format has no such dtype, or the header is longer than it allows.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {_TEXTS: dict(texts)} if texts else {}
    place = 0
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in _NAMES:
            raise ValueError(f"tensor {name} is {tensor.dtype}, which safetensors does not know")
        size = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [place, place + size],
        }
        place += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _LONGEST_HEADER:
        raise ValueError(
            f"the header is {len(text):,} bytes long, but safetensors allows {_LONGEST_HEADER:,}"
        )
    file.write(len(text).to_bytes(8, "little"))
    file.write(text)
    for name in order:
        file.write(tensor_bytes(tensors[name]))


# ---------------------------------------------------------------- reading


def read_header(file: BinaryIO) -> tuple[dict[str, str], list[Entry]]:
    """The texts and the places of all tensors, in the order in which they lie.

    Raises:
        FormatError: the header is not of the format, or does not account for every byte.
    """
    size = file.seek(0, 2)
    file.seek(0)
    head = file.read(8)
    if len(head) < 8:
        raise FormatError(f"it has {size} bytes, fewer than the 8 of a header's length")
    length = int.from_bytes(head, "little")
    if length > min(size - 8, _LONGEST_HEADER):
        raise FormatError(f"a header of {length:,} bytes does not fit into its {size:,}")
    try:
        header = json.loads(file.read(length).decode(), object_pairs_hook=_once)
    except (ValueError, RecursionError):
        raise FormatError("its header is no JSON") from None
    if not isinstance(header, dict):
        raise FormatError("its header is no table")
    texts = header.pop(_TEXTS, {})
    if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
        raise FormatError("its metadata is no table of texts")
    begin = 8 + length
    entries = sorted(
        (_entry(name, facts, begin) for name, facts in header.items()),
        key=lambda entry: (entry.start, entry.stop),
    )
    for entry in entries:
        if entry.start != begin:
            raise FormatError(f"tensor {entry.name} does not begin where the one before ends")
        begin = entry.stop
    if begin != size:
        raise FormatError(f"it has {size:,} bytes, but its header accounts for {begin:,}")
    return texts, entries


def _once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    pairs = list(pairs)
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name stands twice")
    return table


def _entry(name: str, facts: Any, begin: int) -> Entry:
    try:
        dtype, shape = DTYPES[facts["dtype"]], tuple(facts["shape"])
        start, stop = facts["data_offsets"]
        whole = all(type(number) is int and number >= 0 for number in (*shape, start, stop))
        fits = whole and len(facts) == 3 and stop - start == math.prod(shape) * dtype.itemsize
        fits = fits and math.prod(max(1, number) for number in shape) < _MOST_NUMBERS
    except (TypeError, ValueError, KeyError):
        fits = False
    if not fits:
        raise FormatError(f"its header says of tensor {name} what cannot be")
    return Entry(name, dtype, shape, begin + start, begin + stop)


def read_tensor(file: BinaryIO, entry: Entry, look: Callable[[memoryview], object]) -> Tensor:
    """A tensor, on the CPU; `look` is shown its bytes piece by piece, each once, in order.

    Raises:
        FormatError: the file ends before it.
    """
    tensor = torch.empty(entry.shape, dtype=entry.dtype)
    _read(file, entry, tensor_bytes(tensor), look)
    return tensor


def look_at_tensor(file: BinaryIO, entry: Entry, look: Callable[[memoryview], object]) -> None:
    """The same without keeping it: takes the memory of a piece.

    Raises:
        FormatError: the file ends before it.
    """
    _read(file, entry, None, look)


def _read(
    file: BinaryIO,
    entry: Entry,
    target: memoryview | None,
    look: Callable[[memoryview], object],
) -> None:
    size, done = entry.stop - entry.start, 0
    piece = memoryview(bytearray(min(size, _PIECE) if target is None else 0))
    file.seek(entry.start)
    while done < size:
        room = piece[: size - done] if target is None else target[done : done + _PIECE]
        got = file.readinto(room)  # type: ignore[attr-defined]
        if not got:
            raise FormatError(f"it ends within tensor {entry.name}")
        look(room[:got])
        done += got
