"""benchmarks/loading.py runs, and all that load see the same pictures."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def loading() -> Any:
    spec = importlib.util.spec_from_file_location("loading", ROOT / "benchmarks" / "loading.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["loading"] = module
    spec.loader.exec_module(module)
    return module


def test_it_prints_a_line_for_each(
    loading: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["loading.py", "--quick"])
    monkeypatch.setattr(loading, "LIMIT", 0.0)  # what is measured here depends on the machine
    assert loading.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[:14].strip() for line in lines[2:]] == ["PNG", "JPEG in a zip", "array"]


def test_all_load_the_same_pictures(loading: Any, tmp_path: Path) -> None:
    loading.lay_out(loading.pictures(None, 12, 16), tmp_path)
    for kind, source, dataset in (
        ("folder", tmp_path / "PNG", loading.Files(tmp_path / "PNG")),
        ("archive", tmp_path / "jpeg.zip", loading.Files(tmp_path / "JPEG")),
        ("arrays", tmp_path / "array.npy", loading.Rows(tmp_path / "array.npy")),
    ):
        more = {} if kind == "arrays" else {"size": 16}
        ours = list(loading.ours(12, 1, source=kind, path=source, **more)())
        theirs = torch.stack([dataset[i] for i in range(12)])
        assert len(ours) == 1
        assert torch.equal(*(images.flatten(1).long().sum(1).sort().values
                             for images in (ours[0], theirs)))  # fmt: skip
