"""Conditioners: what each makes of raw input, its null condition, their joining, by name."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from k_diffusion.models import (
    CONDITIONERS,
    AudioTokens,
    ClassConditioner,
    CompositeConditioner,
    Conditioner,
    KnownPart,
    LowResolution,
    UNet,
    conditioner_config,
    make_conditioner,
    register_conditioner,
)
from k_diffusion.utils.augmentation import box_mask
from k_diffusion.utils.images import save_png


@pytest.fixture
def registry() -> Iterator[None]:
    before = dict(CONDITIONERS)
    yield
    CONDITIONERS.clear()
    CONDITIONERS.update(before)


def tokens(keyword: str, width: int, length: int) -> type[Conditioner]:
    """A conditioner whose sequence is its raw numbers, repeated."""
    mask_name = f"{keyword}_mask"

    @dataclass(frozen=True, kw_only=True)
    class Config:
        reads: str = "number"

    Config.__annotations__ = {"reads": str}

    class Numbers(Conditioner):
        keywords = (keyword, mask_name)

        def forward(self, raw: Any) -> dict[str, Tensor]:
            values = torch.tensor([float(one) for one in raw])
            mask = torch.ones(len(values), length, dtype=torch.bool)
            return {keyword: values[:, None, None].expand(-1, length, width), mask_name: mask}

        def null(self, batch: int, like: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
            long = length if like is None else like[keyword].shape[1]
            mask = torch.zeros(batch, long, dtype=torch.bool)
            return {keyword: torch.zeros(batch, long, width), f"{keyword}_mask": mask}

    Numbers.Config = Config
    return Numbers


# ---------------------------------------------------------------- classes


def test_classes_by_name_index_and_tensor() -> None:
    conditioner = ClassConditioner(class_names=("cat", "dog", "7"))
    made = conditioner(["dog", 0, None, "7"])["class_label"]
    assert made.dtype == torch.int64
    assert made.tolist() == [1, 0, 3, 2]
    given = torch.tensor([2, 1], dtype=torch.uint8)
    assert conditioner(given)["class_label"].tolist() == [2, 1]
    assert conditioner.null(2)["class_label"].tolist() == [3, 3]
    assert [conditioner.read(word) for word in ("7", "1", "dog")] == [["7"], [1], ["dog"]]
    for wrong, said in (
        (["cow"], "unknown class 'cow'"),
        ([3], "class 3 does not exist: there are 0 to 2"),
        ([1.5], "class 1.5 does not exist: there are 0 to 2"),
        ([float("nan")], "class nan does not exist"),
        ([-1], "class -1 does not exist"),
        (torch.zeros(2), "class indices are integers of shape .B,., got torch.float32"),
        (torch.zeros(2, 1, dtype=torch.int64), r"got torch.int64 of \(2, 1\)"),
    ):
        with pytest.raises(ValueError, match=said):
            conditioner(wrong)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "num_classes = 0 and class_names is empty"),
        ({"num_classes": 2, "class_names": ("a",)}, "num_classes = 2, but class_names has 1"),
        ({"num_class": 2}, "num_class = 2 is no option of this conditioner; did you mean num_cl"),
        ({"num_classes": "2"}, "num_classes = '2' does not fit; give a whole number"),
        ({"num_classes": -1}, "num_classes = -1 is negative"),
        ({"class_names": ("a", "b", "a")}, "class_names has 'a' twice"),
    ],
)
def test_classes_refuse(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ClassConditioner(**options)


# ---------------------------------------------------------------- pictures


def test_low_resolution_lowers_by_means_and_enlarges_linearly() -> None:
    conditioner = LowResolution(channels=2, factor=2)
    large = torch.randn(3, 2, 6, 4, generator=torch.Generator().manual_seed(0))
    small = conditioner.lower(large)
    means = large.unflatten(3, (2, 2)).unflatten(2, (3, 2)).mean((3, 5))
    assert (small - means).abs().max() < 1e-6
    row = torch.tensor([0.0, 4.0]).expand(1, 2, 1, 2)
    # Each pixel's middle is where it was: a quarter and three quarters between two, flat outside.
    assert conditioner(row)["image"][0, 1, 0].tolist() == [0, 1, 3, 4]
    seen = conditioner.from_batch({"clean": large}, [0, 1, 2])["image"]
    assert torch.equal(seen, conditioner(small)["image"])
    assert seen.shape == large.shape
    with pytest.raises(ValueError, match=r"factor = 2 does not divide the size \(5, 4\)"):
        conditioner.lower(large[:, :, :5])
    with pytest.raises(ValueError, match=r"\(B, 2, height, width\) .* got \(3, 1, 6, 4\)"):
        conditioner(large[:, :1])


@pytest.mark.parametrize("size", [(8,), (4, 6), (2, 4, 6)])
def test_low_resolution_in_any_dimension(size: tuple[int, ...]) -> None:
    conditioner = LowResolution(channels=1, factor=2)
    x = torch.randn(2, 1, *size)
    assert conditioner.from_batch({"clean": x}, [0, 1])["image"].shape == x.shape


def test_bytes_are_pictures_too() -> None:
    small = torch.tensor([[0, 255]], dtype=torch.uint8).expand(1, 1, 1, 2)
    made = LowResolution(channels=1, factor=1)(small)["image"]
    assert made.flatten().tolist() == [-1, 1]


def test_known_part_shows_what_is_known_and_nothing_else() -> None:
    conditioner = KnownPart(channels=1)
    pictures = torch.full((2, 1, 3, 3), 0.5)
    known = torch.zeros(2, 1, 3, 3, dtype=torch.bool)
    known[0, :, 1] = True
    made = conditioner((pictures, known))["image"]
    assert made.shape == (2, 2, 3, 3)
    assert torch.equal(made[:, 1:], known.float())
    assert torch.equal(made[:, :1], 0.5 * known)
    seeds = [5, 6, 7]
    seen = conditioner.from_batch({"clean": torch.ones(3, 1, 8, 8)}, seeds)["image"]
    assert torch.equal(seen[:, 1:], (~box_mask(3, (8, 8), seeds)).float())
    assert torch.equal(seen[:, :1], seen[:, 1:])
    alone = conditioner.from_batch({"clean": torch.ones(1, 1, 8, 8)}, [6])["image"]
    assert torch.equal(alone[0], seen[1])  # whatever its neighbours
    with pytest.raises(ValueError, match=r"torch.float32 .* give booleans of shape \(2, 1, 3, 3\)"):
        conditioner((pictures, known.float()))
    with pytest.raises(ValueError, match="unknown mask 'bocks'; did you mean 'box'"):
        KnownPart(mask="bocks")


def test_pictures_are_read_from_files(tmp_path: Path) -> None:
    picture = torch.randint(0, 256, (4, 3, 5), dtype=torch.uint8)
    save_png(tmp_path / "part.png", picture)
    pictures, known = KnownPart(channels=3).read(str(tmp_path / "part.png"))
    assert torch.equal(pictures[0], picture[:3])
    assert torch.equal(known[0], picture[3:] > 0)
    save_png(tmp_path / "small.png", picture[:3])
    assert torch.equal(LowResolution().read(str(tmp_path / "small.png"))[0], picture[:3])
    with pytest.raises(ValueError, match=r"small.png has no transparent part"):
        KnownPart(channels=3).read(str(tmp_path / "small.png"))


def test_a_picture_is_null_in_the_shape_that_is_known() -> None:
    for conditioner, channels in ((LowResolution(channels=3), 3), (KnownPart(channels=3), 4)):
        assert conditioner.image_channels == channels
        with pytest.raises(ValueError, match="needs the size of x: give `size` in its config, or"):
            conditioner.null(2)
        like = {"image": torch.ones(5, channels, 4, 6)}
        assert torch.equal(conditioner.null(2, like)["image"], torch.zeros(2, channels, 4, 6))
        sized = type(conditioner)(channels=3, size=(4, 6))
        assert sized.null(2)["image"].shape == (2, channels, 4, 6)


# ---------------------------------------------------------------- hiding


def test_hidden_samples_are_told_the_null_condition_and_others_the_same() -> None:
    hidden = torch.tensor([True, False, True])
    for conditioner, raw in (
        (ClassConditioner(num_classes=4), [0, 1, 2]),
        (LowResolution(channels=1, factor=2), torch.ones(3, 1, 2, 2)),
        (AudioTokens(sample_rate=800, window=64, hop=16, bands=4), torch.ones(3, 50)),
    ):
        told = conditioner(raw)
        seen, null = conditioner.hide(told, hidden), conditioner.null(3, told)
        assert set(seen) == set(told) == set(conditioner.keywords)
        for keyword, value in seen.items():
            assert value.dtype == told[keyword].dtype
            assert torch.equal(value[hidden], null[keyword][hidden])
            assert torch.equal(value[~hidden], told[keyword][~hidden])
            assert not torch.equal(value, told[keyword])


def test_a_null_condition_is_a_network_told_nothing() -> None:
    torch.manual_seed(0)
    network = UNet(
        in_channels=1, channels=8, channel_mults=(1,), blocks=1, attention=(False,),
        head_channels=8, num_classes=3, image_channels=1,
    )  # fmt: skip
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    both = CompositeConditioner(
        kind=ClassConditioner(num_classes=3), picture=LowResolution(channels=1, factor=2)
    )
    x, t = torch.randn(2, 1, 4, 4), torch.tensor([3.0, 500.0])
    told = both({"kind": [1, 2], "picture": torch.randn(2, 1, 2, 2)})
    plain = network(x, t)
    assert torch.equal(network(x, t, **both.null(2, told)), plain)
    assert (network(x, t, **told) - plain).abs().max() > 0.01


# ---------------------------------------------------------------- several together


def test_sequences_are_joined_in_order_and_masks_with_them() -> None:
    kind = tokens("context", 3, 2)
    long = tokens("context", 3, 4)
    both = CompositeConditioner(one=kind(), other=long(), kind=ClassConditioner(num_classes=2))
    assert both.keywords == ("context", "context_mask", "class_label")
    made = both({"one": [1, 2], "other": [3, 4], "kind": [0, 1]})
    assert made["context"][:, :, 0].tolist() == [[1, 1, 3, 3, 3, 3], [2, 2, 4, 4, 4, 4]]
    assert made["context_mask"].all()
    assert made["class_label"].tolist() == [0, 1]
    some = both({"other": [3, 4]})  # the rest is absent, in its place
    assert some["context_mask"].tolist() == [[False] * 2 + [True] * 4] * 2
    assert some["class_label"].tolist() == [2, 2]
    for null in (both.null(2), both.null(2, made)):
        assert {k: v.shape for k, v in null.items()} == {k: v.shape for k, v in made.items()}
        assert not null["context_mask"].any()
        assert not null["context"].any()
        assert null["class_label"].tolist() == [2, 2]


def test_what_cannot_be_joined_is_refused() -> None:
    classes = ClassConditioner(num_classes=2)
    with pytest.raises(ValueError, match="class_label is given by 'a' and by 'b': only sequences"):
        CompositeConditioner(a=classes, b=classes)
    both = CompositeConditioner(narrow=tokens("context", 3, 2)(), wide=tokens("context", 5, 2)())
    with pytest.raises(ValueError, match="context is of width 3 from 'narrow' but of 5 from 'wide"):
        both({"narrow": [1], "wide": [1]})
    with pytest.raises(ValueError, match="unknown part 'wid'; did you mean 'wide'"):
        both({"wid": [1]})
    for wrong in ([1, 2], {}):
        with pytest.raises(ValueError, match="takes a mapping, part -> raw input"):
            both(wrong)
    picture = CompositeConditioner(kind=classes, words=tokens("context", 3, 2)())
    with pytest.raises(ValueError, match="of different samples, 1 of 'kind', 2 of 'words'"):
        picture({"kind": [1], "words": [1, 2]})
    with pytest.raises(ValueError, match=r"part_dropout = 2 is outside \[0, 1\)"):
        CompositeConditioner(kind=classes, part_dropout=2)
    with pytest.raises(ValueError, match="made of conditioners by name"):
        CompositeConditioner()
    with pytest.raises(ValueError, match=r"part_dropout = 1 is outside \[0, 1\)"):
        make_conditioner(
            {"type": "composite", "parts": {"a": {"type": "class", "num_classes": 2}}}
            | {"part_dropout": 1}
        )


def test_training_hides_each_part_by_itself() -> None:
    parts = {"a": tokens("context", 1, 1)(), "b": tokens("context", 1, 1)()}
    both = CompositeConditioner(part_dropout=0.25, **parts)
    seeds = list(range(4000))
    mask = both.from_batch({"number": [1] * 4000}, seeds)["context_mask"]
    seen = mask.double()
    # Five standard deviations of a share among 4000.
    assert (seen.mean(0) - 0.75).abs().max() < 5 * (0.25 * 0.75 / 4000) ** 0.5
    both_hidden = float((seen.sum(1) == 0).double().mean())
    assert abs(both_hidden - 1 / 16) < 5 * (1 / 16 * 15 / 16 / 4000) ** 0.5
    alone = both.from_batch({"number": [1]}, [7])["context_mask"]
    assert torch.equal(alone[0], mask[7])
    whole = CompositeConditioner(**parts).from_batch({"number": [1] * 9}, range(9))
    assert whole["context_mask"].all()


def test_words_of_the_command_line() -> None:
    both = CompositeConditioner(kind=ClassConditioner(class_names=("cat", "dog")))
    assert both.read("kind=dog") == {"kind": ["dog"]}
    for word in ("dog", "knd=dog"):
        with pytest.raises(ValueError, match=f"'{word}' is not of the form part=value; the parts"):
            both.read(word)


# ---------------------------------------------------------------- by name


def test_by_name_and_back_through_json(registry: None) -> None:
    config = {
        "type": "composite",
        "parts": {
            "kind": {"type": "class", "class_names": ["cat", "dog"]},
            "picture": {"type": "low_resolution", "channels": 1, "factor": 2},
        },
    }
    made = make_conditioner(config)
    plain = json.loads(json.dumps(conditioner_config(made)))
    assert plain == conditioner_config(made)
    assert plain["parts"]["kind"] == {
        "type": "class",
        "num_classes": 2,
        "class_names": ["cat", "dog"],
        "reads": "label",
    }
    assert conditioner_config(make_conditioner(plain)) == plain


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"type": "clas"}, "unknown conditioner type 'clas'; did you mean 'class'?"),
        ({"type": "mine"}, "One of your own is known once its file is imported: by --plugin FILE"),
        ({"reads": "x"}, "the conditioner's type is missing; known: class"),
        ({"type": "composite"}, "parts is missing: 'composite' cannot do without"),
        ({"type": "composite", "parts": 3}, "parts = 3 does not fit; give a table of names"),
        ({"type": "composite", "parts": {}}, "parts is empty"),
        ({"type": "composite", "parts": {"a": {"type": "class"}}}, "parts.a: num_classes = 0"),
        ({"type": "low_resolution", "factor": 0}, "factor = 0 is too small"),
        ({"type": "low_resolution", "size": [4, "x"]}, "give a list of whole numbers"),
    ],
)
def test_configs_refused(config: dict[str, Any], said: str) -> None:
    for use in (make_conditioner, CONDITIONERS.settings):
        with pytest.raises(ValueError, match=said):
            use(config)


@dataclass(frozen=True, kw_only=True)
class AgeConfig:
    unit: float = 100.0
    reads: str = "age"


class Age(Conditioner):
    Config = AgeConfig
    keywords = ("embedding",)

    def forward(self, raw: Any) -> dict[str, Tensor]:
        return {"embedding": torch.tensor([[float(age) / self.config.unit] for age in raw])}

    def null(self, batch: int, like: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        return {"embedding": torch.zeros(batch, 1)}


def test_one_of_your_own(registry: None) -> None:
    assert register_conditioner("age")(Age) is Age
    made = make_conditioner({"type": "age", "unit": 50})
    assert made([25])["embedding"].tolist() == [[0.5]]
    assert made.from_batch({"age": [100], "label": [1]}, [0])["embedding"].tolist() == [[2]]
    assert conditioner_config(made) == {"type": "age", "unit": 50, "reads": "age"}
    with pytest.raises(ValueError, match="Age reads 'age', but a batch of this data has label, cl"):
        made.from_batch({"label": [1], "clean": []}, [0])
    with pytest.raises(ValueError, match="conditioner type 'age' is taken by .*Age"):
        register_conditioner("age")(Age)
    with pytest.raises(TypeError, match="conditioner 'b' must be a class derived from Conditioner"):
        register_conditioner("b")(torch.nn.Linear)
    with pytest.raises(ValueError, match="AgeConfig, or from its fields by keyword, got 3"):
        Age(3)


def test_one_whose_config_does_not_say_what_it_reads() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Unit:
        unit: float = 100.0

    class Blind(Age):
        Config = Unit

    with pytest.raises(TypeError, match="Blind.Config has no field `reads`, the name of the raw"):
        Blind().from_batch({"age": [1]}, [0])


def test_an_unregistered_one_has_no_config() -> None:
    with pytest.raises(ValueError, match="Age has no type: register it with register_conditioner"):
        conditioner_config(Age())


def test_pictures_that_are_none_or_do_not_fit() -> None:
    enlarge = LowResolution(channels=1, factor=2, size=(8, 8))
    assert enlarge([torch.zeros(1, 4, 4)] * 2)["image"].shape == (2, 1, 8, 8)
    for raw, text in (
        ([1, 2], "LowResolution takes pictures as tensors, got int"),
        ([], "LowResolution takes pictures as tensors, got none"),
        ("cat.png", "LowResolution takes pictures as tensors, got str"),
        (
            [torch.zeros(1, 4, 4), torch.zeros(1, 2, 2)],
            r"of one shape, got \(1, 4, 4\), \(1, 2, 2\)",
        ),
        (torch.zeros(1, 1, 5, 5), r"is of \(10, 10\), but size = \(8, 8\): give one of \(4, 4\)"),
    ):
        with pytest.raises(ValueError, match=text):
            enlarge(raw)
