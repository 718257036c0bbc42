"""More broken data than allowed stops a run, by name; less is skipped, counted and named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from k_diffusion.training import Trainer, run_training
from k_diffusion.training.broken import BrokenDataError, check_bad_share
from k_diffusion.training.folder import Folder
from k_diffusion.training.opening import opening_lines


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """16 good ones, one that the scan finds broken, three that their decoding does."""
    root = tmp_path / "pictures"
    root.mkdir()
    for i in range(16):
        Image.new("L", (8, 8), 10 * i).save(root / f"{i:02}.png")
    (root / "scan.png").write_bytes(b"no picture")
    noise = torch.randint(256, (64, 64), dtype=torch.uint8, generator=torch.Generator())
    Image.fromarray(noise.numpy()).save(root / "whole.jpg")
    content = (root / "whole.jpg").read_bytes()
    (root / "whole.jpg").unlink()
    for i in range(3):
        (root / f"cut{i}.jpg").write_bytes(content[: len(content) // 2])
    return root


def config(make_run_config: Any, root: Path, **changes: Any) -> Any:
    model = {"type": "tiny", "prediction": "edm", "time_convention": "log_sigma"}
    data = {"source": "folder", "path": str(root), "size": 8, "channels": 1}
    return make_run_config(
        **{"model": model, "data": data, "batch_size": 8, "total_images": 80, **changes}
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_stops_by_name_once_it_is_too_much(
    pictures: Path, make_run_config: Any, workers: int
) -> None:
    settings = config(make_run_config, pictures, max_bad_share=0.12, workers=workers)
    lines: list[str] = []
    words = r"4 of 20 images are broken, .* max_bad_share = 0\.12 allows: .*scan\.png \(cannot"
    with pytest.raises(BrokenDataError, match=words) as caught:
        run_training(settings, progress=False, say=lines.append)
    assert "\n" not in str(caught.value)
    assert caught.value.everywhere
    assert sum("ing broken image" in line for line in lines) == 4


def test_a_run_with_as_many_as_allowed_names_them_in_its_report(
    pictures: Path, make_run_config: Any
) -> None:
    settings = config(make_run_config, pictures, max_bad_share=0.2)
    result = run_training(settings, progress=False, say=lambda line: None)
    names = {"scan.png", "cut0.jpg", "cut1.jpg", "cut2.jpg"}
    assert {Path(file).name for file in result.bad_files} == names
    end = json.loads(result.metrics.read_text().splitlines()[-1])
    assert {Path(file).name for file in end["bad_files"]} == names
    assert end["bad_files"] == result.bad_files


def test_it_is_seen_before_the_first_step(pictures: Path, make_run_config: Any) -> None:
    with pytest.raises(BrokenDataError, match="1 of 20 images are broken"):
        Trainer(config(make_run_config, pictures, max_bad_share=0.04))
    trainer = Trainer(config(make_run_config, pictures, max_bad_share=0.05))
    source = trainer.source
    assert any("1 of 20 images are broken and left out" in line
               for line in opening_lines(trainer, None, looked=False))  # fmt: skip
    check_bad_share(source, 0.05)
    with pytest.raises(BrokenDataError):
        check_bad_share(source, 0.0499)


def test_more_than_three_are_counted(pictures: Path) -> None:
    source = Folder(pictures, 8)
    source.report(source.batch(torch.arange(len(source))).bad)
    with pytest.raises(BrokenDataError, match=r"4 of 20 .*, 1 more; mend them"):
        check_bad_share(source, 0.1)
