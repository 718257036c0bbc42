"""Models by name; and what importing them brings in."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch
from torch import nn

from k_diffusion.models import MODELS, UNet, make_model, model_config, register_model
from k_diffusion.models.registry import (
    PRESETS,
    check_types,
    known_classes,
    known_fields,
    model_trait,
    register_preset,
    takes_option,
)


@pytest.fixture
def registry() -> Iterator[None]:
    before, presets = dict(MODELS), dict(PRESETS)
    yield
    for table, kept in ((MODELS, before), (PRESETS, presets)):
        table.clear()
        table.update(kept)


@dataclass(frozen=True)
class MineConfig:
    width: int = 4


class Mine(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.config = MineConfig(width)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Mine:
        return cls(**known_fields(MineConfig, config))


def test_unet_by_name_and_back_through_json() -> None:
    config = {
        "type": "unet",
        "in_channels": 1,
        "channels": 8,
        "channel_mults": [1, 2],
        "attention": [False, True],
        "head_channels": 8,
        "num_classes": 3,
        "dropout": 0,
    }
    kept = dict(config)
    model = make_model(config)
    assert isinstance(model, UNet)
    assert config == kept
    assert model.config.channel_mults == (1, 2)
    plain = json.loads(json.dumps(model_config(model)))
    assert plain == model_config(model)
    assert {key: plain[key] for key in config} == config
    again = make_model(plain)
    assert isinstance(again, UNet)
    assert again.config == model.config
    assert hash(again.config) == hash(model.config)


def test_register(registry: None) -> None:
    assert register_model("mine")(Mine) is Mine
    model = make_model({"type": "mine", "width": 7})
    assert isinstance(model, Mine)
    assert model_config(model) == {"type": "mine", "width": 7}
    with pytest.raises(ValueError, match="widht = 7 is no option of this model; did you mean wid"):
        make_model({"type": "mine", "widht": 7})
    with pytest.raises(ValueError, match="model type 'mine' is taken by .*Mine"):
        register_model("mine")(Mine)


def test_a_class_with_a_config_needs_no_more(registry: None) -> None:
    @register_model("plain")
    class Plain(nn.Module):
        Config = MineConfig

        def __init__(self, config: MineConfig) -> None:
            super().__init__()
            self.layer = nn.Linear(config.width, 1)

    model = make_model({"type": "plain", "width": 7})
    assert isinstance(model, Plain)
    assert model.layer.in_features == 7
    assert model_config(model) == {"type": "plain", "width": 7}
    with pytest.raises(ValueError, match="widht = 7 is no option"):
        make_model({"type": "plain", "widht": 7})
    with pytest.raises(ValueError, match="width = '7' does not fit; give a whole number"):
        make_model({"type": "plain", "width": "7"})


def test_register_refuses(registry: None) -> None:
    with pytest.raises(TypeError, match=r"model 'a' must be a class derived from nn\.Module"):
        register_model("a")(MineConfig)  # type: ignore[type-var]
    with pytest.raises(TypeError, match="model 'b': Linear needs a dataclass as its `Config`"):
        register_model("b")(nn.Linear)
    assert not {"a", "b"} & set(MODELS)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"type": "unnet"}, "unknown model type 'unnet'; did you mean 'unet'?"),
        ({"type": ["unet"]}, r"unknown model type \['unet'\]"),
        ({"channels": 3}, "the model's type is missing; known: .*unet"),
        ("unet", "a model's config must be a mapping, got str"),
        ({"type": "unet", "chanels": 3}, "chanels = 3 is no option .* did you mean channels?"),
    ],
)
def test_make_model_refuses(config: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make_model(config)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("config", "text"),
    [
        (
            {"type": "dit", "width": 10**12},
            "model 'dit' cannot be built .its weights are more than",
        ),
        ({"type": "unet", "blocks": 10**6}, "blocks = 1000000 is too large; give at most 1000"),
        ({"type": "hourglass", "depths": [2, 1001]}, r"depths = \[2, 1001\] is too large; give at"),
    ],
)
def test_sizes_beyond_all_memory(config: Any, text: str, device: str) -> None:
    with pytest.raises(ValueError, match=text), torch.device(device):
        make_model(config)


def test_a_class_that_fails_is_named(registry: None) -> None:
    @dataclass
    class Settings:
        blocks: int = 10**6  # of one's own: it may mean anything
        error: Any = None

    @register_model("failing")
    class Failing(nn.Module):
        Config = Settings

        def __init__(self, config: Settings) -> None:
            super().__init__()
            raise config.error

    for error in (KeyError("boom"), TypeError("boom"), RuntimeError("boom")):
        text = rf"model 'failing' cannot be built \(.*Failing: {type(error).__name__}: .?boom"
        with pytest.raises(ValueError, match=text) as caught:
            make_model({"type": "failing", "error": error})
        assert caught.value.__cause__ is error
    for device in ("cpu", "meta"):
        full = RuntimeError("can't allocate memory: you tried to allocate 2147483648 bytes")
        text = r"cannot be built \(its weights .* of them has 2 GiB\): give smaller sizes"
        with pytest.raises(ValueError, match=text), torch.device(device):
            make_model({"type": "failing", "error": full})
    with pytest.raises(ValueError, match="^mine$"):
        make_model({"type": "failing", "error": ValueError("mine")})
    # Without memory torch itself fails in many ways: that is not the class's fault.
    with pytest.raises(RuntimeError, match="^boom$"), torch.device("meta"):
        make_model({"type": "failing", "error": RuntimeError("boom")})


def test_model_config_refuses_the_unregistered() -> None:
    with pytest.raises(ValueError, match="Mine has no type: register it"):
        model_config(Mine())


@dataclass(frozen=True)
class Needs:
    width: int
    num_classes: int = 4


def test_what_a_model_has_is_told_without_building_it(registry: None) -> None:
    @register_model("needs")
    class Builds(nn.Module):
        Config = Needs
        prediction = "flow"

        def __init__(self, config: Needs) -> None:
            raise AssertionError("it was built")

    config = {"type": "needs", "width": 3}
    assert model_trait(config, "prediction", "eps") == "flow"  # of the class
    assert model_trait(config, "num_classes", 0) == 4  # of its config's defaults
    assert model_trait({**config, "num_classes": 7}, "num_classes", 0) == 7
    assert model_trait(config, "sigma_data", 0.5) == 0.5
    assert model_trait({"type": "unet", "prediction": "edm"}, "time_convention", "") == "log_sigma"
    assert takes_option(config, "width")
    assert not takes_option(config, "in_channels")
    assert takes_option({"type": "unet"}, "in_channels")
    with pytest.raises(ValueError, match="width is missing: 'needs' cannot do without"):
        make_model({"type": "needs"})
    with pytest.raises(ValueError, match="unknown model type 'x'.* by --plugin FILE.py"):
        model_trait({"type": "x"}, "prediction", "eps")


def test_known_classes() -> None:
    model = nn.Module()
    assert known_classes(model) == 0
    model.config = Needs(width=1)
    assert known_classes(model) == 4
    model.num_classes = 0
    assert known_classes(model) == 0


def test_presets(registry: None) -> None:
    register_model("mine")(Mine)
    register_preset("mine_wide", "mine", width=32)
    assert model_config(make_model({"type": "mine_wide"})) == {"type": "mine", "width": 32}
    assert make_model({"type": "mine_wide", "width": 8}).config.width == 8
    with pytest.raises(ValueError, match="model type 'mine_wide' is taken"):
        register_preset("mine_wide", "mine")
    with pytest.raises(ValueError, match="unknown model type 'min'; did you mean 'mine'"):
        register_preset("small", "min")


@dataclass(frozen=True)
class Typed:
    flag: bool = False
    share: float | None = None
    sizes: tuple[int, ...] = ()
    kind: Literal["a", "b"] = "a"
    table: dict[str, Any] | None = None
    pair: tuple[int, float] = (1, 2.0)
    anything: Any = None


@dataclass
class Listed:
    names: list[str]


def test_check_types() -> None:
    typed = Typed(share=2, sizes=[1, 2])  # type: ignore[arg-type]
    check_types(typed)
    assert typed.sizes == (1, 2)
    check_types(Typed(kind="b", table={"x": 1}, pair=(3, 4), anything=object()))
    check_types(Listed(names=["x"]))
    for wrong, wanted in (
        ({"kind": "c"}, "kind = 'c' does not fit; give one of 'a', 'b'"),
        ({"table": 3}, "table = 3 does not fit; give a table of names and values or none"),
        ({"pair": (1,)}, "give a list of 2: a whole number, a number"),
        ({"pair": (1, "x")}, "give a list of 2: a whole number, a number"),
        ({"flag": 1}, "flag = 1 does not fit; give true or false"),
        ({"share": True}, "share = True does not fit; give a number or none"),
        ({"share": "inf"}, "give a number or none"),
        ({"share": float("inf")}, "share = inf does not fit"),
        ({"sizes": [1, True]}, r"sizes = \(1, True\) does not fit; give a list of whole numbers"),
    ):
        with pytest.raises(ValueError, match=wanted):
            check_types(Typed(**wrong))


def test_importing_models_needs_torch_alone() -> None:
    program = (
        "import sys, torch; before = {m.split('.')[0] for m in sys.modules};"
        "import k_diffusion.models; after = {m.split('.')[0] for m in sys.modules};"
        "print(*sorted(after - before - set(sys.stdlib_module_names)))"
    )
    out = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert out.stdout.split() == ["k_diffusion"]
