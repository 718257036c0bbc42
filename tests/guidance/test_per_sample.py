"""What guidance holds for each sample goes with the samples: into the parts of a batch that
adaptive solvers, steps="auto" and sample_many ask about, and into twice the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from mixture import MEANS, Mixture, given
from torch import Tensor, nn

from k_diffusion.guidance import (
    Composed,
    Guided,
    Part,
    SwitchAt,
    apg,
    autoguidance,
    cfg,
    posterior_sampling,
    pseudo_inverse,
)
from k_diffusion.guidance.contrast import batched_call, null_condition
from k_diffusion.sampling import AutoSteps, KSampler, invert
from k_diffusion.utils.levels import VE, Level

NONE = {"class_label": None}
SEEDS = [5, 6, 7, 8]
LABELS = torch.tensor([0, 1, 2, 1])
SCALES = torch.tensor([1.0, 2.0, 3.0, 4.0])
MEASURED = torch.tensor([[0.4, 0.0], [-0.6, 0.0], [1.0, 0.0], [0.0, 0.0]])
NULLS = torch.tensor([1, 2, 0, 3])
MASKS = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.5, 0.5]])


def keep_first(x0: Tensor) -> Tensor:
    return x0 * torch.tensor([1.0, 0.0], dtype=x0.dtype)


def posterior(measured: Any) -> Any:
    return posterior_sampling(Mixture(), keep_first, measured, noise=0.1)


def towards(x0: Tensor, sigma: Tensor, class_label: Tensor) -> Tensor:
    return -(x0 - MEANS[class_label].to(x0.dtype)).square().sum(1)


Make = Callable[[Any], Any]
# Each of what it holds for the samples: their tensor, and what makes the guidance of a part of it.
BOUND: dict[str, tuple[Tensor, Make]] = {
    "cfg": (SCALES, lambda v: cfg(Mixture(), v, null=NONE)),
    "cfg, two calls": (SCALES, lambda v: cfg(Mixture(), v, null=NONE, batched=False)),
    "apg": (SCALES, lambda v: apg(Mixture(), v, null=NONE, norm=0.5)),
    "autoguidance": (SCALES, lambda v: autoguidance(Mixture(), cfg(Mixture(), v, null=NONE), 2.0)),
    "guided": (SCALES, lambda v: Guided(Mixture(), towards, v)),
    "posterior sampling": (MEASURED, posterior),
    "pseudo-inverse": (
        MEASURED, lambda v: pseudo_inverse(Mixture(), keep_first, v, noise=0.1)
    ),
    "null": (NULLS, lambda v: cfg(Mixture(), 2.0, null={"class_label": v})),
    "weight": (SCALES, lambda v: Composed(Mixture(), [Part({}, v)], null=NONE)),
    "mask": (MASKS, lambda v: Composed(Mixture(), [Part({}, 2.0, v), Part({}, 0.5)], null=NONE)),
    "part": (LABELS, lambda v: Composed(Mixture(), [Part({"class_label": v}, 2.0)], null=NONE)),
    "null of parts": (
        NULLS, lambda v: Composed(Mixture(), [Part({}, 2.0)], null={"class_label": v})
    ),
    "cfg of posterior sampling": (MEASURED, lambda v: cfg(posterior(v), 2.0, null=NONE)),
    "cfg of cfg": (SCALES, lambda v: cfg(cfg(Mixture(), v, null=NONE), 2.0, null=NONE)),
    "cfg of a null": (
        NULLS, lambda v: cfg(cfg(Mixture(), 3.0, null={"class_label": v}), 2.0, null=NONE)
    ),
    "cfg of composed": (
        MASKS, lambda v: cfg(Composed(Mixture(), [Part({}, 2.0, v)], null=NONE), 2.0, null=NONE)
    ),
    "refiner": (SCALES, lambda v: SwitchAt(Mixture(), cfg(Mixture(), v, null=NONE), 1.0)),
}  # fmt: skip


def draw(guided: Any, how: str, rows: list[int], **told: Any) -> Tensor:
    condition = {"class_label": LABELS[rows], **told}
    sampler = KSampler(guided, "karras", "dpm_adaptive" if how == "adaptive" else "heun")
    steps: Any = AutoSteps(0.02, first=4, most=64) if how == "auto" else 10
    result: Tensor = sampler.sample(
        steps=steps, shape=(2,), seeds=[SEEDS[i] for i in rows], condition=condition
    )
    return result


def settle_apart() -> list[int]:
    """The steps that each sample takes: they are not the same, so that batches shrink."""
    guided = cfg(Mixture(), SCALES, null=NONE)
    result = KSampler(guided, "karras", "heun").sample(
        steps=AutoSteps(0.02, first=4, most=64), shape=(2,), seeds=SEEDS, condition=LABELS,
        details=True,
    )  # fmt: skip
    return list(result.steps)


def test_samples_settle_apart_here() -> None:
    assert len(set(settle_apart())) > 1


@pytest.mark.parametrize("how", ["fixed", "adaptive", "auto"])
@pytest.mark.parametrize("kind", BOUND)
def test_what_is_bound_goes_with_its_sample(kind: str, how: str) -> None:
    values, make = BOUND[kind]
    together = draw(make(values), how, [0, 1, 2, 3])
    for i in range(4):
        alone = draw(make(values[i : i + 1]), how, [i])
        assert float((alone - together[i]).abs().max()) < 1e-4


@pytest.mark.parametrize("kind", BOUND)
def test_many_in_batches_are_each_as_if_alone(kind: str) -> None:
    values, make = BOUND[kind]
    sampler = KSampler(make(values), "karras", "heun")
    options: dict[str, Any] = {"steps": 10, "shape": (2,), "condition": LABELS, "seed": SEEDS}
    together = sampler.sample_many(4, batch_size=4, **options).collect()
    for batch_size in (1, 3):
        drawn = sampler.sample_many(4, batch_size=batch_size, **options).collect()
        assert float((drawn - together).abs().max()) < 1e-5
    assert float((together - draw(make(values), "fixed", [0, 1, 2, 3])).abs().max()) < 1e-5
    with pytest.raises(ValueError, match=r"holds 4 values, one a sample, but there are 8 samples"):
        sampler.sample_many(8, shape=(2,), batch_size=4)


NAMED: dict[str, Make] = {
    "cfg": lambda v: cfg(Mixture(), v, null=NONE),
    "guided": lambda v: Guided(Mixture(), towards, v),
    "weight": lambda v: Composed(Mixture(), [Part({}, v)], null=NONE),
    "cfg of cfg": lambda v: cfg(cfg(Mixture(), v, null=NONE), v, null=NONE),
    "base and refiner": lambda v: SwitchAt(
        cfg(Mixture(), v, null=NONE), cfg(Mixture(), v, null=NONE), 1.0, told=dict
    ),
    "lesser": lambda v: autoguidance(
        cfg(Mixture(), v, null=NONE), cfg(Mixture(), v, null=NONE), 2.0
    ),
}


@pytest.mark.parametrize("how", ["fixed", "adaptive", "auto"])
@pytest.mark.parametrize("kind", NAMED)
def test_a_scale_by_name_is_the_one_of_that_name(kind: str, how: str) -> None:
    guided = NAMED[kind]("strength")
    bound = draw(NAMED[kind](SCALES), how, [0, 1, 2, 3])
    named = draw(guided, how, [0, 1, 2, 3], strength=SCALES)
    assert float((named - bound).abs().max()) < 1e-5
    one = draw(guided, how, [0, 1], strength=2.0)
    assert float((one - draw(NAMED[kind](2.0), how, [0, 1])).abs().max()) < 1e-5
    with pytest.raises(ValueError, match="is the keyword 'strength' of the run, which was not giv"):
        draw(guided, how, [0, 1])


def test_a_measurement_a_mask_and_a_part_by_name() -> None:
    for kind in ("posterior sampling", "cfg of posterior sampling", "mask"):
        values, make = BOUND[kind]
        bound = draw(make(values), "adaptive", [0, 1, 2, 3])
        named = draw(make("mine"), "adaptive", [0, 1, 2, 3], mine=values)
        assert float((named - bound).abs().max()) < 1e-5


@pytest.mark.parametrize("how", ["fixed", "adaptive", "auto"])
def test_a_score_is_told_the_label_of_each_sample(how: str) -> None:
    """What holds all labels of its own cannot be told of some samples; what is told of them can."""
    together = draw(Guided(Mixture(), towards, 2.0), how, [0, 1, 2, 3])
    for i in range(4):

        def held(x0: Tensor, sigma: Tensor, i: int = i) -> Tensor:
            return towards(x0, sigma, LABELS[i : i + 1])

        alone = draw(Guided(Mixture(), held, 2.0), how, [i])
        assert float((alone - together[i]).abs().max()) < 1e-4


def test_what_a_score_is_told() -> None:
    x, sigma, label = given(VE)
    seen: list[set[str]] = []

    class Forward(nn.Module):
        def forward(self, x0: Tensor, sigma: Tensor, target: Tensor) -> Tensor:
            seen.append({"target"})
            return -(x0 - target).square().sum(1)

    def all_of_it(x0: Tensor, sigma: Tensor, **condition: Any) -> Tensor:
        seen.append(set(condition))
        return -x0.square().sum(1)

    inner = cfg(Mixture(), "inside", null=NONE)
    told = {"class_label": label, "inside": 2.0, "w": 3.0, "target": x}
    for score in (Forward(), all_of_it):
        # The model itself would refuse `target`, and `w`.
        Guided(inner, score, "w", alone=["target"])(x, sigma, **told)
    assert seen == [{"target"}, {"class_label", "target"}]
    Guided(inner, lambda x0, sigma: -x0.square().sum(1), "w", alone=["target"])(x, sigma, **told)
    with pytest.raises(TypeError, match="alone must be a list of keywords' names, got 'target'"):
        Guided(inner, all_of_it, alone="target")


def test_a_mask_of_one_sample_is_not_taken_for_one_value_a_sample() -> None:
    """Two values a sample, and two samples."""
    for how in ("adaptive", "auto"):
        guided = Composed(Mixture(), [Part({}, 2.0, MASKS[0]), Part({}, 0.5)], null=NONE)
        together = draw(guided, how, [0, 1])
        for i in (0, 1):
            assert float((draw(guided, how, [i]) - together[i]).abs().max()) < 1e-4


def test_guidance_may_be_changed_between_runs() -> None:
    guided = cfg(Mixture(), SCALES, null=NONE)
    draw(guided, "adaptive", [0, 1, 2, 3])
    guided.scale = 2.0
    plain = draw(cfg(Mixture(), 2.0, null=NONE), "adaptive", [0, 1, 2, 3])
    assert torch.equal(draw(guided, "adaptive", [0, 1, 2, 3]), plain)


def test_inversion_takes_the_rows_too() -> None:
    x = MEANS[LABELS].float()
    start, end = Level(1.0, 0.05), Level(1.0, 5.0)

    def inverted(rows: list[int]) -> Tensor:
        guided = cfg(Mixture(), SCALES[rows], null=NONE)
        told = {"class_label": LABELS[rows]}
        result: Tensor = invert(guided, x[rows], start, end, condition=told)[0]
        return result

    together = inverted([0, 1, 2, 3])
    for i in range(4):
        assert float((inverted([i]) - together[i]).abs().max()) < 1e-3


def test_twice_the_batch_is_twice_all_that_has_its_rows() -> None:
    seen: list[Any] = []

    def model(x: Tensor, sigma: Tensor, **condition: Any) -> Tensor:
        seen.append((len(x), condition))
        return x

    x, sigma, label = given(VE)
    one = {"more": {"label": label, "all": "same"}, "text": "same"}
    other = {"more": {"label": label + 1, "all": "same"}, "text": "same"}
    batched_call(model, x, sigma, [one, other])
    ((rows, told),) = seen
    assert rows == 8
    assert told["text"] == told["more"]["all"] == "same"
    assert torch.equal(told["more"]["label"], torch.cat([label, label + 1]))
    for apart in ({**other, "text": "other"}, {**other, "more": {"label": label}}):
        seen.clear()
        batched_call(model, x, sigma, [one, apart])
        assert [rows for rows, _ in seen] == [4, 4]


def test_what_does_not_fit_says_the_way_out() -> None:
    x, sigma, label = given(VE)
    three = SCALES[:3]
    for make in (lambda v: cfg(Mixture(), v, null=NONE), lambda v: Guided(Mixture(), towards, v)):
        with pytest.raises(ValueError, match=r"scale must .* \(4,\), got \(3,\): .* the name of a"):
            make(three)(x, sigma, class_label=label)
    with pytest.raises(ValueError, match=r"weight must .* \(4,\), got \(3,\): .* the name of a"):
        Composed(Mixture(), [Part({}, three)], null=NONE)(x, sigma, class_label=label)
    with pytest.raises(ValueError, match=r"measured has shape \(3, 2\), .* the name of a keyword"):
        posterior(MEASURED[:3])(x, sigma)
    with pytest.raises(TypeError, match="mask must be a tensor or a keyword's name, got 3"):
        Part({}, 1.0, 3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="scale must be a number, .* got str '3 x'"):
        cfg(Mixture(), "3 x")
    with pytest.raises(TypeError, match="scale must be a number, .* got list"):
        cfg(Mixture(), "w", null=NONE)(x, sigma, class_label=label, w=[2.0] * 4)


def test_a_compiled_score_is_told_what_the_module_names() -> None:
    class Forward(nn.Module):
        def forward(self, x0: Tensor, sigma: Tensor) -> Tensor:
            return -x0.square().sum(1)

    class Compiled(nn.Module):  # as torch.compile makes it, which is slow to import
        def __init__(self) -> None:
            super().__init__()
            self._orig_mod = Forward()

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self._orig_mod(*args, **kwargs)

    x, sigma, label = given(VE)
    told = Guided(Mixture(), Compiled())(x, sigma, class_label=label)
    assert torch.equal(told, Guided(Mixture(), Forward())(x, sigma, class_label=label))


def test_no_condition_leaves_alone_what_is_for_guidance_inside() -> None:
    x, _, label = given(VE)
    inner = cfg(Mixture(), "strength", null=NONE)
    told = {"class_label": label, "strength": SCALES}
    seen: list[Any] = []

    def other(condition: Any) -> dict[str, Any]:
        seen.append(set(condition))
        return {}

    class Network:
        def drop_condition(self, condition: Any, drop: Tensor) -> dict[str, Any]:
            seen.append(set(condition))
            return {}

    for null in (None, NONE, other):
        assert null_condition(null, inner, told, x) == {"strength": SCALES}
    inner.denoiser.network = Network()
    assert null_condition(None, inner, told, x) == {"strength": SCALES}
    assert seen == [{"class_label"}, {"class_label"}]


def test_a_refiner_is_not_told_what_is_for_the_guidance_of_the_base() -> None:
    x, sigma, label = given(VE)
    base = cfg(Mixture(), "strength", null=NONE)
    plain = Mixture()(x, sigma, class_label=label)
    for told in (
        None,
        lambda condition: {"class_label": condition.pop("class_label"), **condition},
    ):
        switched = SwitchAt(base, Mixture(), 1.0, told=told)
        assert torch.equal(switched(x, sigma, class_label=label, strength=3.0), plain)
