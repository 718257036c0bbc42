"""docs/augmentation.md: its keys, masks and figures are all there are, and its code makes its
picture."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch

from k_diffusion.training.augmentation_config import AugmentationConfig
from k_diffusion.utils.augmentation import MASKS
from k_diffusion.utils.images import load_png

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/augmentation.md").read_text()


def test_the_section_has_every_key_in_the_order_of_what_is_done() -> None:
    first, second = re.findall(r"```toml\n(.*?)```", TEXT, re.DOTALL)
    section = tomllib.loads(first)["augmentation"]
    assert list(AugmentationConfig(**section).chosen) == list(section)
    assert [key for key in AugmentationConfig.model_fields if key != "leaky"] == list(section)
    assert tomllib.loads(second)["conditioner"]["mask"] in MASKS


def test_every_mask_is_named() -> None:
    rows = TEXT.partition("| kind | hides |")[2].partition("\n\n")[0]
    assert re.findall(r"^\| `(\w+)` \|", rows, re.MULTILINE) == list(MASKS)


def test_the_code_makes_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    made: dict[str, torch.Tensor] = {}
    exec(compile(code, "docs/augmentation.md", "exec"), made)
    new, _ = load_png(tmp_path / "augmentation.png")
    kept, _ = load_png(ROOT / "docs/augmentation.png")
    assert new.shape == kept.shape
    # Another torch may round otherwise, and another Pillow draw words otherwise.
    pictures = (new.float() - kept.float())[:, :, 40:].abs()
    assert (pictures > 3).float().mean() < 0.01
    assert made["told"].shape == (12, 9)


def test_the_figures_are_those_measured() -> None:
    rows = json.loads((ROOT / "benchmarks/results/augmentation.json").read_text())["rows"]
    table = TEXT.partition("## Speed")[2]
    for name in rows[0]["images_per_second"]:
        speeds = [int(float(f"{row['images_per_second'][name]:.3g}")) for row in rows]
        assert f"| {name} | " + " | ".join(f"{speed:,}" for speed in speeds) + " |" in table
    assert rows[0]["side"] == 32
    for chance in rows[0]["ratios"]:
        ratios = " | ".join(f"{row['ratios'][chance]:.1f}" for row in rows)
        assert f"| ours / established, {chance} | {ratios} |" in table
    assert rows[0]["ratios"]["0.12"] >= 10
