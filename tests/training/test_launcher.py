"""What accelerate's launcher was told, and what the config says."""

from __future__ import annotations

from typing import Any

import pytest

from k_diffusion.training.config import ConfigError
from k_diffusion.training.devices import check_launcher, make_accelerator
from k_diffusion.training.trainer import Trainer

PRECISION, BACKEND = "ACCELERATE_MIXED_PRECISION", "ACCELERATE_DYNAMO_BACKEND"


@pytest.mark.parametrize(
    ("name", "value", "config"),
    [
        (PRECISION, "bf16", {}),
        (PRECISION, "fp16", {"precision": "bf16"}),
        (BACKEND, "INDUCTOR", {}),
        (BACKEND, "AOT_EAGER", {"compile": True}),
    ],
)
def test_what_differs_is_refused_by_name(
    make_run_config: Any, monkeypatch: pytest.MonkeyPatch, name: str, value: str, config: Any
) -> None:
    monkeypatch.setenv(name, value)
    key = "precision" if name == PRECISION else "compile"
    with pytest.raises(ConfigError, match=f"^{key} = .*, but .* {name} = '{value.lower()}'"):
        Trainer(make_run_config(**config))


def test_what_agrees_or_says_nothing_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("no", "bf16"):
        monkeypatch.setenv(PRECISION, value)
        check_launcher("bf16", compile=False)
    for backend in ("NO", "INDUCTOR"):
        monkeypatch.setenv(BACKEND, backend)
        check_launcher("bf16", compile=True)
    # The run compiles by itself, once.
    plugin = make_accelerator("bf16").state.dynamo_plugin
    assert plugin.backend.value == "NO"
