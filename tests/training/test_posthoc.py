"""Averages made afterwards: inner products, least squares, and a run's against one kept."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from k_diffusion.models import MODELS
from k_diffusion.training import load_denoiser, read_info
from k_diffusion.training.checkpoint import CheckpointError, save_checkpoint
from k_diffusion.training.config import TrainConfig
from k_diffusion.training.ema import Ema, PowerFunction, exponent_of
from k_diffusion.training.posthoc import (
    TOLERANCE,
    PosthocError,
    combine,
    overlap,
    plan,
    reconstruct,
    save_reconstruction,
)
from k_diffusion.training.run import run_training
from k_diffusion.training.snapshots import Snapshot, list_snapshots
from k_diffusion.training.trainer import Trainer, TrainState
from k_diffusion.utils.maths import gauss_legendre

MakeConfig = Callable[..., TrainConfig]
DIRECT = (0.06, 0.08, 0.15)


# ---------------------------------------------------------------- mathematics


@pytest.mark.parametrize("times", [(1.0, 1.0), (3.0, 7.0), (7.0, 3.0), (1e6, 2e7), (2.0, 400.0)])
@pytest.mark.parametrize("gammas", [(0.5, 0.5), (6.94, 16.97), (16.97, 6.94), (40.0, 1.0)])
def test_overlap_is_the_integral(times: tuple[float, float], gammas: tuple[float, float]) -> None:
    end = min(times)
    total = 0.0
    for part in range(50):  # composite Gauss quadrature over the time that both cover
        for node, weight in gauss_legendre(8):
            tau = end * (part + (1 + node) / 2) / 50
            product = 1.0
            for t, gamma in zip(times, gammas, strict=True):
                product *= (gamma + 1) / t * (tau / t) ** gamma
            total += weight / 2 * end / 50 * product
    exact = overlap(times[0], gammas[0], times[1], gammas[1])
    assert abs(total - exact) <= 1e-8 * exact


def functions_of(n: int, lengths: tuple[float, ...]) -> list[tuple[float, float]]:
    return [(float(i), length) for i in range(1, n + 1) for length in lengths]


def sampled(t: float, sigma_rel: float, end: float, points: int) -> Tensor:
    """A power function at the middles of `points` cells over [0, end]."""
    tau = (torch.arange(points, dtype=torch.float64) + 0.5) * end / points
    gamma = exponent_of(sigma_rel)
    return torch.where(tau < t, (gamma + 1) / t * (tau / t) ** gamma, 0.0)


@pytest.mark.parametrize("sigma_rel", [0.03, 0.08, 0.2])
def test_combination_is_the_nearest_whose_weights_sum_to_one(sigma_rel: float) -> None:
    kept = functions_of(8, (0.05, 0.10))
    found = combine(kept, 8.0, sigma_rel)
    assert abs(sum(found.weights) - 1) < 1e-12
    points = 80_000
    basis = torch.stack([sampled(t, length, 8.0, points) for t, length in kept], dim=1)
    wanted = sampled(8.0, sigma_rel, 8.0, points)
    # The same problem on a grid, the condition built in: the last weight is 1 minus the others.
    free = torch.linalg.lstsq(basis[:, :-1] - basis[:, -1:], (wanted - basis[:, -1])[:, None])
    others = free.solution[:, 0]
    best = torch.cat([others, 1 - others.sum()[None]])
    assert (torch.tensor(found.weights, dtype=torch.float64) - best).abs().max() < 1e-4
    error = (basis @ best - wanted).norm() / wanted.norm()
    assert abs(found.error - error) < 1e-5


def test_combination_knows_what_was_kept() -> None:
    kept = functions_of(8, (0.05, 0.10))
    found = combine(kept, 5.0, 0.10)
    assert found.error == 0
    assert [k for k, w in zip(kept, found.weights, strict=True) if w] == [(5.0, 0.10)]
    # The same through the least squares.
    near = combine(kept, 8.0, 0.10 + 1e-9)
    assert near.error < 1e-7
    assert abs(near.weights[-1] - 1) < 1e-6


def test_combination_does_not_depend_on_the_unit_of_time() -> None:
    kept = functions_of(16, (0.05, 0.10))
    one = combine(kept, 16.0, 0.08)
    many = combine([(t * 1e9, length) for t, length in kept], 16e9, 0.08)
    assert max(abs(a - b) for a, b in zip(one.weights, many.weights, strict=True)) < 1e-9


def test_combination_bears_a_function_that_is_there_twice() -> None:
    kept = functions_of(8, (0.05, 0.10))
    once, twice = combine(kept, 8.0, 0.08), combine(kept * 2, 8.0, 0.08)
    assert abs(once.error - twice.error) < 1e-9
    assert max(map(abs, twice.weights)) < 2


@pytest.mark.parametrize(
    ("n", "within", "outside"), [(8, 0.014, 0.35), (16, 0.004, 0.21), (32, 0.001, 0.13)]
)
def test_how_well_lengths_between_and_outside_are_made(
    n: int, within: float, outside: float
) -> None:
    kept = functions_of(n, (0.05, 0.10))
    assert all(combine(kept, float(n), s).error < within for s in (0.055, 0.06, 0.07, 0.08, 0.09))
    assert combine(kept, float(n), 0.28).error > outside > TOLERANCE


# ---------------------------------------------------------------- a run


@dataclass
class Made:
    """A run with snapshots, and averages that were kept directly."""

    folder: Path
    config: TrainConfig
    direct: dict[float, dict[str, Tensor]]
    at_half: dict[float, dict[str, Tensor]]

    @property
    def snapshots(self) -> list[Snapshot]:
        return list_snapshots(self.folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    """160 steps with 16 snapshots; kept directly beside them: the lengths of `DIRECT`."""
    from .conftest import Tiny, config_of

    folder = tmp_path_factory.mktemp("posthoc") / "run"
    steps, every = 160, 10
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "tiny", Tiny)
        config = config_of(
            out=str(folder),
            total_images=32 * steps,
            optimizer={"lr": 1e-2},
            ema={"profiles": [0.05, 0.10], "snapshot_every_images": 32 * every},
        )
        averages: dict[float, Ema] = {}
        half: dict[float, dict[str, Tensor]] = {}

        def keep(trainer: Trainer, state: TrainState) -> None:
            if not averages:
                averages.update({s: Ema(trainer.network, PowerFunction(s)) for s in DIRECT})
            for length, average in averages.items():
                average.update()
                if state.step == steps // 2:
                    half[length] = {n: v.clone() for n, v in average.state_dict().items()}

        run_training(config, progress=False, on_step=keep)
        yield Made(folder, config, {s: a.state_dict() for s, a in averages.items()}, half)


def largest_error(ours: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """Of all tensors the largest difference, as a share of the tensor's largest number."""
    assert set(ours) == set(exact)
    assert all(ours[n].dtype == exact[n].dtype for n in exact)
    assert torch.equal(ours["calls"], exact["calls"])  # the buffer is copied, not averaged
    floats = [n for n in exact if n != "calls"]
    return max(((ours[n] - exact[n]).abs().max() / exact[n].abs().max()).item() for n in floats)


def test_made_afterwards_is_the_one_kept_directly(made: Made) -> None:
    for length, bound in ((0.06, 5e-5), (0.08, 5e-5), (0.15, 2e-4)):
        found = reconstruct(made.snapshots, length)
        assert largest_error(found.weights, made.direct[length]) < bound < 1e-3
        assert (found.updates, found.snapshots, found.info.images_seen) == (160, 16, 5120)
        # It is no small matter: the nearest that was kept is far from it.
        kept = reconstruct(made.snapshots, 0.05).weights
        assert largest_error(kept, made.direct[length]) > 5e-3


def test_made_for_an_earlier_time(made: Made) -> None:
    found = reconstruct(made.snapshots, 0.08, 80)
    assert largest_error(found.weights, made.at_half[0.08]) < 1e-3
    assert (found.updates, found.snapshots, found.info.images_seen) == (80, 8, 2560)
    with pytest.raises(PosthocError, match=r"t = 161 .* outside the snapshots.* of 10 to 160"):
        reconstruct(made.snapshots, 0.08, 161)
    with pytest.raises(PosthocError, match=r"t = 9 "):
        reconstruct(made.snapshots, 0.08, 9)


def test_few_snapshots_are_enough_between_the_profiles(made: Made) -> None:
    found = reconstruct(made.snapshots[1::2], 0.08)
    assert found.snapshots == 8
    assert largest_error(found.weights, made.direct[0.08]) < 1e-3


def test_a_length_that_was_kept_comes_out_of_one_snapshot(made: Made) -> None:
    found = reconstruct(made.snapshots, 0.10)
    assert (found.snapshots, found.error) == (1, 0)
    expected = load_denoiser(found.info.path, "ema_0.1")[0].network.state_dict()
    for name, tensor in expected.items():
        assert torch.equal(found.weights[name], tensor), name


def test_what_cannot_be_made_well_is_refused(made: Made) -> None:
    message = (
        r"sigma_rel = 0\.02 cannot be made of 16 snapshots of 0\.05, 0\.1: .* off by 12% of "
        r"itself \(allowed: 2%\)"
    )
    with pytest.raises(PosthocError, match=message):
        reconstruct(made.snapshots, 0.02)
    with pytest.raises(PosthocError, match=r"sigma_rel = 0\.28"):
        reconstruct(made.snapshots, 0.28)
    assert 0.1 < reconstruct(made.snapshots, 0.02, tolerance=0.2).error < 0.2
    with pytest.raises(ValueError, match=r"sigma_rel = 0\.3 is no length of a power function"):
        reconstruct(made.snapshots, 0.3)
    with pytest.raises(PosthocError, match="none are given"):
        reconstruct([], 0.08)


def test_file_to_sample_from(made: Made, tmp_path: Path) -> None:
    found = reconstruct(made.snapshots, 0.08)
    sha256 = save_reconstruction(found, tmp_path / "new/model.safetensors")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["model.safetensors"]
    denoiser, info = load_denoiser(tmp_path / "new/model.safetensors")
    assert info.sha256 == sha256
    assert (info.images_seen, info.step) == (5120, 160)
    assert info.config == read_info(made.snapshots[-1].path).config
    assert info.data["images"] == 1438
    assert info.state["weights"]["average"] == "ema_0.08"
    assert info.state["weights"]["snapshots"] == 16
    for name, tensor in denoiser.network.state_dict().items():
        assert torch.equal(tensor, found.weights[name]), name


def test_snapshots_between_which_nothing_was_learned_count_once(made: Made) -> None:
    *before, last = made.snapshots
    later = replace(last, images_seen=last.images_seen + 320)
    parts, error = plan([*before, last, later], 0.08)
    assert [snapshot for snapshot, _ in parts] == [*before, later]
    assert error == plan(made.snapshots, 0.08)[1]


def test_damaged_snapshot_is_named(made: Made, tmp_path: Path) -> None:
    shutil.copytree(made.folder / "ema", tmp_path / "ema")
    path = sorted((tmp_path / "ema").iterdir())[7]
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=path.name):
        reconstruct(list_snapshots(tmp_path), 0.08)


def test_snapshot_of_another_network_is_named(made: Made, tmp_path: Path) -> None:
    shutil.copytree(made.folder / "ema", tmp_path / "ema")
    first, second = (s.path for s in list_snapshots(tmp_path)[:2])

    def forge(path: Path, **tensors: Tensor) -> None:
        info = read_info(path)
        parts: dict[str, dict[str, Any]] = {
            part: {name: tensor.clone() for name, tensor in tensors.items()}
            for part in info.averages
        }
        save_checkpoint(
            path, parts, config={}, images_seen=info.images_seen, step=1, state=info.state
        )

    forge(first, a=torch.ones(2))
    with pytest.raises(
        CheckpointError, match=f"{second.name} is of another network than .*{first.name}"
    ):
        reconstruct(list_snapshots(tmp_path), 0.08)


def test_snapshots_in_float16_cost_little(
    made: Made, make_run_config: MakeConfig, tmp_path: Path
) -> None:
    config = made.config.model_dump(mode="json")
    config["ema"]["snapshot_dtype"] = "float16"
    config["out"] = str(tmp_path / "half")
    run_training(make_run_config(**config), progress=False)
    snapshots = list_snapshots(tmp_path / "half")
    assert {s.dtype for s in snapshots} == {"float16"}
    found = reconstruct(snapshots, 0.08)
    error = largest_error(found.weights, made.direct[0.08])
    assert 5e-5 < error < 1e-3


def test_a_length_is_finite_and_positive() -> None:
    with pytest.raises(ValueError, match="sigma_rel = nan"):
        combine([(1.0, 0.05)], 1.0, math.nan)
