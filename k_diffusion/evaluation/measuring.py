"""All figures of a set of samples, beside the statistics of real images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from k_diffusion.evaluation.extractors import FeatureExtractor
from k_diffusion.evaluation.frechet import moments_frechet
from k_diffusion.evaluation.gathering import joined_rows, look_last, on_first_looking, place
from k_diffusion.evaluation.kernel import kernel_distance
from k_diffusion.evaluation.making import make_extractor
from k_diffusion.evaluation.manifold import density_coverage, precision_recall
from k_diffusion.evaluation.moments import Moments
from k_diffusion.evaluation.neighbours import Memorised, memorisation
from k_diffusion.evaluation.reading import Data, Reading, as_seen, bar, spread
from k_diffusion.evaluation.small import SmallExtractor, train_small
from k_diffusion.evaluation.statistics import MOST, Statistics, measure_data
from k_diffusion.utils.maths import unknown

METRICS = ("fid", "kid", "precision", "recall", "density", "coverage", "memorised")
EXTRACTORS = ("small", "inception", "dinov2", "clip")
TRAINED_ON = 20_000
"""Images at most that a small extractor is trained on, evenly spread over the data."""


@dataclass(frozen=True)
class Reference:
    """Real images as an extractor sees them.

    Attributes:
        extractor: on `device`.
        statistics: of the data.
        device: where features, and figures where it knows float64, are computed.
    """

    extractor: FeatureExtractor
    statistics: Statistics
    device: torch.device


@dataclass(frozen=True)
class Figures:
    """What was measured.

    Attributes:
        values: name -> figure.
        notes: what to know when reading them, a sentence each.
        memorised: each sample's nearest real image, where "memorised" was asked for.
    """

    values: dict[str, float]
    notes: tuple[str, ...]
    memorised: Memorised | None = None


def check_metrics(names: Sequence[str]) -> tuple[str, ...]:
    """The names, in the order of `METRICS`.

    Raises:
        ValueError: an unknown one, or none.
    """
    for name in names:
        if name not in METRICS:
            raise ValueError(unknown("metric", name, METRICS))
    if not names:
        raise ValueError(f"no metric is named; give some of {', '.join(METRICS)}")
    return tuple(name for name in METRICS if name in names)


def make_reference(
    data: Data,
    extractor: str | FeatureExtractor = "small",
    *,
    weights: str | Path = "",
    most: int = MOST,
    cache: Path | None = None,
    device: torch.device | str = "cpu",
    progress: bool = False,
    say: Callable[[str], None] = lambda line: None,
    look: Callable[[], None] = lambda: None,
) -> Reference:
    """What samples are compared with; every process has to call it.

    The images are decoded once, as far as memory holds them from one use to the next (see
    `Reading`), and not at all where the cache knows the data by their fingerprint and has all that
    is asked of them.

    Args:
        data: real images.
        extractor: a name in `EXTRACTORS`, or one of your own. "small" is trained on the data.
        weights: of a named one, see `make_extractor`; of "small" a file that one was saved to.
        most: real images at most, evenly spread over the data.
        cache: a folder for statistics and small extractors; None: nothing is kept.
        device: where it computes.
        progress: show bars.
        say: takes lines of news.
        look: called by all processes, after each batch and each step of a small extractor's
            training; what it raises, on all of them at once, ends this.

    Raises:
        ValueError: an unknown extractor, weights that cannot be had, or data of several sizes.
    """
    if len(getattr(data, "shapes", ())) > 1:
        raise ValueError("the real images have several sizes, and figures are of one: no buckets")
    shown = spread(len(data), TRAINED_ON) if extractor == "small" and not weights else None
    reading = Reading(data, spread(len(data), most), shown)
    sha256 = on_first_looking(
        lambda step: reading.known_sha256(cache, progress=progress, look=step), look
    )
    chosen: FeatureExtractor
    if not isinstance(extractor, str):
        chosen = extractor
    elif extractor == "small":
        chosen = _small(data, reading, sha256, weights, cache, device, say, look)
    elif extractor in EXTRACTORS:
        chosen = make_extractor(extractor, weights=weights, device=device)
    else:
        raise ValueError(unknown("extractor", extractor, EXTRACTORS))
    statistics = measure_data(
        data,
        chosen,
        sha256=sha256,
        most=most,
        cache=cache,
        device=device,
        progress=progress,
        say=say,
        reading=reading,
        look=look,
    )
    return Reference(chosen, statistics, torch.device(device))


def features_of(
    draw: Callable[[list[int]], Tensor],
    count: int,
    reference: Reference,
    *,
    batch_size: int = 64,
    progress: bool = False,
    look: Callable[[], None] = lambda: None,
) -> Tensor:
    """The features of samples, float32 on the CPU, shape (count, features), in their order.

    The processes take whole batches in turn, so that each sample meets the same neighbours in its
    batch, and has the same bits, whatever their number.

    Args:
        draw: a list of samples' numbers -> images, floats in [-1, 1] or uint8.
        count: how many samples.
        reference: whose extractor is taken.
        batch_size: samples at a time.
        progress: show a bar.
        look: called by all processes after each of their batches; it may raise to end this.
    """
    rank, world = place()
    parts = list(torch.arange(count).split(batch_size))
    own, found = parts[rank::world], list[Tensor]()
    for part in bar(iter(own), len(own), "measuring samples", progress):
        images = as_seen(draw(part.tolist())).to(reference.device)
        found.append(reference.extractor(images).float().cpu())
        look()
    look_last(len(parts), look)
    size = len(reference.statistics.moments.mean)
    rows = torch.cat(found) if found else torch.empty(0, size)
    numbers = torch.cat(own) if own else torch.empty(0, dtype=torch.int64)
    return joined_rows(rows, numbers)[0]


def figures_of(features: Tensor, reference: Reference, metrics: Sequence[str] = METRICS) -> Figures:
    """The figures of samples by their features.

    "fid" takes the moments of all real images; "memorised" the features of all that are kept; the
    others as many real images as there are samples, evenly spread, for their figures move with the
    counts.

    Args:
        features: shape (count, features).
        reference: what they are compared with.
        metrics: names in `METRICS`.

    Raises:
        ValueError: an unknown metric, too few samples for one, or a feature that is not finite.
    """
    metrics = check_metrics(metrics)
    statistics = reference.statistics
    device = torch.device("cpu") if reference.device.type == "mps" else reference.device
    made = features.to(device)
    real = statistics.evenly(len(made)).to(device)
    values: dict[str, float] = {}
    notes = []
    memorised = None
    if "fid" in metrics:
        values["fid"] = moments_frechet(statistics.moments, Moments.of(made.cpu()))
        if len(made) <= made.shape[1]:
            notes.append(
                f"fid: {len(made)} samples do not fill {made.shape[1]} features, which puts it far "
                "above what many samples give: compare it at the same count alone"
            )
    if "kid" in metrics:
        kid = kernel_distance(real, made)
        values |= {"kid": kid.value, "kid_error": kid.error}
    if {"precision", "recall"} & {*metrics}:
        values |= precision_recall(real, made)._asdict()
    if {"density", "coverage"} & {*metrics}:
        values |= density_coverage(real, made)._asdict()
    if "memorised" in metrics:
        memorised = memorisation(made, statistics.features.to(device))
        values["memorised"] = memorised.share
    wanted = {*metrics, *(["kid_error"] if "kid" in metrics else [])}
    if len(real) < len(made):
        notes.append(
            f"{len(made)} samples meet only {len(real)} real images: precision, recall, density "
            "and coverage are not those of equal counts"
        )
    values = {name: value for name, value in values.items() if name in wanted}
    return Figures(values, tuple(notes), memorised)


def class_labels(counts: Sequence[int], number: int) -> list[int]:
    """Classes of so many samples, in the shares of the data: that of the image at the same place
    in the data sorted by class.

    Args:
        counts: images of each class.
        number: how many samples.
    """
    places = (torch.arange(number, dtype=torch.float64) + 0.5) * (sum(counts) / number)
    ends = torch.tensor(counts, dtype=torch.float64).cumsum(0)
    found: list[int] = torch.searchsorted(ends, places, right=True).tolist()
    return found


def _small(
    data: Data,
    reading: Reading,
    sha256: str,
    weights: str | Path,
    cache: Path | None,
    device: torch.device | str,
    say: Callable[[str], None],
    look: Callable[[], None],
) -> SmallExtractor:
    """Trained by the first process, or read by it; the others are told its weights."""
    path = None if cache is None else cache / f"small-{sha256[:12]}.safetensors"

    def have(step: Callable[[], None]) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
        extractor = None
        if weights:
            extractor = SmallExtractor.load(Path(weights))
        elif path is not None and path.exists():
            try:
                extractor = SmallExtractor.load(path)
            except ValueError as error:
                say(f"{error}: it is trained anew")
        if extractor is None:
            images, labels = _shown(data, reading, step)
            say(
                f"training a small extractor on {len(images)} images of the data, which takes one "
                "core up to three minutes"
            )
            extractor = train_small(images, labels, sha256, device=device, look=step)
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                extractor.save(path)
        state = {name: tensor.cpu() for name, tensor in extractor.network.state_dict().items()}
        return state, extractor.trained

    state, facts = on_first_looking(have, look)
    from k_diffusion.evaluation.classifier import Classifier

    network = Classifier(facts["channels"], facts["outputs"])
    network.load_state_dict(dict(state))
    return SmallExtractor(network, facts, device)


def _shown(data: Data, reading: Reading, step: Callable[[], None]) -> tuple[Tensor, Tensor]:
    """What a small extractor is trained on, at its size: images and classes."""
    wanted = spread(len(data), TRAINED_ON)
    if not bool(torch.isin(wanted, torch.cat(reading.parts)).all()):
        reading = Reading(data, wanted, wanted)  # fewer images are measured than are learned from
    images, labels = [], []
    for k in range(len(reading.parts)):
        found = reading.shown(k)
        images.append(found.images)
        labels.append(found.labels)
        step()
    return torch.cat(images), torch.cat(labels)
