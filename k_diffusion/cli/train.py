"""`k-diffusion train`: a model from a config file."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .plugins import Plugins, load_plugins
from .problems import Stopped, as_usage
from .values import Resume, Settings, WholeOrNone


@dataclass
class Train:
    """Train a model as a config file says, with live progress.

    Ctrl-C or SIGTERM stops after the present step and leaves a checkpoint; `--resume` goes on from
    it and ends in the same weights as a run that was never stopped.
    """

    config: Path
    """The run's config, TOML or JSON; examples/digits.toml is one."""
    data: str = ""
    """The image folder to train on, or `digits`, in place of the config's. A config of other data
    needs `--set data.size=32` (in pixels) as well."""
    out: str = ""
    """The folder for checkpoints and metrics, in place of the config's."""
    total_images: WholeOrNone = None
    """The run's length in images seen."""
    batch_size: WholeOrNone = None
    """Images a step."""
    seed: WholeOrNone = None
    """Decides the first weights and everything random after."""
    set: Settings = field(default_factory=dict)
    """Any other keys of the config, such as optimizer.lr=3e-4,model.channels=64."""
    resume: Resume = ""
    """Go on from this checkpoint; `--resume` alone, or `--resume auto`: from the newest whole one
    in the out folder, or from the beginning where there is none."""
    overwrite: bool = False
    """Begin anew where the out folder holds a run, and remove that one's checkpoints."""
    plugin: Plugins = ()
    """A Python file or module of your own, which registers models and conditioners; again for
    more."""

    def run(self) -> None:
        from k_diffusion.training import load_config, run_training

        load_plugins(self.plugin)
        with as_usage():
            given = self._overrides()
            if "data.path" in given and load_config(self.config).data.source != "folder":
                # The config's own data has other keys: it gives way as a whole.
                given = {"data": {"source": "folder", "path": given.pop("data.path")}} | given
            config = load_config(self.config, given)
        result = run_training(
            config,
            resume=self.resume or None,
            overwrite=self.overwrite,
        )
        if result.stopped_by is not None:
            raise Stopped(
                result.stopped_by,
                f"stopped at {result.images_seen} of {config.total_images} images; the checkpoint "
                f"is {result.checkpoint}, and the same command with --resume goes on",
            )
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
        }
        return given | {key: value for key, value in named.items() if value is not None} | self.set
