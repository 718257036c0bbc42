"""What is off by a run's own metrics. Needs no torch.

Each check is a function of the history that gives a finding, or None where all is well, or raises
`NotSeen`. docs/watching.md has the thresholds.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence

from k_diffusion.training.doctor.finding import Finding, NotSeen
from k_diffusion.training.history import History, TrainLine, series
from k_diffusion.training.lengths import main_age

LINES = 20
"""Train lines that a course is judged by, at least."""
PARTS = 10
"""Of the run, each with as many lines, whose means are compared."""
RISE = 0.05
"""A loss rises by more than this share of its lowest part..."""
ERRORS = 4.0
"""...and by more than so many standard errors."""
SKIPPED = 0.001
"""Share of the steps that may be skipped; up to `SKIPPED_FREE` in any case."""
SKIPPED_FREE = 3
CLIPPED = 0.9
"""Share of the lines whose gradient's norm lies above grad_clip."""
SIGMA_DATA = 1.25
"""Factor between sigma_data and the data's standard deviation."""
SCALES = 0.25, 4.0
"""The data's standard deviation where the prediction has no sigma_data, but takes it for near 1."""
MEAN = 1.0
"""The data's mean, in its standard deviations."""
TOO_LONG, TOO_SHORT = 0.25, 0.005
"""Mean age of the weights in the average, as a share of the images seen."""
STEPS = 200
"""Steps before which averages and bands say nothing."""
FLAT, FALLEN = 0.05, 0.2
"""A band is flat that fell by less than the first share, where the whole loss fell by the other."""
FIRST = 50
"""The step of the first line after which the beginning is not told of."""
BATCH = 4.0
"""Factor between batch size and gradient noise scale."""
BAD_FILES = 0.01
"""Share of the files that may be broken."""


def diverging(history: History) -> Finding | None:
    """Roll-backs, spikes, and a loss that rises."""
    lr = history.setting("optimizer.lr")
    lower = (
        f"optimizer.lr = {lr / 2:g}" if isinstance(lr, (int, float)) else "half the optimizer.lr"
    )
    backs, broken = history.of_kind("roll_back"), history.of_kind("diverged")
    spikes = [event for event in history.of_kind("spike") if event.stands]
    figures = {"roll_backs": len(backs), "diverged": len(broken), "spikes": len(spikes)}
    if backs or broken:
        at = (broken or backs)[0].images_seen
        went = f"went back {_times(len(backs))}" if backs else "did not go back"
        change = lower
        if not backs and not history.setting("spikes.roll_back", False):
            change += ", and spikes.roll_back = true with a checkpoint_every_images"
        return Finding(
            f"the run diverged {_times(max(len(broken), len(backs)))}, first at {at:,} images, and "
            f"{went}",
            change,
            figures,
        )
    losses = _losses(history)
    if len(losses) >= LINES and (rise := _rise(losses)) is not None:
        least, last, errors = rise
        return Finding(
            f"the loss rises: its last tenth is {last:.4g} in the mean, after a tenth of "
            f"{least:.4g} ({errors:.0f} standard errors)",
            lower,
            {**figures, "lowest_tenth": least, "last_tenth": last, "standard_errors": errors},
        )
    if len(spikes) >= 3:
        return Finding(
            f"{len(spikes)} losses were spikes, the last at {spikes[-1].images_seen:,} images",
            f"{lower}, or a longer optimizer.warmup_images, or a lower grad_clip",
            figures,
        )
    if len(losses) < LINES:
        raise NotSeen(f"{len(losses)} train lines, and a course takes {LINES}: {_MORE_LINES}")
    return None


_MORE_LINES = "train on, or set a lower log_every_images"


def skipped(history: History) -> Finding | None:
    """Steps that were not finite."""
    last = _last(history)
    count, allowed = last.skipped_steps, max(SKIPPED_FREE, SKIPPED * last.step)
    if count <= allowed:
        return None
    places = Counter(str(e.facts.get("where", "?")) for e in history.of_kind("skipped"))
    where, often = places.most_common(1)[0] if places else ("?", 0)
    images = [name for e in history.of_kind("skipped") for name in e.facts.get("images", ())]
    if where == "the data":
        named = ", ".join(dict.fromkeys(map(str, images[:3])))
        change = f"look at the data ({named}): take out what is not finite"
    elif history.setting("precision") == "fp16":
        change = "precision = 'bf16', whose numbers reach as far as float32's"
    else:
        lr = history.setting("optimizer.lr")
        change = f"optimizer.lr = {lr / 2:g}" if lr else "half the optimizer.lr"
        change += ", or precision = 'no' where it is another"
    return Finding(
        f"{count} of {last.step} steps were skipped as not finite; most often ({often} of those "
        f"told) it began in {where}",
        change,
        {"skipped": count, "steps": last.step, "allowed": allowed, "where": where},
    )


def clipping(history: History) -> Finding | None:
    """A gradient that is clipped nearly always."""
    clip = history.setting("grad_clip")
    if clip is None and "grad_clip" in history.config:
        return None
    norms = [norm for _, norm in series(history.lines, "grad_norm")]
    norms = norms[len(norms) // 2 :]
    if len(norms) < LINES // 2 or clip is None:
        raise NotSeen(f"{len(norms)} lines in the run's later half: {_MORE_LINES}")
    share = sum(norm > clip for norm in norms) / len(norms)
    if share <= CLIPPED:
        return None
    usual = statistics.median(norms)
    return Finding(
        f"the gradient's norm lies above grad_clip = {clip:g} in {share:.0%} of the later half's "
        f"lines (it is {usual:.3g} usually), so that clipping decides the length of the steps",
        f"grad_clip = {_two_digits(2 * usual)}, twice the usual norm",
        {"grad_clip": clip, "share": share, "median_norm": usual},
    )


def statistics_of_data(history: History) -> Finding | None:
    """Data whose mean and standard deviation are not what the network is built for."""
    mean, std = history.data.get("mean"), history.data.get("std")
    if not isinstance(mean, (int, float)) or not isinstance(std, (int, float)):
        raise NotSeen("the run's first line has no mean and std of its data")
    sigma_data, prediction = (
        history.setting("model.sigma_data"),
        history.setting("model.prediction"),
    )
    figures = {"mean": mean, "std": std, "sigma_data": sigma_data, "prediction": prediction}
    if std <= 0:
        return Finding("all values of the data are equal", "other data", figures)
    if prediction == "edm" and isinstance(sigma_data, (int, float)):
        if not 1 / SIGMA_DATA <= sigma_data / std <= SIGMA_DATA:
            return Finding(
                f"the data's standard deviation is {std:.3g}, but the network is scaled for "
                f"sigma_data = {sigma_data:.3g}",
                f"a new run with model.sigma_data = 'auto' (here {std:.4g})",
                figures,
            )
    elif not SCALES[0] <= std <= SCALES[1]:
        return Finding(
            f"the data's standard deviation is {std:.3g}, but {prediction or 'this prediction'} "
            "and its noise levels are made for data near 1",
            f"data divided by {std:.3g}, or model.prediction = 'edm' with model.sigma_data = "
            "'auto'",
            figures,
        )
    if abs(mean) > MEAN * std:
        return Finding(
            f"the data's mean is {mean:.3g}, above its standard deviation {std:.3g}: networks are "
            "scaled for a mean near 0",
            "data less its mean",
            figures,
        )
    return None


def average_length(history: History) -> Finding | None:
    """A main average that reaches too far back, or not far enough."""
    last = _last(history)
    if last.step < STEPS:
        raise NotSeen(f"after {last.step} steps no average has a length to judge; {STEPS} do")
    age = main_age(history)
    if last.ema_decay is None or not age:
        raise NotSeen("the metrics do not tell the average's decay")
    share = age / last.images_seen
    steps = last.images_seen / history.batch_size
    # The decay whose average is a tenth of the run long: about 1 / (1 - d) steps.
    tenth = f"ema.max_decay = {1 - 10 / steps:.4g}" if steps > 20 else "a longer run"
    figures = {"age": age, "images_seen": last.images_seen, "share": share}
    told = f"the average's weights are {age:,.0f} images old in the mean, {share:.2g} of the run"
    if share > TOO_LONG:
        return Finding(
            f"{told} so far: it still holds weights of the run's beginning",
            f"{tenth} (a tenth of the run), or a longer run",
            figures,
        )
    if share < TOO_SHORT:
        return Finding(
            f"{told} so far: it smooths little",
            f"{tenth} (a tenth of the run), or ema.profiles = [0.05, 0.1], lengths that grow with "
            "the run",
            figures,
        )
    return None


def flat_bands(history: History) -> Finding | None:
    """Bands of noise levels in which nothing is learned."""
    if history.setting("init_from") is not None:
        raise NotSeen("the run began with trained weights (init_from): its first lines tell little")
    if "denoising" in (history.lines[-1].terms if history.lines else {}):
        raise NotSeen("the bands have a learned or an added loss in them, which need not fall")
    lines = [line for line in history.lines if line.bands and line.loss is not None]
    edges = history.band_edges
    if not lines or len(edges) + 1 != len(lines[-1].bands):
        raise NotSeen("the metrics tell no loss by noise level: they are of an older version")
    if len(lines) < LINES or lines[-1].step < STEPS:
        raise NotSeen(
            f"{len(lines)} lines over {lines[-1].step} steps, and {LINES} over {STEPS} tell: "
            f"{_MORE_LINES}"
        )
    first, last = lines[:2], lines[-max(2, len(lines) // PARTS) :]
    whole = _fall([line.loss for line in first], [line.loss for line in last])
    falls = [
        _fall([line.bands[k] for line in first], [line.bands[k] for line in last])
        for k in range(len(edges) + 1)
    ]
    figures = {"fallen": falls, "whole": whole, "edges": list(edges)}
    if whole is None or whole < FALLEN:
        if lines[0].step > FIRST:
            raise NotSeen(
                f"the first line is {lines[0].step} steps in, when much was learned already: a "
                "lower log_every_images tells more"
            )
        share = "nothing" if whole is None or whole <= 0 else f"{whole:.0%}"
        return Finding(
            f"the loss has fallen by {share} since the run began, less than {FALLEN:.0%}",
            "a higher optimizer.lr where nothing is off above, else a longer run",
            figures,
        )
    flat = [k for k, fall in enumerate(falls) if fall is not None and fall < FLAT]
    if not flat:
        return None
    names = ", ".join(_band(edges, k) for k in flat)
    middle = "higher" if flat[0] >= len(falls) // 2 else "lower"
    density = "a loss.density with more of them"
    if history.setting("model.prediction") == "edm":
        density = f"loss.density = 'lognormal' with a {middle} loss.density_options.mean"
    return Finding(
        f"the loss is flat (fallen by less than {FLAT:.0%}) at noise levels sigma {names}, while "
        f"as a whole it fell by {whole:.0%}",
        f"loss.uncertainty = true, which brings all levels to equal say, or {density}",
        figures,
    )


def batch_size(history: History) -> Finding | None:
    """A batch far from the gradient noise scale."""
    lines = list(series(history.lines, "noise_scale"))
    if not lines:
        raise NotSeen(
            "the gradient noise scale is not measured: noise_scale_decay = 0.99 does, with a "
            "micro_batch_size below the batch_size or several processes"
        )
    later = lines[-max(1, len(lines) // 4) :]
    scale, size = statistics.median(value for _, value in later), history.batch_size
    figures = {"noise_scale": scale, "batch_size": size}
    said = f"the gradient noise scale is {scale:.3g} images, and batch_size is {size}"
    if not size:
        raise NotSeen("the metrics do not tell the batch size")
    if size * BATCH < scale:
        return Finding(
            f"{said}: each step is mostly noise",
            f"batch_size = {_power_of_two(scale / 2)}, with micro_batch_size = 'auto' where memory "
            "is short",
            figures,
        )
    if size > BATCH * scale:
        return Finding(
            f"{said}: smaller batches would learn nearly as much a step",
            f"batch_size = {_power_of_two(2 * scale)}: more steps from as many images, with a "
            "lower optimizer.lr",
            figures,
        )
    return None


def broken_files(history: History) -> Finding | None:
    """Files of the data that could not be read."""
    ends = history.of_kind("end")
    if not ends:
        raise NotSeen("the run has not ended, and tells its broken files at its end")
    bad = ends[-1].facts.get("bad_files")
    bad, good = bad if isinstance(bad, dict) else {}, history.data.get("images")
    if not isinstance(good, int):
        raise NotSeen("the run's first line does not tell how many images there are")
    share = len(bad) / max(good, 1)
    if share <= BAD_FILES:
        return None
    name, reason = next(iter(bad.items()))
    return Finding(
        f"{len(bad)} files of the data are broken, for {good:,} images; such as {name} ({reason})",
        "mend or remove them: they are named in the last line of metrics.jsonl",
        {"broken": len(bad), "images": good, "share": share},
    )


def broken_off(history: History) -> Finding | None:
    """An error that ended the last session."""
    ends = history.of_kind("end")
    reason = ends[-1].facts.get("reason") if ends else None
    if reason is None:
        return None
    last = ends[-1]
    checkpoint = last.facts.get("checkpoint")
    on = f"; --resume goes on from {checkpoint}" if checkpoint else ""
    return Finding(
        f"an error ended it at {last.images_seen:,} images: {reason}",
        f"put that right{on}",
        {"reason": reason, "images_seen": last.images_seen, "checkpoint": checkpoint},
    )


CHECKS: dict[str, Callable[[History], Finding | None]] = {
    "diverging": diverging,
    "skipped steps": skipped,
    "gradient clipping": clipping,
    "data statistics": statistics_of_data,
    "length of the average": average_length,
    "loss by noise level": flat_bands,
    "batch size": batch_size,
    "broken files": broken_files,
    "broken off": broken_off,
}
"""Name -> check, in the order in which they are told."""


# ---------------------------------------------------------------- their parts


def _last(history: History) -> TrainLine:
    if not history.lines:
        raise NotSeen("the run has no train line yet")
    return history.lines[-1]


def _losses(history: History) -> list[float]:
    """The denoising loss where it is a part of what is made small, else that."""
    found = []
    for line in history.lines:
        value = line.terms.get("denoising", line.loss)
        if value is not None:
            found.append(value)
    return found


def _rise(losses: Sequence[float]) -> tuple[float, float, float] | None:
    """The lowest mean of a part, that of the last, and their distance in standard errors, where it
    is out of the ordinary.

    A line's noise is measured by differences of lines beside each other, which a course does not
    touch: their median size over 0.6745 √2, the standard deviation of a Gaussian's.
    """
    size = len(losses) // PARTS
    parts = [losses[len(losses) - (k + 1) * size : len(losses) - k * size] for k in range(PARTS)]
    means = [statistics.fmean(part) for part in parts]
    last, least = means[0], min(means[1:])
    steps = [abs(b - a) for a, b in itertools.pairwise(losses)]
    noise = statistics.median(steps) / (0.6745 * math.sqrt(2))
    error = noise * math.sqrt(2 / size)
    rise = last - least
    if rise <= RISE * abs(least) or rise <= ERRORS * error:
        return None
    return least, last, rise / error if error else math.inf


def _fall(first: Sequence[float | None], last: Sequence[float | None]) -> float | None:
    """By which share of it the mean fell."""
    before = [value for value in first if value is not None]
    after = [value for value in last if value is not None]
    if not before or not after or statistics.fmean(before) <= 0:
        return None
    return 1 - statistics.fmean(after) / statistics.fmean(before)


def _band(edges: Sequence[float], k: int) -> str:
    if k == len(edges):
        return f"above {edges[-1]:.2g}"
    return f"{edges[k - 1]:.2g} to {edges[k]:.2g}" if k else f"below {edges[0]:.2g}"


def _times(count: int) -> str:
    return "once" if count == 1 else "twice" if count == 2 else f"{count} times"


def _two_digits(value: float) -> str:
    return f"{float(f'{value:.2g}'):g}"


def _power_of_two(value: float) -> int:
    return int(2 ** max(0, round(math.log2(value))))
