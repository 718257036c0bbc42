"""The gradient in micro-batches, and running out of memory: nothing is lost or changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from k_diffusion.training import Trainer, TrainingError
from k_diffusion.training.checkpoint import read_checkpoint
from k_diffusion.training.config import TrainConfig
from k_diffusion.training.dataset import Purpose
from k_diffusion.training.gradient import (
    OutOfMemory,
    even_parts,
    largest_that_fits,
)
from k_diffusion.utils.maths import fold_seed
from k_diffusion.utils.memory import is_out_of_memory

MakeConfig = Callable[..., TrainConfig]
FLOW = {"type": "tiny", "num_classes": 10, "prediction": "flow", "time_convention": "unit"}


class Limited(nn.Module):
    """Raises the device's out-of-memory error above a number of samples."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.limit = 1_000_000
        self.sizes: list[int] = []
        for name in ("num_classes", "prediction", "time_convention", "sigma_data"):
            setattr(self, name, getattr(inner, name))

    def forward(self, x: Tensor, t: Tensor, **condition: Any) -> Tensor:
        if len(x) > self.limit:
            raise torch.OutOfMemoryError(f"out of memory: {len(x)} samples")
        self.sizes.append(len(x))
        output: Tensor = self.inner(x, t, **condition)
        return output


def limited(tiny: Any, **options: Any) -> Limited:
    torch.manual_seed(5)
    return Limited(tiny(**{k: v for k, v in {**FLOW, **options}.items() if k != "type"}))


def flat_weights(trainer: Trainer) -> Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.network.parameters()])


def test_parts_are_few_and_even() -> None:
    for total in range(1, 40):
        for largest in range(1, 45):
            parts = even_parts(total, largest)
            sizes = [stop - start for start, stop in parts]
            assert [i for start, stop in parts for i in range(start, stop)] == list(range(total))
            assert max(sizes) <= largest
            assert max(sizes) - min(sizes) <= 1
            assert len(parts) == -(-total // largest)


@pytest.mark.parametrize("micro", [1, 3, 10, 16, 31])
def test_micro_batches_add_up_to_the_same_gradient(
    make_run_config: MakeConfig, tiny: Any, micro: int
) -> None:
    norms = {}
    for size in (None, micro):
        config = make_run_config(model=FLOW, micro_batch_size=size)
        trainer = Trainer(config, network=limited(tiny))
        inputs = trainer.inputs.draw(trainer.stream[0], 0)
        trainer.gradient.micro_batch = trainer.micro_batch or 32
        losses, _ = trainer.gradient.compute(inputs)
        norms[size] = [losses, *(p.grad for p in trainer.gradient.parameters)]
        assert max(trainer.network.sizes) <= (size or 32)
        assert sum(trainer.network.sizes) == 32
    for whole, parts in zip(norms[None], norms[micro], strict=True):
        assert float((whole - parts).abs().max()) <= 5e-6 * float(whole.abs().max())


class Drawing(Limited):
    """Keeps what it draws in each call."""

    def forward(self, x: Tensor, t: Tensor, **condition: Any) -> Tensor:
        self.drawn = [*getattr(self, "drawn", []), torch.rand(3)]
        return super().forward(x, t, **condition)


def test_what_the_network_draws_is_a_function_of_step_and_place(
    make_run_config: MakeConfig, tiny: Any
) -> None:
    config = make_run_config(model=FLOW, micro_batch_size=11, total_images=96, seed=3)
    network = Drawing(tiny(**{k: v for k, v in FLOW.items() if k != "type"}))
    list(Trainer(config, network=network))
    places = [(step, first) for step in range(3) for first in (0, 10, 21)]
    assert len(network.drawn) == len(places)
    for drawn, (step, first) in zip(network.drawn, places, strict=True):
        torch.manual_seed(fold_seed(3, Purpose.NETWORK, step, first))
        assert torch.equal(drawn, torch.rand(3)), (step, first)


def test_a_run_in_micro_batches_is_the_same_run(make_run_config: MakeConfig, tiny: Any) -> None:
    runs = {}
    for size in (None, 5):
        trainer = Trainer(make_run_config(model=FLOW, micro_batch_size=size), network=limited(tiny))
        runs[size] = [(s.loss, s.grad_norm) for s in trainer], flat_weights(trainer)
    states = torch.tensor(runs[None][0]), torch.tensor(runs[5][0])
    assert float((states[0] / states[1] - 1).abs().max()) < 1e-5
    assert float((runs[None][1] - runs[5][1]).abs().max()) < 1e-5


def test_out_of_memory_in_mid_run_loses_no_step(make_run_config: MakeConfig, tiny: Any) -> None:
    plain = Trainer(make_run_config(model=FLOW), network=limited(tiny))
    expected = [(s.step, s.loss, s.grad_norm) for s in plain]
    trainer = Trainer(make_run_config(model=FLOW), network=limited(tiny))
    seen = []
    for state in trainer:
        seen.append((state.step, state.loss, state.grad_norm))
        if state.step == 7:
            trainer.network.limit = 9  # from here on: 32 -> 16 -> 8
    assert [step for step, *_ in seen] == list(range(1, 21))
    assert trainer.micro_batch == 8
    worst = (torch.tensor(seen)[:, 1:] / torch.tensor(expected)[:, 1:] - 1).abs().max()
    assert float(worst) < 1e-5
    assert float((flat_weights(trainer) - flat_weights(plain)).abs().max()) < 1e-5
    assert trainer.ema.updates == 20


def test_out_of_memory_in_the_backward_pass_leaves_no_half_gradient(
    make_run_config: MakeConfig, tiny: Any
) -> None:
    class Late(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            if len(grad) > 8:
                raise torch.OutOfMemoryError("out of memory")
            return grad

    class Greedy(Limited):
        def forward(self, x: Tensor, t: Tensor, **condition: Any) -> Tensor:
            return super().forward(Late.apply(x + 0 * self.inner.time.weight.sum()), t, **condition)

    plain = Trainer(make_run_config(model=FLOW), network=limited(tiny))
    torch.manual_seed(5)
    greedy = Greedy(tiny(**{k: v for k, v in FLOW.items() if k != "type"}))
    trainer = Trainer(make_run_config(model=FLOW), network=greedy)
    for one, other in zip(plain, trainer, strict=True):
        assert abs(one.grad_norm / other.grad_norm - 1) < 1e-5
    assert trainer.micro_batch == 8


@pytest.mark.parametrize("limit", [1, 2, 7, 20, 31, 32, 100])
def test_auto_finds_what_fits(make_run_config: MakeConfig, tiny: Any, limit: int) -> None:
    network = limited(tiny)
    network.limit = limit
    trainer = Trainer(make_run_config(model=FLOW, micro_batch_size="auto"), network=network)
    assert trainer.micro_batch is None
    state = next(iter(trainer))
    assert trainer.micro_batch == min(limit, 32)
    plain = Trainer(make_run_config(model=FLOW), network=limited(tiny))
    assert abs(state.grad_norm / next(iter(plain)).grad_norm - 1) < 1e-5
    assert float((flat_weights(trainer) - flat_weights(plain)).abs().max()) < 1e-5
    # The trials left no trace, in buffers either.
    assert int(network.inner.calls) == -(-32 // min(limit, 32))


def test_auto_is_near_the_largest_of_many() -> None:
    for limit in (10, 100, 333, 4096):
        for largest in {1, 2, 3, limit // 3, limit // 2 + 1, limit - 1, limit}:
            tried: list[int] = []

            def fits(size: int, largest: int = largest, tried: list[int] = tried) -> bool:
                tried.append(size)
                return size <= largest

            found = largest_that_fits(fits, limit)
            assert 0.95 * largest <= found <= largest
            assert len(tried) <= 2 + limit.bit_length()
    with pytest.raises(OutOfMemory, match="not even one"):
        largest_that_fits(lambda size: False, 64)


def test_auto_is_kept_over_a_resume(make_run_config: MakeConfig, tiny: Any, tmp_path: Path) -> None:
    def begin(**more: Any) -> Trainer:
        network = limited(tiny, dropout=0.2)
        network.limit = 9
        config = make_run_config(model=FLOW, micro_batch_size="auto")
        return Trainer(config, network=network, **more)

    whole = begin()
    list(whole)
    first = begin()
    for state in first:
        if state.step == 11:
            first.save(tmp_path / "a.safetensors")
            break
    second = begin(resume=tmp_path / "a.safetensors")
    assert second.micro_batch == 9
    list(second)
    assert torch.equal(flat_weights(whole), flat_weights(second))
    assert read_checkpoint(tmp_path / "a.safetensors")[0].state["micro_batch"] == 9


def test_a_resume_takes_the_size_asked_for_unless_memory_refused_it(
    make_run_config: MakeConfig, tiny: Any, tmp_path: Path
) -> None:
    def after(asked: int | None, limit: int, **more: Any) -> Trainer:
        network = limited(tiny)
        network.limit = limit
        config = make_run_config(model=FLOW, micro_batch_size=asked)
        trainer = Trainer(config, network=network, **more)
        if not more:
            next(iter(trainer))
            trainer.save(tmp_path / "a.safetensors")
        return trainer

    def resumed(asked: int | None) -> int | None:
        return after(asked, 32, resume=tmp_path / "a.safetensors").micro_batch

    assert after(4, limit=32).micro_batch == 4
    assert [resumed(asked) for asked in (16, 2, None)] == [16, 2, 32]
    assert after(16, limit=9).micro_batch == 8
    assert [resumed(asked) for asked in (16, 2, None)] == [8, 2, 8]


def test_one_image_that_does_not_fit_ends_the_run(make_run_config: MakeConfig, tiny: Any) -> None:
    network = limited(tiny)
    network.limit = 0
    for size in (None, "auto"):
        trainer = Trainer(make_run_config(model=FLOW, micro_batch_size=size), network=network)
        with pytest.raises(TrainingError, match=r"one image at a time.*model.checkpointing"):
            next(iter(trainer))


def test_what_counts_as_out_of_memory() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("x"))
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"))
    assert is_out_of_memory(RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error"))
    assert is_out_of_memory(RuntimeError("FATAL ERROR :: MODULE:PT_DEVMEM Allocation failed"))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(KeyboardInterrupt())
