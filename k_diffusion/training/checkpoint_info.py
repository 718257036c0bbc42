"""What a checkpoint says about itself, whether it is one file or a folder of shards."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

FORMAT = "k_diffusion"
VERSION = 1
SUFFIX = ".safetensors"
LAST = "last"
"""The weights after the last step; in files they are the part "model"."""
MANIFEST = "manifest.json"
"""In a folder: it is a checkpoint of several processes, see `sharded`."""
CONDITIONER = "conditioner"
"""The part with what a conditioner has drawn for itself; only where there is such."""

OTHERS = "use an earlier checkpoint or another copy"


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written, or does not fit; its message is one line."""

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
        card: Markdown, the model card of a file for sampling; empty in others.
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
    card: str = field(default="", repr=False)

    @property
    def parameters(self) -> int:
        """How many numbers the network's weights and buffers are."""
        kinds = {n.partition("/")[0] for n in self.tensors} - {"optimizer", CONDITIONER}
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

    @property
    def weights(self) -> list[str]:
        """What may be asked for: the averages, and `LAST` where it has the last step's."""
        last = any(name.startswith("model/") for name in self.tensors)
        return [*self.averages, *[LAST] * last]


def damaged(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"checkpoint {path} is damaged: {reason}; {OTHERS}")


def check_record(path: Path, record: Any) -> None:
    """Refuse what is no record (see `checkpoint`), as JSON gave it.

    Raises:
        CheckpointError: something is missing, or of another kind.
    """
    try:
        whole = all(type(record[key]) is kind for key, kind in _RECORD.items())
        whole = whole and record["images_seen"] >= 0 and record["step"] >= 0
    except (KeyError, TypeError):
        whole = False
    if not whole:
        raise CheckpointError(
            f"checkpoint {path} is whole, but its record is not one that k_diffusion writes: it "
            "needs " + ", ".join(_RECORD)
        )


_RECORD = {"config": dict, "images_seen": int, "step": int, "data": dict, "state": dict}
