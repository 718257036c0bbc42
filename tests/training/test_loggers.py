"""What other loggers are told: the facts of the metrics, none twice; and none ends a run.

TensorBoard and wandb are stood in for by modules of the same functions; where the real ones are
installed, the last tests take them too.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from k_diffusion.training.check import check_run
from k_diffusion.training.config import ConfigError, TrainConfig
from k_diffusion.training.dataset import ArraySource, Digits, Stream
from k_diffusion.training.loggers import RUN_ID, SUMMARY_FOLDER, Loggers, check_loggers, numbers
from k_diffusion.training.run import RunResult, run_training

MakeConfig = Callable[..., TrainConfig]


class Writers:
    """Stands for torch.utils.tensorboard: what each SummaryWriter was told, in order."""

    def __init__(self) -> None:
        self.made: list[Any] = []
        self.fails_at: int | None = None
        outer = self

        class SummaryWriter:
            def __init__(self, log_dir: str, purge_step: int | None = None) -> None:
                Path(log_dir).mkdir(parents=True, exist_ok=True)
                (Path(log_dir) / f"events.out.tfevents.{len(outer.made)}").write_text("x")
                self.folder, self.purge, self.closed = log_dir, purge_step, False
                self.scalars: list[tuple[int, str, float]] = []
                self.texts: list[tuple[int, str]] = []
                self.images: list[tuple[int, tuple[int, ...]]] = []
                outer.made.append(self)

            def add_scalar(self, name: str, value: float, step: int) -> None:
                if step == outer.fails_at:
                    raise OSError(28, "No space left on device")
                self.scalars.append((step, name, value))

            def add_text(self, name: str, text: str, step: int) -> None:
                self.texts.append((step, name))

            def add_image(self, name: str, image: torch.Tensor, step: int) -> None:
                assert image.dtype == torch.uint8
                self.images.append((step, tuple(image.shape)))

            def flush(self) -> None:
                pass

            def close(self) -> None:
                self.closed = True

        self.SummaryWriter = SummaryWriter


class Wandb:
    """Stands for wandb and its server, which keeps runs by id and refuses steps that go back."""

    __spec__ = ModuleSpec("wandb", None)  # which accelerate looks for

    def __init__(self) -> None:
        self.begun: list[dict[str, Any]] = []
        self.runs: dict[str, list[tuple[int, dict[str, Any]]]] = {}
        self.finished = 0

    def Settings(self, **settings: Any) -> dict[str, Any]:
        return settings

    def Image(self, pixels: Any) -> tuple[int, ...]:
        return tuple(pixels.shape)

    def init(self, **options: Any) -> Any:
        self.begun.append(options)
        name = options["id"] or f"id{len(self.runs)}"
        rows = self.runs.setdefault(name, [])

        def log(values: dict[str, Any], step: int) -> None:
            assert not rows or step >= rows[-1][0], "wandb would drop this"
            rows.append((step, values))

        def finish() -> None:
            self.finished += 1

        step = rows[-1][0] + 1 if rows else 0
        return SimpleNamespace(id=name, step=step, log=log, finish=finish)


@pytest.fixture
def writers(monkeypatch: pytest.MonkeyPatch) -> Writers:
    made: Any = Writers()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", made)
    return made


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Wandb:
    made: Any = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", made)
    return made


def run(config: TrainConfig, **options: Any) -> RunResult:
    return run_training(config, **{"progress": False, "say": lambda line: None, **options})


def told_lines(result: RunResult) -> dict[int, dict[str, float]]:
    """Images seen -> the numbers of the train line."""
    facts = [json.loads(text) for text in result.metrics.read_text().splitlines()]
    return {f["images_seen"]: numbers("train", f) for f in facts if f["event"] == "train"}


def scalars(writer: Any) -> dict[int, dict[str, float]]:
    found: dict[int, dict[str, float]] = {}
    for step, name, value in writer.scalars:
        assert name not in found.setdefault(step, {}), "told twice"
        found[step][name] = value
    return found


def test_numbers_of_a_line() -> None:
    line = {"step": 3, "images_seen": 96, "loss": 0.5, "grad_norm": None, "bands": [1.0, None, 2],
            "terms": {"denoising": 0.4}, "images_per_second": 10}  # fmt: skip
    assert numbers("train", line) == {
        "loss": 0.5, "bands/0": 1.0, "bands/2": 2.0, "terms/denoising": 0.4,
        "images_per_second": 10.0,
    }  # fmt: skip
    assert numbers("train", {"loss": float("nan"), "terms": {"a": float("inf")}, "lr": 1}) == {
        "lr": 1.0
    }
    assert numbers("spike", {"loss": 3.0, "median": 1.0}) == {"spike": 3.0}
    assert numbers("end", {"seconds": 3.0}) == {}
    figures = {"step": 4, "extractor": "small-1", "figures": {"fid": 2.5, "recall": 0.5}}
    assert numbers("evaluate", figures) == {"figures/fid": 2.5, "figures/recall": 0.5}
    assert numbers("evaluate", {"figures": None, "reason": "not finite"}) == {}


def test_the_same_facts_as_the_metrics(
    make_run_config: MakeConfig, writers: Writers, wandb: Wandb
) -> None:
    config = make_run_config(
        loggers=["tensorboard", "wandb"], wandb_project="digits", preview={"every_images": 320}
    )
    result = run(config)
    (writer,) = writers.made
    assert writer.folder == str(Path(config.out) / SUMMARY_FOLDER)
    assert writer.purge is None
    assert writer.closed
    assert scalars(writer) == told_lines(result)
    assert len(told_lines(result)) == 7
    assert [step for step, _ in writer.images] == [320, 640]
    assert writer.texts == [(0, "config"), (640, "end")]
    (rows,) = wandb.runs.values()
    lines = {step: values for step, values in rows if "loss" in values}
    assert lines == told_lines(result)
    assert [step for step, values in rows if "preview" in values] == [320, 640]
    (begun,) = wandb.begun
    assert begun["project"] == "digits"
    assert begun["config"]["optimizer"]["lr"] == config.optimizer.lr
    assert wandb.finished == 1


@pytest.mark.parametrize(("channels", "shown"), [(1, 1), (2, 1), (3, 3), (4, 3)])
def test_a_preview_of_any_channels(
    make_run_config: MakeConfig, writers: Writers, wandb: Wandb, channels: int, shown: int
) -> None:
    config = make_run_config(loggers=["tensorboard", "wandb"])
    Path(config.out).mkdir(parents=True)
    loggers = Loggers(config, 0, False, lambda line: None)
    loggers.picture(32, torch.zeros(channels, 4, 6, dtype=torch.uint8))
    assert writers.made[0].images == [(32, (shown, 4, 6))]
    (rows,) = wandb.runs.values()
    assert rows == [(32, {"preview": (4, 6, 3) if shown == 3 else (4, 6)})]


def test_a_resumed_run_doubles_nothing(
    make_run_config: MakeConfig, writers: Writers, wandb: Wandb
) -> None:
    """The run ends at 640; then, as after a kill, it goes on from its checkpoint at 320."""
    config = make_run_config(
        loggers=["tensorboard", "wandb"], checkpoint_every_images=320, keep_checkpoints=9
    )
    run(config)
    file = Path(config.out) / RUN_ID
    assert file.read_text() == "id0\n"
    start = Path(config.out) / "checkpoint-000000000320.safetensors"
    said: list[str] = []
    result = run(config, resume=start, say=said.append)
    assert not [line for line in said if "fails" in line]
    first, second = writers.made
    assert second.purge == 321
    old = {step: values for step, values in scalars(first).items() if step < second.purge}
    now = scalars(second)
    assert not old.keys() & now.keys()
    told = told_lines(result)
    assert set(old) | set(now) == set(told)
    assert all(now[step]["loss"] == told[step]["loss"] for step in now)
    # wandb has the later ones already, as they were: they are not told again.
    assert wandb.begun[1]["id"] == "id0"
    (rows,) = wandb.runs.values()
    steps = [step for step, _ in rows]
    assert steps == sorted(set(steps)) == sorted(told)


def test_a_run_begun_anew_has_nothing_of_the_old(
    make_run_config: MakeConfig, writers: Writers, wandb: Wandb
) -> None:
    config = make_run_config(loggers=["tensorboard", "wandb"])
    run(config)
    run(config, overwrite=True)
    assert writers.made[1].purge is None
    folder = Path(config.out) / SUMMARY_FOLDER
    assert [path.name for path in folder.iterdir()] == ["events.out.tfevents.1"]
    assert wandb.begun[1]["id"] is None
    assert set(wandb.runs) == {"id0", "id1"}


def test_going_back(make_run_config: MakeConfig, writers: Writers, wandb: Wandb) -> None:
    """From step 12 to 8: TensorBoard's points after 256 are purged, wandb's stay."""
    config = make_run_config(
        loggers=["tensorboard", "wandb"],
        model={"type": "tiny", "num_classes": 10, "prediction": "flow", "time_convention": "unit"},
        spikes={"factor": 3.0, "window": 4, "patience": 3, "roll_back": True},
        checkpoint_every_images=128,
        log_every_images=96,
    )
    digits = Digits()
    stream, images = Stream(digits, 32, seed=3), digits.images.clone()
    for step in (9, 10, 11):
        images[stream[step].indices] *= 30.0
    result = run(config, source=ArraySource(images, digits.labels, digits.class_names))
    first, second = writers.made
    assert second.purge == 257
    assert [kind for _, kind in first.texts] == ["config", "spike", "spike", "spike", "diverged"]
    old = {step: values for step, values in scalars(first).items() if step < 257}
    told = told_lines(result)
    assert sorted({**old, **scalars(second)}) == [n for n in sorted(told) if n != 384]
    steps = [step for rows in wandb.runs.values() for step, _ in rows]
    assert steps == sorted(steps)
    assert steps[-1] == 640


def test_what_a_logger_does_is_nothing_to_the_run(
    make_run_config: MakeConfig, writers: Writers
) -> None:
    """One that fails in mid-run is told nothing more; the metrics have all."""
    plain = run(make_run_config())
    losses = {step: values["loss"] for step, values in told_lines(plain).items()}
    writers.fails_at = 288
    said: list[str] = []
    config = make_run_config(loggers=["tensorboard"])
    result = run(config, overwrite=True, say=said.append)
    assert {step: values["loss"] for step, values in told_lines(result).items()} == losses
    assert said == [
        "tensorboard fails ([Errno 28] No space left on device): it is told nothing more in this "
        "session; metrics.jsonl has all of it"
    ]
    assert max(step for step, _, _ in writers.made[0].scalars) == 192


@pytest.mark.parametrize(("name", "module"), [("tensorboard", "torch.utils.tensorboard"),
                                              ("wandb", "wandb")])  # fmt: skip
def test_a_missing_package_is_refused_before_training(
    make_run_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, name: str, module: str
) -> None:
    monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, name, None)
    config = make_run_config(loggers=[name])
    message = (
        f"^loggers has '{name}', but the package {name} cannot be imported.*: pip install {name}"
    )
    for begin in (run, check_run):
        with pytest.raises(ConfigError, match=message):
            begin(config)
    assert not Path(config.out).exists()
    check_loggers(())


def test_one_that_cannot_begin_is_refused(
    make_run_config: MakeConfig, writers: Writers, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken: Any = ModuleType("wandb")
    broken.__spec__ = ModuleSpec("wandb", None)
    monkeypatch.setitem(sys.modules, "wandb", broken)
    config = make_run_config(loggers=["tensorboard", "wandb"])
    with pytest.raises(ConfigError, match="^loggers has 'wandb', which cannot begin .*: leave it"):
        run(config)
    assert writers.made[0].closed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loggers": ["mlflow"]}, r"^config: loggers"),
        ({"loggers": ["wandb", "wandb"]}, r"has one twice"),
        ({"wandb_project": "a"}, r"wandb_project is for loggers = \['wandb'\]: leave it out"),
    ],
)
def test_config(make_run_config: MakeConfig, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_run_config(**changes)
    assert make_run_config().loggers == ()


# ---------------------------------------------------------------- the real ones


@pytest.mark.filterwarnings("ignore")
def test_tensorboard_itself(make_run_config: MakeConfig) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = make_run_config(
        loggers=["tensorboard"], checkpoint_every_images=320, keep_checkpoints=9,
        preview={"every_images": 320},
    )  # fmt: skip
    run(config)
    result = run(config, resume=Path(config.out) / "checkpoint-000000000320.safetensors")
    found = EventAccumulator(str(Path(config.out) / SUMMARY_FOLDER))
    found.Reload()
    points = {point.step: point.value for point in found.Scalars("loss")}
    assert len(found.Scalars("loss")) == len(points)
    expected = {step: values["loss"] for step, values in told_lines(result).items()}
    assert points == pytest.approx(expected, rel=1e-6)
    assert [image.step for image in found.Images("preview")] == [320, 640]


@pytest.mark.filterwarnings("ignore")
def test_wandb_itself_offline(make_run_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = make_run_config(
        loggers=["wandb"], wandb_project="p", checkpoint_every_images=320, keep_checkpoints=9
    )
    run(config)
    name = (Path(config.out) / RUN_ID).read_text()
    run(config, resume=Path(config.out) / "checkpoint-000000000320.safetensors")
    assert (Path(config.out) / RUN_ID).read_text() == name
    files = list(Path(config.out).glob("wandb/offline-run-*/run-*.wandb"))
    assert [file.stem for file in files] == [f"run-{name.strip()}"] * 2
