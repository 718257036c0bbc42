"""Previews: what they show, that they can be repeated, and that they change nothing of a run."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from k_diffusion.sampling import KSampler, unit_noise
from k_diffusion.training.checkpoint import read_info
from k_diffusion.training.config import ConfigError, TrainConfig
from k_diffusion.training.dataset import ArraySource, Digits, Stream
from k_diffusion.training.previews import Previews, preview_path
from k_diffusion.training.restore import load_denoiser
from k_diffusion.training.run import RunResult, run_training
from k_diffusion.training.trainer import Trainer
from k_diffusion.utils.images import image_grid, load_png
from k_diffusion.utils.scheduler import make_scheduler

from .train_briefly import assert_bitwise

MakeConfig = Callable[..., TrainConfig]
PREVIEW = {"every_images": 200, "count": 6, "steps": 4}


def run(config: TrainConfig, **options: Any) -> RunResult:
    return run_training(config, **{"progress": False, "say": lambda line: None, **options})


def files(config: TrainConfig) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(config.out, "previews").iterdir()}


def without_clock(result: RunResult) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in result.metrics.read_text().splitlines()]
    return [
        {
            k: v
            for k, v in line.items()
            if k not in ("images_per_second", "seconds", "config", "sha256")
        }
        for line in lines
    ]


def test_none_unless_asked_for(make_run_config: MakeConfig) -> None:
    config = make_run_config(total_images=64)
    run(config)
    assert not Path(config.out, "previews").exists()


def test_the_run_is_bitwise_the_same(make_run_config: MakeConfig, tmp_path: Path) -> None:
    """With dropout, a buffer that counts calls, and modules of which one evaluates in training."""
    plain = run(make_run_config())
    shown = run(make_run_config(out=str(tmp_path / "shown"), preview={**PREVIEW, "guidance": 2.0}))
    assert_bitwise(plain.checkpoint, shown.checkpoint)
    assert without_clock(plain) == without_clock(shown)


def test_nothing_of_the_network_is_left_changed(
    make_run_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(make_run_config(preview=PREVIEW))
    for _, _ in zip(range(3), trainer, strict=False):
        pass
    network: Any = trainer.network
    network.dropout.eval()  # a part that the owner has frozen
    network.register_buffer("hidden", torch.zeros(2), persistent=False)

    def count(module: Any, *_: object) -> None:
        module.hidden.add_(1)
        torch.rand(1)  # as a network may that is never told to evaluate

    network.register_forward_hook(count)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    state = torch.get_rng_state()
    images = Previews(trainer).draw()
    assert images.shape == (6, 1, 8, 8)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert torch.equal(network.hidden, torch.zeros(2))
    assert network.training
    assert network.enter.training
    assert not network.dropout.training
    assert torch.equal(Previews(trainer).draw(), images)
    # All are drawn by the main process, however many there are.
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert torch.equal(Previews(trainer).draw(), images)


def test_when(make_run_config: MakeConfig) -> None:
    """At the first step at or after each multiple of 200, and at the end."""
    config = make_run_config(preview=PREVIEW)
    run(config)
    assert sorted(files(config)) == [preview_path("", n).name for n in (224, 416, 608, 640)]


def test_what_is_drawn_can_be_drawn_again(make_run_config: MakeConfig) -> None:
    """From the checkpoint's average, by what the picture's text says."""
    config = make_run_config(preview={**PREVIEW, "count": 12, "seed": 5, "sampler": "heun"})
    result = run(config)
    grid, text = load_png(preview_path(config.out, 640))
    assert {k: v for k, v in text.items() if k not in ("config", "command")} == {
        "images seen": "640", "step": "20", "weights": "ema", "seeds": "5 to 16",
        "sampler": "heun", "scheduler": "karras", "steps": "4", "guidance": "1.0",
        "classes": "0,1,2,3,4,5,6,7,8,9,0,1",
    }  # fmt: skip
    assert json.loads(text["config"]) == read_info(result.checkpoint).config
    assert shlex.split(text["command"]) == [
        "k-diffusion", "sample", str(result.checkpoint), "--seed", "5", "--sampler", "heun",
        "--scheduler", "karras", "--steps", "4", "--guidance", "1.0", "-n", "12",
    ]  # fmt: skip
    denoiser, _ = load_denoiser(result.checkpoint)
    sampler = KSampler(denoiser, make_scheduler("karras"), "heun")
    noise = unit_noise((1, 8, 8), list(range(5, 17)))
    samples = sampler.sample(noise, 4, torch.arange(12) % 10)
    expected = image_grid(samples, columns_named=[str(k) for k in range(10)], scale=8)
    assert torch.equal(grid, expected)


def test_a_resumed_run_leaves_the_same_files(make_run_config: MakeConfig) -> None:
    config = make_run_config(preview=PREVIEW, checkpoint_every_images=320, keep_checkpoints=9)
    run(config)
    whole = files(config)
    late = preview_path(config.out, 608)
    late.write_bytes(b"of another line of steps")
    preview_path(config.out, 999).write_bytes(b"the same")
    run(config, resume=Path(config.out) / "checkpoint-000000000320.safetensors")
    assert files(config) == whole
    run(make_run_config(preview=PREVIEW, total_images=96), overwrite=True)
    assert sorted(files(config)) == [preview_path("", 96).name]


@pytest.mark.parametrize(
    ("every", "steps"),
    [(32, [*range(1, 10), *range(13, 21)]), (96, [3, 6, 9, 15, 18, 20])],
)
def test_those_of_given_up_steps_go(
    make_run_config: MakeConfig, every: int, steps: list[int]
) -> None:
    """Steps 10 to 12 are spikes: the run goes back from 384 to 256, and from there on to 416."""
    config = make_run_config(
        model={"type": "tiny", "num_classes": 10, "prediction": "flow", "time_convention": "unit"},
        spikes={"factor": 3.0, "window": 4, "patience": 3, "roll_back": True},
        checkpoint_every_images=128,
        preview={**PREVIEW, "every_images": every},
    )
    digits = Digits()
    stream, images = Stream(digits, 32, seed=3), digits.images.clone()
    for step in (9, 10, 11):
        images[stream[step].indices] *= 30.0
    run(config, source=ArraySource(images, digits.labels, digits.class_names))
    assert sorted(files(config)) == [preview_path("", 32 * step).name for step in steps]


def test_guidance_changes_the_picture(make_run_config: MakeConfig) -> None:
    one = Trainer(make_run_config(preview=PREVIEW))
    two = Trainer(make_run_config(preview={**PREVIEW, "guidance": 3.0}))
    assert not torch.equal(Previews(one).draw(), Previews(two).draw())


def test_samples_that_are_not_finite_end_nothing(make_run_config: MakeConfig) -> None:
    said: list[str] = []
    trainer = Trainer(make_run_config(preview=PREVIEW))
    for value in trainer.ema.state_dict().values():
        if value.is_floating_point():
            value.fill_(torch.nan)
    assert Previews(trainer).save(said.append) is None
    assert len(said) == 1
    assert said[0].startswith("no preview at 0 images: ")


def test_without_classes_there_are_no_names(make_run_config: MakeConfig) -> None:
    model = {"type": "tiny", "prediction": "edm", "time_convention": "log_sigma"}
    config = make_run_config(model=model, preview=PREVIEW, total_images=32)
    run(config)
    grid, text = load_png(preview_path(config.out, 32))
    assert text["classes"] == "none"
    assert grid.shape == (1, 2 * 66 + 2, 3 * 66 + 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preview": {"sampler": "dpmpp"}}, r"^config: preview: unknown sampler 'dpmpp'"),
        ({"preview": {"scheduler": "karas"}}, r"^config: preview: unknown scheduler 'karas'"),
        ({"preview": {"every": 3}}, r"^config: preview\.every = 3 is no known key; did you mean"),
        ({"preview": {"every_images": 9}, "parallel": "fsdp"}, r"does not go with parallel = 'fsd"),
    ],
)
def test_config(make_run_config: MakeConfig, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_run_config(**changes)
    assert make_run_config().preview.every_images is None


def test_what_cannot_be_shown_is_refused(make_run_config: MakeConfig) -> None:
    model = {"type": "tiny", "prediction": "edm", "time_convention": "log_sigma"}
    config = make_run_config(model=model, preview={**PREVIEW, "guidance": 2.0})
    with pytest.raises(ConfigError, match="told nothing anyway: leave it out"):
        run(config)

    class Sound(nn.Module):
        prediction, time_convention, sigma_data = "edm", "log_sigma", 0.5

        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return x * self.gain

    config = make_run_config(preview=PREVIEW)
    with pytest.raises(
        ConfigError, match=r"^preview draws images, but the data has shape \(1, 16\)"
    ):
        run(config, source=ArraySource(torch.randn(8, 1, 16)), network=Sound())
    assert not Path(config.out).exists()
