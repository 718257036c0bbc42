"""Snapshots of a run's power-function averages, from which `posthoc` makes others afterwards.

A snapshot is a file in the run's folder, `ema/snapshot-<images seen>.safetensors`, in the format of
a checkpoint (and so written beside its place, flushed, renamed, and every bit of it sealed) with
one part for each average, such as `ema_0.05/...`.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from k_diffusion.training.checkpoint import SUFFIX, CheckpointError, read_record, save_checkpoint
from k_diffusion.training.ema import PowerFunction
from k_diffusion.training.shards import gathered

if TYPE_CHECKING:
    from k_diffusion.training.trainer import Trainer

FOLDER = "ema"
DTYPES = {"float32": torch.float32, "float16": torch.float16}


@dataclass(frozen=True)
class Snapshot:
    """What a snapshot says about itself.

    Attributes:
        path: the file.
        images_seen: the training clock.
        updates: of the network's weights, up to the last that moved the averages: their own time.
        profiles: average's name -> its relative length sigma_rel.
        dtype: of the averages in the file, a name in `DTYPES`.
        bytes: size of the file.
    """

    path: Path
    images_seen: int
    updates: int
    profiles: dict[str, float]
    dtype: str
    bytes: int


def save_snapshot(trainer: Trainer) -> Path | None:
    """Write the run's power-function averages as they are now into its folder; all processes call.

    Returns:
        The file; None where there is none to write: no update has been made, or this process is
        not the main one.

    Raises:
        CheckpointError: a weight is too large for float16.
    """
    config, averages = trainer.config, trainer.averages
    profiles = {
        name: average.profile.sigma_rel
        for name, average in averages.items()
        if isinstance(average.profile, PowerFunction)
    }
    if not (profiles and trainer.ema.reached):
        return None
    main = trainer.processes.main
    whole = {name: gathered(averages[name].state_dict(), keep=main) for name in profiles}
    if not main:
        return None
    path, dtype = snapshot_path(config.out, trainer.images_seen), config.ema.snapshot_dtype
    parts = {name: _rounded(whole[name], averages[name].buffers, dtype, path) for name in profiles}
    save_checkpoint(
        path,
        parts,
        config=config.to_json(),
        images_seen=trainer.images_seen,
        step=trainer.step,
        data=trainer.source.facts(),
        state={
            "ema_updates": trainer.ema.reached,
            "profiles": profiles,
            "buffers": sorted(trainer.ema.buffers),
            "dtype": dtype,
        },
    )
    return path


def _rounded(
    average: dict[str, Tensor], buffers: Set[str], dtype: str, path: Path
) -> dict[str, Tensor]:
    found = dict(average)
    for name in set(found) - buffers:
        exact = found[name]
        found[name] = exact.to(DTYPES[dtype])
        if dtype != "float32" and not torch.equal(found[name].isfinite(), exact.isfinite()):
            raise CheckpointError(
                f"snapshot {path} cannot be written: {name} reaches {exact.abs().max():.3g}, too "
                "large for float16; set ema.snapshot_dtype = 'float32'"
            )
    return found


def snapshot_path(run: str | Path, images_seen: int) -> Path:
    """Where a run's snapshot at this time lies."""
    return Path(run) / FOLDER / f"snapshot-{images_seen:012d}{SUFFIX}"


def snapshot_files(run: str | Path) -> list[Path]:
    """The snapshots' files in a run's folder, oldest first."""
    return sorted((Path(run) / FOLDER).glob(f"snapshot-{'[0-9]' * 12}{SUFFIX}"))


def list_snapshots(run: str | Path) -> list[Snapshot]:
    """The snapshots in a run's folder, oldest first, by their sealed metadata.

    Raises:
        CheckpointError: one is damaged, or the folder holds none.
    """
    found = [read_snapshot(path) for path in snapshot_files(run)]
    if not found:
        raise CheckpointError(
            f"there are no snapshots in {Path(run) / FOLDER}: a run leaves some where "
            "ema.profiles = [0.05, 0.1] and ema.snapshot_every_images are set"
        )
    return found


def read_snapshot(path: str | Path) -> Snapshot:
    """What a snapshot says about itself; its tensors are verified when they are read.

    Raises:
        CheckpointError: missing, damaged or no snapshot.
    """
    path = Path(path)
    record = read_record(path)
    state = record["state"]
    if "profiles" not in state:
        raise CheckpointError(
            f"checkpoint {path} is no snapshot of averages: those lie in the folder {FOLDER} of a "
            "run"
        )
    return Snapshot(
        path=path,
        images_seen=record["images_seen"],
        updates=state["ema_updates"],
        profiles=state["profiles"],
        dtype=state["dtype"],
        bytes=path.stat().st_size,
    )


def remove_snapshots_after(
    run: str | Path, images_seen: int, say: Callable[[str], None] = lambda line: None
) -> None:
    """Remove what lies after a time to which the run has gone back, and halves of killed writes.

    Args:
        run: its folder.
        images_seen: where the run goes on; 0: at its beginning.
        say: takes a line where any are removed.
    """
    for half in (Path(run) / FOLDER).glob(f".snapshot-*{SUFFIX}.*.tmp"):
        half.unlink(missing_ok=True)
    later = [
        path for path in snapshot_files(run) if path.name > snapshot_path(run, images_seen).name
    ]
    for path in later:
        path.unlink(missing_ok=True)
    if later:
        say(
            f"removing {len(later)} snapshot{'s' * (len(later) > 1)} from {later[0]} on: the run "
            f"goes on from {images_seen} images"
        )
