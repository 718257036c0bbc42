"""`k-diffusion export`: weights for sampling out of a checkpoint, in a file to give away."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from .plugins import Plugins, load_plugins
from .problems import UsageError
from .values import newest_in


@dataclass
class Export:
    """Write a file for sampling: one set of weights, how to rebuild the network, a model card.

    `k-diffusion sample` takes it like a checkpoint, and `k-diffusion info` prints its card.
    """

    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """A .safetensors file that `k-diffusion train` wrote, or a run's folder: the newest in it."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """The file to write, such as model.safetensors."""
    weights: str = "ema"
    """ema: their moving average; last: those after the last step; or another average that
    `k-diffusion info` lists, such as ema_0.05."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """What they are stored as; sampling computes in float32 all the same."""
    licence: str = ""
    """Under which you give the weights away; the card says it."""
    note: str = ""
    """What else the card should say, in Markdown."""
    overwrite: bool = False
    """Replace a file that is already there."""
    plugin: Plugins = ()
    """A Python file or module of your own, which registers models and conditioners; again for
    more."""

    def run(self) -> None:
        if self.out.suffix != ".safetensors" or self.out.is_dir():
            raise UsageError(f"--out {self.out} is no name of a .safetensors file")
        source = newest_in(self.checkpoint)
        if self.out.exists():
            if self.out.samefile(source):
                raise UsageError(f"--out {self.out} is the checkpoint itself; give another name")
            if not self.overwrite:
                raise UsageError(f"--out {self.out} exists; give another name, or --overwrite")

        import torch

        from k_diffusion.training.restore import save_inference

        load_plugins(self.plugin)
        sha256 = save_inference(
            source,
            self.out,
            weights=self.weights,
            dtype=getattr(torch, self.dtype),
            licence=self.licence,
            note=self.note,
        )
        print(f"{self.out}: {self.out.stat().st_size:,} bytes, SHA-256 {sha256}")
