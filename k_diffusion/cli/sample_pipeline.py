"""`k-diffusion sample --model`: images of texts from a diffusers pipeline."""

from __future__ import annotations

import os
import shlex
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from .drawing import pick_device
from .gallery import GRID, GRID_HOLDS, Gallery
from .pictures import open_picture
from .problems import Stopped, UsageError, as_usage, plain_warnings, process_number
from .signals import Terminated
from .values import Classes, Settings, Words, show_setting, show_settings

_NOT_OPTIONS = (
    "guidance", "height", "init", "labels", "mask", "n", "negative", "prompt", "run", "seed",
    "seeds", "steps", "strength", "to", "width",
)  # fmt: skip
"""Keywords of `PipelineSampler.sample` that other options give."""


@dataclass
class SamplePipeline:
    """Draw images of texts from a diffusers pipeline into a folder: single PNGs and a grid.

    Image i has the seed `--seed` + i and does not depend on the others drawn with it. Its PNG text
    holds the settings and the command that draws it again. The same command, started again after
    whatever ended it, draws what is missing; under torchrun the processes share the images.
    """

    model: Annotated[str, tyro.conf.arg(metavar="FOLDER_OR_ID")]
    """A folder that diffusers wrote, a .safetensors file, or an id on the Hugging Face hub."""
    prompt: Words = ()
    """A text, and the option again for the next."""
    negative: str = ""
    """What the images are to be far from."""
    guidance: float | None = None
    """Strength of guidance; 1 is none. Without it, the usual one of this kind of model, or of
    CFG++, whose scale is from 0 to 1."""
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
    """Images drawn at a time, at first: where memory runs out, half as many. It changes the memory
    needed, not the images."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("samples")
    """The folder to write to; made where it is missing."""
    overwrite: bool = False
    """Replace images that are already there."""
    sampler_options: Settings = field(default_factory=dict)
    """Options of the method, such as eta=0.5."""
    scheduler_options: Settings = field(default_factory=dict)
    """Options of the levels, such as rho=5; with `--scheduler`."""
    options: Settings = field(default_factory=dict)
    """What the pipeline itself takes beside texts, such as guidance_rescale=0.7."""
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
        from k_diffusion.external.fingerprint import fingerprint
        from k_diffusion.utils.images import image_grid, save_png

        sampler = self._load()
        given: list[Any] = list(self.class_label or self.prompt or (None,))
        jobs = [(what, self.seed + i) for i, what in enumerate(self._repeated(given))]
        names = [
            f"seed{seed:06d}" + (f"_class{what}" if self.class_label else "") + ".png"
            for what, seed in jobs
        ]
        keywords, said = self._keywords()
        said = {"model digest": fingerprint(sampler.pipeline), **said}

        def text(i: int | None) -> dict[str, str]:
            shown, seed, number = ([jobs[i][0]], jobs[i][1], 1) if i is not None else (
                given, self.seed, self.number
            )  # fmt: skip
            return self._text(sampler, shown, seed, number, said)

        gallery = Gallery(self.out, names, text)
        there = gallery.open(self.overwrite)
        try:
            with plain_warnings("k-diffusion sample"):
                kept = self._draw(sampler, gallery, jobs, there, keywords)
        except (KeyboardInterrupt, Terminated) as end:
            number = signal.SIGTERM if isinstance(end, Terminated) else signal.SIGINT
            raise Stopped(
                number,
                f"stopped; {gallery.count()} of {len(jobs)} images are in {self.out}, each whole: "
                "the same command draws the others",
            ) from None
        if gallery.count() < len(jobs):
            return  # another process has images to draw, and makes the grid
        columns = self.number if len(given) > 1 and 1 < self.number <= 20 else 0
        grid = image_grid(gallery.images(GRID_HOLDS), columns)
        save_png(self.out / GRID, grid, gallery.text(None))
        already = f"; {kept} of them were there" if kept else ""
        print(f"{len(jobs)} images and {GRID} are in {self.out}{already}")

    def _load(self) -> Any:
        import torch

        from k_diffusion.external import load
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
        return sampler

    def _draw(
        self,
        sampler: Any,
        gallery: Gallery,
        jobs: list[tuple[Any, int]],
        there: list[int],
        keywords: dict[str, Any],
    ) -> int:
        """Draw what is missing of this process's share, and write it; how many were not."""
        from tqdm import tqdm

        from k_diffusion.utils.memory import is_out_of_memory, release_memory

        rank, world = process_number(), int(os.environ.get("WORLD_SIZE", "1"))
        share = range(rank, len(jobs), world)
        missing = [i for i in share if i not in set(there)]
        gallery.clear(share if world > 1 else range(len(jobs)))
        size = self.batch_size
        hidden = True if rank else None  # None: where nobody looks on
        with tqdm(total=len(missing), unit="image", desc="sampling", disable=hidden) as bar:
            while missing:
                some = missing[:size]
                # Shown between images, too: a single one may take minutes.
                run = {"callback": lambda k, *_: bar.set_postfix_str(f"call {k + 1}")}
                try:
                    with as_usage():
                        drawn = sampler.sample(
                            **self._what([jobs[i][0] for i in some]),
                            seeds=[jobs[i][1] for i in some],
                            to="tensor",
                            run=run,
                            **keywords,
                        ).cpu()
                except Exception as error:
                    if not is_out_of_memory(error) or len(some) == 1:
                        raise
                    size = len(some) // 2
                    drawn = None
                if drawn is None:  # here, where the error and what its frames held are gone
                    release_memory(sampler.device)
                    continue
                for i, image in zip(some, drawn, strict=True):
                    gallery.write(i, image)
                missing = missing[len(some) :]
                bar.update(len(some))
        return len(share) - sum(i not in there for i in share)

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
        for name in self.options:
            if name in _NOT_OPTIONS:
                raise UsageError(f"--options {name}: the command line has its own way to say it")
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

    def _keywords(self) -> tuple[dict[str, Any], dict[str, str]]:
        """The keywords of all images, and what their text says of the pictures among them."""
        told: dict[str, Any] = {
            "steps": self.steps,
            "guidance": self.guidance,
            "height": self.height,
            "width": self.width,
            "strength": self.strength,
            **self.options,
        }
        said = {}
        for option in ("init", "mask"):
            if path := getattr(self, option):
                told[option], said[f"{option} sha256"] = open_picture(option, path)
        return told, said

    def _text(
        self, sampler: Any, given: list[Any], seed: int, number: int, said: dict[str, str]
    ) -> dict[str, str]:
        """What a PNG says of the images of `given`, `number` of each from `seed` on."""
        from importlib.metadata import version

        guidance = sampler.usual_guidance if self.guidance is None else self.guidance
        prompts = [] if self.class_label or given == [None] else given
        classes = ",".join(map(str, given)) if self.class_label else ""
        own = type(sampler.pipeline.scheduler).__name__
        found = {
            "software": f"k-diffusion {version('k-diffusion')}, diffusers {version('diffusers')}",
            "model": self.model,
            "pipeline": type(sampler.pipeline).__name__,
            **said,
            "prompt": "; ".join(prompts),
            "class": classes,
            "seed": str(seed),
            "images": str(number),
        }
        settings = {
            "negative": self.negative,
            "guidance": show_setting(guidance),
            "sampler": self.sampler,
            "sampler options": show_settings(self.sampler_options),
            "scheduler": self.scheduler,
            "scheduler options": show_settings(self.scheduler_options),
            "steps": str(self.steps),
            "height": "" if self.height is None else str(self.height),
            "width": "" if self.width is None else str(self.width),
            "init": self.init,
            "strength": "" if self.strength is None else show_setting(self.strength),
            "mask": self.mask,
            "options": show_settings(self.options),
            "kind": self.kind,
            "config": self.config,
            "dtype": self.dtype,
        }
        command = ["k-diffusion", "sample", "--model", self.model]
        for prompt in prompts:
            command += ["--prompt", prompt]
        command += ["--class-label", classes] if classes else []
        for option, value in settings.items():
            if value:
                command += ["--" + option.replace(" ", "-"), value]
        command += ["--seed", str(seed), "-n", str(number)] + ["--local"] * self.local
        # What was not asked for is the pipeline's own.
        settings |= {"sampler": sampler.solver.name, "scheduler": self.scheduler or own}
        text = {**found, **settings, "command": shlex.join(command)}
        return {key: value for key, value in text.items() if value}
