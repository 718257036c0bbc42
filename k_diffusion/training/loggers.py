"""Other places to which a run tells the facts of its metrics: TensorBoard, Weights & Biases.

Their packages are imported only where a config names them. What they are told is what a line of
`metrics.jsonl` holds, at the time of its images seen; a logger that fails in mid-run ends nothing.

To add one, write a class here and enter it in `LOGGERS`, and its name in `TrainConfig.loggers`.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from k_diffusion.training.config import ConfigError
from k_diffusion.utils.words import reason_of

if TYPE_CHECKING:
    from torch import Tensor

    from k_diffusion.training.config import TrainConfig

SUMMARY_FOLDER = "tensorboard"
"""In the run's folder, for TensorBoard."""
RUN_ID = "wandb-id"
"""The file in the run's folder that keeps by which name Weights & Biases knows the run."""


class Logger(Protocol):
    """Takes what a run tells of itself."""

    def fact(self, event: str, facts: Mapping[str, Any]) -> None:
        """A line of the metrics."""
        ...

    def picture(self, images_seen: int, image: Tensor) -> None:
        """A preview: uint8, shape (channels, height, width)."""
        ...

    def flush(self) -> None:
        """Make what was told last."""
        ...

    def close(self) -> None:
        """The session is over."""
        ...


def numbers(event: str, facts: Mapping[str, Any]) -> dict[str, float]:
    """What can be drawn over time in a line: name -> value; lists and tables item by item.

    The losses by noise level are bands/0 (noiseless), bands/1..., those of terms terms/<name>, what
    an evaluation found figures/<name>.
    """
    if event == "evaluate":
        return dict(_flat({"figures": facts["figures"] or {}}))
    if event == "spike":
        return {"spike": float(facts["loss"])}
    if event != "train":
        return {}
    return dict(_flat({k: v for k, v in facts.items() if k not in ("step", "images_seen")}))


def _flat(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{name}/")
        elif isinstance(value, (list, tuple)):
            yield from _flat({str(k): one for k, one in enumerate(value)}, f"{above}{name}/")
        elif isinstance(value, (int, float)) and math.isfinite(value):
            yield above + name, float(value)


class TensorBoard:
    """Event files in the folder `tensorboard` of a run.

    Where a run goes on, and where it goes back, points from after that time are purged: a new event
    file begins, before which TensorBoard drops them.
    """

    package = "tensorboard"
    module = "torch.utils.tensorboard"

    def __init__(self, config: TrainConfig, images_seen: int, going_on: bool) -> None:
        self._folder = Path(config.out) / SUMMARY_FOLDER
        if not going_on:
            for old in self._folder.glob("events.out.tfevents.*"):
                old.unlink(missing_ok=True)
        self._open(images_seen if going_on else None)
        if not going_on:
            self._writer.add_text("config", _as_text(config.to_json()), 0)

    def _open(self, images_seen: int | None) -> None:
        module: Any = importlib.import_module(self.module)
        purge = None if images_seen is None else images_seen + 1
        self._writer: Any = module.SummaryWriter(log_dir=str(self._folder), purge_step=purge)

    def fact(self, event: str, facts: Mapping[str, Any]) -> None:
        """See `Logger`."""
        at = int(facts.get("images_seen", 0))
        for name, value in numbers(event, facts).items():
            self._writer.add_scalar(name, value, at)
        if event == "roll_back":
            self._writer.close()
            self._open(at)
        if event not in ("start", "train"):
            self._writer.add_text(event, _as_text(facts), at)

    def picture(self, images_seen: int, image: Tensor) -> None:
        """See `Logger`."""
        self._writer.add_image("preview", image[:3] if len(image) > 2 else image[:1], images_seen)

    def flush(self) -> None:
        """See `Logger`."""
        self._writer.flush()

    def close(self) -> None:
        """See `Logger`."""
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, which a resumed run goes on with.

    Its steps are images seen and can only grow: what is told again of a time that it has is left
    out. So a resumed run doubles nothing, and where a run goes back, what it had told of the steps
    that it gave up stays there. WANDB_MODE, WANDB_ENTITY and its like hold as ever.
    """

    package = "wandb"
    module = "wandb"

    def __init__(self, config: TrainConfig, images_seen: int, going_on: bool) -> None:
        self._module: Any = importlib.import_module(self.module)
        out = Path(config.out)
        file = out / RUN_ID
        known = file.read_text(encoding="utf-8").strip() if going_on and file.exists() else ""
        self._run: Any = self._module.init(
            project=config.wandb_project,
            name=out.name,
            dir=str(out),
            id=known or None,
            resume="allow",
            config=config.to_json(),
            settings=self._module.Settings(console="off"),
        )
        file.write_text(f"{self._run.id}\n", encoding="utf-8")
        # A run that was killed may have been told of later steps; offline there is no asking.
        self._next = max(images_seen + 1, int(self._run.step or 0)) if known else 0

    def fact(self, event: str, facts: Mapping[str, Any]) -> None:
        """See `Logger`."""
        self._tell(int(facts.get("images_seen", 0)), numbers(event, facts))

    def picture(self, images_seen: int, image: Tensor) -> None:
        """See `Logger`."""
        pixels = image.permute(1, 2, 0).numpy()
        pixels = pixels[..., :3] if pixels.shape[2] > 2 else pixels[..., 0]
        self._tell(images_seen, {"preview": self._module.Image(pixels)})

    def _tell(self, images_seen: int, values: Mapping[str, Any]) -> None:
        if values and images_seen >= self._next:
            self._run.log(dict(values), step=images_seen)
            self._next = images_seen  # one time may be told of more than once

    def flush(self) -> None:
        """See `Logger`."""

    def close(self) -> None:
        """See `Logger`."""
        self._run.finish()


LOGGERS: dict[str, Any] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}
"""Name in `TrainConfig.loggers` -> class."""


def check_loggers(names: Sequence[str]) -> None:
    """Refuse loggers whose packages are missing, before anything is trained.

    Raises:
        ConfigError: one is.
    """
    for name in names:
        kind = LOGGERS[name]
        try:
            importlib.import_module(kind.module)
        except ImportError as error:
            reason = f" ({error.name} is missing)" if error.name != kind.package else ""
            raise ConfigError(
                f"loggers has {name!r}, but the package {kind.package} cannot be imported{reason}: "
                f"pip install {kind.package}, or leave it out"
            ) from None


class Loggers:
    """All of a run's. One that fails is told of once, and no more facts after that.

    Args:
        config: of the run.
        images_seen: where the session begins.
        going_on: whether the run's own folder has it, so that what was told before stays.
        say: takes lines of news.

    Raises:
        ConfigError: one cannot begin.
    """

    def __init__(
        self, config: TrainConfig, images_seen: int, going_on: bool, say: Callable[[str], None]
    ) -> None:
        self._say = say
        self._open: dict[str, Logger] = {}
        name = ""
        try:
            for name in config.loggers:
                self._open[name] = LOGGERS[name](config, images_seen, going_on)
        except Exception as error:  # of a foreign package, which may raise anything
            self.close()
            raise ConfigError(
                f"loggers has {name!r}, which cannot begin ({reason_of(error)}): leave it out, or "
                "put that right"
            ) from None

    def fact(self, event: str, facts: Mapping[str, Any]) -> None:
        """A line of the metrics."""
        self._each(lambda logger: logger.fact(event, facts))

    def picture(self, images_seen: int, image: Tensor) -> None:
        """A preview."""
        self._each(lambda logger: logger.picture(images_seen, image))

    def flush(self) -> None:
        """Make what was told last, before a checkpoint that counts on it."""
        self._each(lambda logger: logger.flush())

    def close(self) -> None:
        """The session is over."""
        self._each(lambda logger: logger.close())
        self._open.clear()

    def _each(self, tell: Callable[[Logger], None]) -> None:
        for name in list(self._open):
            self._one(name, tell)

    def _one(self, name: str, tell: Callable[[Logger], None]) -> None:
        try:
            tell(self._open[name])
        except Exception as error:
            del self._open[name]
            self._say(
                f"{name} fails ({reason_of(error)}): it is told nothing more in this session; "
                "metrics.jsonl has all of it"
            )


def _as_text(facts: Mapping[str, Any]) -> str:
    """JSON, as a block that TensorBoard's Markdown leaves as it is."""
    lines = json.dumps(facts, indent=1, default=str).splitlines()
    return "\n".join(f"    {line}" for line in lines)
