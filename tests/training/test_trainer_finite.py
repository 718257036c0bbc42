"""Steps in few bits, scaled losses, and steps that are not finite: nothing is lost."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from k_diffusion.training.checkpoint import read_checkpoint
from k_diffusion.training.config import ConfigError, TrainConfig
from k_diffusion.training.dataset import ArraySource, Digits
from k_diffusion.training.trainer import Trainer, TrainingError, TrainState

from .train_briefly import FLOW, Spy, contents, train

MakeConfig = Callable[..., TrainConfig]


def test_bf16_trains_close_to_float32(make_run_config: MakeConfig) -> None:
    full = [s.loss for s in Trainer(make_run_config())]
    trainer = Trainer(make_run_config(precision="bf16"))
    half = [s.loss for s in trainer]
    assert full != half
    assert max(abs(a / b - 1) for a, b in zip(full, half, strict=True)) < 0.05
    assert all(p.dtype == torch.float32 for p in trainer.network.parameters())
    assert next(iter(Trainer(make_run_config()))).loss == full[0]  # and back again


def with_scaler(trainer: Trainer, scale: float) -> Trainer:
    """The loss scaling of fp16, which accelerate gives to GPUs only, on the CPU."""
    from accelerate.optimizer import AcceleratedOptimizer

    accelerator = trainer.accelerator
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    trainer._optimizer = AcceleratedOptimizer(trainer.optimizer, scaler=accelerator.scaler)
    accelerator._optimizers = [trainer._optimizer]
    accelerator.native_amp = True
    accelerator.state._mixed_precision = "fp16"
    return trainer


def test_scaled_loss_trains_the_same_and_keeps_its_scale(
    make_run_config: MakeConfig, tmp_path: Path
) -> None:
    plain = Trainer(make_run_config())
    list(plain)
    scaled = with_scaler(Trainer(make_run_config()), 4096.0)
    states = list(scaled)
    assert not any(state.skipped for state in states)
    for a, b in zip(plain.network.parameters(), scaled.network.parameters(), strict=True):
        assert (a - b).abs().max() < 1e-6  # a power of two: unscaling is exact but for clipping
    scaled.save(tmp_path / "a.safetensors")
    state = read_checkpoint(tmp_path / "a.safetensors")[0].state["scaler"]
    assert state["scale"] == 4096
    assert state["_growth_tracker"] == 20


def test_scale_comes_back_at_a_resume(
    make_run_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(make_run_config(), tmp_path / "plain.safetensors", 1)
    trainer = with_scaler(Trainer(make_run_config()), 4096.0)
    next(iter(trainer))
    trainer.save(tmp_path / "scaled.safetensors")
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    monkeypatch.setattr(
        "k_diffusion.training.trainer.make_accelerator", lambda p: trainer.accelerator
    )
    for name, scale in (("plain", 2), ("scaled", 4096)):
        again = Trainer(make_run_config(), resume=tmp_path / f"{name}.safetensors")
        assert again.accelerator.scaler.state_dict()["scale"] == scale


def test_overflow_lowers_the_scale_and_changes_nothing(make_run_config: MakeConfig) -> None:
    trainer = with_scaler(Trainer(make_run_config()), 2.0**127)
    before = {name: p.clone() for name, p in trainer.network.named_parameters()}
    loop = iter(trainer)
    state = next(loop)
    assert state.skipped
    assert trainer.accelerator.scaler.get_scale() == 2.0**126
    assert not any(s.get("step", 0) for s in trainer.optimizer.state.values())
    assert trainer.ema.updates == 0
    for name, p in trainer.network.named_parameters():
        assert torch.equal(p, before[name])
    assert any(not state.skipped for state in loop)


def test_nan_loss_under_a_scaler_is_skipped(make_run_config: MakeConfig) -> None:
    trainer = Trainer(make_run_config(model=FLOW), source=poisoned(0))
    bad = [i for i in range(20) if 0 in trainer.stream[i].indices]
    trainer = with_scaler(
        Trainer(make_run_config(model=FLOW, total_images=1500), source=poisoned(0)), 64.0
    )
    states = list(trainer)
    assert [i for i, s in enumerate(states) if s.skipped][: len(bad)] == bad
    assert any(s.skipped for s in states)
    assert all(p.isfinite().all() for p in trainer.network.parameters())


def test_infinite_loss_of_finite_gradients_under_a_scaler(make_run_config: MakeConfig) -> None:
    class Blind(Spy):
        """Infinite for the first image, in a way that no gradient sees, in every other step."""

        def forward(self, x: Tensor, t: Tensor, class_label: Tensor) -> Tensor:
            if torch.is_grad_enabled():  # else a bad step is being examined
                self.seen.append((x, t, class_label, t))
            out = self.weight.expand_as(x)
            first = torch.arange(len(x)).reshape(-1, 1, 1, 1) == 0
            return torch.where(first, math.inf, out) if len(self.seen) % 2 else out

    trainer = with_scaler(Trainer(make_run_config(model=FLOW), network=Blind()), 64.0)
    states = list(trainer)
    assert [state.skipped for state in states] == [True, False] * 10
    assert all(math.isfinite(state.grad_norm) for state in states)


def test_precision_that_the_machine_lacks_is_refused(
    make_run_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    import accelerate

    def refuse(**options: Any) -> None:
        raise ValueError("fp16 mixed precision\n requires a GPU")

    with monkeypatch.context() as patch:
        patch.setattr(accelerate, "Accelerator", refuse)
        with pytest.raises(ConfigError, match="'fp16' does not work here: fp16 .* a GPU$"):
            Trainer(make_run_config(precision="fp16"))
    if not torch.cuda.is_available():  # accelerate would quietly compute in float32
        with pytest.raises(ConfigError, match="precision = 'fp16' needs a GPU; give 'bf16'"):
            Trainer(make_run_config(precision="fp16"))
    assert len(list(Trainer(make_run_config(total_images=32)))) == 1


# ---------------------------------------------------------------- not finite


def poisoned(bad: int) -> ArraySource:
    digits = Digits()
    images = digits.images.clone()
    images[bad] = math.nan
    return ArraySource(images, digits.labels, digits.class_names)


def test_a_nan_image_skips_its_step_and_nothing_else(
    make_run_config: MakeConfig, tmp_path: Path
) -> None:
    model = {"type": "tiny", "num_classes": 10, "prediction": "flow", "time_convention": "unit"}
    config = make_run_config(model=model)
    clean = Trainer(config)
    bad = int(clean.stream[7].indices[5])
    trainer = Trainer(config, source=poisoned(bad))
    before: dict[str, Tensor] = {}
    states: list[TrainState] = []
    for state in trainer:
        trainer.save(tmp_path / "now.safetensors")
        now = contents(tmp_path / "now.safetensors")
        if state.step == 8:
            for name, tensor in now.items():
                if not name.endswith("calls"):
                    assert torch.equal(tensor, before[name]), name
        before = now
        states.append(state)
    assert [s.step for s in states if s.skipped] == [8]
    assert math.isnan(states[7].loss)
    assert states[7].ema_decay == 1
    assert [s.skipped_steps for s in states] == [0] * 7 + [1] * 13
    assert len(states) == 20
    assert all(tensor.isfinite().all() for tensor in before.values())
    assert trainer.ema.updates == 19


def test_infinite_gradient_of_a_finite_loss_is_skipped(make_run_config: MakeConfig) -> None:
    class Cusp(Spy):
        def forward(self, x: Tensor, t: Tensor, class_label: Tensor) -> Tensor:
            # The square root's slope at 0 is infinite, and 0 times infinity no number.
            return x * (self.weight * 0).sqrt()

    network = Cusp()
    trainer = Trainer(make_run_config(model=FLOW), network=network)
    state = next(iter(trainer))
    assert math.isfinite(state.loss)
    assert not math.isfinite(state.grad_norm)
    assert state.skipped
    assert network.weight.isfinite().all()


def test_too_many_in_a_row_end_the_run(make_run_config: MakeConfig, tmp_path: Path) -> None:
    digits = Digits()
    source = ArraySource(digits.images * math.nan, digits.labels, digits.class_names)
    config = make_run_config(model=FLOW, max_skipped=3)
    states = []

    def run() -> None:
        states.extend(Trainer(config, source=source))

    with pytest.raises(TrainingError, match="3 steps in a row were not finite, the last at 96 im"):
        run()
    # Single ones do not: the count begins anew after each good step.
    bad = {int(i) for step in (1, 3, 5, 7) for i in Trainer(config).stream[step].indices[:1]}
    images = digits.images.clone()
    images[sorted(bad)] = math.nan
    few = Trainer(config, source=ArraySource(images, digits.labels, digits.class_names))
    assert sum(state.skipped for state in few) == 4
    # The count goes on over a stop.
    trainer = Trainer(config, source=source)
    loop = iter(trainer)
    next(loop), next(loop)
    trainer.extra["note"] = [1.5, "of the caller"]
    trainer.save(tmp_path / "a.safetensors")
    again = Trainer(config, source=source, resume=tmp_path / "a.safetensors")
    assert (again.skipped_steps, again.extra) == (2, trainer.extra)
    with pytest.raises(TrainingError, match="at 96 images"):
        list(again)


def test_after_step_rests_in_a_skipped_step(
    make_run_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_run_config()
    bad = int(Trainer(config).stream[2].indices[0])
    trainer = Trainer(config, source=poisoned(bad))
    calls: list[int] = []
    monkeypatch.setattr(trainer.objective, "after_step", lambda: calls.append(trainer.step))
    skipped = [state.skipped for state in trainer]
    assert 0 < sum(skipped) < len(skipped)
    assert len(calls) == len(skipped) - sum(skipped)
