"""What a run has told of itself: its metrics file, read back. Needs neither torch nor pydantic.

Of the lines those hold that stand: where a run went back to a checkpoint, what it had told of the
steps after that is left out, and of two lines of the same images the last one counts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

METRICS = "metrics.jsonl"
"""The file's name in a run's folder."""


class HistoryError(ValueError):
    """There is no run to read of; the message is one line."""


@dataclass(frozen=True)
class TrainLine:
    """A "train" line. What an older run did not tell is None or empty.

    Attributes:
        step, images_seen: the clock.
        loss, grad_norm: means since the line before; None: no step was finite.
        lr: learning rate.
        ema_decay: what a step keeps of the main average.
        skipped_steps: since the start of the run.
        images_per_second: the speed.
        terms: name -> mean of what the loss is made of.
        bands: mean loss in each band of noise levels, noiseless to noisy; None: no sample.
        noise_scale: the gradient noise scale in images.
    """

    step: int
    images_seen: int
    loss: float | None = None
    grad_norm: float | None = None
    lr: float | None = None
    ema_decay: float | None = None
    skipped_steps: int = 0
    images_per_second: float | None = None
    terms: Mapping[str, float] = field(default_factory=dict)
    bands: tuple[float | None, ...] = ()
    noise_scale: float | None = None


@dataclass(frozen=True)
class Event:
    """Any other line but the first.

    Attributes:
        kind: such as "spike", "skipped", "roll_back", "end".
        images_seen: when.
        facts: the rest of the line.
        stands: whether the run kept the steps that this was on, or gave them up by going back.
    """

    kind: str
    images_seen: int
    facts: Mapping[str, Any]
    stands: bool = True


class Judge(NamedTuple):
    """By what figures were found; those of different ones do not compare.

    Attributes:
        extractor: of the features.
        samples: how many were drawn.
        data: the beginning of the hash of the real images; empty where the line does not say it.
    """

    extractor: str
    samples: int
    data: str = ""


@dataclass(frozen=True)
class History:
    """A run, as its metrics file has it.

    Attributes:
        path: the file.
        start: the first line: config, data, parameters, versions, band_edges.
        lines: the train lines that stand, by images seen.
        events: all others, in the order in which they came.
        unreadable: how many lines were cut, or are no line of a run.
    """

    path: Path
    start: Mapping[str, Any]
    lines: tuple[TrainLine, ...]
    events: tuple[Event, ...]
    unreadable: int = 0

    @property
    def config(self) -> Mapping[str, Any]:
        """The run's config in full, as plain data; empty where the first line is lost."""
        return _mapping(self.start.get("config"))

    @property
    def data(self) -> Mapping[str, Any]:
        """What the run found of its data: shape, images, mean, std..."""
        return _mapping(self.start.get("data"))

    @property
    def band_edges(self) -> tuple[float, ...]:
        """The sigmas between the bands of noise levels, rising; empty where none are told."""
        edges = self.start.get("band_edges")
        if not isinstance(edges, list) or any(_number(edge) is None for edge in edges):
            return ()
        return tuple(map(float, edges))

    @property
    def images_seen(self) -> int:
        """The clock at the last line."""
        return self.lines[-1].images_seen if self.lines else 0

    @property
    def batch_size(self) -> int:
        """Images a step; 0 where neither config nor lines tell."""
        size = self.config.get("batch_size")
        if isinstance(size, int):
            return size
        last = self.lines[-1] if self.lines else None
        return last.images_seen // last.step if last and last.step else 0

    def setting(self, key: str, default: Any = None) -> Any:
        """A value of the config by its dotted key, such as "optimizer.lr"."""
        value: Any = self.config
        for part in key.split("."):
            if not isinstance(value, Mapping) or part not in value:
                return default
            value = value[part]
        return value

    def figures(self) -> dict[Judge, dict[str, list[tuple[int, float]]]]:
        """What evaluations have found: by whom, name of the figure -> (images seen, value), rising.

        Those stand that the run has not given up by going back; of two of the same time the last.
        """
        standing: dict[int, Mapping[str, Any]] = {}
        for event in self.of_kind("evaluate"):
            if event.stands:
                standing[event.images_seen] = event.facts
        found: dict[Judge, dict[str, list[tuple[int, float]]]] = {}
        for images in sorted(standing):
            facts = standing[images]
            judge = Judge(
                str(facts.get("extractor")),
                int(_number(facts.get("samples")) or 0),
                str(facts.get("data", "")),
            )
            for name, given in _mapping(facts.get("figures")).items():
                if (value := _number(given)) is not None:
                    found.setdefault(judge, {}).setdefault(name, []).append((images, value))
        return found

    def of_kind(self, *kinds: str) -> list[Event]:
        """The events of some kinds, in order."""
        return [event for event in self.events if event.kind in kinds]


def read_history(run: str | Path) -> History:
    """Read a run's metrics.

    Args:
        run: its folder, or the file itself.

    Raises:
        HistoryError: there is no such folder or file, or it holds nothing of a run.
    """
    path = Path(run)
    if path.is_dir():
        path = path / METRICS
    if not path.is_file():
        reason = "there is no such folder" if not Path(run).exists() else f"it holds no {METRICS}"
        raise HistoryError(f"{run} is no run ({reason}): give the folder that a run has as its out")
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise HistoryError(f"{path} cannot be read ({error.strerror})") from None
    facts, unreadable = [], 0
    for line in text.splitlines():
        if (fact := _fact(line)) is None:
            unreadable += bool(line.strip())
        else:
            facts.append(fact)
    if not facts:
        raise HistoryError(f"{path} holds no line of a run: give the folder of one that has begun")
    return _standing(path, facts, unreadable)


def _standing(path: Path, facts: Sequence[dict[str, Any]], unreadable: int) -> History:
    start: dict[str, Any] = {}
    lines: dict[int, TrainLine] = {}
    events: list[Event] = []
    for fact in facts:
        kind, images = fact["event"], fact.get("images_seen", 0)
        if kind == "start":
            start = start or fact
        elif kind == "train":
            lines[images] = _train_line(fact)
        else:
            rest = {k: v for k, v in fact.items() if k not in ("event", "images_seen")}
            if kind == "roll_back":
                lines = {seen: line for seen, line in lines.items() if seen <= images}
                events = [_given_up(event, images) for event in events]
            events.append(Event(kind, images, rest))
    ordered = tuple(lines[seen] for seen in sorted(lines))
    return History(path, start, ordered, tuple(events), unreadable)


def _given_up(event: Event, images: int) -> Event:
    stands = event.stands and (event.images_seen <= images or event.kind == "roll_back")
    return Event(event.kind, event.images_seen, event.facts, stands)


def _fact(line: str) -> dict[str, Any] | None:
    """A line as a run writes it; None for any other."""
    try:
        fact = json.loads(line)
    except (json.JSONDecodeError, RecursionError):
        return None
    if not isinstance(fact, dict) or not isinstance(fact.get("event"), str):
        return None
    images = fact.get("images_seen", None if fact["event"] == "train" else 0)
    step = fact.get("step", None if fact["event"] == "train" else 0)
    whole = all(type(value) is int for value in (images, step))
    return fact if whole else None


def _train_line(fact: Mapping[str, Any]) -> TrainLine:
    bands, terms = fact.get("bands"), _mapping(fact.get("terms"))
    return TrainLine(
        step=fact["step"],
        images_seen=fact["images_seen"],
        skipped_steps=int(_number(fact.get("skipped_steps")) or 0),
        terms={
            name: value for name, given in terms.items() if (value := _number(given)) is not None
        },
        bands=tuple(map(_number, bands)) if isinstance(bands, list) else (),
        **{
            name: _number(fact.get(name))
            for name in ("loss", "grad_norm", "lr", "ema_decay", "images_per_second", "noise_scale")
        },
    )


def _number(value: Any) -> float | None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def series(lines: Sequence[TrainLine], name: str) -> Iterator[tuple[int, float]]:
    """(images seen, value) of an attribute of train lines, where there is one."""
    for line in lines:
        value = getattr(line, name)
        if value is not None:
            yield line.images_seen, value
