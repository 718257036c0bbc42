"""What is said of a config's keys, and configs written out: all of it generated."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import sys
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field, create_model
from torch import nn

from k_diffusion.models import CONDITIONERS, MODELS, PRESETS
from k_diffusion.training.config import TrainConfig
from k_diffusion.training.config_file import make_config
from k_diffusion.training.config_text import as_json, as_toml, in_full, template
from k_diffusion.training.explain import (
    Section,
    as_text,
    config_sections,
    documented,
    narrowed,
)
from k_diffusion.training.extra_losses import LOSSES
from k_diffusion.training.loss import DENSITIES, WEIGHTINGS
from k_diffusion.training.sections import COURSE_OPTIONS, StrictConfig
from k_diffusion.training.words import takes, toml, toml_tables
from k_diffusion.utils.scheduler import SCHEDULERS, Spacing

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

RUN: dict[str, Any] = {
    "model": {"type": "unet", "prediction": "edm", "sigma_data": "auto"},
    "data": {"source": "digits"},
    "total_images": 64,
}


@pytest.fixture(scope="module")
def sections() -> dict[str, Section]:
    return {section.path: section for section in config_sections()}


def tables(kind: type[BaseModel]) -> list[type[BaseModel]]:
    return [kind, *(t for below in kind.__subclasses__() for t in tables(below))]


def test_every_key_of_every_table_is_said_with_its_description(sections: Any) -> None:
    """Found by the classes themselves, not by the walk that is tested."""
    said = {entry.key: entry for section in sections.values() for entry in section.entries}
    fields = [(kind, n) for kind in tables(StrictConfig)[1:] for n in kind.model_fields]
    fields = [(k, n) for k, n in fields if k.__module__.startswith("k_diffusion.")]
    assert len(fields) > 40
    for kind, name in fields:
        field = kind.model_fields[name]
        mine = [entry for key, entry in said.items() if key.rpartition(".")[2] == name]
        assert field.description, f"{kind.__name__}.{name}"
        assert [e for e in mine if e.description == field.description], f"{kind.__name__}.{name}"


def test_what_registries_hold_is_said_with_all_options(sections: Any) -> None:
    for registry, key in ((MODELS, "model"), (CONDITIONERS, "conditioner")):
        assert {f"{key}.{name}" for name in registry.homes} <= set(sections)
        ours = {n: c for n, c in registry.items() if c.__module__.startswith("k_diffusion.")}
        for name, cls in ours.items():
            section = sections[f"{key}.{name}"]
            config = getattr(cls, "Config", None)
            names = [f.name for f in dataclasses.fields(config)] if config else []
            keys = [entry.key.removeprefix(f"{key}.") for entry in section.entries]
            assert keys == (["type", *names] if config else [])
            missing = [e.key for e in section.entries if not e.description]
            assert not missing, f"{name}: {missing}"
            assert section.title
    for name in PRESETS:
        assert PRESETS[name]["type"] in sections[f"model.{name}"].title
    for name, kind in SCHEDULERS.items():
        assert (f"process.{name}" in sections) == (not issubclass(kind, Spacing))
    for key, table in (("weighting", WEIGHTINGS), ("density", DENSITIES)):
        for name, function in table.items():
            options = inspect.signature(function).parameters.values()
            wanted = [f"loss.{key}_options.{o.name}" for o in options if o.kind is o.KEYWORD_ONLY]
            assert [entry.key for entry in sections[f"loss.{key}.{name}"].entries] == wanted


def test_courses_are_said_with_what_they_take(sections: Any) -> None:
    for name, options in COURSE_OPTIONS.items():
        title = sections[f"optimizer.schedule.{name}"].title
        assert re.findall(r"optimizer\.(\w+)", title) == list(options), name
    found = narrowed(list(sections.values()), "optimizer.schedule.cosine")
    assert as_text(found).startswith("== optimizer.schedule.cosine: Half a cosine from lr down")


def test_extra_losses_are_said_with_their_options(monkeypatch: pytest.MonkeyPatch) -> None:
    def sharp(outcome: Any, *, power: float = 2.0) -> Any:
        """Of edges.

        Args:
            power: of the differences.
        """

    class Deep(nn.Module):
        """Of a network."""

        def __init__(self, *, layer: int, scale: float | None = None) -> None: ...

    monkeypatch.setitem(LOSSES, "sharp", sharp)
    monkeypatch.setitem(LOSSES, "deep", Deep)
    assert as_text(narrowed(config_sections(), "loss.extra.sharp")) == (
        "== loss.extra.sharp: Of edges.\n\n"
        "loss.extra.sharp.weight = 1.0\n    number above 0\n    What its mean is multiplied by.\n\n"
        "loss.extra.sharp.power = 2.0\n    number\n    Of the differences."
    )
    (deep,) = narrowed(config_sections(), "loss.extra.deep")
    assert [(e.key, e.takes, e.default) for e in deep.entries[1:]] == [
        ("loss.extra.deep.layer", "whole number", None),
        ("loss.extra.deep.scale", "number", ""),
    ]


def test_what_comes_anew_appears_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    class Inner(BaseModel):
        """Two words."""

        depth: Annotated[int, Field(ge=1, lt=9)] = Field(default=3, description="How deep.")

    class Left(BaseModel):
        kind: Literal["left"] = "left"
        size: float = Field(description="How large.")

    class Right(BaseModel):
        kind: Literal["right"] = "right"

    more: Any = create_model(
        "More",
        __base__=TrainConfig,
        brand_new=(int, Field(default=5, description="It is new.")),
        inner=(Inner | None, Field(default=None, description="A table.")),
        side=(
            Annotated[Left | Right, Field(discriminator="kind")],
            Field(description="Which side."),
        ),
    )

    @dataclass(frozen=True)
    class MineConfig:
        """A config.

        Args:
            width: how wide, in a
                second line.
            odd, even: both.
        """

        width: int = 7
        odd: bool = False
        even: bool | None = None

    class Mine(nn.Module):
        """A model of one's own.

        And more of it.
        """

        Config = MineConfig

    monkeypatch.setitem(MODELS, "mine", Mine)
    found = {section.path: section for section in config_sections(more)}
    text = as_text(list(found.values()))
    assert "brand_new = 5\n    whole number\n    It is new." in text
    assert "inner.depth = 3\n    whole number from 1 to below 9\n    How deep." in text
    assert "side.size (must be given)\n    number\n    How large." in text
    assert {"side.left", "side.right", "inner", "model.mine"} <= set(found)
    assert 'the first key says which kind it is: "left" or "right"' in text
    assert found["model.mine"].title == "A model of one's own."
    said = [(e.key, e.takes, e.default, e.description) for e in found["model.mine"].entries]
    assert said[1:] == [
        ("model.width", "whole number", "7", "How wide, in a second line."),
        ("model.odd", "true or false", "false", "Both."),
        ("model.even", "true or false", "", "Both."),
    ]
    assert "model.even (may be left out)" in text


def test_text_is_plain_and_narrow(sections: Any) -> None:
    text = as_text(list(sections.values()))
    assert all(sign.isprintable() for sign in text.replace("\n", ""))
    assert max(len(line) for line in text.splitlines() if line.startswith("    ")) <= 96
    assert "batch_size = 128" in text
    assert "model.in_channels (may be left out)" in text


@pytest.mark.parametrize(
    ("name", "paths", "keys"),
    [
        ("optimizer.lr", ["optimizer"], ["optimizer.lr"]),
        ("seed", [""], ["seed"]),
        ("data.folder", ["data.folder"], None),
        ("model.dit_s", ["model.dit_s"], []),
        ("process.cosine", ["process.cosine"], None),
        ("loss.weighting.min_snr", ["loss.weighting.min_snr"], ["loss.weighting_options.gamma"]),
    ],
)
def test_narrowed(sections: Any, name: str, paths: list[str], keys: list[str] | None) -> None:
    found = narrowed(list(sections.values()), name)
    assert [section.path for section in found] == paths
    if keys is not None:
        assert [entry.key for section in found for entry in section.entries] == keys


def test_narrowed_to_a_key_with_choices_and_to_what_is_not_there(sections: Any) -> None:
    found = narrowed(list(sections.values()), "loss.weighting")
    assert [s.path for s in found][:2] == ["loss", "loss.weighting.edm"]
    assert [e.key for e in found[0].entries] == ["loss.weighting"]
    with pytest.raises(ValueError, match=r"did you mean 'optimizer.lr'\? --explain alone lists"):
        narrowed(list(sections.values()), "optimizer.lrr")


@pytest.mark.parametrize(
    ("hint", "said"),
    [
        (int, "whole number"),
        (Annotated[float, Field(gt=0, le=1)], "number above 0 to 1"),
        (Annotated[int, Field(ge=1)], "whole number of at least 1"),
        (Annotated[float, Field(le=3)], "number of at most 3"),
        (Annotated[int, Field(ge=1)] | Literal["auto"] | None,
         'whole number of at least 1, or "auto", or "none"'),
        (tuple[float, float], "list of 2: each a number"),
        (tuple[int, str], "list of 2: whole number, text"),
        (tuple[int, ...], "list, each a whole number"),
        (dict[str, float], "table, each value a number"),
        (dict[str, Any], "table"),
        (Literal[1, 3], "1 or 3"),
        (Any, "anything"),
    ],
)  # fmt: skip
def test_words_for_types(hint: Any, said: str) -> None:
    assert takes(hint) == said


def test_toml_is_read_back_as_it_was() -> None:
    data = {
        "text": 'quote " back \\ line \n tab \t del \x7f snow ☃ \U0001f600',
        "numbers": [0, -3, 1e-8, 1.5e300, True],
        "table": {"a b": 1, "ü": {"x": [{"y": 1}, {}], "empty": []}},
        "last": False,
    }
    assert tomllib.loads("\n".join(toml_tables(data))) == data
    assert tomllib.loads(f"x = {toml(float('-inf'))}") == {"x": float("-inf")}
    with pytest.raises(TypeError, match="is no plain data"):
        toml(object())


def test_args_of_docstrings() -> None:
    def thing() -> None:
        """One.

        Args:
            a: first: with a colon.
            b, c: None: both.

        Returns:
            d: not one.
        """

    assert documented(thing) == {
        "a": "First: with a colon.",
        "b": "Left out: both.",
        "c": "Left out: both.",
    }


# ---------------------------------------------------------------- written out


RUNS = [
    RUN,
    {**RUN, "grad_clip": None, "checkpoint_every_images": 5, "data": {
        "source": "folder", "path": 'a"b', "size": [8, 16]}},
    {**RUN, "process": {"name": "karras", "sigma_max": 40.0},
     "loss": {"weighting": "min_snr", "weighting_options": {"gamma": 4.0}}},
    {**RUN, "model": {"type": "hourglass_tiny"}, "micro_batch_size": "auto",
     "conditioner": {"type": "class", "num_classes": 3}},
]  # fmt: skip


@pytest.mark.parametrize("data", RUNS)
def test_a_config_in_full_is_the_same_run(data: dict[str, Any]) -> None:
    config = make_config(data)
    full = in_full(config)
    for text, read in ((as_json(config), json.loads), (as_toml(config), tomllib.loads)):
        again = make_config(read(text))
        assert in_full(again) == full
        for key in TrainConfig.model_fields:
            if key not in ("model", "conditioner", "process"):
                assert getattr(again, key) == getattr(config, key)
    fields = {f.name for f in dataclasses.fields(MODELS.find(config.model)[0].Config)}
    assert set(full["model"]) == {"type", *fields} - {"in_channels"}


def test_what_is_auto_stays_so_and_is_explained() -> None:
    text = as_toml(make_config(RUN))
    assert 'sigma_data = "auto"' in text
    assert '# loss.weighting = "auto" is edm here\n# loss.density = "auto" is lognormal' in text
    assert in_full(make_config({**RUN, "model": {**RUN["model"], "in_channels": 1}}))["model"][
        "in_channels"
    ] == 1  # fmt: skip


@pytest.mark.parametrize("model", ["unet", "hourglass", "dit_s", "mp_unet", "image_v1"])
def test_a_template_is_a_good_config_and_every_line_in_it(model: str) -> None:
    text = template(model)
    config = make_config(tomllib.loads(text))
    every = re.sub(r"(?m)^#(?! )", "", text)
    assert len(every) < len(text)
    assert in_full(make_config(tomllib.loads(every))) == in_full(config)
    data = tomllib.loads(every)
    for section in config_sections():
        if section.path in ("data.folder", "loss", "optimizer", "ema"):
            there = data[section.path.partition(".")[0]]
            said = [e for e in section.entries if e.default or e.default is None]
            assert {e.key.rpartition(".")[2] for e in said} == set(there)


def test_a_template_of_what_is_not_there() -> None:
    with pytest.raises(ValueError, match="unknown model 'unett'; did you mean 'unet"):
        template("unett")


# ---------------------------------------------------------------- "none" and "auto" in TOML


def test_none_and_auto_are_words_of_configs() -> None:
    said = {"grad_clip": "none", "process": "none", "checkpoint_every_images": "none"}
    config = make_config({**RUN, **said})
    assert (config.grad_clip, config.process, config.checkpoint_every_images) == (None, None, None)
    auto = make_config({**RUN, "batch_size": "auto"})
    assert (auto.batch_size, auto.micro_batch_size) == (128, "auto")
    same = make_config({**RUN, "batch_size": "auto", "micro_batch_size": "auto"})
    assert same == auto
    with pytest.raises(ValueError, match="batch_size = 'auto', but micro_batch_size = 4; give one"):
        make_config({**RUN, "batch_size": "auto", "micro_batch_size": 4})
    with pytest.raises(ValueError, match="seed = 'none': input should be a valid integer"):
        make_config({**RUN, "seed": "none"})
