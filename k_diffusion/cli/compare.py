"""`k-diffusion compare`: methods, schedules and numbers of steps side by side, same seeds."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from .drawing import check_shape, pick_device
from .plugins import Plugins, load_plugins
from .problems import UsageError, as_usage, plain_warnings
from .values import Classes, Names, Wholes, newest_in

if TYPE_CHECKING:
    from k_diffusion.evaluation.sheet import Sheet


@dataclass
class Compare:
    """Draw one sheet of samples by several methods, and tell how far each is from 200 steps.

    Writes sheet.png (a curve of the distances, and the samples: same seeds down the rows, numbers
    of steps across), sheet.html (the same in one file) and sheet.json (the figures) into a folder.
    """

    checkpoint: Annotated[str, tyro.conf.arg(metavar="CHECKPOINT")]
    """A .safetensors file that `k-diffusion train` wrote, or a run's folder: the newest in it."""
    samplers: Names = ("euler", "heun", "dpmpp_2m")
    """The methods, such as euler,dpmpp_2m; `k-diffusion samplers` lists them."""
    schedules: Names = ("karras",)
    """How the levels are laid, such as karras,linear; `k-diffusion schedule` lists the ways."""
    steps: Wholes = (5, 10, 20)
    """Numbers of steps, such as 5,10,20."""
    seed: int = 0
    """The seed of the first sample."""
    number: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 4
    """How many samples of each."""
    class_label: Classes = ()
    """Classes, which the samples take in turn; without it all that the model knows."""
    out: Path = Path("compare")
    """The folder to write to; made where it is missing."""
    overwrite: bool = False
    """Replace a sheet that is already there."""
    weights: str = "ema"
    """ema: their moving average; last: those after the last step; or another average that
    `k-diffusion info` lists, such as ema_0.05."""
    device: str = ""
    """cpu, cuda, cuda:1, mps...; without it a GPU where there is one."""
    plugin: Plugins = ()
    """A Python file or module of your own, which registers models; again for more."""

    def run(self) -> None:
        self._check()
        from k_diffusion.evaluation.sheet import REFERENCE, compare_samplers, find_comparable
        from k_diffusion.models.registry import known_classes
        from k_diffusion.training.restore import load_denoiser
        from k_diffusion.training.told import Told
        from k_diffusion.utils.scheduler import make_scheduler

        load_plugins(self.plugin)
        with as_usage():
            for name in self.samplers:
                find_comparable(name)
            for name in self.schedules:
                make_scheduler(name)
        device = pick_device(self.device)
        checkpoint = newest_in(self.checkpoint)
        denoiser, info = load_denoiser(checkpoint, self.weights, device=device)
        check_shape(info)
        classes = known_classes(denoiser.network)
        if self.class_label and max(self.class_label) >= classes:
            raise UsageError(
                f"--class-label {max(self.class_label)} does not exist: {self.checkpoint} has "
                f"{classes} classes"
            )
        turn = self.class_label or tuple(range(classes))
        labels = [turn[i % len(turn)] for i in range(self.number)] if classes else []
        told = Told(denoiser.network, device, labels=labels)
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise UsageError(f"--out {self.out} is a file; give a folder") from None
        if (self.out / "sheet.html").exists() and not self.overwrite:
            raise UsageError(f"--out {self.out} holds a sheet already; give --overwrite")

        from tqdm import tqdm

        with (
            tqdm(unit="call", desc="comparing", disable=None) as bar,
            as_usage(),
            plain_warnings("k-diffusion compare"),
        ):
            sheet = compare_samplers(
                denoiser,
                info.data["shape"],
                range(self.seed, self.seed + self.number),
                samplers=self.samplers,
                schedulers=self.schedules,
                steps=self.steps,
                condition=told(range(self.number)),
                device=device,
                reference_steps=REFERENCE,
                tick=bar.update,
            )
        self._write(sheet, info)

    def _check(self) -> None:
        if self.number < 1:
            raise UsageError(f"--number is {self.number}; give a whole number of at least 1")
        if self.seed < 0:
            raise UsageError(f"--seed is {self.seed}; give a whole number of at least 0")
        for name in ("samplers", "schedules", "steps"):
            if not getattr(self, name):
                raise UsageError(f"--{name} names nothing to compare")
        if min(self.steps) < 1:
            raise UsageError(f"--steps holds {min(self.steps)}; give numbers of at least 1")

    def _write(self, sheet: Sheet, info: Any) -> None:
        import json
        from importlib.metadata import version

        from k_diffusion.utils.files import write_text
        from k_diffusion.utils.images import save_png

        from .sheet import page, picture, whole_picture

        said = {
            "software": f"k-diffusion {version('k-diffusion')}",
            "checkpoint": str(info.path),
            "checkpoint sha256": info.sha256,
            "weights": self.weights,
            "seeds": f"{self.seed} to {self.seed + self.number - 1}",
            "command": self._command(info),
        }
        image = picture(sheet)
        save_png(self.out / "sheet.png", whole_picture(sheet), said)
        write_text(self.out / "sheet.html", page(sheet, image, said))
        figures = {**said, "reference steps": sheet.reference_steps, "cells": [
            {"sampler": c.sampler, "scheduler": c.scheduler, "steps": c.steps, "calls": c.calls,
             "distance": c.distance} for c in sheet.cells
        ], "on no Brownian path": list(sheet.off_path)}  # fmt: skip
        write_text(self.out / "sheet.json", json.dumps(figures, indent=1) + "\n")
        width = max(len(f"{c.sampler}, {c.scheduler}") for c in sheet.cells)
        for cell in sheet.cells:
            print(
                f"{f'{cell.sampler}, {cell.scheduler}':<{width}}  {cell.steps:>4} steps  "
                f"{cell.calls:>4} calls  distance {cell.distance:.4f}"
            )
        print(f"sheet.png, sheet.html and sheet.json are in {self.out}", file=sys.stdout)

    def _command(self, info: Any) -> str:
        options: Mapping[str, str] = {
            "--checkpoint": str(info.path),
            "--samplers": ",".join(self.samplers),
            "--schedules": ",".join(self.schedules),
            "--steps": ",".join(map(str, self.steps)),
            "--seed": str(self.seed),
            "-n": str(self.number),
            "--class-label": ",".join(map(str, self.class_label)),
        }
        words = ["k-diffusion", "compare"]
        for option, value in options.items():
            words += [option, value] if value else []
        for word in self.plugin:
            words += ["--plugin", word]
        if self.weights != "ema":
            words += ["--weights", self.weights]
        return shlex.join(words)
