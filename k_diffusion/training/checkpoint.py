"""Checkpoints: one safetensors file with the weights, their average, the optimiser and the config.

The file holds tensors called `model/...`, `ema/...` and `optimizer/...`, and as its metadata:

- `format` "k_diffusion" and `version`;
- `manifest`: JSON, the SHA-256 of every tensor (its dtype, shape and bytes);
- `record`: JSON, everything that is no tensor (config, images seen, step, facts about the data);
- `sha256`: that of all the others. It is the checkpoint's name in what is made from it.

A checkpoint is written beside its place, flushed to the disk and renamed, so that an interrupted
write leaves the former file. Loading runs no code from the file and refuses any flipped bit.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from k_diffusion.training.shards import local, part_like
from k_diffusion.utils.maths import nearest

FORMAT = "k_diffusion"
VERSION = 1
SUFFIX = ".safetensors"
MANIFEST = "manifest.json"
"""In a folder: it is a checkpoint of several processes, see `sharded`."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or does not fit; its message is one line."""

    everywhere = True  # as in ConfigError


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint says about itself.

    Attributes:
        path: the file.
        sha256: the hash of all that it holds.
        config: the run's config, as JSON data (the keys of TrainConfig).
        images_seen: the training clock.
        step: optimiser steps, skipped ones included.
        data: facts about the training data: "shape" of an image (C, H, W), "num_classes",
            "class_names", "mean", "std", "images" (their number).
        state: what a resume needs beside tensors.
        tensors: name -> shape.
        bytes: size of the file.
    """

    path: Path
    sha256: str
    config: dict[str, Any]
    images_seen: int
    step: int
    data: dict[str, Any]
    state: dict[str, Any] = field(repr=False)
    tensors: dict[str, tuple[int, ...]] = field(repr=False)
    bytes: int

    @property
    def parameters(self) -> int:
        """How many numbers the network's weights and buffers are."""
        kinds = {n.partition("/")[0] for n in self.tensors} - {"optimizer"}
        part = "model" if "model" in kinds else min(kinds, default="")
        return sum(
            torch.Size(shape).numel()
            for n, shape in self.tensors.items()
            if n.startswith(f"{part}/")
        )

    @property
    def averages(self) -> list[str]:
        """The names of the averaged weights in it: "ema" and such as "ema_0.05"."""
        kinds = {n.partition("/")[0] for n in self.tensors}
        return sorted(kind for kind in kinds if kind == "ema" or kind.startswith("ema_"))


# ---------------------------------------------------------------- tensors by name


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """A module's parameters and persistent buffers by name; a shared one once, by its first."""
    seen: set[int] = set()
    tensors = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor
    return tensors


@torch.no_grad()
def copy_tensors(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    """Copy values into tensors of the same names and shapes, in the target's dtype and place.

    Raises:
        ValueError: names or shapes differ; the first difference is named and nothing is copied.
    """
    lacking = sorted(set(target) - set(source))
    surplus = sorted(set(source) - set(target))
    if lacking:
        raise ValueError(f"{lacking[0]} is missing{_and_more(lacking)}")
    if surplus:
        raise ValueError(f"{surplus[0]} has no place in the network{_and_more(surplus)}")
    for name, tensor in target.items():
        if source[name].shape != tensor.shape:
            raise ValueError(
                f"{name} has shape {tuple(source[name].shape)}, but the network's has "
                f"{tuple(tensor.shape)}"
            )
    for name, tensor in target.items():
        local(tensor).copy_(part_like(source[name], tensor))


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


# ---------------------------------------------------------------- writing


def save_checkpoint(
    path: str | Path,
    parts: Mapping[str, Mapping[str, Tensor]],
    *,
    config: Mapping[str, Any],
    images_seen: int,
    step: int,
    data: Mapping[str, Any] | None = None,
    state: Mapping[str, Any] | None = None,
) -> str:
    """Write a checkpoint in one go: the file at `path` is the old one or the whole new one.

    Args:
        path: the file; its folder is made where it is missing.
        parts: "model", "ema", "optimizer" -> tensors by name.
        config, images_seen, step, data, state: see `CheckpointInfo`; JSON data.

    Returns:
        The checkpoint's sha256.
    """
    from safetensors.torch import save_file

    path = Path(path)
    tensors = {
        f"{part}/{name}": tensor.detach().cpu().contiguous()
        for part, named in parts.items()
        for name, tensor in named.items()
    }
    record = {
        "config": config,
        "images_seen": images_seen,
        "step": step,
        "data": data or {},
        "state": state or {},
    }
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "manifest": _json({name: _digest(tensor) for name, tensor in tensors.items()}),
        "record": _json(record),
    }
    metadata["sha256"] = _seal(metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # as for any file of this user; safetensors writes 0600
        save_file(tensors, temporary, metadata)
        temporary.chmod(mode)
        _flush(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _flush(path.parent)
    return metadata["sha256"]


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _digest(tensor: Tensor) -> str:
    """SHA-256 of a CPU tensor's dtype, shape and bytes."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _seal(metadata: Mapping[str, str]) -> str:
    return hashlib.sha256(_json({**metadata, "sha256": ""}).encode()).hexdigest()


def _flush(path: Path) -> None:
    """Make the system write a file (or a folder's entries) to the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows has no handle on a folder
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---------------------------------------------------------------- reading


def read_checkpoint(
    path: str | Path, parts: Iterable[str] = ()
) -> tuple[CheckpointInfo, dict[str, dict[str, Tensor]]]:
    """Read a checkpoint and verify every bit of it.

    Args:
        path: the file.
        parts: which of "model", "ema", "optimizer" to keep in memory.

    Returns:
        What it says about itself, and the tensors of each asked part by name, on the CPU.

    Raises:
        CheckpointError: missing, damaged, or not a checkpoint of this library.
    """
    path = Path(path)
    if (path / MANIFEST).is_file():
        from k_diffusion.training.sharded import read_sharded

        return read_sharded(path, parts)
    _recognise(path)
    wanted = tuple(parts)
    kept: dict[str, dict[str, Tensor]] = {part: {} for part in wanted}
    shapes = {}
    metadata, tensors = _open(path)
    manifest, record = _verify_metadata(path, metadata)
    names = set()
    for name, tensor in tensors:
        names.add(name)
        if manifest.get(name) != _digest(tensor):
            raise CheckpointError(
                f"checkpoint {path} is damaged: tensor {name} is not what was written; "
                "use an earlier checkpoint or another copy"
            )
        shapes[name] = tuple(tensor.shape)
        part, _, rest = name.partition("/")
        if part in kept:
            kept[part][rest] = tensor.clone()
    if names != set(manifest):
        lost = sorted(set(manifest) - names)[0]
        raise CheckpointError(f"checkpoint {path} is damaged: tensor {lost} is missing from it")
    info = CheckpointInfo(
        path=path,
        sha256=metadata["sha256"],
        config=record["config"],
        images_seen=record["images_seen"],
        step=record["step"],
        data=record["data"],
        state=record["state"],
        tensors=dict(sorted(shapes.items())),
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
    _recognise(path)
    metadata, _ = _open(path)
    return _verify_metadata(path, metadata)[1]


def _recognise(path: Path) -> None:
    """Refuse, by the first bytes, what is certainly no safetensors file."""
    if path.is_dir():
        raise CheckpointError(f"checkpoint {path} is a folder: name the {SUFFIX} file in it")
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint {path} does not exist{_neighbour(path)}") from None
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error.strerror}") from None
    if not head:
        raise CheckpointError(f"checkpoint {path} is empty (0 bytes): use an earlier one")
    # A safetensors file begins with the length of its header, which can be any number, and "{".
    pickles = (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
    if head[:2] in pickles and head[8:] != b"{":
        raise CheckpointError(
            f"checkpoint {path} is a pickle, which could run code when loaded, so it is not "
            f"opened: give a {SUFFIX} file"
        )


def _neighbour(path: Path) -> str:
    if not path.parent.is_dir():
        return f": there is no folder {path.parent}"
    names = sorted(p.name for p in path.parent.iterdir() if p.suffix == SUFFIX)
    close = nearest(path.name, names) or (names[-1] if names else None)
    return f"; did you mean {path.parent / close}?" if close else f": {path.parent} holds none"


def _open(path: Path) -> tuple[dict[str, str], Iterator[tuple[str, Tensor]]]:
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(path, framework="pt")
        metadata = file.metadata() or {}
        names = sorted(file.keys())
    except (SafetensorError, OSError, ValueError, OverflowError, MemoryError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"checkpoint {path} is truncated, damaged or no safetensors file ({reason}): "
            "use an earlier checkpoint or another copy"
        ) from None

    def tensors() -> Iterator[tuple[str, Tensor]]:
        try:
            with file:
                for name in names:
                    yield name, file.get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"checkpoint {path} is damaged ({error})") from None

    return metadata, tensors()


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
    if metadata.get("sha256") != _seal(metadata):
        raise CheckpointError(
            f"checkpoint {path} is damaged: its metadata is not what was written; "
            "use an earlier checkpoint or another copy"
        )
    return json.loads(metadata["manifest"]), json.loads(metadata["record"])
