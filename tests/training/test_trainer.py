"""The loop: a function of seed and step, bitwise the same after any stop, unharmed by a NaN."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from k_diffusion.models import PRESETS, make_model, model_config
from k_diffusion.training import load_denoiser
from k_diffusion.training.checkpoint import CheckpointError, read_checkpoint
from k_diffusion.training.config import ConfigError, TrainConfig
from k_diffusion.training.config_file import make_config
from k_diffusion.training.dataset import ArraySource, Digits
from k_diffusion.training.trainer import Trainer

from .train_briefly import FLOW, Spy, contents, train

MakeConfig = Callable[..., TrainConfig]


def assert_bitwise_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert set(one) == set(other)
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


# ---------------------------------------------------------------- resume


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stops", [(10,), (1, 2, 13)])
def test_resumed_run_is_bitwise_the_unbroken_one(
    make_run_config: MakeConfig, tmp_path: Path, workers: int, stops: tuple[int, ...]
) -> None:
    # 1438 images of batch 128: 11.2 steps an epoch, so that the stops lie inside one.
    changes = {"batch_size": 128, "total_images": 128 * 20}
    config = make_run_config(**changes)
    whole = train(config, tmp_path / "whole.safetensors")
    assert len(whole) == 20
    config = make_run_config(**changes, workers=workers)
    losses, at, path = [], 0, None
    for i, stop in enumerate([*stops, 20]):
        before, path = path, tmp_path / f"{i}.safetensors"
        torch.manual_seed(i)  # a resumed process has another global generator
        losses += train(config, path, stop - at, resume=before)
        at = stop
    assert losses == whole
    assert path is not None
    assert_bitwise_equal(contents(path), contents(tmp_path / "whole.safetensors"))
    info, _ = read_checkpoint(path)
    assert (info.step, info.images_seen, info.state["ema_updates"]) == (20, 2560, 20)


def test_same_seed_same_run_and_another_seed_another(
    make_run_config: MakeConfig, tmp_path: Path
) -> None:
    one = train(make_run_config(), tmp_path / "1.safetensors")
    assert train(make_run_config(), tmp_path / "2.safetensors") == one
    assert_bitwise_equal(contents(tmp_path / "1.safetensors"), contents(tmp_path / "2.safetensors"))
    other = train(make_run_config(seed=4), tmp_path / "3.safetensors")
    assert all(a != b for a, b in zip(one, other, strict=True))


def test_resume_past_the_end_does_nothing(make_run_config: MakeConfig, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    train(make_run_config(), path)
    assert list(Trainer(make_run_config(), resume=path)) == []


def test_a_longer_run_goes_on_from_a_shorter(make_run_config: MakeConfig, tmp_path: Path) -> None:
    short, long = make_run_config(total_images=320), make_run_config()
    train(short, tmp_path / "half.safetensors")
    train(long, tmp_path / "two.safetensors", resume=tmp_path / "half.safetensors")
    train(long, tmp_path / "one.safetensors")
    assert_bitwise_equal(
        contents(tmp_path / "one.safetensors"), contents(tmp_path / "two.safetensors")
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 4}, "a run with seed = 3, not 4"),
        ({"batch_size": 16}, "batch_size = 32, not 16"),
        ({"data": {"source": "digits", "split": "all"}}, "data.images = 1438, not 1797"),
        (
            {"model": {"type": "tiny", "width": 9}},
            r"model\.dropout = 0.2, not 0.0; .*; model\.width = 8, not 9",
        ),
        ({"process": {"name": "karras"}}, r"process = None, not None|process\.name = None"),
    ],
)
def test_checkpoint_of_another_run_is_refused(
    make_run_config: MakeConfig, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = tmp_path / "a.safetensors"
    train(make_run_config(), path, 0)
    with pytest.raises(CheckpointError, match=message) as caught:
        Trainer(make_run_config(**changes), resume=path)
    assert str(path) in str(caught.value)


def test_what_may_change_at_a_resume(make_run_config: MakeConfig, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    train(make_run_config(), path, 5)
    changed = make_run_config(
        total_images=6400, workers=1, optimizer={"lr": 1e-4}, precision="bf16"
    )
    assert Trainer(changed, resume=path).images_seen == 160


def test_data_may_be_moved(make_run_config: MakeConfig, tmp_path: Path) -> None:
    from PIL import Image

    def config(folder: str) -> TrainConfig:
        data = {"source": "folder", "path": str(tmp_path / folder), "size": 8, "channels": 1}
        return make_run_config(data=data, model={"type": "tiny"}, total_images=128)

    (tmp_path / "here").mkdir()
    for i in range(3):
        Image.new("L", (8, 8), 80 * i).save(tmp_path / "here" / f"{i}.png")
    train(config("here"), tmp_path / "a.safetensors", 1)
    (tmp_path / "here").rename(tmp_path / "there")
    assert Trainer(config("there"), resume=tmp_path / "a.safetensors").step == 1
    (tmp_path / "there" / "0.png").unlink()
    with pytest.raises(CheckpointError, match=r"data\.images = 3, not 2"):
        Trainer(config("there"), resume=tmp_path / "a.safetensors")


def test_inference_file_cannot_be_resumed(make_run_config: MakeConfig, tmp_path: Path) -> None:
    from k_diffusion.training import save_inference

    train(make_run_config(), tmp_path / "a.safetensors", 2)
    save_inference(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match="for sampling only"):
        Trainer(make_run_config(), resume=tmp_path / "b.safetensors")


# ---------------------------------------------------------------- a step


def test_steps_draw_anew_and_independently(make_run_config: MakeConfig) -> None:
    spy = Spy()
    source = ArraySource(torch.zeros(64, 1, 4, 4), torch.arange(64) % 10, list("0123456789"))
    config = make_run_config(model=FLOW, total_images=32 * 200, condition_dropout=0.25)
    for _ in Trainer(config, network=spy, source=source):
        pass
    assert len(spy.seen) == 200
    times = torch.stack([t for _, t, _, _ in spy.seen])
    # x0 = 0, so x = sigma · noise, and sigma is the flow's time.
    noise = torch.stack([x for x, _, _, _ in spy.seen]) / times[..., None, None, None]
    assert abs(noise.mean()) < 3.3 / noise.numel() ** 0.5
    assert abs(noise.var() - 1) < 3.3 * (2 / noise.numel()) ** 0.5
    flat = noise.flatten(1)
    assert (flat[1:] * flat[:-1]).mean(1).abs().max() < 5 / flat.shape[1] ** 0.5
    logits = torch.logit(times.double())
    assert (logits.mean(1).abs() < 0.2).all()  # stratified in each step
    assert abs(logits.mean()) < 0.01
    assert abs(logits.std() - 1) < 0.02
    hidden = (torch.stack([c for _, _, c, _ in spy.seen]) == 10).float().mean()
    assert abs(hidden - 0.25) < 3.3 * (0.25 * 0.75 / 6400) ** 0.5
    assert len({tuple(r.tolist()) for _, _, _, r in spy.seen}) == 200


def test_a_step_depends_on_seed_and_step_alone(make_run_config: MakeConfig) -> None:
    source = ArraySource(torch.zeros(8, 1, 4, 4), torch.zeros(8, dtype=torch.int64), ["a"] * 10)
    whole, late = Spy(), Spy()
    config = make_run_config(model=FLOW)
    list(Trainer(config, network=whole, source=source))
    trainer = Trainer(config, network=late, source=source)
    trainer.step = 15
    list(trainer)
    for one, other in zip(whole.seen[15:], late.seen, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_processes_cut_the_step_of_one(make_run_config: MakeConfig) -> None:
    trainer = Trainer(make_run_config())
    whole = trainer.inputs.draw(trainer.stream[3], 3)
    parts = []
    for rank in range(2):
        part = Trainer(make_run_config())
        part.stream.rank, part.stream.world = rank, 2
        parts.append(part.inputs.draw(part.stream[3], 3))
    for part in ("x0", "sigma", "noise", "indices"):
        joined = torch.cat([getattr(p, part) for p in parts])
        assert torch.equal(joined, getattr(whole, part))
    labels = torch.cat([p.condition["class_label"] for p in parts])
    assert torch.equal(labels, whole.condition["class_label"])
    assert [p.first for p in parts] == [0, 16]


def test_state_tells_the_clock(make_run_config: MakeConfig) -> None:
    states = list(Trainer(make_run_config(total_images=100)))
    assert [s.images_seen for s in states] == [32, 64, 96, 128]
    assert {s.total_images for s in states} == {128}
    assert [s.step for s in states] == [1, 2, 3, 4]
    assert states[0].ema_decay == 0
    assert abs(states[1].ema_decay - (1 - 2**-0.75)) < 1e-12
    for state in states:
        expected = (128 - state.images_seen) / state.images_per_second
        assert abs(state.seconds_left - expected) < 1e-9


def test_time_left_counts_this_sessions_images(
    make_run_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a clock that moves one second a look, a resumed run still does 32 images a second."""
    path = tmp_path / "a.safetensors"
    train(make_run_config(), path, 10)
    seconds = iter(range(10**6))
    # Of this module alone: other threads of the process look at the clock, too.
    clock = SimpleNamespace(perf_counter=lambda: float(next(seconds)))
    monkeypatch.setattr("k_diffusion.training.state.time", clock)
    state = next(iter(Trainer(make_run_config(), resume=path)))
    assert (state.images_per_second, state.seconds_left) == (32, 9)


def test_training_learns(make_run_config: MakeConfig) -> None:
    config = make_run_config(total_images=32 * 150, optimizer={"lr": 3e-3})
    losses = [state.loss for state in Trainer(config)]
    assert sum(losses[-30:]) < 0.85 * sum(losses[:30])


def test_gradient_is_clipped(make_run_config: MakeConfig, tmp_path: Path) -> None:
    def weights(clip: float | None) -> tuple[float, Tensor]:
        trainer = Trainer(make_run_config(grad_clip=clip))
        state = next(iter(trainer))
        moment = torch.cat(
            [s["exp_avg"].flatten() for s in trainer.optimizer.state.values()]
        )  # 0.1 of the gradient after one step
        return state.grad_norm, moment.norm() * 10

    norm, unclipped = weights(None)
    assert norm > 1
    assert abs(unclipped / norm - 1) < 1e-5
    same, clipped = weights(0.5)
    assert same == norm
    assert abs(clipped / 0.5 - 1) < 1e-4


def test_network_is_put_into_training_mode(make_run_config: MakeConfig, tiny: Any) -> None:
    network = tiny(num_classes=10).eval()
    assert Trainer(make_run_config(), network=network).network.training


def test_weight_decay_spares_biases(make_run_config: MakeConfig) -> None:
    trainer = Trainer(make_run_config(optimizer={"weight_decay": 0.1}))
    decayed = {
        id(p)
        for group in trainer.optimizer.param_groups
        for p in group["params"]
        if group["weight_decay"]
    }
    named = {name for name, p in trainer.network.named_parameters() if id(p) in decayed}
    assert named == {"enter.weight", "classes.weight", "time.weight", "leave.weight"}


# ---------------------------------------------------------------- config and data


def test_data_settles_the_model(make_run_config: MakeConfig) -> None:
    trainer = Trainer(make_run_config())
    assert trainer.config.model["in_channels"] == 1
    assert abs(trainer.config.model["sigma_data"] - Digits().std) < 1e-12
    assert trainer.denoiser.sigma_data == trainer.config.model["sigma_data"]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"in_channels": 3}, "model.in_channels is 3, but the data has 1 channels"),
        ({"num_classes": 11}, "model.num_classes is 11, but the data has 10 classes"),
        (
            {"type": "unet", "channels": 8, "head_channels": 8, "dims": 1},
            "model and data do not fit each other: x has shape .* takes .batch, 1, length",
        ),
    ],
)  # fmt: skip
def test_model_that_does_not_fit_the_data(
    make_run_config: MakeConfig, model: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Trainer(make_run_config(model={"type": "tiny", **model}))


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda x: None, "Tiny returned NoneType; its forward must return a tensor of the shape"),
        (lambda x: (x, x), "Tiny returned tuple; its forward"),
        (lambda x: x[:, :, :4, :1], r"Tiny returned shape \(1, 1, 4, 1\); .* of x, \(1, 1, 8, 8\)"),
    ],
)
def test_a_network_that_returns_something_else(
    make_run_config: MakeConfig, tiny: Any, monkeypatch: pytest.MonkeyPatch, returned: Any,
    message: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(tiny, "forward", lambda self, x, t, class_label=None: returned(x))
    with pytest.raises(ConfigError, match=f"model and data do not fit each other: {message}"):
        Trainer(make_run_config())


def test_constant_data_has_no_sigma_data(make_run_config: MakeConfig) -> None:
    source = ArraySource(torch.zeros(8, 1, 4, 4), torch.zeros(8, dtype=torch.int64), ["a"] * 10)
    with pytest.raises(ConfigError, match="all values of the data are equal"):
        Trainer(make_run_config(), source=source)


def test_unet_trains_resumes_and_loads(make_run_config: MakeConfig, tmp_path: Path) -> None:
    model = {"type": "unet", "channels": 16, "channel_mults": [1, 2], "attention": [False, True],
             "blocks": 1, "head_channels": 16, "num_classes": 10, "dropout": 0.1,
             "prediction": "v"}  # fmt: skip
    process = {"name": "cosine", "time_max": 0.99}
    config = make_run_config(model=model, process=process, total_images=256)
    whole = train(config, tmp_path / "whole.safetensors")
    half = train(config, tmp_path / "half.safetensors", 3)
    rest = train(config, tmp_path / "rest.safetensors", resume=tmp_path / "half.safetensors")
    assert half + rest == whole
    assert_bitwise_equal(
        contents(tmp_path / "rest.safetensors"), contents(tmp_path / "whole.safetensors")
    )
    denoiser, info = load_denoiser(tmp_path / "rest.safetensors")
    assert denoiser.process.time_max == 0.99
    full = model_config(make_model({**model, "in_channels": 1}))
    assert full["out_channels"] is None
    assert info.config == config.model_copy(update={"model": full}).to_json()
    assert make_config(info.config).to_json() == info.config
    x, sigma = torch.randn(2, 1, 8, 8), torch.tensor([0.5, 0.9])
    labels = torch.tensor([3, 10])
    assert denoiser(x, sigma, class_label=labels).isfinite().all()


def test_a_run_from_a_preset_outlives_the_preset(
    make_run_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"channels": 8, "channel_mults": [1], "attention": [False], "head_channels": 8}
    monkeypatch.setitem(PRESETS, "brief", {"type": "unet", **small, "blocks": 1})
    config = make_run_config(model={"type": "brief"}, total_images=64)
    path = tmp_path / "a.safetensors"
    train(config, path, 1)
    assert read_checkpoint(path)[0].config["model"]["type"] == "unet"
    assert Trainer(config, resume=path).step == 1  # of the same TOML
    monkeypatch.setitem(PRESETS, "brief", {"type": "unet", **small, "blocks": 2})
    assert load_denoiser(path)[0].network.config.blocks == 1
    message = r"a run with model\.blocks = 1, not 2: resume with the same"
    with pytest.raises(CheckpointError, match=message):
        Trainer(config, resume=path)
    with pytest.raises(CheckpointError, match=r"does not fit UNet: .*, with blocks = 1, not 2$"):
        load_denoiser(path, network=make_model({"type": "brief", "in_channels": 1}))


def test_a_checkpoint_that_holds_only_what_was_given_resumes(
    make_run_config: MakeConfig, tmp_path: Path
) -> None:
    path = tmp_path / "a.safetensors"
    trainer = Trainer(make_run_config())
    given = {key: value for key, value in trainer.config.model.items() if key != "width"}
    trainer.config = trainer.config.model_copy(update={"model": given})
    trainer.save(path)
    assert "width" not in read_checkpoint(path)[0].config["model"]
    assert Trainer(make_run_config(), resume=path).step == 0


def test_after_step_follows_each_step_and_comes_before_the_average(
    make_run_config: MakeConfig,
) -> None:
    model = {"type": "mp_unet", "channels": 8, "channel_mults": [1], "attention": [False],
             "blocks": 1, "head_channels": 8, "num_classes": 10}  # fmt: skip
    trainer = Trainer(make_run_config(model=model, total_images=96))
    steps = 0
    for state in trainer:
        steps += 1
        weights = {k: p for k, p in trainer.network.named_parameters() if p.ndim}
        assert weights
        assert not state.skipped
        for name, weight in weights.items():
            square = weight.detach().double().flatten(1).square().mean(1)
            assert (square - 1).abs().max() < 1e-6, name
            if steps == 1:  # the first update of the average takes over what there is
                assert torch.equal(trainer.ema.state_dict()[name], weight)
    assert steps > 1


LIGHT = """
import sys
import k_diffusion.training
import k_diffusion.training.checkpoint
heavy = {"accelerate", "sklearn", "pydantic", "PIL"} & set(sys.modules)
assert not heavy, heavy
import k_diffusion.training.run, k_diffusion.training.config
heavy = {"accelerate", "sklearn", "PIL"} & set(sys.modules)
assert not heavy, heavy
assert set(k_diffusion.training.__all__) <= set(dir(k_diffusion.training))
for name in k_diffusion.training.__all__:
    getattr(k_diffusion.training, name)
"""


def test_imports_stay_light() -> None:
    subprocess.run([sys.executable, "-c", LIGHT], check=True)
