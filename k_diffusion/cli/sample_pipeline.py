"""`k-diffusion sample --model`: images of texts from a diffusers pipeline."""

from __future__ import annotations

import shlex
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from .drawing import pick_device
from .problems import Stopped, UsageError, as_usage
from .signals import Terminated
from .values import Classes, Settings, Words, show_settings


@dataclass
class SamplePipeline:
    """Draw images of texts from a diffusers pipeline into a folder: single PNGs and a grid.

    Image i has the seed `--seed` + i and does not depend on the others drawn with it. Its PNG text
    holds the settings and the command that draws it again.
    """

    model: Annotated[str, tyro.conf.arg(metavar="FOLDER_OR_ID")]
    """A folder that diffusers wrote, a .safetensors file, or an id on the Hugging Face hub."""
    prompt: Words = ()
    """A text, and the option again for the next."""
    negative: str = ""
    """What the images are to be far from."""
    guidance: float | None = None
    """Strength of guidance; 1 is none. Without it, the usual one of this kind of model."""
    sampler: str = ""
    """The method; `k-diffusion samplers` lists them. Without it, the model's own."""
    scheduler: str = ""
    """How the noise levels are laid; `k-diffusion schedule` lists the ways. Without it, the model's
    own."""
    steps: int = 20
    """Steps from noise to image."""
    seed: int = 0
    """The seed of the first image."""
    number: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 1
    """How many images of each text."""
    class_label: Classes = ()
    """For a model of classes: one, or several such as 0,3 or 0-9, instead of texts."""
    height: int | None = None
    """In pixels; without it, the model's own."""
    width: int | None = None
    """In pixels; without it, the model's own."""
    init: str = ""
    """An image to begin from."""
    strength: float | None = None
    """How far it is changed, from 0 to 1."""
    mask: str = ""
    """An image that is white where `--init` is to be repainted."""
    batch_size: int = 4
    """Images drawn at a time; it changes the memory needed, not the images."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("samples")
    """The folder to write to; made where it is missing."""
    overwrite: bool = False
    """Replace images that are already there."""
    sampler_options: Settings = field(default_factory=dict)
    """Options of the method, such as eta=0.5."""
    scheduler_options: Settings = field(default_factory=dict)
    """Options of the levels, such as rho=5; with `--scheduler`."""
    options: Settings = field(default_factory=dict)
    """What the pipeline itself takes beside texts, such as clip_skip=1."""
    kind: str = ""
    """For a .safetensors file: the pipeline's class, such as StableDiffusionXLPipeline."""
    config: str = ""
    """For a .safetensors file: the folder or id of a pipeline that has its configs."""
    dtype: str = ""
    """float32, bfloat16 or float16; without it, as the weights are."""
    device: str = ""
    """cpu, cuda, cuda:1, mps...; without it a GPU where there is one."""
    local: bool = False
    """Never ask the hub."""

    def run(self) -> None:
        self._check()
        import torch
        from tqdm import tqdm

        from k_diffusion.external import load
        from k_diffusion.utils.images import image_grid, save_png
        from k_diffusion.utils.scheduler import make_scheduler

        with as_usage():
            scheduler = (
                make_scheduler(self.scheduler, **self.scheduler_options) if self.scheduler else None
            )
            sampler = load(
                self.model,
                scheduler,
                self.sampler or None,
                dtype=getattr(torch, self.dtype) if self.dtype else None,
                device=pick_device(self.device),
                local=self.local,
                kind=self.kind or None,
                config=self.config or None,
                **self.sampler_options,
            )
        if sampler.family.kind != "image":
            raise UsageError(f"{self.model} draws no images: use KSampler.from_pipeline")
        given: list[Any] = list(self.class_label or self.prompt or (None,))
        jobs = [(what, self.seed + i) for i, what in enumerate(self._repeated(given))]
        names = [f"seed{seed:06d}.png" for _, seed in jobs]
        make_room(self.out, [*names, "grid.png"], self.overwrite)
        told = self._told()
        images: list[torch.Tensor] = []
        try:
            with tqdm(total=len(jobs), unit="image", desc="sampling", disable=None) as bar:
                for first in range(0, len(jobs), self.batch_size):
                    some = jobs[first : first + self.batch_size]
                    with as_usage():
                        drawn = sampler.sample(
                            **self._what([what for what, _ in some]),
                            seeds=[seed for _, seed in some],
                            to="tensor",
                            **told,
                        )
                    for image, (what, seed) in zip(drawn.cpu(), some, strict=True):
                        name = names[len(images)]
                        save_png(self.out / name, image, self._text(sampler, [what], seed, 1))
                        images.append(image)
                    bar.update(len(some))
        except (KeyboardInterrupt, Terminated) as end:
            number = signal.SIGTERM if isinstance(end, Terminated) else signal.SIGINT
            raise Stopped(
                number,
                f"stopped; {len(images)} of {len(jobs)} images are in {self.out}, each whole",
            ) from None
        text = self._text(sampler, given, self.seed, self.number)
        save_png(self.out / "grid.png", image_grid(torch.stack(images)), text)
        print(f"{len(images)} images and grid.png are in {self.out}")

    def _check(self) -> None:
        """Refuse, before anything is loaded, what no model could make right."""
        for name, value in (
            ("--steps", self.steps),
            ("--number", self.number),
            ("--batch-size", self.batch_size),
        ):
            if value < 1:
                raise UsageError(f"{name} is {value}; give a whole number of at least 1")
        if self.seed < 0:
            raise UsageError(f"--seed is {self.seed}; give a whole number of at least 0")
        if self.prompt and self.class_label:
            raise UsageError("--prompt and --class-label are given: a model takes one of them")
        if self.scheduler_options and not self.scheduler:
            raise UsageError("--scheduler-options are of a --scheduler: give its name")
        if self.dtype not in ("", "float32", "bfloat16", "float16"):
            raise UsageError(f"--dtype {self.dtype}: give float32, bfloat16 or float16")
        for name, file in (("--init", self.init), ("--mask", self.mask)):
            if file and not Path(file).is_file():
                raise UsageError(f"{name} {file} does not exist; give an image")

    def _repeated(self, given: list[Any]) -> list[Any]:
        return [what for what in given for _ in range(self.number)]

    def _what(self, some: list[Any]) -> dict[str, Any]:
        """The keywords of what some images show."""
        if some[0] is None:
            return {}
        if self.class_label:
            return {"labels": some}
        return {"prompt": some, "negative": self.negative or None}

    def _told(self) -> dict[str, Any]:
        """The keywords of all images."""
        from PIL import Image

        pictures = {"init": self.init, "mask": self.mask}
        return {
            "steps": self.steps,
            "guidance": self.guidance,
            "height": self.height,
            "width": self.width,
            "strength": self.strength,
            **{name: Image.open(file) if file else None for name, file in pictures.items()},
            **self.options,
        }

    def _text(self, sampler: Any, given: list[Any], seed: int, number: int) -> dict[str, str]:
        """What a PNG says of the images of `given`, `number` of each from `seed` on."""
        from importlib.metadata import version

        pipeline = type(sampler.pipeline).__name__
        own = type(sampler.pipeline.scheduler).__name__
        guidance = sampler.family.guidance if self.guidance is None else self.guidance
        prompts = [] if self.class_label or given == [None] else given
        said = {
            "software": f"k-diffusion {version('k-diffusion')}, diffusers {version('diffusers')}",
            "model": self.model,
            "pipeline": pipeline,
            "prompt": "; ".join(prompts),
            "negative": self.negative,
            "guidance": f"{guidance:g}",
            "sampler": sampler.solver.name,
            "sampler options": show_settings(self.sampler_options),
            "scheduler": self.scheduler or own,
            "scheduler options": show_settings(self.scheduler_options),
            "steps": str(self.steps),
            "seed": str(seed),
            "class label": ",".join(map(str, given)) if self.class_label else "",
        }
        command = ["k-diffusion", "sample", "--model", self.model]
        for prompt in prompts:
            command += ["--prompt", prompt]
        asked = {
            "--class-label": said["class label"],
            "--negative": self.negative,
            "--guidance": said["guidance"],
            "--sampler": said["sampler"],
            "--sampler-options": said["sampler options"],
            "--scheduler": self.scheduler,
            "--scheduler-options": said["scheduler options"],
            "--steps": said["steps"],
            "--seed": said["seed"],
            "-n": str(number),
            "--height": self.height,
            "--width": self.width,
            "--init": self.init,
            "--strength": self.strength,
            "--mask": self.mask,
            "--options": show_settings(self.options),
            "--kind": self.kind,
            "--config": self.config,
            "--dtype": self.dtype,
        }
        for option, value in asked.items():
            if value not in ("", None):
                command += [option, str(value)]
        said["command"] = shlex.join(command + ["--local"] * self.local)
        return {key: value for key, value in said.items() if value}


def make_room(out: Path, names: list[str], overwrite: bool) -> None:
    """Make the folder, and refuse, before the work, to replace what is there unasked."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise UsageError(f"--out {out} is a file; give a folder") from None
    there = [name for name in names if (out / name).exists()]
    if there and not overwrite:
        raise UsageError(
            f"--out {out} holds {there[0]} already ({len(there)} of {len(names)} files); "
            "give another folder, or --overwrite"
        )
