"""`k-diffusion ema`: an average of another length, made from a run's snapshots."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from .problems import UsageError, as_usage
from .values import WholeOrNone

if TYPE_CHECKING:
    from k_diffusion.training.snapshots import Snapshot

LENGTHS = (0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09, 0.1, 0.12, 0.15, 0.2, 0.25)
"""Of which the list tells how well they can be made."""


@dataclass
class MakeEma:
    """Make the averaged weights of a length that the run did not keep, as a file to sample from.

    The run must have left snapshots: `ema.profiles = [0.05, 0.1]` and
    `ema.snapshot_every_images` in its config.
    """

    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """A run's folder."""
    sigma_rel: float | None = None
    """Relative length of the average: its width over training time, as a share of that time."""
    out: Annotated[str, tyro.conf.arg(aliases=["-o"], metavar="FILE")] = ""
    """The file to write, a .safetensors."""
    at: Annotated[WholeOrNone, tyro.conf.arg(metavar="IMAGES")] = None
    """The average as it was when the run had seen so many images, a snapshot's time; without it at
    the newest."""
    tolerance: float | None = None
    """How far off the profile may be, as a share of itself; without it 0.02."""
    overwrite: bool = False
    """Replace the file if it is already there."""
    list: bool = False
    """Only show the snapshots and which lengths can be made of them."""
    json: bool = False
    """Print JSON."""

    def run(self) -> None:
        from k_diffusion.training.posthoc import TOLERANCE, reconstruct, save_reconstruction
        from k_diffusion.training.snapshots import list_snapshots

        self._check()
        snapshots = list_snapshots(self.folder)
        time = self._time(snapshots)
        tolerance = TOLERANCE if self.tolerance is None else self.tolerance
        if self.list:
            facts = snapshot_facts(snapshots, time)
            print(json.dumps(facts, indent=2) if self.json else table(facts, tolerance))
            return
        assert self.sigma_rel is not None
        with as_usage():
            made = reconstruct(snapshots, self.sigma_rel, time, tolerance=tolerance)
        sha256 = save_reconstruction(made, self.out)
        facts = {
            "file": self.out,
            "sha256": sha256,
            "sigma_rel": made.sigma_rel,
            "images seen": made.info.images_seen,
            "updates": made.updates,
            "snapshots": made.snapshots,
            "error": made.error,
        }
        if self.json:
            print(json.dumps(facts, indent=2))
            return
        print(
            f"{self.out}: the average of relative length {made.sigma_rel} at "
            f"{made.info.images_seen} images, from {made.snapshots} snapshots; its profile is off "
            f"by {made.error:.2%} of itself"
        )

    def _check(self) -> None:
        """Refuse, before anything is read, what no snapshots could make right."""
        if self.list:
            return
        if self.sigma_rel is None:
            raise UsageError("--sigma-rel is missing, as in --sigma-rel 0.08; or give --list")
        if not self.out.endswith(".safetensors"):
            raise UsageError(
                f"--out {self.out or 'is missing'}: give a file, as in -o model.safetensors"
            )
        if Path(self.out).exists() and not self.overwrite:
            raise UsageError(f"--out {self.out} is there already; another name, or --overwrite")

    def _time(self, snapshots: Sequence[Snapshot]) -> int | None:
        """The updates of the snapshot asked for; None: the newest's."""
        if self.at is None:
            return None
        known = {snapshot.images_seen: snapshot.updates for snapshot in snapshots}
        if self.at not in known:
            near = min(known, key=lambda images: abs(images - (self.at or 0)))
            raise UsageError(f"--at {self.at} is no snapshot's time; the nearest is {near}")
        return known[self.at]


def snapshot_facts(snapshots: Sequence[Snapshot], time: int | None = None) -> dict[str, Any]:
    """What `--list` tells, as JSON data; time: at which lengths are judged, in updates."""
    from k_diffusion.training.posthoc import plan

    return {
        "snapshots": [{**asdict(snapshot), "path": str(snapshot.path)} for snapshot in snapshots],
        "lengths": {str(length): plan(snapshots, length, time)[1] for length in LENGTHS},
    }


def table(facts: dict[str, Any], tolerance: float) -> str:
    """The same as text."""
    lines = [f"{'images':>12}  {'updates':>9}  averages"]
    for snapshot in facts["snapshots"]:
        names = ", ".join(snapshot["profiles"])
        lines.append(f"{snapshot['images_seen']:>12,}  {snapshot['updates']:>9,}  {names}")
    lines += ["", "sigma_rel  error of the profile"]
    for length, error in facts["lengths"].items():
        refused = "" if error <= tolerance else "  (refused)"
        lines.append(f"{length:>9}  {error:8.3%}{refused}")
    return "\n".join(lines)
