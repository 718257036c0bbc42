"""What a UNet refuses: each with its key, its value and the way out, on one line."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from k_diffusion.models import UNet
from k_diffusion.utils.scheduler import CosineScheduler


def message(error: pytest.ExceptionInfo[ValueError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


# ---------------------------------------------------------------- configs


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        ({"chanels": 64}, ["chanels = 64 is no option", "did you mean channels?"]),
        ({"zzz": None}, ["zzz = None is no option", "known: in_channels, out_channels"]),
        ({"process": None}, ["process = None is no option"]),
        ({"channels": "64"}, ["channels = '64'", "give a whole number"]),
        ({"channels": 64.0}, ["channels = 64.0", "give a whole number"]),
        ({"channels": True}, ["channels = True", "give a whole number"]),
        ({"channels": 0}, ["channels = 0 is too small", "give at least 1"]),
        ({"in_channels": -3}, ["in_channels = -3 is too small"]),
        ({"out_channels": 0}, ["out_channels = 0 is too small"]),
        ({"out_channels": "3"}, ["out_channels = '3'", "give a whole number or none"]),
        ({"blocks": -1}, ["blocks = -1 is too small", "give at least 1"]),
        ({"head_channels": 0}, ["head_channels = 0 is too small"]),
        ({"num_classes": -1}, ["num_classes = -1 is negative", "give 0 for none"]),
        ({"embedding_dim": -8}, ["embedding_dim = -8 is negative"]),
        ({"channel_mults": 2}, ["channel_mults = 2", "give a list of whole numbers"]),
        ({"channel_mults": [1, 2.5, 3]}, ["channel_mults = (1, 2.5, 3)", "whole numbers"]),
        ({"channel_mults": []}, ["channel_mults = () has no level", "such as (1, 2)"]),
        ({"channel_mults": [1, 0, 2]}, ["channel_mults = (1, 0, 2)", "at least 1"]),
        (
            {"channel_mults": [1, 2]},
            [
                "attention = (False, False, True) has 3 entries",
                "channel_mults = (1, 2) makes 2 levels",
                "such as (False, True)",
            ],
        ),
        ({"attention": [0, 0, 1]}, ["attention = (0, 0, 1)", "give a list of true or false"]),
        ({"attention": "last"}, ["attention = 'last'"]),
        (
            {"channels": 36},
            ["head_channels = 32 does not divide the 72 channels", "head_channels = 24 works"],
        ),
        (
            {"channels": 24, "attention": [True, False, False], "head_channels": 16},
            ["head_channels = 16 does not divide the 24 channels", "head_channels = 12 works"],
        ),
        ({"dropout": 1}, ["dropout = 1 is outside [0, 1)"]),
        ({"dropout": float("nan")}, ["dropout = nan", "give a number"]),
        ({"sigma_data": 0}, ["sigma_data = 0", "above 0"]),
        ({"sigma_data": "auto"}, ["sigma_data = 'auto'", "give a number"]),
        ({"prediction": "epsilon"}, ["unknown prediction 'epsilon'", "did you mean 'eps'?"]),
        ({"prediction": None}, ["prediction = None", "give a name"]),
        ({"time_convention": "timesteps"}, ["'timesteps'", "did you mean 'timestep'?"]),
        ({"blocks": -2}, ["blocks = -2 is too small"]),
        ({"dims": 4}, ["dims = 4 is no dimension", "give 1 for sequences, 2 for images, 3 for"]),
        ({"dims": 0}, ["dims = 0 is no dimension"]),
        ({"dims": "2"}, ["dims = '2'", "give a whole number"]),
        ({"resampling": "antialias"}, ["unknown resampling", "did you mean 'antialiased'?"]),
        ({"resampling": True}, ["resampling = True", "give a name"]),
        ({"time_features": "fourrier"}, ["unknown time_features", "did you mean 'fourier'?"]),
        ({"context_dim": -1}, ["context_dim = -1 is negative", "give 0 for none"]),
        (
            {"cross_attention": [False, True, True]},
            ["cross_attention = (False, True, True) has nothing to attend to", "give context_dim"],
        ),
        (
            {"context_dim": 8, "cross_attention": [True]},
            ["cross_attention = (True,) has 1 entries", "makes 3 levels", "(False, False, True)"],
        ),
        ({"context_dim": 8, "cross_attention": 1}, ["cross_attention = 1", "or none"]),
        (
            {"context_dim": 8, "channels": 24, "cross_attention": [True, False, False]},
            ["head_channels = 32 does not divide the 24 channels", "head_channels = 24 works"],
        ),
        ({"checkpointing": 0}, ["checkpointing = 0 is too small", "give n for every n-th block"]),
        ({"checkpointing": [3]}, ["names level 3", "levels 0 to 2"]),
        ({"checkpointing": "all"}, ["checkpointing = 'all'", "true or false or a whole number"]),
    ],
)
def test_configs(config: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011  (the parts are matched below)
        UNet.from_config(config)
    text = message(error)
    for part in parts:
        assert part in text


def test_the_way_out_for_heads_does_work() -> None:
    with pytest.raises(ValueError, match="head_channels = 32 does not divide") as error:
        UNet(channels=40, channel_mults=(1, 3), attention=(True, True))
    found = re.search(r"head_channels = (\d+) works", message(error))
    assert found
    assert int(found[1]) == 20
    UNet(channels=40, channel_mults=(1, 3), attention=(True, True), head_channels=int(found[1]))


def test_a_config_is_a_mapping() -> None:
    with pytest.raises(ValueError, match="UNetConfig is read from a mapping, got str"):
        UNet.from_config("unet")  # type: ignore[arg-type]


def test_the_middle_always_attends() -> None:
    with pytest.raises(ValueError, match="does not divide the 18 channels .* = 18 works"):
        UNet(channels=9, channel_mults=(1, 2), attention=(False, False))


def test_heads_are_no_matter_without_attention() -> None:
    model = UNet(channels=9, channel_mults=(1, 2), attention=(False, False), head_channels=18)
    assert model.down[0][0].attention is None  # type: ignore[index]
    with pytest.raises(ValueError, match="does not divide the 9 channels"):
        UNet(channels=9, channel_mults=(1, 2), attention=(True, False), head_channels=18)


def test_a_process_is_a_scheduler() -> None:
    process = CosineScheduler()
    assert UNet(process=process).process is process
    with pytest.raises(ValueError, match="process = 'cosine' is no Scheduler; make one"):
        UNet(process="cosine")  # type: ignore[arg-type]


# ---------------------------------------------------------------- inputs

TINY: dict[str, Any] = {"channels": 8, "head_channels": 8, "blocks": 1}


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        ((2, 1, 8, 8), "x has shape (2, 1, 8, 8); this model takes (batch, 3, ...)"),
        ((3, 8, 8), "x has shape (3, 8, 8)"),
        ((3, 8, 8), "this model takes (batch, 3, height, width)"),
        ((2, 3, 4, 8, 8), "x has shape (2, 3, 4, 8, 8)"),
        ((2, 3, 0, 4), "x has height 0, of shape (2, 3, 0, 4): give at least 1"),
        ((2, 3, 4, 0), "x has width 0"),
    ],
)
def test_shapes(shape: tuple[int, ...], text: str) -> None:
    model = UNet(**TINY)
    with pytest.raises(ValueError, match=re.escape(text)) as error:
        model(torch.zeros(shape), torch.zeros(shape[0]))
    message(error)


@pytest.mark.parametrize(
    ("dims", "axes"), [(1, "length"), (2, "height, width"), (3, "depth, height, width")]
)
def test_shapes_of_any_dimension(dims: int, axes: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"takes (batch, 3, {axes})")):
        UNet(**TINY, dims=dims)(torch.zeros(2, 3), torch.zeros(2))


@pytest.mark.parametrize("t", [torch.tensor(1.0), torch.ones(1), torch.ones(2, 1)])
def test_times(t: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=re.escape(f"t has shape {tuple(t.shape)}; give one time")):
        UNet(**TINY)(torch.zeros(2, 3, 8, 8), t)


# Known from shapes and dtypes alone: refused by forward and by check_condition.
BY_SHAPE = [
    ({"class_label": torch.tensor(3)}, "class_label has shape (), but the batch has 4 samples"),
    ({"class_label": torch.tensor([3])}, "give one label a sample, shape (4,); to use one for all"),
    ({"class_label": torch.tensor([1, 2, 3])}, "class_label has shape (3,)"),
    ({"class_label": torch.ones(4)}, "class_label is of torch.float32"),
    ({"class_label": torch.ones(4, dtype=torch.bool)}, "class_label is of torch.bool"),
    ({"class_label": [1, 2, 3, 4]}, "class_label must be a tensor, got list"),
    ({"embedding": torch.ones(4, 4)}, "embedding has shape (4, 4)"),
    ({"embedding": torch.ones(1, 5)}, "a batch of 4 take (4, 5)"),
    ({"embedding": torch.ones(4, 5).long()}, "embedding is of torch.int64"),
    ({"embedding": 0.5}, "embedding must be a tensor, got float"),
    ({"augmentation": torch.ones(4, 1)}, "a batch of 4 take (4, 2)"),
    ({"image": torch.ones(4, 1, 8, 8, dtype=torch.uint8)}, "image is of torch.uint8"),
    ({"image": torch.ones(4, 2, 8, 8)}, "image has shape (4, 2, 8, 8)"),
    ({"context": torch.ones(4, 6)}, "take (4, tokens, 6)"),
    ({"context": torch.ones(4, 3, 5)}, "context has shape (4, 3, 5)"),
    ({"context_mask": torch.ones(4, 3).bool()}, "context_mask was given without context"),
    (
        {"context": torch.ones(4, 3, 6), "context_mask": torch.ones(4, 3)},
        "give booleans, true where a token counts",
    ),
    (
        {"context": torch.ones(4, 3, 6), "context_mask": torch.ones(4, 2).bool()},
        "give one truth a token, shape (4, 3)",
    ),
]


@pytest.mark.parametrize(("condition", "text"), BY_SHAPE)
def test_conditions_of_the_wrong_shape(condition: dict[str, Any], text: str) -> None:
    model = UNet(
        num_classes=10,
        embedding_dim=5,
        augmentation_dim=2,
        image_channels=1,
        context_dim=6,
        **TINY,
    )
    with pytest.raises(ValueError, match=re.escape(text)) as error:
        model.check_condition(4, **condition)
    message(error)
    with pytest.raises(ValueError, match=re.escape(text)):
        model(torch.zeros(4, 3, 8, 8), torch.zeros(4), **condition)


@pytest.mark.parametrize(
    ("label", "held"),
    [([0, 11], 11), ([-1, 3], -1), ([300, 2], 300)],
)
def test_classes_out_of_range(label: list[int], held: int) -> None:
    text = f"class_label holds {held}; this model knows classes 0 to 9 (10 stands for no label)"
    with pytest.raises(ValueError, match=re.escape(text)):
        UNet(num_classes=10, **TINY).check_condition(2, class_label=torch.tensor(label))


def test_a_range_beyond_the_labels_dtype() -> None:
    model = UNet(num_classes=1000, **TINY)
    model.check_condition(2, class_label=torch.tensor([255, 0], dtype=torch.uint8))


def test_embeddings_that_are_not_finite() -> None:
    embedding = torch.tensor([[0.0, float("nan")]])
    with pytest.raises(ValueError, match="embedding holds values that are not finite"):
        UNet(embedding_dim=2, **TINY).check_condition(1, embedding=embedding)


def test_conditions_that_the_model_does_not_take() -> None:
    model = UNet(**TINY)
    label, embedding = torch.tensor([1]), torch.ones(1, 2)
    x, t = torch.zeros(1, 3, 8, 8), torch.zeros(1)
    with pytest.raises(ValueError, match="class_label was given, but this model takes none: le"):
        model.check_condition(1, class_label=label)
    with pytest.raises(ValueError, match="takes none: .*or build the model with num_classes"):
        model(x, t, class_label=label)
    with pytest.raises(ValueError, match="embedding was given, but this model takes none"):
        model.check_condition(1, embedding=embedding)
    with pytest.raises(ValueError, match="embedding was given, but this model takes none"):
        model(x, t, embedding=embedding)
    with pytest.raises(ValueError, match="unknown condition 'class_labels'; did you mean 'class_l"):
        model.check_condition(1, class_labels=label)


def test_an_image_of_another_size_than_x() -> None:
    model = UNet(image_channels=1, **TINY)
    image = torch.ones(2, 1, 8, 9)
    model.check_condition(2, image=image)  # which does not know x
    with pytest.raises(ValueError, match=re.escape("take (2, 1, 8, 8), the size of x")):
        model(torch.zeros(2, 3, 8, 8), torch.zeros(2), image=image)


def test_what_is_right_passes() -> None:
    model = UNet(num_classes=10, embedding_dim=2, **TINY)
    model.check_condition(3)
    model.check_condition(3, class_label=None, embedding=None)
    model.check_condition(3, class_label=torch.tensor([0, 9, 10]), embedding=torch.ones(3, 2))
