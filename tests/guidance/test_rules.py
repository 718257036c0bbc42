"""The rules that make one estimate of two, the range of estimates, and several conditions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mixture import NULL, Mixture, given
from torch import Tensor

from k_diffusion.denoiser import Call, FunctionDenoiser, make_denoiser, mark_call
from k_diffusion.guidance import (
    Clamp,
    Composed,
    DynamicThreshold,
    Part,
    apg,
    cfg,
    cfg_zero_star,
    dynamic_threshold,
    perturbed_attention,
)
from k_diffusion.guidance.perturbed import perturbed, self_attentions
from k_diffusion.models import make_model
from k_diffusion.models.attention import SelfAttention
from k_diffusion.sampling import KSampler
from k_diffusion.utils.levels import FLOW, VE, VP, Level, Path

PATHS = pytest.mark.parametrize("path", [VE, VP, FLOW], ids=str)


def worst(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def estimates(path: Path = VE) -> tuple[Mixture, Tensor, Tensor, Tensor, Tensor, Tensor]:
    model = Mixture(path)
    x, sigma, label = given(path)
    return model, x, sigma, label, model(x, sigma, class_label=label), model(x, sigma)


def test_apg_without_its_parts_is_cfg() -> None:
    model, x, sigma, label, *_ = estimates()
    plain = cfg(model, 4.0, null=NULL)(x, sigma, class_label=label)
    same = apg(model, 4.0, null=NULL, parallel=1.0, momentum=0.0)(x, sigma, class_label=label)
    assert worst(plain, same) < 1e-14


def test_apg_splits_cuts_and_remembers() -> None:
    model, x, sigma, label, d, u = estimates()
    across = apg(model, 4.0, null=NULL, momentum=0.0)(x, sigma, class_label=label) - d
    assert float((across * d).sum(1).abs().max()) < 1e-14
    full = 3 * (d - u)
    along = (full * d).sum(1, keepdim=True) / d.square().sum(1, keepdim=True) * d
    assert worst(across, full - along) < 1e-14
    cut = apg(model, 2.0, null=NULL, parallel=1.0, momentum=0.0, norm=0.05)
    step = cut(x, sigma, class_label=label) - d
    length = (d - u).norm(dim=1).clamp(max=0.05)
    assert worst(step.norm(dim=1), length) < 1e-14
    remembers = apg(model, 2.0, null=NULL, parallel=1.0, momentum=-0.5)
    first = remembers(x, mark_call(sigma.clone(), Call(0, Level(1.0, 0.7))), class_label=label)
    second = remembers(x, mark_call(sigma.clone(), Call(1, Level(1.0, 0.7))), class_label=label)
    again = remembers(x, mark_call(sigma.clone(), Call(0, Level(1.0, 0.7))), class_label=label)
    assert worst(first, d + (d - u)) < 1e-14
    assert worst(second, d + 0.5 * (d - u)) < 1e-14
    assert torch.equal(first, again)


@PATHS
def test_zero_star_fits_the_second_velocity(path: Path) -> None:
    model, x, sigma, label, d, u = estimates(path)
    alpha = path.alpha(sigma)[:, None]
    s = sigma[:, None]
    # dx / dsigma of x = alpha x0 + sigma eps with the estimate held, times what makes it finite.
    slope = {"ve": 0.0, "flow": -1.0}.get(str(path))

    def velocity(e: Tensor) -> Tensor:
        eps = (x - alpha * e) / s
        return eps + slope * e if slope is not None else alpha * eps - s * e

    def back(v: Tensor) -> Tensor:
        return x - s * v if slope is not None else alpha * x - s * v

    first, second = velocity(d), velocity(u)
    share = (first * second).sum(1, keepdim=True) / second.square().sum(1, keepdim=True)
    expected = back(share * second + 3 * (first - share * second))
    guided = cfg_zero_star(model, 3.0, null=NULL, still=0)(x, sigma, class_label=label)
    assert worst(guided, expected) < 1e-13
    # The share is the best: no other brings the second velocity nearer to the first.
    for other in (0.99, 1.01):
        assert bool(
            ((first - share * second).norm(dim=1) <= (first - other * share * second).norm(dim=1))
            .all()
        )  # fmt: skip
    assert worst(cfg_zero_star(model, 1.0, null=NULL)(x, sigma, class_label=label), d) < 1e-13


def test_zero_star_stays_still_at_first() -> None:
    seen = []
    guided = cfg_zero_star(Mixture(FLOW), 3.0, null=NULL, still=2)
    x, _, label = given(FLOW)
    KSampler(guided, None, "euler").sample(
        x, 10, label, callback=lambda k, x, sigma, d: seen.append(x.clone())
    )
    assert worst(seen[0], seen[1]) < 1e-12
    assert worst(seen[1], seen[2]) < 1e-12
    assert worst(seen[2], seen[3]) > 1e-3


@pytest.mark.parametrize("still", [1, 2])
@pytest.mark.parametrize("solver", ["euler", "dpmpp_3m", "unipc"])
@pytest.mark.parametrize(
    ("path", "options"),
    [
        (VE, {}),
        (FLOW, {"init": torch.zeros(4, 2, dtype=torch.float64), "strength": 0.4}),
    ],
    ids=["VE", "strength"],
)
def test_zero_star_moves_at_once_where_there_is_a_signal(
    path: Path, options: dict[str, Any], solver: str, still: int
) -> None:
    """A still call would take x, noise and all, for the estimate, and multistep methods keep it."""
    drawn = []
    x, _, label = given(path)
    for calls in (0, still):
        guided = cfg_zero_star(Mixture(path), 3.0, null=NULL, still=calls)
        if options:  # a run from pure noise before, which must leave nothing
            KSampler(guided, None, solver).sample(x, 6, label)
        drawn.append(KSampler(guided, None, solver).sample(x, 6, label, **options))
    assert torch.equal(*drawn)


def test_zero_star_is_still_in_the_first_part_of_a_resampled_run_alone() -> None:
    moved: dict[float, float] = {}

    def callback(k: int, x: Tensor, sigma: Tensor, d: Tensor) -> None:
        # A still call's estimate is x less no velocity: x itself on the path of a flow.
        moved[float(sigma[0])] = max(moved.get(float(sigma[0]), 0.0), worst(d[:, 1], x[:, 1]))

    guided = cfg_zero_star(Mixture(FLOW), 3.0, null=NULL)
    x, _, label = given(FLOW)
    KSampler(guided, None, "euler").sample(
        x, 10, label, init=torch.zeros_like(x), mask=torch.tensor([0.0, 1.0]), resample=3,
        callback=callback,
    )  # fmt: skip
    assert moved.pop(1.0) < 1e-12
    assert min(moved.values()) > 1e-3


def test_a_dynamic_threshold_that_has_a_largest() -> None:
    """What lies beyond it is cut off, not divided away."""
    torch.manual_seed(0)
    x0 = torch.randn(3, 50, dtype=torch.float64) * torch.tensor([[0.1], [1.0], [10.0]])
    size = x0.abs().quantile(0.9, dim=1)
    assert 1 < float(size[1]) < 3 < float(size[2])
    held = dynamic_threshold(x0, 0.9, 1.0, 3.0)
    assert torch.equal(held[:2], dynamic_threshold(x0, 0.9, 1.0)[:2])
    assert worst(held[2], x0[2].clamp(-3, 3) / 3) < 1e-15
    wide = DynamicThreshold(FunctionDenoiser(lambda x, sigma: x), 0.9, 1.0, largest=3.0)
    assert torch.equal(wide(x0, torch.ones(3)), held)
    for largest in (0.5, float("nan"), "3"):
        with pytest.raises(ValueError, match="largest must be at least bound, 1.0, got"):
            DynamicThreshold(Mixture(), largest=largest)  # type: ignore[arg-type]


def test_clamp_and_dynamic_threshold() -> None:
    model, x, sigma, *_ = estimates()
    plain = model(x, sigma)
    assert torch.equal(Clamp(model, -0.1, 0.2)(x, sigma), plain.clamp(-0.1, 0.2))
    torch.manual_seed(0)
    x0 = torch.randn(3, 5, 7, 2) * torch.tensor([0.1, 1.0, 10.0]).reshape(3, 1, 1, 1)
    held = dynamic_threshold(x0, 0.9, 1.0)
    assert torch.equal(held[0], x0[0])
    for i in (1, 2):
        s = max(1.0, float(torch.quantile(x0[i].abs().flatten(), 0.9)))  # between two values
        assert worst(held[i], x0[i].clamp(-s, s) / s) < 1e-6
    wide = FunctionDenoiser(lambda x, sigma: x * 10)
    assert float(DynamicThreshold(wide)(x, sigma).abs().max()) <= 1.0
    pair = cfg(Mixture(), 2.0, null=NULL, pair=True)
    both = Clamp(pair, -0.1, 0.1)(x, sigma, class_label=given(VE)[2])
    assert isinstance(both, tuple)
    assert all(float(e.abs().max()) <= 0.1 for e in both)


@pytest.mark.parametrize("batched", [True, False])
def test_composed(batched: bool) -> None:
    model, x, sigma, label, d, u = estimates()
    other = (label + 1) % 3
    e = model(x, sigma, class_label=other)
    mask = torch.tensor([1.0, 0.0], dtype=torch.float64)

    def composed(*parts: Part, **more: Any) -> Tensor:
        return Composed(model, parts, null=NULL, batched=batched, **more)(x, sigma)

    one = composed(Part({"class_label": label}, 2.5))
    assert worst(one, cfg(model, 2.5, null=NULL)(x, sigma, class_label=label)) < 1e-14
    both = composed(Part({"class_label": label}, 2.0), Part({"class_label": other}, -0.5))
    assert worst(both, u + 2 * (d - u) - 0.5 * (e - u)) < 1e-14
    regions = [
        Part({"class_label": label}, 3.0, mask), Part({"class_label": other}, 3.0, 1 - mask)
    ]  # fmt: skip
    halves = composed(*regions)
    assert worst(halves[:, 0], (u + 3 * (d - u))[:, 0]) < 1e-14
    assert worst(halves[:, 1], (u + 3 * (e - u))[:, 1]) < 1e-14
    outside = composed(*regions, interval=(1.0, 2.0))
    mixed = torch.where(torch.tensor([True, False]), d, e)
    # No level is known on the host here: what is outside is told by sigma itself.
    assert worst(outside, mixed) < 1e-14
    marked = mark_call(sigma.clone(), Call(0, Level(1.0, 0.7)))
    known = Composed(model, regions, null=NULL, interval=(1.0, 2.0))(x, marked)
    assert worst(known, mixed) < 1e-14


def test_composed_outside_its_interval_goes_away_from_nothing() -> None:
    """Outside there is no guidance: a weight below 0, which is to lead away, has no share."""
    model, x, sigma, label, d, u = estimates()
    other = (label + 1) % 3
    e = model(x, sigma, class_label=other)
    known = mark_call(sigma.clone(), Call(0, Level(1.0, 0.7)))

    def outside(at: Tensor, *weights: Any) -> Tensor:
        model.rows.clear()
        parts = [Part({"class_label": label}, weights[0]), Part({"class_label": other}, weights[1])]
        return Composed(model, parts, null=NULL, interval=(1.0, 2.0), batched=False)(x, at)

    for at in (sigma, known):
        for second in (-2.0, torch.tensor([-2.0])):
            assert worst(outside(at, 3.0, second), d) < 1e-15
            assert worst(outside(at, 1.0, second), d) < 1e-15
        assert worst(outside(at, 3.0, 1.0), (3 * d + e) / 4) < 1e-15
        assert worst(outside(at, -1.0, 0.0), u) == 0
        each = outside(at, torch.tensor([1.0, 0.0, -1.0, 2.0]), torch.tensor([1.0, 0.0, 1.0, -2.0]))
        for i, expected in enumerate(((d + e) / 2, u, e, d)):
            assert worst(each[i], expected[i]) < 1e-15


def test_calls_that_composed_spares_outside_its_interval() -> None:
    model, x, sigma, label, *_ = estimates()
    known = mark_call(sigma.clone(), Call(0, Level(1.0, 0.7)))
    left = torch.tensor([1.0, 0.0])

    def calls(*parts: Part, **more: Any) -> int:
        model.rows.clear()
        composed = Composed(model, parts, null=NULL, interval=(1.0, 2.0), batched=False)
        composed(x, known, class_label=label, **more)
        return len(model.rows)

    assert calls(Part({}, 3.0)) == 1  # as cfg
    assert calls(Part({}, 3.0), Part({}, -2.0), Part({}, 0.0)) == 1
    assert calls(Part({}, 3.0, left), Part({}, 2.0, 1 - left)) == 2
    assert calls(Part({}, 3.0, left), Part({}, 2.0)) == 2
    # Where a place may be left to it, u is asked for.
    assert calls(Part({}, 3.0, left)) == 2
    assert calls(Part({}, 3.0, left), Part({}, -2.0, 1 - left)) == 2
    assert calls(Part({}, torch.tensor([3.0]))) == 2
    assert calls(Part({}, "w"), w=3.0) == 2
    assert calls(Part({}, 3.0, "m"), m=torch.ones(4, 2)) == 2
    assert calls(Part({}, -1.0)) == 1


def test_a_mask_of_one_axis_less_is_refused() -> None:
    """(B, H, W) and (C, H, W) cannot be told apart: nothing is guessed."""
    x, sigma = torch.zeros(3, 3, 4, 4), torch.ones(3)

    def shift(x: Tensor, sigma: Tensor, by: float = 0.0) -> Tensor:
        return x + by

    def composed(mask: Tensor) -> Tensor:
        return Composed(shift, [Part({"by": 1.0}, 1.0, mask)])(x, sigma)

    with pytest.raises(ValueError, match=r"mask has shape \(3, 4, 4\), which may be one for each "):
        composed(torch.ones(3, 4, 4))
    one = torch.zeros(3, 1, 4, 4)
    one[1] = 1
    assert torch.equal(composed(one), one.expand(3, 3, 4, 4))
    assert torch.equal(
        composed(one.reshape(1, 3, 4, 4)), one.reshape(1, 3, 4, 4).expand(3, 3, 4, 4)
    )
    for shape in ((4, 4), (1, 4, 4), (1, 1)):
        assert torch.equal(composed(torch.ones(shape)), torch.ones_like(x))


def attentive(kind: str, **more: Any) -> Any:
    torch.manual_seed(4)
    network = make_model({"type": kind, "in_channels": 2, "num_classes": 3, **more}).eval()
    for parameter in network.parameters():  # untrained, an attention adds nothing
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
        elif parameter.ndim == 0:
            torch.nn.init.ones_(parameter)  # an output's gain
    return make_denoiser(network)


NETWORKS: dict[str, dict[str, Any]] = {
    "unet": {"channels": 8, "channel_mults": [1, 1], "attention": [False, True],
             "head_channels": 8, "blocks": 1},
    "mp_unet": {"channels": 8, "channel_mults": [1, 1], "attention": [False, True],
                "head_channels": 8, "blocks": 1},
    "dit": {"patch_size": 2, "width": 32, "depth": 2, "head_channels": 16},
    "hourglass": {"patch_size": 1, "widths": [16, 32], "depths": [1, 1], "kernel_size": 3,
                  "attention": ["neighborhood", "global"], "head_channels": 16,
                  "mapping_width": 16},
}  # fmt: skip


@pytest.mark.parametrize("kind", NETWORKS)
def test_perturbed_attention(kind: str) -> None:
    denoiser = attentive(kind, **NETWORKS[kind])
    x, sigma = torch.randn(2, 2, 8, 8), torch.tensor([0.5, 0.9])
    label = torch.tensor([0, 2])
    with torch.no_grad():
        plain = denoiser(x, sigma, class_label=label)
        guided = perturbed_attention(denoiser, 3.0)
        result = guided(x, sigma, class_label=label)
        assert torch.equal(denoiser(x, sigma, class_label=label), plain)  # put right again
        spoilt = plain - (result - plain) / 2
        assert worst(spoilt, plain) > 1e-4
        assert torch.equal(perturbed_attention(denoiser, 1.0)(x, sigma, class_label=label), plain)
        name = next(iter(self_attentions(denoiser.network)))
        with pytest.raises(ValueError, match=r"no self-attention of .* is called nowhere; there"):
            perturbed_attention(denoiser, 3.0, names=["nowhere"])
        one = perturbed_attention(denoiser, 3.0, names=[name])(x, sigma, class_label=label)
        assert worst(one, plain) > 1e-6


def test_a_spoilt_attention_lets_no_position_see_another() -> None:
    torch.manual_seed(5)
    attention = SelfAttention(8, 4)
    torch.nn.init.normal_(attention.out.weight)
    attention.norm = torch.nn.Identity()  # it would join all positions, too
    x = torch.randn(1, 8, 3, 3, requires_grad=True)
    for spoilt, sees in ((False, 9), (True, 1)):
        with perturbed([attention] if spoilt else []):
            (gradient,) = torch.autograd.grad(attention(x)[..., 1, 1].sum(), x)
        assert int((gradient.abs().sum(1) > 1e-9).sum()) == sees


def test_perturbed_attention_needs_attention() -> None:
    bare = torch.nn.Conv2d(1, 1, 3, padding=1)
    bare.prediction = "eps"  # type: ignore[assignment]
    with pytest.raises(ValueError, match="Conv2d has no self-attention of this library"):
        perturbed_attention(bare, 2.0)
    with pytest.raises(TypeError, match="around a network of this library, got FunctionDenoiser"):
        perturbed_attention(lambda x, sigma: x, 2.0)


def test_wrong_input_is_refused_by_name() -> None:
    model, x, sigma, *_ = estimates()
    with pytest.raises(ValueError, match=r"mask of shape \(3,\) does not broadcast"):
        Composed(model, [Part({}, 1.0, torch.ones(3))])(x, sigma)
    with pytest.raises(ValueError, match="at least one Part"):
        Composed(model, [])
    with pytest.raises(
        TypeError, match="weight must be a number, one a sample or a keyword's name, got 'a b'"
    ):
        Part({}, "a b")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="low must be below high"):
        Clamp(model, 1.0, -1.0)
    with pytest.raises(ValueError, match=r"quantile must lie in \(0, 1\], got 99.5"):
        DynamicThreshold(model, 99.5)
    with pytest.raises(ValueError, match="momentum must lie in"):
        apg(model, 2.0, momentum=2.0)
    with pytest.raises(ValueError, match="norm must be above 0"):
        apg(model, 2.0, norm=0.0)
    with pytest.raises(ValueError, match="still must be a whole number"):
        cfg_zero_star(model, 2.0, still=-1)
