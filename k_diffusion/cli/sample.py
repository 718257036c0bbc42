"""`k-diffusion sample`: images from a checkpoint, each with what is needed to make it again."""

from __future__ import annotations

import shlex
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from .drawing import check_shape, pick_device
from .gallery import GRID, GRID_HOLDS, Gallery
from .guiding import WITHOUT_CONDITION, check_guidance, make_guided
from .pictures import read_mask, read_picture
from .plugins import Plugins, load_plugins
from .problems import Stopped, UsageError, as_usage, plain_warnings, process_number
from .signals import Terminated
from .telling import Teller
from .values import (
    OURS,
    Classes,
    Settings,
    WholeOrAuto,
    Words,
    newest_in,
    show_setting,
    show_settings,
)

if TYPE_CHECKING:
    import torch

    from k_diffusion.sampling import Churn, KSampler
    from k_diffusion.training.checkpoint import CheckpointInfo
    from k_diffusion.training.told import Told

REPEATED = (
    "sampler", "sampler options", "scheduler", "scheduler options", "steps", "guidance",
    "guidance method", "guidance options", "guide", "init", "strength", "mask", "resample", "noise",
)  # fmt: skip
"""What an image's text says and its command repeats."""


@dataclass
class Sample:
    """Draw images from a checkpoint into a folder: single PNGs and a grid.

    Image i has the seed `--seed` + i and does not depend on the others drawn with it. Its PNG text
    holds the settings and the command that draws it again. The same command, started again after
    whatever ended it, draws what is missing; under torchrun the processes share the images. With
    `--model`, from a diffusers pipeline: `k-diffusion sample --model NAME --help`.
    """

    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")] = (
        f"{OURS}digits"
    )
    """A .safetensors file that `k-diffusion train` or `export` wrote, or a run's folder: the newest
    in it. Without it a small model that comes with the library."""
    sampler: str = "dpmpp_2m"
    """The method; `k-diffusion samplers` lists them."""
    scheduler: str = "karras"
    """How the noise levels are laid; `k-diffusion schedule` lists the ways."""
    steps: WholeOrAuto = 20
    """Steps from noise to image; auto: as many as each image needs."""
    seed: int = 0
    """The seed of the first image."""
    number: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 16
    """How many images."""
    class_label: Classes = ()
    """One class, or several such as 0,3 or 0-9, which the images take in turn. Without it, a model
    with classes takes all of them in turn."""
    batch_size: WholeOrAuto = "auto"
    """Images drawn at a time, at first: where memory runs out, half as many; auto: 64. It changes
    the memory needed, not the images."""
    guidance: float = 1.0
    """How far to go beyond the model's answer, away from a second one; 1: not at all."""
    guidance_method: Annotated[str, tyro.conf.arg(metavar="METHOD")] = ""
    """Where the second answer comes from, and what is made of both: cfg (as it is where nothing is
    said), apg, cfg_zero_star: the model told nothing; perturbed_attention."""
    guidance_options: Settings = field(default_factory=dict)
    """Options of the guidance, such as rescale=0.7,interval=[0.3,5] (bounds of the noise level)."""
    guide: Annotated[str, tyro.conf.arg(metavar="CHECKPOINT")] = ""
    """Guidance away from a lesser model (autoguidance): its checkpoint, or its run's folder."""
    negative: Words = ()
    """What guidance goes away from, instead of no condition: given as --condition is."""
    init: Annotated[str, tyro.conf.arg(metavar="IMAGE")] = ""
    """An image to begin from, scaled and cropped to the model's size."""
    strength: Annotated[float | None, tyro.conf.arg(metavar="FLOAT")] = None
    """How far that image is noised: 0 leaves it, 1 leaves nothing of it."""
    mask: Annotated[str, tyro.conf.arg(metavar="IMAGE")] = ""
    """What to draw anew of --init: white where to draw, black what to keep, exactly."""
    resample: int = 1
    """With a mask, how often each step is walked: more fits the new part better to the old one."""
    out: Path = Path("samples")
    """The folder to write to; made where it is missing."""
    overwrite: bool = False
    """Replace images that are already there."""
    condition: Words = ()
    """What the model is told, where it was trained with a conditioner: a text, a class, a file; of
    several parts each as part=value, and the option again for the next."""
    sampler_options: Settings = field(default_factory=dict)
    """Options of the method, such as eta=0.5."""
    scheduler_options: Settings = field(default_factory=dict)
    """Options of the levels, such as rho=5,sigma_max=40."""
    noise: str = "independent"
    """The noise of methods that draw any: independent, or path, one Brownian path for each seed,
    which stays the same for any number of steps."""
    noise_on_cpu: bool = False
    """Make that noise on the CPU, so that a seed gives the same on every device."""
    weights: str = "ema"
    """ema: their moving average; last: those after the last step; or another average that
    `k-diffusion info` lists, such as ema_0.05."""
    device: str = ""
    """cpu, cuda, cuda:1, mps...; without it a GPU where there is one."""
    plugin: Plugins = ()
    """A Python file or module of your own, which registers models and conditioners; again for
    more."""

    def run(self) -> None:
        self._check()
        from k_diffusion.models.registry import known_classes
        from k_diffusion.sampling import NOISES, KSampler, find_solver
        from k_diffusion.training.restore import load_denoiser
        from k_diffusion.utils.images import image_grid, save_png
        from k_diffusion.utils.maths import unknown
        from k_diffusion.utils.scheduler import make_scheduler

        load_plugins(self.plugin)
        with as_usage():
            solver = find_solver(self.sampler)
            if self.noise not in NOISES:
                raise ValueError(unknown("noise", self.noise, NOISES))
            churn, options = _split_churn(self.sampler_options, solver.options)
            solver.check_options(options)
            scheduler = make_scheduler(self.scheduler, **self.scheduler_options)
            method = check_guidance(
                self.guidance, self.guidance_method, self.guidance_options, self.guide,
                self.negative,
            )  # fmt: skip
        device = pick_device(self.device)
        checkpoint = newest_in(self.checkpoint)
        denoiser, info = load_denoiser(checkpoint, self.weights, device=device)
        check_shape(info)
        teller = Teller(info, denoiser, device)
        condition = teller.condition(self.condition)
        classes = known_classes(denoiser.network)
        labels = self._labels(classes, condition)
        told = teller.told(condition, labels)
        null = None
        if self.guidance != 1 and method not in WITHOUT_CONDITION:
            null = teller.null(self.negative, told)
        guide, said = None, {}
        if self.guide:
            guide, lesser = load_denoiser(newest_in(self.guide), device=device)
            said = {"guide sha256": lesser.sha256}
        outputs = getattr(solver, "outputs", 1)
        start: dict[str, Any] = {}
        for option, read in (("init", read_picture), ("mask", read_mask)):
            if path := getattr(self, option):
                start[option], said[f"{option} sha256"] = read(option, path, info.data["shape"])
                start[option] = start[option].to(device)
        start["strength"] = self.strength
        start["resample"] = self.resample if self.resample > 1 else None
        with as_usage():
            guided = make_guided(
                denoiser, self.guidance, method, self.guidance_options,
                guide=guide, null=null, outputs=outputs,
            )  # fmt: skip
            sampler = KSampler(guided, scheduler, solver, churn=churn, **options)
            if isinstance(self.steps, int):
                sampler.levels(self.steps)
        seeds = [self.seed + index for index in range(self.number)]
        names = [
            f"seed{seed:06d}" + (f"_class{label}" if labels else "") + ".png"
            for seed, label in zip(seeds, labels or seeds, strict=True)
        ]
        gallery = Gallery(
            self.out, names, lambda index: {**self._text(info, index, labels), **said}
        )
        there = gallery.open(self.overwrite)
        try:
            with plain_warnings("k-diffusion sample"):
                kept = self._draw(sampler, gallery, there, info, told, start)
        except (KeyboardInterrupt, Terminated) as end:
            number = signal.SIGTERM if isinstance(end, Terminated) else signal.SIGINT
            raise Stopped(
                number,
                f"stopped; {gallery.count()} of {self.number} images are in {self.out}, each "
                "whole: the same command draws the others",
            ) from None
        if gallery.count() < self.number:
            return  # another process has images to draw, and makes the grid
        columns = self._columns(labels, info.data.get("class_names") or [])
        images = gallery.images(GRID_HOLDS)
        scale = max(1, 64 // images.shape[-1])  # small images are shown larger
        grid = image_grid(images, columns_named=columns, scale=scale)
        save_png(self.out / GRID, grid, gallery.text(None))
        already = f"; {kept} of them were there" if kept else ""
        print(f"{self.number} images and {GRID} are in {self.out}{already}")

    def _draw(
        self,
        sampler: KSampler,
        gallery: Gallery,
        there: list[int],
        info: CheckpointInfo,
        told: Told,
        start: Mapping[str, Any],
    ) -> int:
        """Draw what is missing of this process's share, and write it; how many were not."""
        from tqdm import tqdm

        from k_diffusion.sampling import Solver

        hidden = True if process_number() else None  # None: where nobody looks on
        with tqdm(unit="call", desc="sampling", disable=hidden) as bar:
            with as_usage():
                many = sampler.sample_many(
                    self.number,
                    steps=self.steps,
                    shape=info.data["shape"],
                    condition=told,
                    seed=self.seed,
                    batch_size="auto" if self.batch_size is None else self.batch_size,
                    noise=self.noise,
                    noise_on_cpu=self.noise_on_cpu,
                    callback=lambda *_: bar.update(),
                    **start,
                )
            missing = sorted(set(many.indices) - set(there))
            gallery.clear(many.indices if many.world > 1 else range(self.number))
            # Of adaptive steps, and of parts of a run, the calls are not known beforehand.
            if isinstance(sampler.solver, Solver) and isinstance(self.steps, int) and not self.init:
                batches = -(-len(missing) // many.batch_size)
                bar.total = sampler.plan(self.steps).evaluations * batches
            for index, image in many.draw(missing):
                gallery.write(index, image)
        return len(many) - len(missing)

    def _columns(self, labels: list[int], class_names: list[str]) -> list[str]:
        """The classes over the grid's columns, where the images take a few of them in turn."""
        turn = list(dict.fromkeys(labels))
        few = 1 < len(turn) <= 20 and labels == [turn[i % len(turn)] for i in range(len(labels))]
        if not few:
            return []
        return [class_names[label] if label < len(class_names) else str(label) for label in turn]

    def _check(self) -> None:
        """Refuse, before anything is loaded, what no checkpoint could make right."""
        for name, value in (
            ("--steps", self.steps),
            ("--number", self.number),
            ("--batch-size", self.batch_size),
            ("--resample", self.resample),
        ):
            if isinstance(value, int) and value < 1:
                raise UsageError(f"{name} is {value}; give a whole number of at least 1")
        if self.seed < 0:
            raise UsageError(f"--seed is {self.seed}; give a whole number of at least 0")
        if self.strength is not None and not 0 <= self.strength <= 1:
            raise UsageError(f"--strength is {self.strength}; give a number from 0 to 1")
        for name in ("strength", "mask"):
            if getattr(self, name) not in (None, "") and not self.init:
                raise UsageError(f"--{name} says how much of an image to keep: give it as --init")
        if self.init and self.strength is None and not self.mask:
            raise UsageError(
                f"--init {self.init} alone does not say how much of it to keep: give --strength, "
                "from 0 (all of it) to 1 (nothing; 0.75 is usual), or a --mask"
            )
        if self.resample > 1 and not self.mask:
            raise UsageError("--resample fits what is drawn to what a mask keeps: give --mask")

    def _labels(self, num_classes: int, condition: Mapping[str, torch.Tensor]) -> list[int]:
        """The class of each image; empty for a model without classes, or that is told it already.

        Args:
            num_classes: that the model knows.
            condition: what `--condition` tells it.
        """
        if self.condition and "class_label" in condition:
            if not self.class_label:
                return []
            if (told := int(condition["class_label"][0])) != num_classes:
                raise UsageError(
                    f"--class-label is {self.class_label[0]}, but --condition tells class {told}; "
                    "leave one of them away"
                )
        if self.class_label and not num_classes:
            raise UsageError(
                f"--class-label is {self.class_label[0]}, but {self.checkpoint} was trained "
                "without classes; leave the option away"
            )
        for label in self.class_label:
            if label >= num_classes:
                raise UsageError(
                    f"--class-label {label} does not exist: {self.checkpoint} has {num_classes} "
                    f"classes, 0 to {num_classes - 1}"
                )
        if not num_classes:
            return []
        turn = self.class_label or tuple(range(num_classes))
        return [turn[index % len(turn)] for index in range(self.number)]

    def _text(self, info: CheckpointInfo, index: int | None, labels: list[int]) -> dict[str, str]:
        """What the PNG of image `index` says (None: of the grid)."""
        from importlib.metadata import version

        seed, number = (self.seed, self.number) if index is None else (self.seed + index, 1)
        classes = labels if index is None else labels[index : index + 1]
        if index is None and self.class_label:
            classes = list(self.class_label)
        said = {
            "software": f"k-diffusion {version('k-diffusion')}",
            "checkpoint": str(info.path),
            "checkpoint sha256": info.sha256,
            "weights": self.weights,
            "sampler": self.sampler,
            "sampler options": show_settings(self.sampler_options),
            "scheduler": self.scheduler,
            "scheduler options": show_settings(self.scheduler_options),
            "steps": str(self.steps),
            "guidance": show_setting(self.guidance) if self.guidance != 1 else "",
            "guidance method": self.guidance_method,
            "guidance options": show_settings(self.guidance_options),
            "guide": self.guide,
            "negative": "; ".join(self.negative),
            "init": self.init,
            "strength": "" if self.strength is None else show_setting(self.strength),
            "mask": self.mask,
            "resample": str(self.resample) if self.resample > 1 else "",
            "noise": self.noise if self.noise != "independent" else "",
            "noise on cpu": "yes" if self.noise_on_cpu else "",
            "seed": str(seed),
            "images": str(number),
            "condition": "; ".join(self.condition),
            "class": ",".join(map(str, dict.fromkeys(classes))),
        }
        command = ["k-diffusion", "sample", str(info.path)]
        for option in REPEATED:
            if said[option]:
                command += ["--" + option.replace(" ", "-"), said[option]]
        command += ["--noise-on-cpu"] * self.noise_on_cpu
        command += ["--seed", str(seed), "-n", str(number)]
        if said["class"]:
            command += ["--class-label", said["class"]]
        for name, words in (
            ("--condition", self.condition), ("--negative", self.negative),
            ("--plugin", self.plugin),
        ):  # fmt: skip
            for word in words:
                command += [name, word]
        command += ["--weights", self.weights] if self.weights != "ema" else []
        said["command"] = shlex.join(command)
        return {key: value for key, value in said.items() if value}


def _split_churn(
    given: dict[str, Any], own: Mapping[str, Any]
) -> tuple[Churn | None, dict[str, Any]]:
    """The options of the churn that any sampler takes, if `s_churn` is among them, and the rest."""
    from k_diffusion.sampling import Churn

    if "s_churn" not in given or "s_churn" in own:
        return None, given
    known = {f.name for f in fields(Churn)} - set(own)
    churn = Churn(**{key: value for key, value in given.items() if key in known})
    return churn, {key: value for key, value in given.items() if key not in known}
