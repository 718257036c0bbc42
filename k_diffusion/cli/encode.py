"""`k-diffusion encode`: the latents of a data set, on disk, for training on them."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from .plugins import Plugins, load_plugins
from .problems import UsageError, as_usage
from .values import MoreSettings, WholeOrNone, joined


@dataclass
class Encode:
    """Encode all images of a data set by an autoencoder, once, into a folder of shards.

    A run trains on the folder as `--data` or data.path. The same command goes on where a killed one
    stopped; of several processes (torchrun, or --process 0/4 to 3/4 by hand, on machines that share
    the folder) each makes its share of the shards.
    """

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """A folder, a zip or tar of images, WebDataset shards, an .npy or .npz file, hf:OWNER/NAME, or
    `digits`."""
    autoencoder: Annotated[str, tyro.conf.arg(aliases=["-a"])]
    """The autoencoder: a .safetensors file that save_autoencoder wrote, or the folder or id on the
    hub of an AutoencoderKL of diffusers."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """The folder to write."""
    size: WholeOrNone = None
    """Height and width in pixels, for images; --set size=[256,384] for others than squares."""
    subfolder: str = ""
    """Where the autoencoder lies in its folder or repository, such as vae."""
    batch_size: int = 16
    """Images encoded at once."""
    shard_size: int = 1024
    """Images of one file."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """What latents are stored as."""
    means_only: bool = False
    """Store no variance, by which training would draw each latent anew."""
    device: str = ""
    """cpu, cuda, cuda:1, mps; left out: a GPU where there is one."""
    process: str = ""
    """Which share this process makes, such as 0/4; left out: torchrun's, or all."""
    set: MoreSettings = ()
    """Other keys of the config's data section, such as channels=1,captions=files; again for
    more."""
    plugin: Plugins = ()
    """A Python file or module of your own, which registers autoencoders; again for more."""

    def run(self) -> None:
        for name in ("batch_size", "shard_size"):
            if getattr(self, name) < 1:
                raise UsageError(
                    f"--{name.replace('_', '-')} {getattr(self, name)} is not above 0: give the "
                    "number of images"
                )
        process = share_of(self.process, os.environ)

        import torch

        from k_diffusion.training.config_file import make_data
        from k_diffusion.training.data_sections import guess_data
        from k_diffusion.training.dataset import make_source
        from k_diffusion.training.encoding import encode

        load_plugins(self.plugin)
        given: dict[str, Any] = {**guess_data(self.data)}
        if self.size is not None:
            given["size"] = self.size
        with as_usage():
            options = make_data({**given, **joined(self.set)})
        source = make_source(**options)
        done = encode(
            source,
            self._autoencoder(),
            self.out,
            shard_size=self.shard_size,
            batch_size=self.batch_size,
            dtype=getattr(torch, self.dtype),
            variance=not self.means_only,
            process=process,
            say=lambda line: print(line, file=sys.stderr),
        )
        for file, reason in done.bad_files.items():
            print(f"left out {file}: {reason}", file=sys.stderr)
        kept = f", {done.kept} were there already" if done.kept else ""
        print(f"{done.made} shards written{kept}")
        if done.images is None:
            print(f"{self.out} waits for the shards of other processes")
        else:
            print(f"{self.out}: {done.images} latents, {len(done.bad_files)} images broken")

    def _autoencoder(self) -> Any:
        from k_diffusion.training.latents import load_autoencoder

        from .drawing import pick_device

        where = pick_device(self.device)
        if self.autoencoder.endswith(".safetensors"):
            return load_autoencoder(self.autoencoder, where)
        from k_diffusion.models import make_autoencoder

        options = {"type": "diffusers_kl", "path": self.autoencoder, "subfolder": self.subfolder}
        return make_autoencoder(options).to(where)


def share_of(given: str, environment: Any) -> tuple[int, int]:
    """The number of this process, from 0, and of how many.

    Args:
        given: such as "0/4"; "": what torchrun has put into the environment, or the only one.
    """
    if not given:
        return int(environment.get("RANK", "0")), int(environment.get("WORLD_SIZE", "1"))
    first, _, count = given.partition("/")
    if not (first.isdecimal() and count.isdecimal() and int(first) < int(count)):
        raise UsageError(f"--process {given} is no share: give such as 0/4, 1/4, 2/4 and 3/4")
    return int(first), int(count)
