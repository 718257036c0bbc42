"""What is off with a run, in plain words, and what to try.

`told` looks at the metrics alone, `measured` at the newest checkpoint with some of the data. To add
a check, write a function there and enter it in that module's `CHECKS`, with its threshold and what
it says in docs/watching.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from k_diffusion.training.doctor import told
from k_diffusion.training.doctor.finding import Finding, NotSeen, Report
from k_diffusion.training.history import METRICS, read_history
from k_diffusion.utils.words import reason_of

__all__ = ["IMAGES", "MEASURED", "Finding", "NotSeen", "Report", "examine_run"]

IMAGES = 64
"""Images of the data that losses are measured on, unless told otherwise."""
MEASURED = ("average measured", "conditioning", "steps in sampling")
"""The checks that need a checkpoint."""


def examine_run(
    run: str | Path,
    *,
    weights: bool = True,
    device: Any = "cpu",
    images: int = IMAGES,
) -> Report:
    """Look at a run for what usually goes wrong.

    Args:
        run: its folder.
        weights: whether to load the newest checkpoint and compute with it; else only the metrics
            are read.
        device: where that is computed.
        images: of the data, that losses are measured on.

    Raises:
        HistoryError: the folder is no run.
    """
    run = Path(run)
    history = read_history(run)
    findings, fine, unseen = list[Finding](), list[str](), dict[str, str]()

    def look(name: str, check: Callable[[Any], Finding | None], at: Any) -> None:
        try:
            finding = check(at)
        except NotSeen as reason:
            unseen[name] = str(reason)
        except Exception as error:  # a network or data of any kind may raise anything
            unseen[name] = f"it could not be computed here ({reason_of(error)})"
        else:
            if finding is None:
                fine.append(name)
            else:
                findings.append(dataclasses.replace(finding, check=name))

    for name, check in told.CHECKS.items():
        look(name, check, history)
    if not weights:
        unseen |= dict.fromkeys(MEASURED, "the weights were left out, as asked")
    else:
        folder = run if run.is_dir() else run.parent
        try:
            patient = _patient(folder, device, images)
        except NotSeen as reason:
            unseen |= dict.fromkeys(MEASURED, str(reason))
        else:
            from k_diffusion.training.doctor import measured

            for name, examine in measured.CHECKS.items():
                look(name, examine, patient)
    unseen["memorisation"] = (
        "whether training images come back is for k-diffusion evaluate, which draws enough samples"
    )
    shown = run.parent if run.name == METRICS and run.is_file() else run
    return Report(str(shown), history.images_seen, tuple(findings), tuple(fine), unseen)


def _patient(folder: Path, device: Any, images: int) -> Any:
    from k_diffusion.training.retention import latest_checkpoint

    try:
        newest = latest_checkpoint(folder)
        if newest is not None:
            from k_diffusion.training.doctor.measured import open_patient

            return open_patient(newest, device, images)
    except Exception as error:  # a checkpoint, a network or data of any kind
        raise NotSeen(f"the newest checkpoint cannot be used here ({reason_of(error)})") from None
    raise NotSeen("the run has no checkpoint yet: checkpoint_every_images writes some on the way")
