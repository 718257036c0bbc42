"""The established UNet: one network under two faces, what it can be told, and what it refuses."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from k_diffusion.denoiser import make_denoiser
from k_diffusion.models import ImageDenoiserModelV1, ImageV1, make_model, model_config
from k_diffusion.models.augment_wrapper import KarrasAugmentWrapper
from k_diffusion.models.image_v1 import ResConvBlock

SMALL: dict[str, Any] = {
    "mapping_width": 16, "depths": (1, 2), "channels": (16, 32), "self_attention": (False, True),
}  # fmt: skip
TOLD: dict[str, Any] = {
    "num_classes": 5, "embedding_dim": 3, "augmentation_dim": 2, "image_channels": 2,
    "context_dim": 6, "cross_attention": (False, True),
}  # fmt: skip


def awake(network: Any, seed: int = 0) -> Any:
    """What starts at zero is set to random values, so that it does speak."""
    torch.manual_seed(seed)
    for parameter in network.parameters():
        if not parameter.detach().any():
            nn.init.normal_(parameter, std=0.2)
    return network


def build(**options: Any) -> ImageV1:
    torch.manual_seed(0)
    return awake(ImageV1(**{**SMALL, **options})).eval()


def established(**options: Any) -> ImageDenoiserModelV1:
    torch.manual_seed(0)
    made = ImageDenoiserModelV1(3, 16, [1, 2], [16, 32], [False, True], **options)
    return awake(made).eval()


def told(batch: int = 3) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(2)
    return {
        "class_label": torch.arange(batch),
        "embedding": torch.randn(batch, 3, generator=g),
        "augmentation": torch.randn(batch, 2, generator=g),
        "image": torch.randn(batch, 2, 8, 8, generator=g),
        "context": torch.randn(batch, 4, 6, generator=g),
        "context_mask": torch.arange(4) < torch.arange(4, 4 - batch, -1)[:, None],
    }


def inputs(batch: int = 3, size: int = 8) -> tuple[Tensor, Tensor]:
    x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))
    return x, torch.linspace(-1.1, 1.0, batch)


# ---------------------------------------------------------------- two faces


def test_both_faces_are_one_network() -> None:
    ours = build(**{**TOLD, "num_classes": 0}, has_variance=True, patch_size=2)
    theirs = established(
        cross_attn_depths=[False, True], mapping_cond_dim=5, unet_cond_dim=2, cross_cond_dim=6,
        has_variance=True, patch_size=2,
    )  # fmt: skip
    theirs.load_state_dict(ours.state_dict(), strict=True)
    (x, t), given = inputs(), told()
    del given["class_label"]
    got, logvar = ours(x, t, **given, return_variance=True)
    expected, other = theirs(
        x, (4 * t).exp(),
        mapping_cond=torch.cat([given["augmentation"], given["embedding"]], 1),
        unet_cond=given["image"],
        cross_cond=given["context"],
        cross_cond_padding=(~given["context_mask"]).float(),
        return_variance=True,
    )  # fmt: skip
    assert got.std() > 0.1
    assert (got - expected).abs().max() < 1e-5
    assert logvar.shape == (3,)
    assert (logvar - other).abs().max() < 1e-5
    assert torch.equal(ours(x, t, **given), got)


def test_a_coarse_sigma_is_no_coarse_time() -> None:
    network, (x, t) = established(), inputs()
    sigma = t.exp().bfloat16()
    assert torch.equal(network(x, sigma), network(x, sigma.float()))


def test_the_established_signature() -> None:
    assert list(inspect.signature(ImageDenoiserModelV1).parameters) == [
        "c_in", "feats_in", "depths", "channels", "self_attn_depths", "cross_attn_depths",
        "mapping_cond_dim", "unet_cond_dim", "cross_cond_dim", "dropout_rate", "patch_size",
        "skip_stages", "has_variance",
    ]  # fmt: skip
    assert list(inspect.signature(ImageDenoiserModelV1.forward).parameters)[1:] == [
        "input", "sigma", "mapping_cond", "unet_cond", "cross_cond", "cross_cond_padding",
        "return_variance",
    ]  # fmt: skip
    assert "mapping_width" in inspect.signature(ImageV1).parameters


def test_only_ours_passes_for_a_network_with_a_time() -> None:
    """Called with log sigma / 4 for its sigma, the other would be wrong without a word."""
    assert make_denoiser(build()).time_convention == "log_sigma"
    with pytest.raises(ValueError, match="carries no `prediction`"):
        make_denoiser(established())


def test_by_name_and_back() -> None:
    network = build(**TOLD)
    again = make_model(model_config(network))
    assert type(again) is ImageV1
    again.load_state_dict(network.state_dict(), strict=True)
    (x, t), given = inputs(), told()
    assert torch.equal(again.eval()(x, t, **given), network(x, t, **given))


def test_an_untrained_output_is_zero() -> None:
    x, t = inputs()
    assert not ImageV1(**SMALL)(x, t).any()


def test_how_it_begins() -> None:
    """Blocks pass their input; the mapping turns its input, and changes no length of it."""
    torch.manual_seed(0)
    x, cond = torch.randn(2, 8, 4, 4), {"cond": torch.randn(2, 16)}
    assert torch.equal(ResConvBlock(16, 8, 12, 8)(x, cond), x)
    wider = ResConvBlock(16, 8, 12, 10)
    assert torch.equal(wider(x, cond), wider.skip(x))
    mapping = ImageV1(**SMALL).mapping
    for matrix in (wider.skip.weight[:, :, 0, 0].T, mapping[0].weight, mapping[2].weight):
        assert (matrix @ matrix.T - torch.eye(len(matrix))).abs().max() < 1e-5


# ---------------------------------------------------------------- what it is told


def test_a_sample_does_not_depend_on_its_neighbours() -> None:
    network, (x, t), given = build(**TOLD), inputs(), told()
    together = network(x, t, **given)
    for i in range(3):
        one = {name: value[i : i + 1] for name, value in given.items()}
        alone = network(x[i : i + 1], t[i : i + 1], **one)
        assert (alone - together[i : i + 1]).abs().max() < 1e-5


def test_every_condition_counts_and_absence_is_its_null() -> None:
    network, (x, t), given = build(**TOLD), inputs(), told()
    whole = network(x, t, **given)
    hidden = network.drop_condition(given, torch.ones(3, dtype=torch.bool))
    assert (network(x, t, **hidden) - network(x, t)).abs().max() < 1e-6
    for names in (
        ["class_label"],
        ["embedding"],
        ["augmentation"],
        ["image"],
        ["context", "context_mask"],
    ):
        others = {name: value for name, value in given.items() if name not in names}
        absent = network(x, t, **others)
        assert (whole - absent).abs().amax((1, 2, 3)).min() > 1e-4, names
        null = given | {name: hidden[name] for name in names}
        assert (network(x, t, **null) - absent).abs().max() < 1e-6, names


def test_masked_tokens_are_ignored_exactly() -> None:
    network, (x, t), given = build(**TOLD), inputs(), told()
    expected = network(x, t, **given)
    other = given["context"].masked_fill(~given["context_mask"][:, :, None], 1e9)
    assert torch.equal(network(x, t, **{**given, "context": other}), expected)


def test_an_established_model_that_is_told_nothing() -> None:
    network = established(
        cross_attn_depths=[False, True], mapping_cond_dim=5, unet_cond_dim=2, cross_cond_dim=6
    )
    x, t = inputs()
    nulls = {
        "mapping_cond": torch.zeros(3, 5),
        "unet_cond": torch.zeros(3, 2, 8, 8),
        "cross_cond": torch.randn(3, 4, 6),
        "cross_cond_padding": torch.ones(3, 4),
    }
    assert torch.equal(network(x, t.exp()), network(x, t.exp(), **nulls))
    # No padding is no token left out.
    counted = nulls | {"cross_cond_padding": torch.zeros(3, 4)}
    assert torch.equal(
        network(x, t.exp(), **counted),
        network(x, t.exp(), **(nulls | {"cross_cond_padding": None})),
    )


def test_the_wrapper_puts_the_augmentation_first() -> None:
    inner = established(mapping_cond_dim=9 + 2)
    wrapped = KarrasAugmentWrapper(inner)
    assert all(name.startswith("inner_model.") for name in wrapped.state_dict())
    (x, t), more, augmented = inputs(), torch.randn(3, 2), torch.randn(3, 9)
    sigma = t.exp()

    def plain(*parts: Tensor) -> Tensor:
        return inner(x, sigma, mapping_cond=torch.cat(parts, 1))

    assert torch.equal(wrapped(x, sigma, augmented, more), plain(augmented, more))
    assert torch.equal(wrapped(x, sigma, mapping_cond=more), plain(torch.zeros(3, 9), more))
    assert torch.equal(wrapped(x, sigma, aug_cond=augmented), plain(augmented, torch.zeros(3, 2)))
    with pytest.raises(ValueError, match=r"aug_cond has shape \(3, 2\); give 9 numbers"):
        wrapped(x, sigma, more)


# ---------------------------------------------------------------- training


def test_dropout_is_off_in_evaluation() -> None:
    network = build(**TOLD, dropout=0.5)
    (x, t), given = inputs(), told()
    still = build(**TOLD)
    still.load_state_dict(network.state_dict())
    assert torch.equal(network(x, t, **given), still(x, t, **given))
    network.train()
    assert not torch.equal(network(x, t, **given), network(x, t, **given))


def test_gradcheck() -> None:
    config = {"in_channels": 1, "channels": (4, 4), "depths": (1, 1), "mapping_width": 4}
    network = build(**config, **TOLD).double()
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2, 1, 4, 4, generator=g, dtype=torch.float64)
    t = torch.tensor([-0.5, 0.7], dtype=torch.float64)
    given = {k: v.double() if v.is_floating_point() else v for k, v in told(2).items()}
    given["image"] = given["image"][:, :, :4, :4].contiguous()
    fixed = {name: given.pop(name) for name in ("context_mask", "class_label")}
    wanted = [value.requires_grad_() for value in (x, t, *given.values())]

    def function(x: Tensor, t: Tensor, *values: Tensor) -> Tensor:
        return network(x, t, **dict(zip(given, values, strict=True)), **fixed)

    assert torch.autograd.gradcheck(function, wanted)


def test_every_parameter_gets_a_gradient() -> None:
    network, (x, t), given = build(**TOLD, has_variance=True), inputs(), told()
    output, logvar = network(x, t, **given, return_variance=True)
    (output.square().sum() + logvar.sum()).backward()
    assert [n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    network, (x, t), given = build(**TOLD), inputs(), told()
    plain = network(x, t, **given)
    if dtype == torch.bfloat16:
        with torch.autocast("cpu", dtype):
            y = network(x, t, **given)
        y.float().square().mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
        assert (y - plain).abs().max() < 0.05 * plain.abs().max()
    low = network.to(dtype)
    lowered = {k: v.to(dtype) if v.is_floating_point() else v for k, v in given.items()}
    y = low(x.to(dtype), t, **lowered)
    assert y.dtype == dtype
    assert (y.float() - plain).abs().max() < 0.05 * plain.abs().max()


@pytest.mark.parametrize("policy", [True, 2, (0,), (1,)])
def test_checkpointing_by_policy_changes_no_gradient(policy: Any) -> None:
    def gradients(policy: Any) -> tuple[int, list[Tensor]]:
        network = build(**TOLD, dropout=0.1, checkpointing=policy).train()
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        (x, t), given = inputs(), told()
        torch.manual_seed(3)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = network(x, t, **given)
        output.square().mean().backward()
        weights = sum(p.numel() * p.element_size() for p in network.parameters())
        return sum(kept.values()) - weights, [p.grad for p in network.parameters()]  # type: ignore[misc]

    (plain, expected), (frugal, got) = gradients(False), gradients(policy)
    assert frugal < (0.4 if policy is True else 0.9) * plain, (frugal, plain)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_the_established_face_is_one_graph() -> None:
    network = established(
        cross_attn_depths=[False, True], mapping_cond_dim=9, cross_cond_dim=6, has_variance=True
    )
    wrapped = KarrasAugmentWrapper(network).eval()
    (x, t), tokens = inputs(), {"cross_cond": torch.randn(3, 4, 6), "return_variance": True}
    compiled = torch.compile(wrapped, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        pairs = zip(compiled(x, t.exp(), **tokens), wrapped(x, t.exp(), **tokens), strict=True)
    assert all((got - expected).abs().max() < 1e-5 for got, expected in pairs)


def test_param_groups() -> None:
    network = KarrasAugmentWrapper(established(mapping_cond_dim=9))
    decays, stays = network.param_groups(1e-3)
    assert decays["lr"] == stays["lr"] == 1e-3
    assert stays["weight_decay"] == 0
    assert "weight_decay" not in decays
    names = {id(p): n.removeprefix("inner_model.") for n, p in network.named_parameters()}
    first = {names[id(p)] for p in decays["params"]}
    assert {names[id(p)] for p in stays["params"]} == set(names.values()) - first
    assert {"mapping.0.weight", "mapping_cond.weight", "u_net.u_blocks.1.0.skip.weight"} <= first
    assert not {"proj_in.weight", "proj_out.weight", "mapping.0.bias"} & first


# ---------------------------------------------------------------- stages and patches


def test_stages_are_left_out_and_come_back() -> None:
    network = KarrasAugmentWrapper(established(mapping_cond_dim=9))
    inner = network.inner_model
    assert isinstance(inner, ImageDenoiserModelV1)
    keys = set(network.state_dict())
    seen: list[int] = []
    for level, stage in enumerate(inner.u_net.d_blocks):
        stage.register_forward_pre_hook(lambda *_, level=level: seen.append(level))  # type: ignore[misc]
    x, t = inputs(size=6)
    assert network.set_skip_stages(1) is inner
    assert awake(network)(x, t.exp()).shape == x.shape
    assert seen == [1]
    assert inner.proj_in.out_channels == 16  # of the finest level, whose output the next one reads
    kernels = {"inner_model.u_net.d_blocks.1.0.kernel", "inner_model.u_net.u_blocks.0.4.kernel"}
    assert keys - set(network.state_dict()) == kernels
    network.set_skip_stages(0)
    assert keys == set(network.state_dict())
    assert awake(network)(x, t.exp()).std() > 0.1
    assert seen == [1, 0, 1]
    with pytest.raises(ValueError, match="skip_stages = 2 leaves none of 2 levels; give at most 1"):
        network.set_skip_stages(2)


def test_patches_of_another_size() -> None:
    network = established()
    network.set_patch_size(2)
    assert network.proj_in.in_channels == network.proj_out.out_channels == 12
    assert awake(network)(*inputs()).shape == (3, 3, 8, 8)
    with pytest.raises(
        ValueError, match=r"x has height 6, which .* works: 8 .a multiple of 4, at least 8"
    ):
        network(*inputs(size=6))


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"out_channels": 2}, ["out_channels = 2 differs", "leave it out"]),
        ({"mapping_width": 15}, ["mapping_width = 15", "even"]),
        ({"channels": ()}, ["channels = () has no level"]),
        ({"channels": (16, 0)}, ["channels = (16, 0)", "at least 1"]),
        ({"depths": (1,)}, ["depths = (1,) has 1 entries", "2 levels", "one a level"]),
        ({"depths": (1, -1)}, ["depths = (1, -1)", "give at least 1"]),
        ({"self_attention": (True,)}, ["self_attention = (True,) has 1 entries"]),
        ({"cross_attention": (True, False)}, ["context_dim = 0", "give both, or neither"]),
        ({"cross_attention": (True,)}, ["cross_attention = (True,) has 1 entries"]),
        (
            {"context_dim": 4, "cross_attention": (False, False)},
            ["cross_attention = (False, False), but context_dim = 4"],
        ),
        ({"context_dim": -4}, ["context_dim = -4 is negative"]),
        ({"skip_stages": 2}, ["skip_stages = 2 leaves none of 2 levels"]),
        ({"patch_size": 0}, ["patch_size = 0 is too small"]),
        ({"dropout": 1.0}, ["dropout = 1.0 is outside [0, 1)"]),
        ({"channels": (16, 100)}, ["100 do not divide into 3 groups", "multiples of 32"]),
        ({"channels": (16, 224)}, ["224 do not divide into 3 heads", "multiples of 64"]),
        ({"channels": (224, 32)}, ["224 do not divide into 3 heads"]),
        ({"checkpointing": [2]}, ["names level 2"]),
    ],
)
def test_configs(options: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ValueError, match=re.escape(parts[0])) as error:
        ImageV1(**{**SMALL, **options})
    text = str(error.value)
    assert "\n" not in text
    for part in parts:
        assert part in text


def test_sizes() -> None:
    network, t = build(), torch.zeros(1)
    assert network(torch.zeros(1, 3, 4, 6), t).shape == (1, 3, 4, 6)
    for shape, text in (
        ((1, 3, 5, 4), "height 5, .* works: 4 or 6 .a multiple of 2, at least 4"),
        ((1, 3, 4, 2), "width 2, .* works: 4 "),  # nothing there that could be reflected
        ((1, 3, 4, 0), "width 0"),
        ((1, 3, 4), r"x has shape \(1, 3, 4\)"),
    ):
        with pytest.raises(ValueError, match=text):
            network(torch.zeros(shape), t)
    assert build(channels=(16,), depths=(1,), self_attention=(True,))(
        torch.ones(1, 3, 1, 1), t
    ).any()


def test_context_goes_where_self_attention_is() -> None:
    assert ImageV1(**SMALL, context_dim=4).config.cross_attention == (False, True)
    assert ImageV1(**SMALL).config.cross_attention == (False, False)


def test_heads_are_no_matter_without_attention() -> None:
    ImageV1(**{**SMALL, "channels": (16, 224), "self_attention": (False, False)})


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"mapping_cond": torch.zeros(3, 4)}, r"mapping_cond has shape \(3, 4\).*\(3, 5\)"),
        ({"unet_cond": torch.zeros(3, 2, 8, 4)}, r"unet_cond has shape \(3, 2, 8, 4\)"),
        ({"cross_cond": torch.zeros(3, 4, 5)}, r"cross_cond has shape \(3, 4, 5\)"),
        ({"cross_cond_padding": torch.zeros(3, 4)}, r"cross_cond_padding has shape \(3, 4\)"),
        ({"return_variance": True}, r"return_variance = True, but this model has no such output"),
    ],
)
def test_what_an_established_model_refuses(given: dict[str, Any], text: str) -> None:
    network = established(
        cross_attn_depths=[False, True], mapping_cond_dim=5, unet_cond_dim=2, cross_cond_dim=6
    )
    with pytest.raises(ValueError, match=text):
        network(*inputs(), **given)
    for name in ("mapping_cond", "unet_cond", "cross_cond"):
        if name in given:
            with pytest.raises(ValueError, match=f"{name} was given.*build the model with {name}_"):
                established()(*inputs(), **given)
