"""Checkpoints: one safetensors file with the weights, their average, the optimiser and the config.

The file holds tensors called `model/...`, `ema/...` and `optimizer/...`, and as its metadata:

- `format` "k_diffusion" and `version`;
- `manifest`: JSON, the SHA-256 of every tensor (its dtype, shape and bytes);
- `record`: JSON, everything that is no tensor (config, images seen, step, facts about the data, and
  in a file for sampling the model card);
- `sha256`: that of all the others. It is the checkpoint's name in what is made from it.

A checkpoint is written beside its place, flushed to the disk, read back and verified, and renamed,
so that an interrupted or failed write leaves the former file. Loading runs no code from the file
and refuses any flipped bit.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from k_diffusion.training.checkpoint_info import (
    CONDITIONER,
    FORMAT,
    LAST,
    MANIFEST,
    OTHERS,
    SUFFIX,
    VERSION,
    CheckpointError,
    CheckpointInfo,
    check_record,
    damaged,
)
from k_diffusion.training.seals import (
    canonical_json,
    digest_of,
    flush_folder,
    forget,
    seal_of,
    tensor_hash,
)
from k_diffusion.training.sharded import read_sharded, read_sharded_record
from k_diffusion.training.tensor_file import (
    FormatError,
    look_at_tensor,
    read_header,
    read_tensor,
    write_tensors,
)
from k_diffusion.utils.maths import nearest
from k_diffusion.utils.words import reason_of

__all__ = [
    "CONDITIONER", "FORMAT", "LAST", "MANIFEST", "OTHERS", "SUFFIX", "VERSION", "CheckpointError",
    "CheckpointInfo", "Contents", "make_contents", "read_checkpoint", "read_info", "read_record",
    "save_checkpoint", "write_checkpoint",
]  # fmt: skip


# ---------------------------------------------------------------- writing


@dataclass(frozen=True)
class Contents:
    """What a checkpoint is to hold.

    Attributes:
        tensors: full name, such as "model/enter.weight" -> tensor, on any device.
        record: JSON, everything that is no tensor.
    """

    tensors: dict[str, Tensor]
    record: str


def make_contents(
    parts: Mapping[str, Mapping[str, Tensor]],
    *,
    config: Mapping[str, Any],
    images_seen: int,
    step: int,
    data: Mapping[str, Any] | None = None,
    state: Mapping[str, Any] | None = None,
    card: str = "",
) -> Contents:
    """The contents of a checkpoint; the tensors are those given, the rest is fixed from now on.

    Args:
        parts: "model", "ema", "optimizer" -> tensors by name.
        config, images_seen, step, data, state, card: see `CheckpointInfo`; JSON data.
    """
    record = {
        "config": config,
        "images_seen": images_seen,
        "step": step,
        "data": data or {},
        "state": state or {},
    }
    return Contents(
        {f"{part}/{n}": tensor for part, named in parts.items() for n, tensor in named.items()},
        canonical_json(record | ({"card": card} if card else {})),
    )


def save_checkpoint(
    path: str | Path, parts: Mapping[str, Mapping[str, Tensor]], **facts: Any
) -> str:
    """Write a checkpoint in one go; see `make_contents` and `write_checkpoint`."""
    return write_checkpoint(path, make_contents(parts, **facts))


def write_checkpoint(path: str | Path, contents: Contents) -> str:
    """Write a checkpoint in one go: the file at `path` is the old one or the whole new one.

    It is written beside `path`, flushed to the disk, read back and verified; only then is it
    renamed.

    Args:
        path: the file; its folder is made where it is missing.
        contents: the same give the same bytes.

    Returns:
        The checkpoint's sha256.

    Raises:
        CheckpointError: it cannot be written; `path` is as it was.
    """
    path = Path(path)
    tensors = {name: t.detach().cpu().contiguous() for name, t in contents.tensors.items()}
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "manifest": canonical_json({name: digest_of(tensor) for name, tensor in tensors.items()}),
        "record": contents.record,
    }
    metadata["sha256"] = seal_of(metadata)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                write_tensors(file, tensors, metadata)
                file.flush()
                os.fsync(file.fileno())
                forget(file.fileno())
            _verify_written(temporary, metadata["sha256"])
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        flush_folder(path.parent)
    except (OSError, CheckpointError) as error:
        reason = getattr(error, "strerror", None) or reason_of(error)
        raise CheckpointError(
            f"checkpoint {path} could not be written ({reason}); what was there before is untouched"
        ) from error
    return metadata["sha256"]


def _verify_written(path: Path, sha256: str) -> None:
    try:
        found = read_info(path).sha256
    except CheckpointError as error:
        raise CheckpointError(
            f"read back from the disk it is not what was written: {error}"
        ) from None
    if found != sha256:
        raise CheckpointError(f"read back from the disk it is another checkpoint, {found[:12]}")


# ---------------------------------------------------------------- reading


def read_checkpoint(
    path: str | Path, parts: Iterable[str] = ()
) -> tuple[CheckpointInfo, dict[str, dict[str, Tensor]]]:
    """Read a checkpoint once and verify every bit of it.

    Args:
        path: the file.
        parts: which of "model", "ema", "optimizer" to keep in memory; the others take none.

    Returns:
        What it says about itself, and the tensors of each asked part by name, on the CPU.

    Raises:
        CheckpointError: missing, damaged, or not a checkpoint of this library.
    """
    path = Path(path)
    if (path / MANIFEST).is_file():
        return read_sharded(path, parts)
    _recognise(path)
    kept: dict[str, dict[str, Tensor]] = {part: {} for part in parts}
    try:
        with path.open("rb") as file:
            metadata, entries = read_header(file)
            manifest, record = _verify_metadata(path, metadata)
            for entry in entries:
                digest = tensor_hash(entry.dtype, entry.shape)
                part, _, rest = entry.name.partition("/")
                if part in kept:
                    kept[part][rest] = read_tensor(file, entry, digest.update)
                else:
                    look_at_tensor(file, entry, digest.update)
                if manifest.get(entry.name) != digest.hexdigest():
                    raise damaged(path, f"tensor {entry.name} is not what was written")
    except FormatError as error:
        raise _foreign(path, error) from None
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error.strerror}") from None
    if lost := sorted(set(manifest) - {entry.name for entry in entries}):
        raise damaged(path, f"tensor {lost[0]} is missing from it")
    info = CheckpointInfo(
        path=path,
        sha256=metadata["sha256"],
        config=record["config"],
        images_seen=record["images_seen"],
        step=record["step"],
        data=record["data"],
        state=record["state"],
        card=record.get("card", ""),
        tensors={entry.name: entry.shape for entry in sorted(entries, key=lambda e: e.name)},
        bytes=path.stat().st_size,
    )
    return info, kept


def read_info(path: str | Path) -> CheckpointInfo:
    """What a checkpoint says about itself, after verifying all of it.

    Raises:
        CheckpointError: missing, damaged, or not a checkpoint of this library.
    """
    return read_checkpoint(path)[0]


def read_record(path: str | Path) -> dict[str, Any]:
    """A checkpoint's record (see above) by its sealed metadata alone: no tensor is read.

    Raises:
        CheckpointError: missing, damaged there, or not a checkpoint of this library.
    """
    path = Path(path)
    if (path / MANIFEST).is_file():
        return read_sharded_record(path)
    _recognise(path)
    try:
        with path.open("rb") as file:
            return _verify_metadata(path, read_header(file)[0])[1]
    except FormatError as error:
        raise _foreign(path, error) from None
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error.strerror}") from None


def _recognise(path: Path) -> None:
    """Refuse what is no file, or an empty one."""
    if path.is_dir():
        raise CheckpointError(f"checkpoint {path} is a folder: name the {SUFFIX} file in it")
    try:
        with path.open("rb") as file:
            head = file.read(1)
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint {path} does not exist{_neighbour(path)}") from None
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error.strerror}") from None
    if not head:
        raise CheckpointError(f"checkpoint {path} is empty (0 bytes): use an earlier one")


def _foreign(path: Path, error: FormatError) -> CheckpointError:
    """What to say of a file that is not of the format."""
    # Not asked before: a header's length can begin with the same bytes.
    with path.open("rb") as file:
        head = file.read(2)
    if head == b"PK" or (head[:1] == b"\x80" and head[1:] in (b"\2", b"\3", b"\4", b"\5")):
        return CheckpointError(
            f"checkpoint {path} is a pickle, which could run code when loaded, so it is not "
            f"opened: give a {SUFFIX} file"
        )
    return CheckpointError(
        f"checkpoint {path} is truncated, damaged or no safetensors file ({error}): {OTHERS}"
    )


def _neighbour(path: Path) -> str:
    if not path.parent.is_dir():
        return f": there is no folder {path.parent}"
    names = sorted(p.name for p in path.parent.iterdir() if p.suffix == SUFFIX)
    close = nearest(path.name, names) or (names[-1] if names else None)
    if close:
        return f"; did you mean {path.parent / close}?"
    return f", and there is no other in {path.parent.absolute()}"


def _verify_metadata(
    path: Path, metadata: Mapping[str, str]
) -> tuple[dict[str, str], dict[str, Any]]:
    """The manifest and the record, once the seal over them holds."""
    if metadata.get("format") != FORMAT or not {"version", "manifest", "record"} <= set(metadata):
        raise CheckpointError(
            f"checkpoint {path} is a safetensors file, but not one written by k_diffusion training "
            f"(its metadata lacks format {FORMAT!r}): weights alone do not say how to use them"
        )
    if metadata["version"] != str(VERSION):
        raise CheckpointError(
            f"checkpoint {path} has version {metadata['version']} of the format; this release "
            f"reads version {VERSION}: use the release that wrote it"
        )
    if metadata.get("sha256") != seal_of(metadata):
        raise damaged(path, "its metadata is not what was written")
    try:
        manifest, record = json.loads(metadata["manifest"]), json.loads(metadata["record"])
    except (ValueError, RecursionError):
        manifest = record = None
    check_record(path, record if isinstance(manifest, dict) else None)
    return manifest, record
