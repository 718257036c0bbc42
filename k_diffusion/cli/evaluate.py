"""`k-diffusion evaluate`: how good a checkpoint's samples, or a folder of images, are."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from .drawing import check_shape, pick_device
from .guiding import WITHOUT_CONDITION, check_guidance, make_guided
from .measured import (
    begin_processes,
    data_facts,
    drawn_before,
    first_shape,
    samples_of,
    software,
    weights_facts,
)
from .plugins import Plugins, load_plugins
from .problems import UsageError, as_usage, plain_warnings, process_number
from .telling import Teller
from .values import WEIGHTS, Names, Settings, WholeOrAuto, Words, newest_in, show_settings

if TYPE_CHECKING:
    import torch

    from k_diffusion.evaluation import Figures, Reference
    from k_diffusion.training.checkpoint import CheckpointInfo
    from k_diffusion.training.dataset import Source

DRAWING = (
    "sampler", "scheduler", "steps", "seed", "guidance", "guidance_method", "guidance_options",
    "guide", "negative", "condition", "sampler_options", "scheduler_options", "noise",
    "noise_on_cpu", "weights",
)  # fmt: skip
"""Options that say how samples are drawn, and have no meaning where they are there already."""


@dataclass
class Evaluate:
    """Measure samples of a checkpoint, or images in a folder, beside real images.

    Writes a JSON file with the figures and everything needed to find them again. Figures by
    different extractors, or of different numbers of samples, do not compare. Under torchrun the
    processes share the work and find the same.
    """

    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")] = ""
    """A .safetensors file that `k-diffusion train` or `export` wrote, or a run's folder: the newest
    in it. Not needed with --samples and --data."""
    data: Annotated[str, tyro.conf.arg(metavar="DATA")] = ""
    """Real images to compare with: a folder, a .zip or .tar, digits or digits:test; without it what
    the checkpoint was trained on."""
    held_out: Annotated[str, tyro.conf.arg(metavar="DATA")] = ""
    """Real images that were not trained on: their figures stand beside those of the samples."""
    number: Annotated[int, tyro.conf.arg(aliases=["-n", "--n"])] = 5000
    """How many samples."""
    metrics: Names = ("fid", "kid", "precision", "recall", "density", "coverage", "memorised")
    """What to measure, of fid, kid, precision, recall, density, coverage, memorised."""
    extractor: str = "small"
    """What features are taken by: inception, dinov2, clip, or small, a network that is trained on
    the data first, in up to three minutes of one core, and needs no download."""
    extractor_weights: Annotated[str, tyro.conf.arg(metavar="PATH")] = ""
    """Its weights: a file (inception, small), a folder or an id on the Hugging Face hub (dinov2,
    clip); without it the usual ones are fetched."""
    real_images: int = 50_000
    """Real images at most, evenly spread over the data."""
    samples: Annotated[str, tyro.conf.arg(metavar="FOLDER")] = ""
    """Measure the images in this folder; nothing is drawn."""
    sampler: str = "dpmpp_2m"
    """The method; `k-diffusion samplers` lists them."""
    scheduler: str = "karras"
    """How the noise levels are laid; `k-diffusion schedule` lists the ways."""
    steps: WholeOrAuto = 20
    """Steps from noise to image; auto: as many as each image needs."""
    seed: int = 0
    """The seed of the first sample; each has the next one."""
    batch_size: int = 64
    """Samples that are drawn and measured at a time."""
    guidance: float = 1.0
    """See `k-diffusion sample`, as for the options of guidance, condition and noise that follow."""
    guidance_method: Annotated[str, tyro.conf.arg(metavar="METHOD")] = ""
    """cfg, apg, cfg_zero_star or perturbed_attention."""
    guidance_options: Settings = field(default_factory=dict)
    """Options of the guidance, such as rescale=0.7,interval=[0.3,5]."""
    guide: Annotated[str, tyro.conf.arg(metavar="CHECKPOINT")] = ""
    """A lesser model's checkpoint, for autoguidance."""
    negative: Words = ()
    """What guidance goes away from, instead of no condition."""
    condition: Words = ()
    """What the model is told, of all samples; without it classes in the shares of the data, or what
    it was trained to be told of images, of those of the data in turn."""
    sampler_options: Settings = field(default_factory=dict)
    """Options of the method, such as eta=0.5."""
    scheduler_options: Settings = field(default_factory=dict)
    """Options of the levels, such as rho=5,sigma_max=40."""
    noise: str = "independent"
    """The noise of methods that draw any: independent, or path."""
    noise_on_cpu: bool = False
    """Make that noise on the CPU, so that a seed gives the same on every device."""
    weights: str = "ema"
    """ema: their moving average; last: those after the last step; or another average that
    `k-diffusion info` lists, such as ema_0.05."""
    pairs: int = 10
    """How many samples nearest to real images the picture beside the JSON file shows, where
    memorised is measured; 0: no picture."""
    cache: Annotated[str, tyro.conf.arg(metavar="FOLDER")] = ""
    """Where the data's statistics and small extractors are kept; without it the folder evaluation
    beside the checkpoint, or, for a model that comes with the library, beside --out."""
    out: Path = Path("evaluation.json")
    """The file to write."""
    overwrite: bool = False
    """Replace it where it is there already."""
    device: str = ""
    """cpu, cuda, cuda:1, mps...; without it a GPU where there is one."""
    plugin: Plugins = ()
    """A Python file or module of your own, which registers models and conditioners; again for
    more."""

    def run(self) -> None:
        self._check()
        began = time.perf_counter()
        load_plugins(self.plugin)
        device = pick_device(self.device)
        together = begin_processes()
        try:
            self._evaluate(device, began)
        finally:
            if together and sys.exc_info()[0] is None:
                from k_diffusion.training.devices import leave_processes

                leave_processes()

    def _evaluate(self, device: torch.device, began: float) -> None:
        from k_diffusion.evaluation.gathering import on_first
        from k_diffusion.evaluation.measuring import features_of, figures_of, make_reference
        from k_diffusion.training.evaluating import FOLDER, open_data

        found = self._load(device)
        info = found[1] if found else None
        shape = info.data["shape"] if info else first_shape(self.samples)
        images = drawn_before(self.samples, shape) if self.samples else None
        trained = dict(info.config.get("data") or {}) if info else {}
        held = self.held_out
        if not held and not self.data and trained.get("source") == "digits":
            held = "digits:test" if trained.get("split", "train") == "train" else ""
        with as_usage():
            real = open_data(self.data, trained, shape)
            others = open_data(held, trained, shape) if held else None
        parent = Path(info.path).parent if info else Path(self.samples).parent
        if parent == WEIGHTS:  # an installed package is no place to write to
            parent = self.out.parent
        shared: dict[str, Any] = {
            "most": self.real_images,
            "cache": Path(self.cache) if self.cache else parent / FOLDER,
            "device": device,
            "progress": True,
            "say": lambda line: print(line, file=sys.stderr),
        }
        with as_usage():
            reference = make_reference(
                real, self.extractor, weights=self.extractor_weights, **shared
            )
            beside = make_reference(others, reference.extractor, **shared) if others else None
        if images is not None:
            numbers, source = images
            count = len(numbers)

            def draw(chosen: list[int]) -> torch.Tensor:
                return samples_of(source, numbers[chosen])

            said: dict[str, Any] = {"samples": self.samples}
        else:
            assert found is not None
            count = self.number
            draw, said = self._drawn(found, real, reference, device)
        with plain_warnings("k-diffusion evaluate"):
            features = features_of(
                draw, count, reference, batch_size=self.batch_size, progress=True
            )
        with as_usage():
            figures = on_first(lambda: figures_of(features, reference, self.metrics))
            usual = None
            if beside is not None:
                held_features = beside.statistics.features
                usual = on_first(lambda: figures_of(held_features, reference, self.metrics))
        if process_number():
            return
        picture = self._picture(figures, real, reference, draw)
        result = {
            "software": software(),
            "command": self._command(info),
            "device": device.type,
            "processes": int(os.environ.get("WORLD_SIZE", "1")),
            **(
                {"checkpoint": weights_facts(info, self.weights)} if info and images is None else {}
            ),
            **said,
            "number": count,
            "extractor": {
                **reference.statistics.facts["extractor"],
                **getattr(reference.extractor, "trained", {}),
            },
            "data": data_facts(real, self.data or trained, reference),
            "figures": figures.values,
            **({"held out": data_facts(others, held, beside)} if beside and others else {}),
            **({"held-out figures": usual.values} if usual else {}),
            "notes": list(figures.notes),
            **({"nearest": picture} if picture else {}),
            "seconds": round(time.perf_counter() - began, 1),
        }
        self._write(result)
        self._report(result, usual)

    def _load(self, device: torch.device) -> tuple[Any, CheckpointInfo] | None:
        """The checkpoint's denoiser, and what it says; None where none is named."""
        if not self.checkpoint:
            return None
        from k_diffusion.training.restore import load_denoiser

        checkpoint = newest_in(self.checkpoint)
        denoiser, info = load_denoiser(checkpoint, self.weights, device=device)
        check_shape(info)
        return denoiser, info

    def _drawn(
        self,
        found: tuple[Any, CheckpointInfo],
        real: Source,
        reference: Reference,
        device: torch.device,
    ) -> tuple[Any, dict[str, Any]]:
        """What draws samples by their numbers, and what the result says of how."""
        import torch

        from k_diffusion.models.registry import known_classes
        from k_diffusion.sampling import KSampler, find_solver
        from k_diffusion.training.evaluating import shares_of
        from k_diffusion.training.restore import load_denoiser
        from k_diffusion.utils.scheduler import make_scheduler

        from .sample import _split_churn

        denoiser, info = found
        with as_usage():
            solver = find_solver(self.sampler)
            churn, options = _split_churn(self.sampler_options, solver.options)
            solver.check_options(options)
            scheduler = make_scheduler(self.scheduler, **self.scheduler_options)
            method = check_guidance(
                self.guidance, self.guidance_method, self.guidance_options, self.guide,
                self.negative,
            )  # fmt: skip
        teller = Teller(info, denoiser, device)
        counts = reference.statistics.facts["classes"]
        told = teller.told_as_data(self.condition, real, counts, self.number, self.seed)
        null = None
        if self.guidance != 1 and method not in WITHOUT_CONDITION:
            null = teller.null(self.negative, told)
        guide = None
        said: dict[str, Any] = {name: getattr(self, name) for name in DRAWING[:-1]}
        if self.guide:
            guide, lesser = load_denoiser(newest_in(self.guide), device=device)
            said["guide sha256"] = lesser.sha256

        with as_usage():
            guided = make_guided(
                denoiser, self.guidance, method, self.guidance_options,
                guide=guide, null=null, outputs=getattr(solver, "outputs", 1),
            )  # fmt: skip
            sampler = KSampler(guided, scheduler, solver, churn=churn, **options)
            if isinstance(self.steps, int):
                sampler.levels(self.steps)
            many = sampler.sample_many(
                self.number, steps=self.steps, shape=info.data["shape"], condition=told,
                seed=self.seed, batch_size=self.batch_size, noise=self.noise,
                noise_on_cpu=self.noise_on_cpu, rank=0, world=1,
            )  # fmt: skip

        def draw(numbers: list[int]) -> torch.Tensor:
            return torch.stack([image for _, image in many.draw(numbers)])

        said = {key: value for key, value in said.items() if value or key == "seed"}
        if told.labels:
            said["classes in the shares of"] = shares_of(counts, known_classes(denoiser.network))
        if told.shown is not None:
            said["told of"] = f"{len(told.shown.numbers.unique())} images of the data"
        return draw, {"sampling": said}

    def _picture(
        self, figures: Figures, real: Source, reference: Reference, draw: Any
    ) -> dict[str, Any]:
        """Draw the samples nearest to real images, these, and their own nearest, into a PNG."""
        if figures.memorised is None or not self.pairs:
            return {}
        import torch

        from k_diffusion.evaluation.statistics import as_seen, read
        from k_diffusion.utils.images import image_grid, save_png

        found, places = figures.memorised, reference.statistics.numbers
        chosen = found.closest(self.pairs).cpu()
        ratios = [round(float(found.ratio[i]), 3) for i in chosen]
        neighbours = [places[other.cpu()[chosen]] for other in (found.nearest, found.other)]
        rows = [draw(chosen.tolist()).cpu(), *(read(real, n).images for n in neighbours)]
        path = self.out.with_suffix(".nearest.png")
        grid = image_grid(
            torch.cat([as_seen(row) for row in rows]),
            rows_named=["sample", "nearest real", "its nearest"],
            columns_named=[f"{ratio:.2f}" for ratio in ratios],
            scale=max(1, 64 // rows[0].shape[-1]),
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        save_png(path, grid, {"extractor": reference.extractor.name})
        return {"picture": str(path), "samples": chosen.tolist(), "ratios": ratios}

    def _check(self) -> None:
        """Refuse, before anything is loaded, what nothing could make right."""
        from k_diffusion.evaluation.measuring import EXTRACTORS, check_metrics
        from k_diffusion.sampling import NOISES
        from k_diffusion.utils.maths import unknown

        with as_usage():
            check_metrics(self.metrics)
            for name, value, known in (
                ("extractor", self.extractor, EXTRACTORS), ("noise", self.noise, NOISES),
            ):  # fmt: skip
                if value not in known:
                    raise ValueError(unknown(name, value, known))
        for option, least in (("number", 10), ("real_images", 10), ("batch_size", 1), ("steps", 1),
                              ("seed", 0), ("pairs", 0)):  # fmt: skip
            value = getattr(self, option)
            if isinstance(value, int) and value < least:
                given = option.replace("_", "-")
                raise UsageError(f"--{given} is {value}; give a whole number of at least {least}")
        if not self.checkpoint and not self.samples:
            raise UsageError("there is nothing to measure: give a CHECKPOINT, or --samples FOLDER")
        if not self.checkpoint and not self.data:
            raise UsageError("--samples alone names no real images to compare with: give --data")
        if self.samples:
            for option in DRAWING:
                if getattr(self, option) != _default(option):
                    raise UsageError(
                        f"--{option.replace('_', '-')} says how samples are drawn, but those in "
                        f"--samples {self.samples} are there already: leave one of them out"
                    )
        if self.out.is_dir():
            raise UsageError(f"--out {self.out} is a folder; give a file, such as evaluation.json")
        if self.out.exists() and not self.overwrite:
            raise UsageError(f"--out {self.out} is there already; give another, or --overwrite")

    def _command(self, info: CheckpointInfo | None) -> str:
        words = ["k-diffusion", "evaluate", *([str(info.path)] if info else [])]
        for option in fields(self):
            value = getattr(self, option.name)
            if option.name in ("checkpoint", "overwrite") or value == _default(option.name):
                continue
            word = "--" + option.name.replace("_", "-")
            if value is True:
                words.append(word)
            elif option.name in ("negative", "condition", "plugin"):
                for one in value:
                    words += [word, str(one)]
            elif isinstance(value, Mapping):
                words += [word, show_settings(dict(value))]
            else:
                words += [word, ",".join(value) if isinstance(value, tuple) else str(value)]
        return shlex.join(words)

    def _write(self, result: Mapping[str, Any]) -> None:
        from k_diffusion.utils.files import write_text

        self.out.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.out, json.dumps(result, indent=1) + "\n")

    def _report(self, result: Mapping[str, Any], usual: Figures | None) -> None:
        for name, value in result["figures"].items():
            beside = f"   held-out real images {usual.values[name]:.4f}" if usual else ""
            print(f"{name:<10} {value:>9.4f}{beside}")
        for note in result["notes"]:
            print(f"note: {note}")
        where = f"; nearest pairs: {result['nearest']['picture']}" if "nearest" in result else ""
        print(
            f"{result['number']} samples, features of {result['extractor']['name']}, "
            f"{result['data']['images']} real images; all of it: {self.out}{where}"
        )


def _default(name: str) -> Any:
    found = next(option for option in fields(Evaluate) if option.name == name)
    return {} if found.default_factory is dict else found.default
