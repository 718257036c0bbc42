"""Figures of a run while it trains, and the real images that a checkpoint is measured by.

Nothing of the run changes by it: samples are drawn from seeds of their own by a copy of the
averaged weights, and the generators are put back.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from k_diffusion.denoiser import make_denoiser
from k_diffusion.evaluation.at_hand import look_for_extractor
from k_diffusion.evaluation.extractors import FeatureExtractor
from k_diffusion.evaluation.gathering import on_first
from k_diffusion.evaluation.making import make_extractor
from k_diffusion.evaluation.measuring import (
    Reference,
    class_labels,
    features_of,
    figures_of,
    make_reference,
)
from k_diffusion.models import ClassConditioner, Conditioner, make_model
from k_diffusion.training.config import ConfigError
from k_diffusion.training.dataset import DataError, Source, make_source
from k_diffusion.training.drawing import sampler_of
from k_diffusion.training.named_tensors import copy_tensors, named_tensors
from k_diffusion.training.sections import EvaluateConfig
from k_diffusion.training.shards import gathered
from k_diffusion.training.signals import StopAsked
from k_diffusion.training.told import Lay, make_told
from k_diffusion.utils.scheduler import make_scheduler
from k_diffusion.utils.words import reason_of

if TYPE_CHECKING:
    from k_diffusion.training.trainer import Trainer

FOLDER = "evaluation"
"""Of a run: where the statistics of its data and a small extractor lie."""


class Evaluation:
    """Measures the averaged weights of a run. Every process has to make, prepare and call it.

    Made before the run's folder is touched, so that an extractor that cannot be had costs nothing.

    Args:
        trainer: of the run, whose config has the section `evaluate`.

    Raises:
        ConfigError: the data are no images, or the extractor cannot be had.
    """

    reference: Reference

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.options = trainer, trainer.config.evaluate
        options, processes = self.options, trainer.processes
        processes.on_main(lambda: look_at(options, trainer.source, trainer.denoiser))
        self._extractor: str | FeatureExtractor = options.extractor
        self._weights = options.weights or ""
        if options.extractor != "small":  # which is made of the data
            with self._aside():
                self._extractor = processes.together(self._load, ConfigError)
            self._weights = ""

    def _load(self) -> FeatureExtractor:
        name, device = self.options.extractor, self.trainer.device
        try:
            return make_extractor(name, weights=self._weights, device=device)
        except (ValueError, OSError, ImportError) as error:
            raise _cannot_be_had(name, error) from None

    def prepare(self, say: Callable[[str], None], look: Callable[[], None] = lambda: None) -> None:
        """See the real images by the extractor; before the first step, so that whatever is missing
        is missed at once.

        Args:
            say: takes lines of news.
            look: called between all parts of the work, here and in `measure`, by all processes
                alike; what it raises, on all of them at once, ends it (see `signals.looking`).

        Raises:
            ConfigError: the data or the weights cannot be read.
        """
        trainer, options, self._look = self.trainer, self.options, look
        with self._aside():
            try:
                self.reference = make_reference(
                    trainer.source,
                    self._extractor,
                    weights=self._weights,
                    most=options.real_images,
                    cache=Path(trainer.config.out) / FOLDER,
                    device=trainer.device,
                    say=say,
                    look=look,
                )
            except (ValueError, OSError) as error:
                raise _cannot_be_had(options.extractor, error) from None
        self.told = make_told(
            trainer.network,
            trainer.conditioner,
            trainer.source,
            options.images,
            in_shares(self.reference.statistics.facts["classes"]),
            seed=options.seed,
            device=trainer.device,
        )

    def measure(self) -> dict[str, Any]:
        """What a line of the metrics file says: "extractor", "samples", "data" (the beginning of
        their hash) and "figures", name -> value; these are null, and "reason" says why, where
        samples or figures cannot be had.

        That ends no run, unless one of several processes fails in the midst of what all do.

        Raises:
            StopAsked: see `prepare`.
        """
        line = {
            "extractor": self.reference.extractor.name,
            "samples": self.options.images,
            "data": self.reference.statistics.facts["data sha256"][:12],
        }
        try:
            return {**line, **self._measured()}
        except Exception as error:  # memory, the disk, data that are gone
            together = self.trainer.processes.count == 1 or getattr(error, "everywhere", False)
            if isinstance(error, StopAsked) or not together:
                raise
            return {**line, "figures": None, "reason": _kind_and_reason(error)}

    def _measured(self) -> dict[str, Any]:
        options = self.options
        wrong: list[str] = []
        with self._aside():
            denoiser = self._averaged()
            many = sampler_of(denoiser, options, "evaluate").sample_many(
                options.images,
                steps=options.steps,
                shape=self.trainer.source.shape,
                condition=self.told,
                seed=options.seed,
                batch_size=options.batch_size,
                rank=0,
                world=1,
            )

            def draw(numbers: list[int]) -> Tensor:
                try:
                    return torch.stack([image for _, image in many.draw(numbers)])
                except Exception as error:  # not finite, say; the run may still come right
                    wrong.append(_kind_and_reason(error))
                    return torch.zeros(len(numbers), *self.trainer.source.shape)

            features = features_of(
                draw,
                options.images,
                self.reference,
                batch_size=options.batch_size,
                look=self._look,
            )
        if reasons := [one for own in self.trainer.processes.gather(wrong) for one in own]:
            return {"figures": None, "reason": reasons[0]}
        figures = on_first(lambda: figures_of(features, self.reference, options.metrics).values)
        return {"figures": figures}

    def _averaged(self) -> Any:
        """The averaged weights as a denoiser of their own."""
        trainer, config = self.trainer, self.trainer.config
        if trainer.is_sharded:  # whose modules cannot be copied
            network = make_model(config.model).to(trainer.device)
        else:
            network = copy.deepcopy(trainer.network)
        copy_tensors(gathered(trainer.ema.state_dict(), keep=True), named_tensors(network))
        process = make_scheduler(**config.process) if config.process else None
        return make_denoiser(network.eval().requires_grad_(False), process)

    def _aside(self) -> Any:
        """Nothing drawn within it is missed, and no sampler's advice is given."""
        return _Aside(self.trainer.device)


class _Aside:
    def __init__(self, device: torch.device) -> None:
        self._rng = torch.random.fork_rng(
            devices=[] if device.type == "cpu" else None,
            device_type="cuda" if device.type == "cpu" else device.type,
        )
        self._warnings = warnings.catch_warnings()

    def __enter__(self) -> None:
        self._rng.__enter__()
        self._warnings.__enter__()
        warnings.simplefilter("ignore")

    def __exit__(self, *error: Any) -> None:
        self._warnings.__exit__(*error)
        self._rng.__exit__(*error)


def _cannot_be_had(extractor: str, error: Exception) -> ConfigError:
    return ConfigError(f"evaluate.extractor = {extractor!r} cannot be had: {error}")


def _kind_and_reason(error: Exception) -> str:
    """In words; with the type, but of what samplers raise where samples are not finite."""
    reason = reason_of(error)
    return reason if isinstance(error, ArithmeticError) else f"{type(error).__name__}: {reason}"


def look_at(options: EvaluateConfig, source: Source, denoiser: Any) -> str:
    """See what can be seen before anything is loaded.

    Returns:
        What is done when, in words.

    Raises:
        ConfigError: the data are no images of one size, the extractor cannot be had, or no levels
            can be laid.
    """
    sampler_of(denoiser, options, "evaluate")
    facts = source.facts()
    if len(facts["shape"]) != 3 or not 1 <= facts["shape"][0] <= 4 or "autoencoder" in facts:
        what = "latents" if "autoencoder" in facts else f"of shape {tuple(facts['shape'])}"
        raise ConfigError(
            f"evaluate.every_images = {options.every_images}, but the data are {what}, not "
            "images: leave it out"
        )
    if len(source.shapes) > 1:
        raise ConfigError(
            f"evaluate.every_images = {options.every_images}, but data.buckets gives images of "
            f"{len(source.shapes)} sizes, and figures are of one: leave it out, and "
            "measure by k-diffusion evaluate with data of one size"
        )
    try:
        origin = look_for_extractor(options.extractor, options.weights or "", source.shape[0])
    except (ValueError, ImportError) as error:
        raise _cannot_be_had(options.extractor, error) from None
    return (
        f"{', '.join(options.metrics)} of {options.images:,} samples every "
        f"{options.every_images:,} images, by {options.extractor} ({origin})"
    )


def in_shares(counts: Sequence[int]) -> Lay:
    """Classes in the shares of the data; see `shares_of`.

    Of a conditioner that reads something else than labels the order of classes is not known: it
    has to be asked, of images.

    Args:
        counts: the data's images of each class.
    """

    def lay(conditioner: Conditioner, classes: int, count: int) -> list[int]:
        if not isinstance(conditioner, ClassConditioner) or conditioner.config.reads != "label":
            return []
        return class_labels(shares_of(counts, classes), count)

    return lay


def shares_of(counts: Sequence[int], classes: int) -> list[int]:
    """Images of each of a model's classes; equal shares, where the data's are not its classes."""
    return list(counts) if 1 < len(counts) <= classes else [1] * classes


def open_data(given: str, trained: Mapping[str, Any], shape: Sequence[int]) -> Source:
    """Real images to compare with.

    Args:
        given: a folder, a .zip or .tar, "digits" or "digits:test"; "": what a checkpoint was
            trained on.
        trained: the "data" of its config; empty where there is none.
        shape: of an image, (channels, height, width).

    Raises:
        DataError: there is no such data, or it has another shape.
    """
    if given.startswith("digits"):
        source = make_source("digits", split=given.partition(":")[2] or "train")
    elif given:
        kept = {key: trained[key] for key in ("classes", "max_pixels") if key in trained}
        kind = "archive" if given.endswith((".zip", ".tar")) else "folder"
        source = make_source(
            kind, path=given, size=tuple(shape[1:]), channels=int(shape[0]), **kept
        )
    elif trained:
        source = make_source(**trained)
    else:
        raise DataError("no real images are named to compare with: give --data")
    if tuple(source.shape) != tuple(shape):
        raise DataError(
            f"data {given or trained.get('path', trained.get('source'))} holds images of shape "
            f"{tuple(source.shape)}, but the samples have {tuple(shape)}: give the data of these"
        )
    return source
