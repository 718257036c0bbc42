"""`k-diffusion train`: a model from a config file."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from k_diffusion.utils.words import printable

from .plugins import Plugins, load_plugins
from .problems import Stopped, as_usage, process_number
from .values import MoreSettings, Resume, WholeOrAuto, WholeOrNone, joined


@dataclass
class Train:
    """Train a model as a config file says, with live progress.

    Ctrl-C or SIGTERM stops after the present step and leaves a checkpoint; `--resume` goes on from
    it and ends in the same weights as a run that was never stopped.
    """

    config: Path
    """The run's config, TOML or JSON; examples/digits.toml is one. Established JSON configs do,
    too."""
    data: str = ""
    """What to train on in place of the config's: a folder of images, a zip or tar of them,
    WebDataset shards, an .npy or .npz file, a folder of latents, hf:OWNER/NAME, or `digits`. A
    config of other data needs `--set data.size=32` (in pixels) for images as well."""
    out: str = ""
    """The folder for checkpoints and metrics, in place of the config's."""
    total_images: WholeOrNone = None
    """The run's length in images seen."""
    batch_size: WholeOrAuto = None
    """Images a step; auto: the config's number, in parts as large as memory holds."""
    seed: WholeOrNone = None
    """Decides the first weights and everything random after."""
    set: MoreSettings = ()
    """Any other keys of the config, such as optimizer.lr=3e-4,model.channels=64; again for more.
    `k-diffusion config --explain` lists them."""
    check: bool = False
    """Train nothing: see whether config, data and memory will do by one step on a copy of
    everything, and say what was found. The out folder stays as it is."""
    resume: Resume = ""
    """Go on from this checkpoint; `--resume` alone, or `--resume auto`: from the newest whole one
    in the out folder, or from the beginning where there is none."""
    init_from: str = ""
    """Begin with the weights and the average in this checkpoint or file for sampling."""
    overwrite: bool = False
    """Begin anew where the out folder holds a run, and remove that one's checkpoints."""
    plugin: Plugins = ()
    """A Python file or module of your own, which registers models and conditioners; again for
    more."""

    def run(self) -> None:
        try:
            self._train()
        except Exception as error:
            # Who fails alone ends at once: the others may be in the midst of an average with it.
            if isinstance(error, Stopped) or getattr(error, "everywhere", False):
                _leave_processes()
            raise
        _leave_processes()

    def _train(self) -> None:
        from k_diffusion.config.run import load_run
        from k_diffusion.training import run_training

        load_plugins(self.plugin)
        with as_usage():
            config = load_run(self.config, self._overrides())
        resume = self.resume or None
        if self.check:
            from k_diffusion.training.check import check_run

            found = check_run(config, resume=resume, overwrite=self.overwrite)
            if not process_number():
                print("\n".join(map(printable, str(found).split("\n"))))
            return
        result = run_training(config, resume=resume, overwrite=self.overwrite)
        if result.stopped_by is not None:
            raise Stopped(
                result.stopped_by,
                f"stopped at {result.images_seen} of {config.total_images} images; the checkpoint "
                f"is {result.checkpoint}, and the same command with --resume goes on",
            )
        if process_number():
            return
        print(f"trained on {result.images_seen} images in {result.seconds:.0f} s")
        print(f"checkpoint: {result.checkpoint}")
        print(f"metrics:    {result.metrics}")

    def _overrides(self) -> dict[str, Any]:
        """Dotted config key -> value, for what the command line gives."""
        given: dict[str, Any] = {}
        if self.data == "digits":
            given["data"] = {"source": "digits"}
        elif self.data:
            given["data.path"] = self.data
        named = {
            "out": self.out or None,
            "total_images": self.total_images,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "init_from": self.init_from or None,
        }
        return (
            given
            | {key: value for key, value in named.items() if value is not None}
            | joined(self.set)
        )


def _leave_processes() -> None:
    if "torch" in sys.modules:  # else it was refused before there was anything to leave
        from k_diffusion.training.devices import leave_processes

        leave_processes()
