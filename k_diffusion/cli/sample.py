"""`k-diffusion sample`: images from a checkpoint, each with what is needed to make it again."""

from __future__ import annotations

import shlex
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from .drawing import check_shape, draw, pick_device
from .plugins import Plugins, load_plugins
from .problems import Stopped, UsageError, as_usage
from .signals import Terminated
from .values import Classes, Settings, Words, newest_in, show_settings

if TYPE_CHECKING:
    import torch

    from k_diffusion.sampling import Churn
    from k_diffusion.training.checkpoint import CheckpointInfo

GRID_HOLDS = 400


@dataclass
class Sample:
    """Draw images from a checkpoint into a folder: single PNGs and a grid.

    Image i has the seed `--seed` + i and does not depend on the others drawn with it. Its PNG text
    holds the settings and the command that draws it again. With `--model`, from a diffusers
    pipeline: `k-diffusion sample --model NAME --help`.
    """

    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """A .safetensors file that `k-diffusion train` or `export` wrote, or a run's folder: the newest
    in it."""
    sampler: str = "dpmpp_2m"
    """The method; `k-diffusion samplers` lists them."""
    scheduler: str = "karras"
    """How the noise levels are laid; `k-diffusion schedule` lists the ways."""
    steps: int = 20
    """Steps from noise to image."""
    seed: int = 0
    """The seed of the first image."""
    number: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 16
    """How many images."""
    class_label: Classes = ()
    """One class, or several such as 0,3 or 0-9, which the images take in turn. Without it, a model
    with classes takes all of them in turn."""
    batch_size: int = 64
    """Images drawn at a time; it changes the memory needed, not the images."""
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
    no_ema: bool = False
    """Take the last weights, not their moving average."""
    ema: Annotated[str, tyro.conf.arg(metavar="NAME")] = ""
    """Take this average of the weights, one that `k-diffusion info` lists, such as ema_0.05."""
    device: str = ""
    """cpu, cuda, cuda:1, mps...; without it a GPU where there is one."""
    plugin: Plugins = ()
    """A Python file or module of your own, which registers models and conditioners; again for
    more."""

    def run(self) -> None:
        self._check()
        import torch

        from k_diffusion.models.registry import known_classes
        from k_diffusion.sampling import NOISES, KSampler, Solver, find_solver
        from k_diffusion.training.restore import load_denoiser
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
        device = pick_device(self.device)
        checkpoint = newest_in(self.checkpoint)
        denoiser, info = load_denoiser(checkpoint, ema=self.ema or not self.no_ema, device=device)
        check_shape(info)
        condition = self._condition(info, denoiser, device)
        seeds = [self.seed + index for index in range(self.number)]
        labels = self._labels(known_classes(denoiser.network), condition)
        with as_usage():
            sampler = KSampler(denoiser, scheduler, solver, churn=churn, **options)
            calls = None  # adaptive steps are not known beforehand
            if isinstance(solver, Solver):
                calls = sampler.plan(self.steps).evaluations * -(-self.number // self.batch_size)
            else:
                sampler.levels(self.steps)
        names = [
            f"seed{seed:06d}" + (f"_class{label}" if labels else "") + ".png"
            for seed, label in zip(seeds, labels or seeds, strict=True)
        ]
        make_room(self.out, [*names, "grid.png"], self.overwrite)

        from tqdm import tqdm

        from k_diffusion.utils.images import image_grid, save_png

        texts = [self._text(info, index, labels) for index in range(self.number)]
        kept: list[torch.Tensor] = []
        written = 0
        try:
            with tqdm(
                total=calls,
                unit="call",
                desc="sampling",
                disable=None,  # where nobody looks on
            ) as bar:
                for _, images in draw(
                    sampler,
                    info.data["shape"],
                    seeds,
                    labels,
                    condition,
                    steps=self.steps,
                    batch_size=self.batch_size,
                    device=device,
                    noise=self.noise,
                    noise_on_cpu=self.noise_on_cpu,
                    tick=bar.update,
                ):
                    for image in images:
                        save_png(self.out / names[written], image, texts[written])
                        written += 1
                    kept += images[: max(0, GRID_HOLDS - len(kept))]
        except (KeyboardInterrupt, Terminated) as end:
            number = signal.SIGTERM if isinstance(end, Terminated) else signal.SIGINT
            raise Stopped(
                number, f"stopped; {written} of {self.number} images are in {self.out}, each whole"
            ) from None
        columns = self._columns(labels, info.data.get("class_names") or [])
        scale = max(1, 64 // kept[0].shape[-1])  # small images are shown larger
        grid = image_grid(torch.stack(kept), columns_named=columns, scale=scale)
        save_png(self.out / "grid.png", grid, self._text(info, None, labels))
        print(f"{self.number} images and grid.png are in {self.out}")

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
        ):
            if value < 1:
                raise UsageError(f"{name} is {value}; give a whole number of at least 1")
        if self.ema and self.no_ema:
            raise UsageError(f"--ema is {self.ema}, but --no-ema asks for the last weights")
        if self.seed < 0:
            raise UsageError(f"--seed is {self.seed}; give a whole number of at least 0")

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

    def _condition(
        self, info: CheckpointInfo, denoiser: Any, device: torch.device
    ) -> dict[str, torch.Tensor]:
        """What all images are told, as a batch of one; none where the checkpoint knows of none."""
        from k_diffusion.training.restore import load_conditioner

        if not self.condition and not info.config.get("conditioner"):
            return {}
        conditioner = load_conditioner(info, device)
        if conditioner is None:
            raise UsageError(
                f"--condition is {self.condition[0]!r}, but {self.checkpoint} was trained without "
                "any; leave the option away"
            )
        if not self.condition:
            try:
                return conditioner.null(1)
            except ValueError:  # its shape is not known beforehand
                return {}
        with as_usage():
            raws = [self._read(conditioner, word) for word in self.condition]
            if isinstance(raws[0], Mapping):
                raws = [{name: raw for part in raws for name, raw in part.items()}]
            elif len(raws) > 1:
                raise ValueError(
                    f"--condition is given {len(raws)} times, but this model is told one thing"
                )
            condition = conditioner(raws[0])
            denoiser.check_condition(1, **condition)
        return condition

    @staticmethod
    def _read(conditioner: Any, word: str) -> Any:
        try:
            return conditioner.read(word)
        except (ValueError, TypeError) as error:
            said = str(error)
            raise ValueError(
                said if "--condition" in said else f"--condition {word}: {said}"
            ) from error

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
            "weights": "last" if self.no_ema else self.ema or "ema",
            "sampler": self.sampler,
            "sampler options": show_settings(self.sampler_options),
            "scheduler": self.scheduler,
            "scheduler options": show_settings(self.scheduler_options),
            "steps": str(self.steps),
            "noise": self.noise if self.noise != "independent" else "",
            "noise on cpu": "yes" if self.noise_on_cpu else "",
            "seed": str(seed),
            "images": str(number),
            "condition": "; ".join(self.condition),
            "class": ",".join(map(str, dict.fromkeys(classes))),
        }
        command = ["k-diffusion", "sample", str(info.path)]
        for option in (
            "sampler", "sampler options", "scheduler", "scheduler options", "steps", "noise",
        ):  # fmt: skip
            if said[option]:
                command += ["--" + option.replace(" ", "-"), said[option]]
        command += ["--noise-on-cpu"] * self.noise_on_cpu
        command += ["--seed", str(seed), "-n", str(number)]
        if said["class"]:
            command += ["--class-label", said["class"]]
        for name, words in (("--condition", self.condition), ("--plugin", self.plugin)):
            for word in words:
                command += [name, word]
        command += ["--ema", self.ema] if self.ema else ["--no-ema"] * self.no_ema
        said["command"] = shlex.join(command)
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
