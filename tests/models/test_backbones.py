"""What every backbone must do, whatever is inside: what it computes, and what absence means.

One entry in `backbones.BACKBONES`, and all of this holds. More: test_backbones_trained.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backbones import (
    BACKBONES,
    build,
    conditions,
    every_backbone,
    fields,
    inputs,
    row,
    told,
)
from torch import Tensor

from k_diffusion.models import MODELS, make_model
from k_diffusion.models.conditions import ClassLabel, Tokens
from k_diffusion.models.network import Network


def test_no_backbone_is_left_out() -> None:
    networks = {name for name, cls in MODELS.items() if issubclass(cls, Network)}
    assert networks == set(BACKBONES)


# ---------------------------------------------------------------- what it computes


@every_backbone
def test_an_untrained_output_is_small(name: str) -> None:
    network = build(name, awake=False, **told(name))
    x, t = inputs(name, network)
    assert network(x, t, **conditions(network, x)).abs().max() < 1e-3


@every_backbone
def test_a_sample_does_not_depend_on_its_neighbours(name: str) -> None:
    network = build(name, **told(name)).eval()
    x, t = inputs(name, network, 4)
    given = conditions(network, x)
    together = network(x, t, **given)
    assert together.shape == x.shape
    assert together.std() > 0.02
    for i in range(4):
        alone = network(x[i : i + 1], t[i : i + 1], **row(given, i))
        assert (alone - together[i : i + 1]).abs().max() < 1e-5 * together.abs().max().clamp(min=1)


@every_backbone
@pytest.mark.parametrize("size", [(8, 12), (16, 6)])
def test_sizes_that_are_not_square(name: str, size: tuple[int, int]) -> None:
    outputs = BACKBONES[name].outputs
    network = build(name, out_channels=outputs, **told(name))
    x, t = torch.randn(2, 2, *size), torch.tensor([3.0, 950.0])
    y = network(x, t, **conditions(network, x))
    assert y.shape == (2, outputs, *size)
    assert y.dtype == torch.float32
    assert y.isfinite().all()
    assert y.std() > 0.02


@every_backbone
def test_the_defaults_work(name: str) -> None:
    network = make_model({"type": name, "in_channels": 1})
    with torch.no_grad():
        assert network(torch.randn(1, 1, 56, 56), torch.ones(1)).abs().max() == 0


@every_backbone
def test_memory_formats_agree(name: str) -> None:
    network = build(name, **told(name)).eval()
    x, t = inputs(name, network)
    given = conditions(network, x)
    plain = network(x, t, **given)
    network = network.to(memory_format=torch.channels_last)
    y = network(x.contiguous(memory_format=torch.channels_last), t, **given)
    assert (y - plain).abs().max() < 1e-5 * plain.abs().max().clamp(min=1)


@every_backbone
def test_every_condition_changes_the_output(name: str) -> None:
    network = build(name, **told(name)).eval()
    x, t = inputs(name, network)
    given = conditions(network, x)
    whole = network(x, t, **given)
    assert (whole - network(x, t + 1, **given)).abs().amax((1, 2, 3)).min() > 1e-4
    for kind in network.conditions:
        others = {key: value for key, value in given.items() if key not in kind.keywords}
        # Label 0 and all tokens are conditions, too: each sample differs.
        assert (whole - network(x, t, **others)).abs().amax((1, 2, 3)).min() > 1e-4, kind.name


@every_backbone
def test_gradcheck(name: str) -> None:
    options = BACKBONES[name].gradcheck
    network = build(name, **{**told(name), "in_channels": 1, "image_channels": 1, **options})
    network = network.double()
    size = BACKBONES[name].small
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 1, *size, generator=generator, dtype=torch.float64)
    t = torch.tensor([0.3, 700.0], dtype=torch.float64)
    given = conditions(network, x, tokens=2)
    smooth = {k: v.double() for k, v in given.items() if v.is_floating_point()}
    fixed = {k: v for k, v in given.items() if not v.is_floating_point()}

    def function(x: Tensor, t: Tensor, *values: Tensor) -> Tensor:
        return network(x, t, **dict(zip(smooth, values, strict=True)), **fixed)

    wanted = [value.requires_grad_() for value in (x, t, *smooth.values())]
    assert torch.autograd.gradcheck(function, wanted)


@every_backbone
def test_bf16_autocast_is_finite_and_near(name: str) -> None:
    network = build(name, **told(name))
    x, t = inputs(name, network)
    given = conditions(network, x)
    plain = network(x, t, **given)
    with torch.autocast("cpu", torch.bfloat16):
        y = network(x, t, **given)
    y.float().square().mean().backward()
    assert y.isfinite().all()
    assert (y - plain).abs().max() < 0.1 * plain.abs().max()
    assert (y != plain).any()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


@every_backbone
def test_weights_in_bf16_see_the_time_in_float32(name: str) -> None:
    network = build(name).bfloat16().eval()
    x = inputs(name, network, 1)[0].expand(2, -1, -1, -1).bfloat16()
    y = network(x, torch.tensor([900.0, 902.0]))  # bf16 knows no number between 900 and 904
    assert y.dtype == torch.bfloat16
    assert (y[0] - y[1]).abs().max() > 0.002 * y.abs().max()


@every_backbone
def test_every_parameter_gets_a_gradient(name: str) -> None:
    network = build(name, **told(name))
    x, t = inputs(name, network)
    network(x, t, **conditions(network, x)).square().sum().backward()
    missing = [
        name
        for name, p in network.named_parameters()
        if p.grad is None or not p.grad.abs().max() > 1e-4
    ]
    assert not missing


VARIANTS = [
    pytest.param(name, options, id=f"{name}-{i}")
    for name, kind in BACKBONES.items()
    for i, options in enumerate(({}, *kind.compiled))
]
"""Of each backbone what holds every kind of layer."""


@pytest.mark.parametrize(("name", "options"), VARIANTS)
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch's own
def test_forward_derivatives_are_the_slopes(name: str, options: dict[str, Any]) -> None:
    """Those of torch.func.jvp, which consistency and mean-flow training are made of."""
    network = build(name, **{**told(name), **options}).double()
    x, t = (value.double() for value in inputs(name, network))
    given = conditions(network, x)
    towards = torch.randn_like(x), torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)

    def function(x: Tensor, t: Tensor) -> Tensor:
        return network(x, t, **given)

    y, slope = torch.func.jvp(function, (x, t), towards)
    step = 1e-5
    ahead, behind = (function(x + h * towards[0], t + h * towards[1]) for h in (step, -step))
    assert (y - function(x, t)).abs().max() < 1e-10 * y.abs().max()
    assert slope.abs().max() > 1e-3
    assert (slope - (ahead - behind) / (2 * step)).abs().max() < 1e-5 * slope.abs().max()


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_the_gradients_of_each_sample_come_from_one_call(
    name: str, options: dict[str, Any]
) -> None:
    """Those of torch.func.vmap over torch.func.grad, against one backward pass a sample."""
    network = build(name, **{**told(name), **options}).double()
    x, t = (value.double() for value in inputs(name, network))
    given = conditions(network, x)
    weights = {key: value.detach() for key, value in network.named_parameters()}

    def loss(weights: Any, x: Tensor, t: Tensor, given: dict[str, Tensor]) -> Tensor:
        alone = {key: value[None] for key, value in given.items()}
        y = torch.func.functional_call(network, weights, (x[None], t[None]), alone)
        return y.square().mean()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0, 0))(weights, x, t, given)
    for i in range(len(x)):
        network.zero_grad()
        loss({}, x[i], t[i], {key: value[i] for key, value in given.items()}).backward()
        for key, p in network.named_parameters():
            error = (each[key][i] - p.grad).abs().max()  # type: ignore[operator]
            assert error < 1e-10 * p.grad.abs().max().clamp(min=1), key  # type: ignore[union-attr]


@every_backbone
def test_dropout_is_off_in_evaluation(name: str) -> None:
    dropping = BACKBONES[name].dropping
    network = build(name, **dropping)
    same = build(name)
    x, t = inputs(name, network)
    assert not torch.equal(network(x, t), network(x, t))
    assert torch.equal(network.eval()(x, t), same.eval()(x, t))


# ---------------------------------------------------------------- refusals


@every_backbone
def test_axes_that_are_missing_are_refused_in_the_shape_that_was_given(name: str) -> None:
    network = build(name, image_channels=2)
    refusal = r"^x has shape \(1, 2, 8\); this model takes \(batch, 2, height, width\)$"
    with pytest.raises(ValueError, match=refusal):
        network(torch.zeros(1, 2, 8), torch.ones(1), image=torch.zeros(1, 2, 8))


@every_backbone
def test_a_batch_without_a_sample_is_refused(name: str) -> None:
    network = build(name)
    with pytest.raises(ValueError, match=r"^x has shape \(0, 2, 8, 8\), without a sample"):
        network(torch.zeros(0, 2, 8, 8), torch.zeros(0))


# ---------------------------------------------------------------- absence


@pytest.mark.parametrize("name", [name for name in BACKBONES if "context_dim" in fields(name)])
def test_masked_tokens_are_ignored_exactly(name: str) -> None:
    network = build(name, **told(name)).eval()
    (kind,) = (kind for kind in network.conditions if isinstance(kind, Tokens))
    x, t = inputs(name, network)
    given = conditions(network, x)
    tokens, mask = given[kind.name].requires_grad_(), given[kind.mask]
    assert mask.any(1).all()
    assert not mask.all()
    plain = network(x, t, **given)
    plain.square().sum().backward()
    assert (tokens.grad[~mask] == 0).all()
    assert (tokens.grad[mask].abs().amax(-1) > 0).all()
    for value in (5.0, torch.inf, torch.nan):
        other = torch.where(mask[..., None], tokens, torch.tensor(value))
        y = network(x, t, **{**given, kind.name: other})
        assert torch.equal(y, plain)
        network.zero_grad()
        y.square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    everything = network(x, t, **{**given, kind.mask: torch.ones_like(mask)})
    assert torch.equal(network(x, t, **{**given, kind.mask: None}), everything)
    # As if they were not there at all.
    shorter = {kind.name: tokens[1:2, :3], kind.mask: None}
    assert mask[1].tolist() == [True, True, True, False]
    alone = network(x[1:2], t[1:2], **{**row(given, 1), **shorter})
    assert (alone - plain[1:2]).abs().max() < 1e-5 * plain.abs().max().clamp(min=1)


@every_backbone
def test_the_null_conditions_are_no_condition(name: str) -> None:
    network = build(name, **told(name)).eval()
    x, t = inputs(name, network)
    given = conditions(network, x)
    unconditional = network(x, t)
    zero: dict[str, Any] = {}
    for kind in network.conditions:
        value = given[kind.name]
        match kind:
            case ClassLabel():
                zero[kind.name] = torch.full_like(value, kind.num_classes)
            case Tokens():
                zero[kind.name] = torch.full_like(value, torch.nan)
                zero[kind.mask] = torch.zeros_like(given[kind.mask])
            case _:
                zero[kind.name] = torch.zeros_like(value)
    everyone = torch.ones(3, dtype=torch.bool)
    ways = [
        dict.fromkeys(given),
        zero,
        network.drop_condition(given, everyone),
        network.drop_condition({k: v for k, v in given.items() if "mask" not in k}, everyone),
    ]
    for way in ways:
        assert torch.equal(network(x, t, **way), unconditional)
    for kind in network.conditions:  # each alone is absent
        alone = {key: zero[key] for key in kind.keywords}
        assert torch.equal(network(x, t, **alone), unconditional)


@every_backbone
def test_null_conditions_leave_no_parameter_without_a_gradient(name: str) -> None:
    """As training on several devices at once needs it, where nothing at all would leave some."""
    network = build(name, **told(name))
    x, t = inputs(name, network)
    null = network.drop_condition(conditions(network, x), torch.ones(3, dtype=torch.bool))
    network(x, t, **null).square().sum().backward()
    assert not [name for name, p in network.named_parameters() if p.grad is None]


@every_backbone
def test_absent_and_present_stand_in_one_batch(name: str) -> None:
    network = build(name, **told(name)).eval()
    x, t = inputs(name, network)
    given = conditions(network, x)
    hidden = torch.tensor([True, False, True])
    y = network(x, t, **network.drop_condition(given, hidden))
    assert (y - network(x, t))[hidden].abs().max() < 1e-5
    assert (y - network(x, t, **given))[~hidden].abs().max() < 1e-5


@every_backbone
def test_untold_it_is_the_network_that_cannot_be_told(name: str) -> None:
    """So a condition may be added to a trained network, which says the same without it."""
    options = {key: told(name)[key] for key in BACKBONES[name].adding if key in told(name)}
    plain, network = build(name).eval(), build(name, **options).eval()
    missing, unexpected = network.load_state_dict(plain.state_dict(), strict=False)
    assert missing
    assert not unexpected
    x, t = inputs(name, network)
    zeros = {"embedding": torch.zeros(3, 3)}
    if "augmentation_dim" in options:
        zeros["augmentation"] = torch.zeros(3, 2)
    assert torch.equal(network(x, t), plain(x, t))
    assert torch.equal(network(x, t, **zeros), plain(x, t))
