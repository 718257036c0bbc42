"""Running statistics move with the steps that count, and with no others."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from k_diffusion.training import Trainer
from k_diffusion.training.buffers import Buffers
from k_diffusion.training.checkpoint import read_checkpoint
from k_diffusion.training.config import TrainConfig
from k_diffusion.training.dataset import ArraySource, Digits

MakeConfig = Callable[..., TrainConfig]
FLOW = {"num_classes": 10, "prediction": "flow", "time_convention": "unit"}


def normed(tiny: Any, fails_at: int = 0) -> nn.Module:
    """A network with batch normalisation, which runs out of memory in one of its calls."""

    class Normed(tiny):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(**FLOW)
            self.norm = nn.BatchNorm2d(1)
            self.count = 0

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            x = self.norm(x)
            self.count += 1
            if self.count == fails_at:
                raise torch.OutOfMemoryError("out of memory")
            return super().forward(x, *args, **kwargs)

    torch.manual_seed(5)
    return Normed()


def everything(trainer: Trainer, path: Path) -> dict[str, Tensor]:
    trainer.save(path)
    _, parts = read_checkpoint(path, ["model", "ema", "optimizer"])
    return {f"{part}/{n}": t for part, named in parts.items() for n, t in named.items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return set(one) == set(other) and all(torch.equal(one[n], other[n]) for n in one)


def test_a_skipped_step_moves_no_buffer(
    make_run_config: MakeConfig, tiny: Any, tmp_path: Path
) -> None:
    config, path = make_run_config(model={"type": "tiny", **FLOW}), tmp_path / "now.safetensors"
    bad = int(Trainer(config).stream[7].indices[5])
    digits = Digits()
    images = digits.images.clone()
    images[bad] = math.nan
    source = ArraySource(images, digits.labels, digits.class_names)
    trainer = Trainer(config, network=normed(tiny), source=source)
    before: dict[str, Tensor] = {}
    for state in trainer:
        now = everything(trainer, path)
        assert all(bool(t.isfinite().all()) for t in now.values()), state.step
        assert same(now, before) == state.skipped == (state.step == 8)
        before = now
    assert int(trainer.network.norm.num_batches_tracked) == 19  # type: ignore[union-attr]


def test_a_step_begun_again_moves_the_buffers_once(
    make_run_config: MakeConfig, tiny: Any, tmp_path: Path
) -> None:
    config = make_run_config(model={"type": "tiny", **FLOW}, micro_batch_size=16)

    def after(fails_at: int) -> dict[str, Tensor]:
        trainer = Trainer(config, network=normed(tiny, fails_at))
        for state in trainer:
            if state.step == 2 and not fails_at:
                trainer.gradient.micro_batch = 8
            if state.step == 4:
                break
        assert trainer.micro_batch == 8
        return everything(trainer, tmp_path / f"{fails_at}.safetensors")

    unbroken = after(0)
    assert int(unbroken["model/norm.num_batches_tracked"]) == 2 + 2 + 4 + 4
    assert same(after(6), unbroken)  # the sixth call: in the midst of the third step


def test_buffers_that_are_replaced_or_shared_come_back() -> None:
    inner = nn.Module()
    inner.register_buffer("a", torch.zeros(2))
    inner.register_buffer("none", None)
    outer = nn.ModuleList([inner, nn.Module()])
    outer[1].register_buffer("b", inner.a)
    buffers = Buffers(outer)
    assert len(buffers.tensors()) == 1
    buffers.keep()
    held = inner.a
    inner.a.add_(1)
    inner.a = inner.a * 2
    assert inner.a.tolist() == [2, 2]
    buffers.put_back()
    assert inner.a is held
    assert held.tolist() == [0, 0]
    inner.a = torch.ones(2)
    buffers.bring_home()
    assert inner.a is held
    assert held.tolist() == [1, 1]
