"""The gradient noise scale, against a problem whose noise is known."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from k_diffusion.training.checkpoint import read_info
from k_diffusion.training.config import TrainConfig
from k_diffusion.training.noise_scale import BucketNorms, NoiseScale, PartNorms, estimate
from k_diffusion.training.run import run_training
from k_diffusion.training.trainer import Trainer

MakeConfig = Callable[..., TrainConfig]


def test_exact_where_the_norms_are_their_expectations() -> None:
    # |G|² = 3, tr(Sigma) = 50.
    assert estimate(3 + 50 / 4, 3 + 50 / 64, 4, 64) == pytest.approx((3, 50), rel=1e-14)
    scale = NoiseScale(0.7)
    assert scale.value is None
    assert math.isnan(scale.square)
    for _ in range(5):
        scale.update(3 + 50 / 4, 3 + 50 / 64, 4, 64)
        assert (scale.square, scale.variance) == pytest.approx((3, 50), rel=1e-14)
        assert scale.value == pytest.approx(50 / 3, rel=1e-14)


def test_sizes_that_do_not_grow_are_refused() -> None:
    for small, large in ((4, 4), (8, 4), (0, 4)):
        with pytest.raises(ValueError, match="do not tell noise from gradient"):
            estimate(1.0, 1.0, small, large)


def test_what_is_not_finite_is_left_out_and_no_ratio_made_up() -> None:
    scale = NoiseScale(0.5)
    scale.update(math.nan, 1.0, 1, 2)
    scale.update(1.0, math.inf, 1, 2)
    assert scale.updates == 0
    scale.update(2.0, 0.9, 1, 2)  # |G|² estimated as -0.2
    assert scale.square == pytest.approx(-0.2)
    assert scale.value is None
    scale.update(0.9, 2.0, 1, 2)  # no noise at all
    assert scale.variance < 0
    assert scale.value is None


def test_state_goes_on_exactly() -> None:
    whole, first = NoiseScale(0.9), NoiseScale(0.9)
    generator = torch.Generator().manual_seed(0)
    norms = torch.rand(20, 2, generator=generator, dtype=torch.float64).tolist()
    for i, (small, large) in enumerate(norms):
        whole.update(small + 1, large, 2, 8)
        if i == 7:
            second = NoiseScale(0.9)
            second.load_state_dict(first.state_dict())
            first = second
        first.update(small + 1, large, 2, 8)
    assert first.state_dict() == whole.state_dict()
    assert first.value == whole.value


def test_known_noise_is_found() -> None:
    """Gradients G + noise of covariance Sigma, as the mean over images has it.

    With n parts of b images each of the n parts' means m_i has covariance Sigma / b, and the
    estimate of tr(Sigma) is b times their sample variance: of relative standard deviation
    sqrt(2 tr(Sigma²) / (n - 1)) / tr(Sigma) a step. That of |G|² is, to first order in the noise of
    the whole, 2 sqrt(G Sigma G / B) plus what its own square brings. Tolerances are four of these
    over the root of the number of steps that the average holds, (1 + decay) / (1 - decay).
    """
    torch.manual_seed(0)
    dims, n, b, decay, steps = 200, 8, 4, 0.998, 4000
    true = torch.randn(dims, dtype=torch.float64) * 0.3
    deviation = torch.rand(dims, dtype=torch.float64) + 0.5
    square, trace = float(true @ true), float(deviation @ deviation)
    scale = NoiseScale(decay)
    batch = n * b
    for _ in range(steps):
        means = true + deviation * torch.randn(n, dims, dtype=torch.float64) / math.sqrt(b)
        whole = means.mean(0)
        scale.update(float((means**2).sum(1).mean()), float(whole @ whole), small=b, large=batch)
    held = min(steps, (1 + decay) / (1 - decay))
    traced = math.sqrt(2 * float((deviation**4).sum()) / (n - 1))
    squared = math.sqrt(
        4 * float(((true * deviation) ** 2).sum()) / batch
        + 2 * float((deviation**4).sum()) / batch**2 * (1 + 1 / (n - 1))
    )
    assert abs(scale.variance - trace) < 4 * traced / math.sqrt(held)
    assert abs(scale.square - square) < 4 * squared / math.sqrt(held)
    assert 4 * traced / math.sqrt(held) < 0.02 * trace  # the test says something
    assert 4 * squared / math.sqrt(held) < 0.05 * square
    assert scale.value == pytest.approx(trace / square, rel=0.07)


def test_norms_of_parts_of_uneven_size() -> None:
    """Against single images' gradients: those of the parts, and the sum that is given back."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(3, dtype=torch.float64))
    gain = nn.Parameter(torch.ones(1, dtype=torch.float64))
    unused = nn.Parameter(torch.ones(2))
    x = torch.randn(7, 3, dtype=torch.float64)

    def loss(part: Tensor) -> Tensor:
        return (part @ weight * gain).square().sum() / len(x)

    def square(gradients: list[Tensor]) -> Tensor:
        return torch.stack([g.double().square().sum() for g in gradients]).sum()

    loss(x).backward()
    whole = [p.grad.clone() for p in (weight, gain) if p.grad is not None]
    weight.grad = gain.grad = None
    norms = PartNorms([weight, unused, gain], len(x), square)
    expected = 0.0
    for start, stop in ((0, 2), (2, 4), (4, 7)):
        part = x[start:stop]
        loss(part).backward()
        assert weight.grad is not None
        assert gain.grad is not None
        mean = [g * len(x) / len(part) for g in (weight.grad, gain.grad)]
        expected += len(part) / len(x) * float(square(mean))
        norms.take(stop - start)
        assert weight.grad is None
    norms.give_back()
    assert norms.total is not None
    assert float(norms.total) == pytest.approx(expected, rel=1e-12)
    assert norms.parts == 3
    assert unused.grad is None
    for gradient, parameter in zip(whole, (weight, gain), strict=True):
        assert parameter.grad is not None
        assert (parameter.grad - gradient).abs().max() < 1e-12


def test_in_training(make_run_config: MakeConfig, tmp_path: Path) -> None:
    """The trainer's numbers are those of its micro-batches; a resume goes on exactly."""
    plain = [s.loss for s in Trainer(make_run_config(micro_batch_size=16))]
    config = make_run_config(noise_scale_decay=0.8, checkpoint_every_images=320)
    seen = []
    squares: list[tuple[float, float]] = []
    trainer = Trainer(config)
    assert trainer.micro_batch == 16  # two halves, without being asked to
    update = NoiseScale.update

    def record(self: NoiseScale, small: float, large: float, *sizes: float) -> None:
        squares.append((small, large))
        assert sizes == (16, 32)
        update(self, small, large, *sizes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NoiseScale, "update", record)
        for state in trainer:
            seen.append(state.noise_scale)
            assert squares[-1][1] == pytest.approx(state.grad_norm**2, rel=1e-6)
            # The mean of squares is at least the square of the mean.
            assert squares[-1][0] >= squares[-1][1] * (1 - 1e-6)
    again = NoiseScale(0.8)
    for small, large in squares:
        again.update(small, large, 16, 32)
    assert again.value == seen[-1]
    assert any(value is not None for value in seen)
    assert [s.loss for s in Trainer(config)] == plain  # only looked at

    run_training(config, progress=False)
    lines = (Path(config.out) / "metrics.jsonl").read_text()
    assert '"noise_scale": ' in lines
    half = Path(config.out) / "checkpoint-000000000320.safetensors"
    assert read_info(half).state["noise_scale"]["updates"] == 10
    assert [s.noise_scale for s in Trainer(config, resume=half)] == seen[10:]
    assert all(s.noise_scale is None for s in Trainer(make_run_config(), resume=half))


def test_only_wrapped_modules_have_buckets() -> None:
    with pytest.raises(ValueError, match="Linear has no communication between processes"):
        BucketNorms(nn.Linear(1, 1))
