"""What a report says of a step that is not finite, and that looking changes nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from k_diffusion.training.checkpoint import read_checkpoint, read_info
from k_diffusion.training.config import TrainConfig
from k_diffusion.training.dataset import ArraySource, Batch, Digits
from k_diffusion.training.folder import Folder
from k_diffusion.training.health import BadStep, examine, first_bad_module
from k_diffusion.training.inputs import Inputs
from k_diffusion.training.parallel import Processes
from k_diffusion.training.run import RunResult, run_training
from k_diffusion.training.step_gradient import Totals
from k_diffusion.training.trainer import Trainer, TrainingError, TrainState

MakeConfig = Callable[..., TrainConfig]

FLOW = {"type": "tiny", "num_classes": 10, "prediction": "flow", "time_convention": "unit",
        "dropout": 0.2}  # fmt: skip


class Deep(nn.Module):
    """Blocks in a row, one of which may have something wrong with it."""

    num_classes = 10
    prediction = "flow"
    time_convention = "unit"

    def __init__(self, odd: nn.Module | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.Dropout(0.1)) for _ in range(4)
        )
        if odd is not None:
            self.blocks[2].append(odd)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, t: Tensor, class_label: Tensor | None = None) -> Tensor:
        self.calls += 1
        for block in self.blocks:
            x = block(x)
        return x


class Half(nn.Module):
    """Computes in float16 what is too large for it; the network goes on in float32."""

    def forward(self, x: Tensor) -> Tensor:
        return (x.half() * 6e4 * 6e4).float() * 0


class Split(nn.Module):
    """Its output is no tensor, and only a part of it not finite."""

    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"x": x, "more": (torch.arange(3), [x / 0])}


class Join(nn.Module):
    def forward(self, parts: dict[str, Any]) -> Tensor:
        return parts["x"] + parts["more"][1][0]


class Cusp(nn.Module):
    """Finite, but with an infinite slope."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + (self.scale**2).sqrt())


def first_report(config: TrainConfig, **options: Any) -> BadStep:
    trainer = Trainer(config, **options)
    state = next(state for state in trainer if state.skipped)
    assert state.report is not None
    assert state.report.step == state.step
    return state.report


def poisoned(*bad: int) -> ArraySource:
    digits = Digits()
    images = digits.images.clone()
    images[list(bad), 0, 3, 4] = math.nan
    return ArraySource(images, digits.labels, digits.class_names)


def test_the_data_is_found(make_run_config: MakeConfig) -> None:
    config = make_run_config(model=FLOW)
    trainer = Trainer(config)
    bad = int(trainer.stream[4].indices[7])
    report = first_report(config, source=poisoned(bad))
    assert (report.step, report.images, report.more_images) == (5, (f"image {bad}",), 0)
    sigma = float(trainer.inputs.draw(trainer.stream[4], 4).sigma[7])
    assert report.sigmas == (sigma, sigma)
    assert report.where == "the data"
    assert str(report) == (
        f"loss nan, gradient norm nan, from image {bad}, at sigma {sigma:.4g}; first not finite: "
        "the data"
    )


def test_a_poisoned_weight_in_a_middle_layer(make_run_config: MakeConfig) -> None:
    network = Deep()
    with torch.no_grad():
        network.blocks[2][0].weight[0, 0, 1, 1] = math.nan
    report = first_report(make_run_config(model=FLOW), network=network)
    assert report.where == "blocks.2.0 (Conv2d)"
    # All images are bad: eight are named.
    assert len(report.images) == 8
    assert report.more_images == 24
    trainer = Trainer(make_run_config(model=FLOW))
    assert report.images == tuple(f"image {i}" for i in trainer.stream[0].indices[:8].tolist())
    sigma = trainer.inputs.draw(trainer.stream[0], 0).sigma
    assert report.sigmas == (float(sigma.min()), float(sigma.max()))
    assert " and 24 more, at sigma " in str(report)


def test_an_overflow_of_half_precision(make_run_config: MakeConfig) -> None:
    report = first_report(make_run_config(model=FLOW), network=Deep(Half()))
    assert report.where == "blocks.2.2 (Half)"


def test_a_part_of_an_output(make_run_config: MakeConfig) -> None:
    odd = nn.Sequential(Split(), Join())
    report = first_report(make_run_config(model=FLOW), network=Deep(odd))
    assert report.where == "blocks.2.2.0 (Split)"


def test_the_gradient_alone(make_run_config: MakeConfig) -> None:
    report = first_report(make_run_config(model=FLOW), network=Deep(Cusp()))
    assert math.isfinite(report.loss)
    assert not math.isfinite(report.grad_norm)
    assert (report.images, report.more_images) == ((), 0)  # it is everybody's
    assert report.sigmas[0] < report.sigmas[1]
    assert report.where == "the gradient of blocks.2.2.scale"


def look(losses: list[float], network: nn.Module | None = None, **given: Any) -> BadStep:
    count = len(losses)
    inputs = Inputs(
        x0=torch.zeros(count, 1, 2, 2),
        sigma=torch.linspace(0.1, 0.5, count),
        noise=torch.zeros(count, 1, 2, 2),
        condition=given.pop("condition", {}),
        indices=torch.arange(count) + 100,
    )
    facts: dict[str, Any] = {"gradients": {}, "replay": lambda inputs: None, **given}
    return examine(
        step=3,
        loss=math.nan,
        grad_norm=1.0,
        losses=torch.tensor(losses),
        inputs=inputs,
        network=network or nn.Identity(),
        name=lambda index: f"no. {index}",
        processes=Processes(SimpleNamespace(process_index=0, num_processes=1, device="cpu")),
        **facts,
    )


def test_the_other_places() -> None:
    bad = [1.0, math.inf, 1.0, math.nan]
    condition = {"label": torch.arange(4), "text": torch.zeros(4, 3)}
    condition["text"][3, 1] = math.inf
    report = look(bad, condition=condition)
    assert report.where == "the condition text"
    assert report.images == ("no. 101", "no. 103")
    assert report.sigmas == pytest.approx((0.1 + 0.4 / 3, 0.5))
    condition["text"] = torch.full((4, 3), math.inf)
    condition["text"][[1, 3]] = 0  # of images whose loss is finite: no reason
    assert look(bad, condition=condition).where == "the loss, of a finite network output"
    assert look([1.0] * 4, gradients={"a": torch.ones(2), "b": torch.ones(2)}).where == (
        "the norm of the gradient, each part of which is finite"
    )
    report = look([1.0] * 4, gradients={"a": torch.ones(2), "b": torch.tensor([1.0, -math.inf])})
    assert report.where == "the gradient of b"
    report = look([math.nan] * 9)
    assert (len(report.images), report.more_images) == (8, 1)
    assert look([math.nan] * 8).more_images == 0


def test_json_knows_no_nan() -> None:
    facts = look([math.nan]).to_json()
    assert json.loads(json.dumps(facts, allow_nan=False)) == {
        "step": 3, "loss": "nan", "grad_norm": 1.0, "images": ["no. 100"], "more_images": 0,
        "sigmas": [pytest.approx(0.1)] * 2, "where": "the loss, of a finite network output",
    }  # fmt: skip


def test_looking_leaves_buffers_generators_and_hooks_alone() -> None:
    network = Deep(Half())
    x = torch.randn(2, 1, 4, 4)
    state = torch.get_rng_state()

    def run() -> None:
        torch.manual_seed(5)
        network(x, torch.ones(2))

    assert first_bad_module(network, run) == "blocks.2.2 (Half)"
    assert torch.equal(torch.get_rng_state(), state)
    assert network.calls == 0
    assert not any(module._forward_hooks for module in network.modules())

    def fail() -> None:
        network(x, torch.ones(2))
        raise RuntimeError("of the replay")

    with pytest.raises(RuntimeError, match="of the replay"):
        first_bad_module(network, fail)
    assert torch.equal(torch.get_rng_state(), state)
    assert network.calls == 0
    assert not any(module._forward_hooks for module in network.modules())
    assert first_bad_module(Deep().eval(), lambda: None) == ""


def contents(path: Path) -> dict[str, Tensor]:
    _, parts = read_checkpoint(path, ["model", "ema", "optimizer"])
    return {f"{part}/{n}": t for part, named in parts.items() for n, t in named.items()}


@pytest.mark.parametrize("micro_batch", [None, 12])
def test_a_run_is_bitwise_the_same_with_and_without_looking(
    make_run_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    micro_batch: int | None,
) -> None:  # fmt: skip
    """The third block's output overflows in some steps, in a network with dropout and a buffer."""

    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

        def forward(self, x: Tensor) -> Tensor:
            self.seen += 1
            chance = float(x.detach().double().abs().sum()) * 1000 % 1
            return x * (math.inf if chance < 0.3 else 1.0)

    def train(name: str) -> tuple[list[bool], list[Tensor]]:
        torch.manual_seed(1)
        config = make_run_config(model=FLOW, micro_batch_size=micro_batch)
        trainer = Trainer(config, network=Deep(Sometimes()))
        skipped, drawn = [], []
        for state in trainer:
            skipped.append(state.skipped)
            drawn.append(torch.rand(3))  # of the caller's own, between two steps
        trainer.save(tmp_path / name)
        return skipped, drawn

    def dont_look(self: Trainer, inputs: Any, losses: Any, found: Totals) -> BadStep:
        return BadStep(self.step + 1, found.loss, found.grad_norm, (), 0, (0.0, 0.0), "")

    skipped, drawn = train("a.safetensors")
    assert 3 < sum(skipped) < 17
    monkeypatch.setattr(Trainer, "_examine", dont_look)
    again, drawn_again = train("b.safetensors")
    assert skipped == again
    assert torch.equal(torch.stack(drawn), torch.stack(drawn_again))
    a, b = contents(tmp_path / "a.safetensors"), contents(tmp_path / "b.safetensors")
    assert set(a) == set(b)
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name


# ---------------------------------------------------------------- runs


def skipped_lines(result: RunResult) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in result.metrics.read_text().splitlines()]
    return [line for line in found if line["event"] == "skipped"]


def test_one_nan_image_in_200_steps(make_run_config: MakeConfig) -> None:
    config = make_run_config(model=FLOW, total_images=32 * 200)
    stream = Trainer(config).stream
    bad = 1234
    expected = [step + 1 for step in range(200) if bad in stream[step].indices]
    assert len(expected) >= 4
    said: list[str] = []
    result = run_training(config, source=poisoned(bad), progress=False, say=said.append)
    assert result.images_seen == 32 * 200
    assert result.skipped_steps == len(expected)
    assert read_info(result.checkpoint).state["skipped_steps"] == len(expected)
    assert all(t.isfinite().all() for t in contents(result.checkpoint).values())
    lines = skipped_lines(result)
    assert [line["step"] for line in lines] == expected
    assert {(*line["images"], line["where"]) for line in lines} == {("image 1234", "the data")}
    assert len(said) == len(expected)
    for step, line in zip(expected, said, strict=True):
        assert line.startswith(f"step {step} skipped as not finite: ")
        assert ", from image 1234, at sigma " in line


class FloatFolder(Folder):
    """A folder whose images come as floats, one file of which holds a nan."""

    def batch(self, indices: Tensor, seeds: Any = None) -> Batch:
        batch = super().batch(indices, seeds)
        images = batch.images.float() / 127.5 - 1
        for place, index in enumerate(batch.indices.tolist()):
            if self.files[index].name == "bad.png":
                images[place, 0, 0, 0] = math.nan
        return batch._replace(images=images)


def pictures(folder: Path) -> Path:
    from PIL import Image

    folder.mkdir()
    for i in range(40):
        Image.new("L", (8, 8), 5 * i).save(folder / f"{i}.png")
    Image.new("L", (8, 8), 77).save(folder / "bad.png")
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_is_named_by_its_path(
    make_run_config: MakeConfig, tmp_path: Path, workers: int
) -> None:
    folder = pictures(tmp_path / "pictures")
    config = make_run_config(
        model={"type": "tiny", "prediction": "v"}, batch_size=8, total_images=80, workers=workers
    )
    source = FloatFolder(folder, 8, channels=1)
    result = run_training(config, source=source, progress=False, say=lambda line: None)
    lines = skipped_lines(result)
    assert result.skipped_steps == len(lines) > 0
    assert {(*line["images"], line["where"]) for line in lines} == {
        (str(folder / "bad.png"), "the data")
    }


def test_too_many_in_a_row_end_the_run_with_the_report(make_run_config: MakeConfig) -> None:
    config = make_run_config(model=FLOW, max_skipped=4)
    steps = Trainer(config).stream
    bad = [int(steps[step].indices[0]) for step in range(6, 10)]
    seen: list[TrainState] = []
    said: list[str] = []
    with pytest.raises(TrainingError) as caught:
        run_training(
            config,
            source=poisoned(*bad),
            progress=False,
            say=said.append,
            on_step=lambda trainer, state: seen.append(state),
        )
    assert len(seen) == 10
    message = str(caught.value)
    assert message.startswith("4 steps in a row were not finite, the last at 320 images (loss nan")
    assert f"from image {bad[3]}, at sigma " in message
    assert "first not finite: the data): lower optimizer.lr (now 0.001) or look at" in message
    assert "\n" not in message
    assert len(said) == 4
