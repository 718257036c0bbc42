"""The hourglass: its shapes, what it refuses, where it is equivariant. More: test_backbones.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backbones import saved_bytes
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from k_diffusion.models import Hourglass, HourglassConfig, make_model, model_config
from k_diffusion.models.neighborhood import has_natten

TINY: dict[str, Any] = {
    "in_channels": 2,
    "patch_size": 1,
    "widths": (16, 24),
    "depths": (2, 1),
    "head_channels": 8,
    "kernel_size": 3,
    "window_size": 4,
    "mapping_width": 12,
    "mapping_depth": 1,
}


def tiny(**options: Any) -> Hourglass:
    """A small hourglass; what starts at zero is set to random values, so that it does speak."""
    torch.manual_seed(0)
    model = Hourglass(**{**TINY, **options})
    for parameter in model.parameters():
        if not parameter.detach().any():
            nn.init.normal_(parameter, std=0.2)
    return model


def inputs(batch: int = 2, height: int = 8, width: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 2, height, width, generator=generator), torch.linspace(3, 950, batch)


KINDS = ["global", "neighborhood", "shifted_window", "none"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("patch", [1, 2, [1, 3]])
def test_shapes(kind: str, patch: Any) -> None:
    model = tiny(attention=(kind, "global"), patch_size=patch, out_channels=5)
    high, wide = model.config.patch
    x, t = inputs(3, 8 * high, 12 * wide)
    y = model(x, t)
    assert y.shape == (3, 5, 8 * high, 12 * wide)
    assert y.is_contiguous()
    assert y.isfinite().all()
    assert y.std() > 0.01


def test_the_defaults_work_and_say_nothing_untrained() -> None:
    model = Hourglass(num_classes=10)
    x = torch.randn(1, 3, 56, 56)
    assert model(x, torch.ones(1)).abs().max() == 0
    assert [model.config.kind(i) for i in range(2)] == ["neighborhood", "global"]


def test_blocks_begin_as_identities() -> None:
    model = Hourglass(**TINY)
    h, mapping = torch.randn(2, 4, 4, 16), torch.randn(2, 12)
    block: Any = model.down_levels[0][0]  # type: ignore[index]
    assert torch.equal(block(h, mapping, torch.zeros(4, 4, 2)), h)


def test_levels_and_their_settings() -> None:
    model: Any = tiny(
        widths=(16, 24, 40),
        depths=(3, 1, 2),
        attention=("shifted_window", "neighborhood", "none"),
        head_channels=(8, 24, 7),
        kernel_size=(4, 5, 4),
        window_size=(2, 1, 1),
        ff_widths=(20, 30, 50),
        dropout=(0.1, 0.2, 0.3),
        neighborhood_backend="tiles",
    )
    for path, levels in (
        (model.down_levels, (0, 1)),
        (model.up_levels, (0, 1)),
        ([model.mid_level], [2]),
    ):
        for blocks, level in zip(path, levels, strict=True):
            assert len(blocks) == (3, 1, 2)[level]
            for i, block in enumerate(blocks):
                assert block.ff.up_proj.weight.shape == (
                    2 * (20, 30, 50)[level],
                    (16, 24, 40)[level],
                )
                assert block.ff.dropout.p == (0.1, 0.2, 0.3)[level]
                if level == 2:
                    assert block.self_attn is None
                    continue
                assert block.self_attn.dropout.p == (0.1, 0.2)[level]
                assert block.self_attn.scale.shape == ((2,), (1,))[level]
                settings = block.self_attn.mix.keywords
                wanted: dict[str, Any] = {"window_size": 2, "shift": i % 2, "scale": 1.0}
                if level == 1:
                    wanted = {"kernel_size": 5, "backend": "tiles", "scale": 1.0}
                assert settings == wanted
    assert len(model.merges) == len(model.splits) == 2


def test_a_split_is_laid_onto_what_its_level_put_out_on_the_way_down() -> None:
    model: Any = tiny(widths=(16, 24, 40), depths=(2, 2, 1), attention="global")
    ends: dict[int, Tensor] = {}
    laid: dict[int, tuple[Tensor, Tensor]] = {}
    for i in range(2):
        model.down_levels[i][-1].register_forward_hook(
            lambda module, args, out, i=i: ends.update({i: out})
        )
        model.splits[i].register_forward_hook(
            lambda module, args, out, i=i: laid.update({i: (args[1], out)})
        )
        # At 0 the split adds nothing: what went down goes on alone.
        model.splits[i].fac.data.zero_()
    model(*inputs())
    for i in range(2):
        assert all(torch.equal(part, ends[i]) for part in laid[i])


def test_every_level_is_told_the_mapping_and_takes_part() -> None:
    model = tiny(attention="neighborhood", kernel_size=3)
    x, t = inputs()
    whole = model(x, t)
    for name, parameter in model.named_parameters():
        if "norm.linear" in name or "out_proj" in name or name.endswith("fac"):
            kept = parameter.detach().clone()
            parameter.data.zero_()
            assert (model(x, t) - whole).abs().max() > 1e-5, name
            parameter.data.copy_(kept)


def test_shifted_windows_let_neighbours_across_a_cut_see_each_other() -> None:
    """With one block no pixel sees beyond its window; the second, shifted, carries it on."""
    x, t = inputs(1, 8, 8)
    x.requires_grad_()

    def reach(depth: int) -> Tensor:
        model = tiny(widths=(16,), depths=(depth,), attention="shifted_window", patch_size=1)
        (gradient,) = torch.autograd.grad(model(x, t)[0, :, 1, 3].sum(), x)
        return gradient.abs().sum((0, 1)) > 0

    inside = torch.zeros(8, 8, dtype=torch.bool)
    inside[:4, :4] = True
    assert torch.equal(reach(1), inside)
    # The shifted window of row 1 and column 3 holds rows 0 and 1, columns 2 to 5.
    inside[:4, 4:] = True
    assert torch.equal(reach(2), inside)


def test_away_from_the_borders_it_moves_with_the_image() -> None:
    model = tiny(attention="neighborhood", depths=(1, 1), patch_size=2).double()
    generator = torch.Generator().manual_seed(1)
    wide = torch.randn(1, 2, 24, 68, generator=generator, dtype=torch.float64)
    t = torch.tensor([300.0])
    step = 4  # one token of the coarsest level
    here, there = model(wide[..., :-step], t), model(wide[..., step:], t)
    difference = (here[..., step:] - there[..., :-step]).abs().amax((0, 1, 2))
    # Three tokens of 2 pixels, one of 4 and what merging aligns: 20 pixels hold all of the reach.
    assert difference[20:-20].max() < 1e-12
    assert difference[:4].max() > 1e-6
    moved = model(wide[..., 2 : 2 - step], t)  # half a token of the coarsest level: no symmetry
    assert (here[..., 22:-20] - moved[..., 20:-22]).abs().max() > 1e-6


def test_a_sample_is_one_whatever_the_time_convention_calls_it() -> None:
    x, _ = inputs()
    times = {"timestep": (300.0, 1.0), "unit": (0.3, 1.0), "log_sigma": (1.2, 1.0)}
    outs = [
        tiny(time_convention=convention)(x, torch.tensor([t, t]))
        for convention, (t, _) in times.items()
    ]
    for out in outs[1:]:
        assert (out - outs[0]).abs().max() < 1e-3


# ---------------------------------------------------------------- memory


def test_full_checkpointing_against_a_plain_model_that_recomputes_nothing() -> None:
    options: dict[str, Any] = {"widths": (32, 64), "depths": (2, 2), "head_channels": 16}
    x, t = inputs(2, 16, 16)
    plain, _ = saved_bytes(tiny(**options), x, t)
    used, _ = saved_bytes(tiny(**options, checkpointing=True), x, t)
    assert used < 0.15 * plain


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"widths": ()}, r"widths = \(\) has no level"),
        ({"depths": (2,)}, r"depths = \(2,\) must give a number of blocks, 0 or more, .* \(2, 2\)"),
        ({"depths": (2, -1)}, r"depths = \(2, -1\) must give a number of blocks, 0 or more"),
        ({"patch_size": (2, 2, 2)}, r"patch_size = \(2, 2, 2\) has 3 sides; give one number or"),
        ({"patch_size": 0}, "patch_size = 0 is too small; give at least 1"),
        (
            {"attention": ("global",) * 3},
            r"attention = \(.*\) has 3 entries for the 2 levels .*; give one for each, or one",
        ),
        ({"attention": "neighbourhood"}, "'neighbourhood'; did you mean 'neighborhood'?"),
        ({"attention": ("global", "windows")}, "unknown attention 'windows'"),
        (
            {"head_channels": 10},
            "head_channels = 10 must be a multiple of 8 that divides the width of its level, 16; "
            "8 works",
        ),
        ({"head_channels": 16}, "divides the width of its level, 24; .* works"),
        ({"widths": (16, 20)}, "level, 20; widths must be multiples of 8, such as 24"),
        ({"kernel_size": (4, 3)}, "kernel_size = 4 has no centre; give an odd number, such as 3"),
        (
            {"attention": "shifted_window", "window_size": 1},
            "window_size = 1 is too small to be shifted by half; give at least 2",
        ),
        ({"ff_widths": (0, 5)}, r"ff_widths = \(0, 5\) is too small; give at least 1"),
        ({"dropout": (0.0, 1.0)}, r"dropout = \(0.0, 1.0\) is outside \[0, 1\); give 0 for none"),
        ({"mapping_width": 13}, "mapping_width = 13 is odd, .* give 14"),
        ({"mapping_width": 0}, "mapping_width = 0 is too small; give at least 1"),
        ({"mapping_depth": -1}, "mapping_depth = -1 is negative; give 0 for none"),
        ({"mapping_dropout": 1.5}, r"mapping_dropout = 1.5 is outside \[0, 1\)"),
        ({"neighborhood_backend": "cuda"}, "unknown neighborhood_backend 'cuda'"),
        ({"checkpointing": (2,)}, "names level 2, but the model has levels 0 to 1"),
        ({"width": (16, 24)}, "width = .* is no option of this model; did you mean widths?"),
    ],
)
def test_refusals(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Hourglass(**{**TINY, **options})


@pytest.mark.skipif(has_natten(), reason="NATTEN is here")
def test_natten_is_asked_for_when_the_model_is_built() -> None:
    with pytest.raises(
        ValueError, match='neighborhood_backend = "natten" asks for NATTEN, which is not install'
    ):
        Hourglass(**TINY, neighborhood_backend="natten")


@pytest.mark.parametrize(
    ("options", "height", "width", "text"),
    [
        ({}, 7, 8, r"height 7, which .* the nearest that works: 6 or 8 \(a multiple of 2, at"),
        ({}, 8, 9, "width 9, which .* the nearest that works: 8 or 10"),
        ({"attention": "shifted_window"}, 8, 12, r"width 12, .* works: 8 or 16 \(a multiple of 8"),
        ({"kernel_size": 9}, 8, 12, "height 8, .* works: 10 .a multiple of 2, at least 10"),
        ({"patch_size": (1, 3)}, 8, 8, "width 8, .* works: 12 .a multiple of 6, at least 12"),
    ],
)
def test_refused_sizes(options: dict[str, Any], height: int, width: int, text: str) -> None:
    x, t = inputs(2, height, width)
    with pytest.raises(ValueError, match=text):
        tiny(**options)(x, t)


def test_refused_dimensions() -> None:
    with pytest.raises(ValueError, match=r"this model takes \(batch, 2, height, width\)"):
        tiny()(torch.zeros(1, 2, 8), torch.zeros(1))


def test_plain_data_and_back() -> None:
    model = tiny(patch_size=[2, 1], attention=["neighborhood", "none"], dropout=0.25)
    plain = model_config(model)
    assert plain["type"] == "hourglass"
    assert plain["patch_size"] == [2, 1]
    again = make_model(plain)
    assert again.config == model.config == HourglassConfig(**{**TINY, **_options(plain)})


def _options(plain: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in plain.items() if key != "type"}


@pytest.mark.parametrize(
    ("name", "size", "parameters", "gigaflops"),
    [("hourglass_tiny", 32, (1, 3), (0.1, 0.2)), ("hourglass_small", 64, (25, 35), (1.5, 2))],
)
def test_presets(name: str, size: int, parameters: Any, gigaflops: Any) -> None:
    with torch.device("meta"):
        model = make_model({"type": name, "num_classes": 10})
        with FlopCounterMode(display=False) as counter:
            y = model(torch.empty(1, 3, size, size), torch.empty(1))
    assert y.shape == (1, 3, size, size)
    assert model_config(model)["type"] == "hourglass"
    assert parameters[0] < sum(p.numel() for p in model.parameters()) / 1e6 < parameters[1]
    assert gigaflops[0] < counter.get_total_flops() / 1e9 < gigaflops[1]
