"""Models by name; and what importing them brings in."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
from torch import nn

from k_diffusion.models import (
    MODELS,
    PRESETS,
    UNet,
    make_model,
    model_config,
    register_model,
    register_preset,
)
from k_diffusion.models.registry import check_types, known_fields


@pytest.fixture
def registry() -> Iterator[None]:
    before = dict(MODELS)
    yield
    MODELS.clear()
    MODELS.update(before)


@pytest.fixture
def presets() -> Iterator[None]:
    before = dict(PRESETS)
    yield
    PRESETS.clear()
    PRESETS.update(before)


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


def test_presets_are_configs_whose_options_are_overridden(presets: None) -> None:
    register_preset("unet_odd", "unet", channels=8, head_channels=4, blocks=1)
    model = make_model({"type": "unet_odd", "blocks": 2})
    assert isinstance(model, UNet)
    assert (model.config.channels, model.config.head_channels, model.config.blocks) == (8, 4, 2)
    assert make_model(model_config(model)).config == model.config
    assert PRESETS["unet_odd"]["blocks"] == 1
    with pytest.raises(ValueError, match="blocs = 3 is no option of this model; did you mean blo"):
        make_model({"type": "unet_odd", "blocs": 3})
    for name in ("unet", "unet_odd"):
        with pytest.raises(ValueError, match=f"model type '{name}' is taken"):
            register_preset(name, "unet")
    with pytest.raises(ValueError, match="unknown model type 'unett'; did you mean 'unet'"):
        register_preset("other", "unett")
    with pytest.raises(ValueError, match="unknown model type 'unet_od'; did you mean 'unet_odd'"):
        make_model({"type": "unet_od"})


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


def test_model_config_refuses_the_unregistered() -> None:
    with pytest.raises(ValueError, match="Mine has no type: register it"):
        model_config(Mine())


@dataclass(frozen=True)
class Typed:
    flag: bool = False
    share: float | None = None
    sizes: tuple[int, ...] = ()


def test_check_types() -> None:
    typed = Typed(share=2, sizes=[1, 2])  # type: ignore[arg-type]
    check_types(typed)
    assert typed.sizes == (1, 2)
    for wrong, wanted in (
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
