"""What guidance remembers belongs to one run: runs one after another, side by side, sample by
sample."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from mixture import Mixture, given
from torch import Tensor

from k_diffusion.denoiser import Call, FunctionDenoiser, call_of, mark_call
from k_diffusion.guidance import Cached, Composed, OnPath, Part, SwitchAt, apg, cfg
from k_diffusion.guidance.memory import RunMemory
from k_diffusion.sampling import KSampler, sample_euler, unit_noise
from k_diffusion.utils.levels import FLOW, VE, Level

NONE = {"class_label": None}
ANEW: dict[str, Callable[[], Any]] = {
    # Not asked at the first call.
    "apg, interval": lambda: apg(Mixture(), 4.0, null=NONE, interval=(0.1, 5.0)),
    "refiner": lambda: SwitchAt(Mixture(), Cached(Mixture(), 0.05), 5.0),
    "refiner on another path": lambda: SwitchAt(Mixture(), Cached(Mixture(FLOW), 0.05), 5.0),
}


@pytest.mark.parametrize("kind", ANEW)
def test_a_run_knows_nothing_of_the_one_before(kind: str) -> None:
    guided = ANEW[kind]()
    x, _, label = given(VE)
    sampler = KSampler(guided, "karras", "dpmpp_2m")
    first = sampler.sample(x, 20, label)
    sampler.sample(-x, 20, label)
    assert torch.equal(first, sampler.sample(x, 20, label))
    # Nor does an established function, which marks its calls itself.
    sigmas = torch.tensor([10.0, 4.0, 2.0, 1.0, 0.5, 0.2, 0.0])
    told = {"class_label": label}
    first = sample_euler(guided, x.float() * 10, sigmas, extra_args=told, disable=True)
    again = sample_euler(guided, x.float() * 10, sigmas, extra_args=told, disable=True)
    assert torch.equal(first, again)


def test_the_second_run_of_what_was_not_finite_begins_anew() -> None:
    """It would go wrong elsewhere, with what the first run left behind."""
    inner = Mixture()
    counts = []

    def breaks(x: Tensor, sigma: Tensor, **condition: Any) -> Tensor:
        call = call_of(sigma)
        assert call is not None
        counts.append(call.k)
        return inner(x, sigma, **condition) * (math.nan if call.k == 12 else 1.0)

    guided = SwitchAt(inner, Cached(breaks, 0.05, most=1), 5.0)
    x, _, label = given(VE)
    with pytest.raises(FloatingPointError, match="call 13 of 20"):
        KSampler(guided, "karras", "euler").sample(x, 20, label)
    again = counts.index(counts[0], 1)
    assert counts[again:] == counts[: counts.index(12) + 1]


@pytest.mark.parametrize("solver", ["dpm_adaptive", "dormand_prince"])
def test_apg_with_adaptive_steps_is_each_sample_as_if_alone(solver: str) -> None:
    label = torch.tensor([0, 1, 2, 1])
    seeds = [5, 6, 7, 8]

    def draw(rows: list[int]) -> Tensor:
        guided = apg(Mixture(), 4.0, null=NONE)
        noise = unit_noise((2,), [seeds[i] for i in rows])
        result: Tensor = KSampler(guided, "karras", solver).sample(noise, 8, label[rows])
        return result

    together = draw([0, 1, 2, 3])
    for i in range(4):
        assert float((draw([i]) - together[i]).abs().max()) < 1e-4


def test_apg_within_guidance_remembers_each_estimate_by_itself() -> None:
    """Two calls one after another are the same as both at once; and where the outer guidance
    begins in the middle of a run, what was kept of half as many rows is void."""
    x, _, label = given(VE)

    def other(condition: Any) -> dict[str, Any]:
        return {"class_label": (condition["class_label"] + 1) % 3}

    for interval in (None, (0.1, 2.0)):
        drawn = []
        for batched in (True, False):
            guided = cfg(
                apg(Mixture(), 3.0, null=NONE, norm=0.5), 2.0, null=other, batched=batched,
                interval=interval,
            )  # fmt: skip
            drawn.append(KSampler(guided, "karras", "euler").sample(x, 12, label))
        if interval is None:
            assert float((drawn[0] - drawn[1]).abs().max()) < 1e-12
        assert all(bool(each.isfinite().all()) for each in drawn)


def test_runs_and_places_are_told_apart() -> None:
    memory: RunMemory[list[int]] = RunMemory(list)
    level, shape, one, two = Level(1.0, 1.0), torch.Size((2, 3)), object(), object()

    def turn(k: int, run: object = None, shape: torch.Size = shape) -> tuple[bool, list[int]]:
        begins = memory.turn(Call(k, level, run), shape)
        memory.kept.append(k)
        return begins, list(memory.kept)

    assert turn(4, one) == (True, [4])
    assert turn(4, one) == (False, [4])  # a second place
    assert turn(5, one) == (False, [4, 5])
    assert turn(5, one, torch.Size((4, 3))) == (False, [5])
    assert turn(6, two) == (True, [6])
    assert turn(7) == (True, [7])
    assert turn(8) == (False, [7, 8])
    assert turn(2) == (True, [2])  # where runs are not told apart, a count that falls does


def test_every_run_is_told_from_others_and_by_nothing_else() -> None:
    runs: list[object] = []

    def model(x: Tensor, sigma: Tensor) -> Tensor:
        call = call_of(sigma)
        assert call is not None
        runs.append(call.run)
        return x / (1 + sigma[0] ** 2)

    # In other coordinates the level is another, and the run the same.
    other = OnPath(FunctionDenoiser(model, FLOW), VE)
    sampler = KSampler(other, "karras", "heun")
    for _ in range(2):
        sampler.sample(torch.randn(2, 1, 2, 2), 3)
    assert len({id(run) for run in runs[:5]}) == 1
    assert len({id(run) for run in runs}) == 2
    sigmas = torch.tensor([4.0, 2.0, 0.0])
    for _ in range(2):
        sample_euler(other, torch.randn(2, 1, 2, 2), sigmas, disable=True)
    assert len({id(run) for run in runs}) == 4
    assert None not in runs
    assert Call(3, Level(1.0, 1.0), object()) == Call(3, Level(1.0, 1.0))


def test_apg_has_no_momentum_where_no_call_is_known() -> None:
    x, sigma, label = given(VE)
    guided = apg(Mixture(), 4.0, null=NONE)
    plain = apg(Mixture(), 4.0, null=NONE, momentum=0.0)(x, sigma, class_label=label)
    marked = mark_call(sigma.clone(), Call(0, Level(1.0, 0.7)))
    guided(x, marked, class_label=label)
    for _ in range(2):
        assert torch.equal(guided(x, sigma, class_label=label), plain)


@pytest.mark.parametrize("masked", [False, True])
def test_each_of_composed_conditions_has_a_memory_of_its_own(masked: bool) -> None:
    """Though outside an interval not all of them are asked for."""
    mask = torch.tensor([1.0, 0.0]) if masked else None
    x, _, _ = given(VE)

    class Each:
        """A cache for each condition, by its label."""

        float64_sigma, path = True, VE
        alpha = staticmethod(VE.alpha)

        def __init__(self) -> None:
            self.caches: dict[int, Cached] = {}

        def __call__(self, x: Tensor, sigma: Tensor, class_label: Tensor) -> Tensor:
            cache = self.caches.setdefault(int(class_label[0]), Cached(Mixture(), 0.05))
            result: Tensor = cache(x, sigma, class_label=class_label)
            return result

    def run(model: Any, batched: bool) -> Tensor:
        parts = [
            Part({"class_label": torch.full((4,), label)}, weight, mask)
            for label, weight in ((2, -0.5), (0, 2.0), (1, 0.7))
        ]
        guided = Composed(model, parts, null={"class_label": torch.full((4,), 3)},
                          interval=(0.05, 4.0), batched=batched)  # fmt: skip
        return KSampler(guided, "karras", "dpmpp_2m").sample(x, 30)

    each = Each()
    apart = run(each, False)
    assert sum(cache.spared for cache in each.caches.values()) > 4
    assert float((run(Cached(Mixture(), 0.05), False) - apart).abs().max()) < 1e-12
    exact = run(Mixture(), True)
    assert 1e-6 < float((apart - exact).abs().max()) < 0.2
