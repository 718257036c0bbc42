"""Checkpoints of which each process has written its part: a folder, under FSDP.

It holds the shards, safetensors files by `torch.distributed.checkpoint`; `record.json`, what
`checkpoint` calls the record, with every tensor's dtype and shape; and `manifest.json`, the SHA-256
of every other file and of itself. It is written under a hidden name, flushed, compared with what is
in memory and renamed. Any number of processes can read it, one among them.

torch's usual storage for this keeps its metadata as a pickle, which can run code when it is loaded.
The safetensors storage used here keeps none: headers are JSON, and all that is read from the files
are tensors.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from k_diffusion.training.checkpoint_info import (
    CONDITIONER,
    FORMAT,
    MANIFEST,
    SUFFIX,
    VERSION,
    CheckpointError,
    CheckpointInfo,
    check_record,
    damaged,
)
from k_diffusion.training.seals import canonical_json, flush_folder, seal_of
from k_diffusion.training.shards import is_cut, local
from k_diffusion.training.tensor_file import DTYPES
from k_diffusion.utils.words import reason_of

if TYPE_CHECKING:
    from k_diffusion.training.parallel import Processes

RECORD = "record.json"

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}

Parts = dict[str, dict[str, Tensor]]


# ---------------------------------------------------------------- writing


def save_sharded(
    path: str | Path,
    parts: Mapping[str, Mapping[str, Tensor]],
    processes: Processes,
    facts: Callable[[], Mapping[str, Any]],
) -> str:
    """Write a checkpoint together: the folder at `path` is the old one or the whole new one.

    Args:
        path: the folder.
        parts: "model", "ema", "optimizer" -> tensors by name; of a cut one each process has a part.
        processes: all of the run; each has to call this.
        facts: config, images_seen, step, data and state, see `CheckpointInfo`; JSON data; asked on
            the main process.

    Returns:
        The checkpoint's sha256, on every process.

    Raises:
        CheckpointError: it could not be written; what was there before is untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    tensors = {f"{p}/{n}": t.detach() for p, named in parts.items() for n, t in named.items()}

    old = path.with_name(f".{path.name}.old.tmp")

    def begin() -> None:
        if processes.main:
            if old.exists() and not path.exists():  # of a run that was killed between two renames
                old.rename(path)
            shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed in a write
            temporary.mkdir(parents=True)

    def write() -> None:
        from torch.distributed.checkpoint import save

        storage = _storage("Writer")(str(temporary), save_distributed=True)
        save(tensors, storage_writer=storage)

    def verify() -> dict[str, str]:
        mine = sorted(temporary.glob(f"shard-{processes.index + 1:05d}-*{SUFFIX}"))
        for file in mine:
            _compare(file, tensors)
        return {file.name: _sha256(file) for file in mine}

    def end() -> str:
        files = {name: digest for found in digests for name, digest in found.items()}
        shapes = {n: [str(t.dtype).removeprefix("torch."), list(t.shape)] for n, t in all_tensors}
        _write(temporary / RECORD, canonical_json({**facts(), "tensors": shapes}))
        files[RECORD] = _sha256(temporary / RECORD)
        if set(files) != set(os.listdir(temporary)):
            raise CheckpointError(f"not all files in {temporary} have been verified")
        manifest: Any = {"format": FORMAT, "version": str(VERSION), "files": files}
        manifest["sha256"] = seal_of(manifest)
        _write(temporary / MANIFEST, canonical_json(manifest))
        flush_folder(temporary)
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)  # of a run that was killed right here
            path.rename(old)
        temporary.rename(path)
        shutil.rmtree(old, ignore_errors=True)
        flush_folder(path.parent)
        return str(manifest["sha256"])

    all_tensors = sorted(tensors.items())
    _together(path, processes, begin)
    _together(path, processes, write)
    digests = _together(path, processes, verify)
    return _together(path, processes, lambda: end() if processes.main else "")[0]


def _together(path: Path, processes: Processes, work: Callable[[], Any]) -> list[Any]:
    """What each process's work gives; where one fails all raise."""
    result, problem = None, None
    from torch.distributed.checkpoint import CheckpointException

    try:
        result = work()
    except (Exception, CheckpointException) as error:
        problem = f"process {processes.index}: {_reason(error)}"
    outcomes = processes.gather((result, problem))
    if problems := [problem for _, problem in outcomes if problem]:
        raise CheckpointError(
            f"checkpoint {path} could not be written ({problems[0]}); what was there before is "
            "untouched"
        )
    return [result for result, _ in outcomes]


def _compare(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse a shard that does not hold what is in memory."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as shard:
        for name in shard.keys():  # noqa: SIM118 (it is no dict)
            ours, theirs = local(tensors[name]).cpu(), shard.get_tensor(name)
            same = ours.dtype == theirs.dtype and ours.shape == theirs.shape
            if not (same and torch.equal(_bytes(ours), _bytes(theirs))):
                raise CheckpointError(f"{file.name} does not hold {name} as it was to be written")


def _bytes(tensor: Tensor) -> Tensor:
    """So that a nan equals itself."""
    return tensor.contiguous().flatten().view(torch.uint8)


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


# ---------------------------------------------------------------- reading


def read_sharded(
    path: str | Path,
    parts: Iterable[str] = (),
    processes: Processes | None = None,
    cut_like: Mapping[str, Tensor] | None = None,
) -> tuple[CheckpointInfo, Parts]:
    """Read a sharded checkpoint and verify every bit of it.

    Args:
        path: the folder.
        parts: which of "model", "ema", "optimizer" to keep in memory.
        processes: who share the work, all of them calling this; None: this one does all.
        cut_like: name of a weight -> a tensor of which each process holds a part; what belongs to
            it is cut in the same way. None: everything is whole, on the CPU.

    Returns:
        What the checkpoint says about itself, and the tensors of each asked part by name.

    Raises:
        CheckpointError: missing, damaged, or not a checkpoint of this library; on every process.
    """
    path = Path(path)
    manifest = _verified(path, processes)
    try:
        record = json.loads((path / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(path, reason_of(error)) from None
    check_record(path, record)
    shapes = _shapes(path, record.get("tensors"), manifest["files"])
    kept: Parts = {part: {} for part in parts}
    wanted: dict[str, Tensor] = {}
    for name, (dtype, shape) in shapes.items():
        part, _, rest = name.partition("/")
        if part in kept:
            cut = cut_like if cut_like is not None and part != CONDITIONER else {}
            model = _model_of(rest, cut, shape)
            wanted[name] = kept[part][rest] = (
                torch.empty(shape, dtype=dtype)
                if model is None
                else torch.empty_like(model, dtype=dtype, requires_grad=False)
            )
    _load(path, wanted, alone=processes is None)
    info = CheckpointInfo(
        path=path,
        sha256=manifest["sha256"],
        config=record["config"],
        images_seen=record["images_seen"],
        step=record["step"],
        data=record["data"],
        state=record["state"],
        tensors={name: shape for name, (_, shape) in sorted(shapes.items())},
        bytes=sum(file.stat().st_size for file in path.iterdir()),
    )
    return info, kept


def read_sharded_record(path: Path) -> dict[str, Any]:
    """A checkpoint's record, verified; no shard is read.

    Raises:
        CheckpointError: manifest or record is missing or damaged.
    """
    problem, manifest = _read_manifest(path)
    problem = problem or _problem(path / RECORD, manifest["files"].get(RECORD, ""))
    if problem:
        raise damaged(path, problem)
    record: dict[str, Any] = json.loads((path / RECORD).read_text(encoding="utf-8"))
    return record


def _shapes(
    path: Path, said: Any, files: Iterable[str]
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Name -> dtype and shape, of tensors that can all be in the files.

    Raises:
        CheckpointError: the record says of one what cannot be.
    """
    if not isinstance(said, dict):
        raise damaged(path, f"{RECORD} says nothing of its tensors")
    found, left = {}, sum((path / name).stat().st_size for name in files)
    for name, facts in said.items():
        try:
            kind, shape = facts
            dtype = _DTYPES[kind]
            whole = all(type(number) is int and 0 <= number < 2**60 for number in shape)
        except (TypeError, ValueError, KeyError):
            whole = False
        left -= math.prod(shape) * dtype.itemsize if whole else 0
        # Of an empty tensor torch multiplies the other sizes.
        if not whole or left < 0 or math.prod(max(1, number) for number in shape) >= 2**60:
            raise damaged(path, f"{RECORD} says of tensor {name} what cannot be")
        found[name] = dtype, tuple(shape)
    return found


def _model_of(name: str, cut_like: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor | None:
    """The weight that a tensor belongs to: of its name, or of the folder of its name."""
    model = cut_like.get(name, cut_like.get(name.rpartition("/")[0]))
    return model if model is not None and is_cut(model) and tuple(model.shape) == shape else None


def _load(path: Path, wanted: dict[str, Tensor], alone: bool) -> None:
    if not wanted:
        return
    from torch.distributed.checkpoint import CheckpointException, load

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as is meant
            load(wanted, storage_reader=_storage("Reader")(str(path)), no_dist=alone)
    except (Exception, CheckpointException) as error:
        raise CheckpointError(f"checkpoint {path} cannot be read ({_reason(error)})") from None


def _verified(path: Path, processes: Processes | None) -> dict[str, Any]:
    """The manifest, once every file is what it says."""
    problem, manifest = _read_manifest(path)
    index, count = (processes.index, processes.count) if processes else (0, 1)
    if not problem:
        mine = sorted(manifest["files"].items())[index::count]
        problem = next(filter(None, (_problem(path / name, digest) for name, digest in mine)), "")
    problems = list(filter(None, processes.gather(problem) if processes else [problem]))
    if problems:
        raise damaged(path, problems[0])
    return manifest


def _read_manifest(path: Path) -> tuple[str, dict[str, Any]]:
    """What is wrong with the manifest, and the manifest."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        sealed = isinstance(manifest, dict) and manifest.get("sha256") == seal_of(manifest)
        there = {file.name for file in path.iterdir()}
    except FileNotFoundError:
        return f"{MANIFEST} is missing", {}
    except (OSError, ValueError, RecursionError) as error:
        return f"{MANIFEST} cannot be read ({reason_of(error)})", {}
    if not sealed:
        return f"{MANIFEST} is not what was written", {}
    written = manifest.get("format"), manifest.get("version")
    if written != (FORMAT, str(VERSION)):
        return f"it is of format {written[0]} {written[1]}", {}
    if not isinstance(manifest.get("files"), dict) or RECORD not in manifest["files"]:
        return f"{MANIFEST} names no {RECORD} among its files", {}
    files = set(manifest["files"])
    if lost := sorted(files - there):
        return f"{lost[0]} is missing from it", {}
    if strange := sorted(there - files - {MANIFEST}):
        return f"{strange[0]} is none of its files", {}
    return "", manifest


def _problem(file: Path, digest: str) -> str:
    try:
        return "" if _sha256(file) == digest else f"{file.name} is not what was written"
    except OSError as error:
        return f"{file.name} cannot be read ({error.strerror})"


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as handle:
        while block := handle.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _storage(kind: str) -> Any:
    """torch's reader or writer of safetensors shards."""
    from torch.distributed import checkpoint

    storage = getattr(checkpoint, f"HuggingFaceStorage{kind}", None)
    if storage is None:
        raise CheckpointError(
            f"torch {torch.__version__} has no safetensors storage for shards: torch 2.13 has it"
        )
    return storage


def _reason(error: BaseException) -> str:
    """Of torch's own exception, which is no Exception, what failed, without its traceback."""
    failures = getattr(error, "failures", None) or {}
    return reason_of(next((failure[0] for failure in failures.values()), error))
