"""`k-diffusion compare`: figures, picture and page of methods side by side."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from k_diffusion.cli import main
from k_diffusion.cli.sheet import (
    COLOURS,
    Line,
    _strokes,
    curve,
    curve_picture,
    drawing,
    page,
    picture,
)
from k_diffusion.evaluation.sheet import compare_samplers
from k_diffusion.utils.images import load_png, to_uint8


def gaussian(x: torch.Tensor, sigma: torch.Tensor, **condition: Any) -> torch.Tensor:
    return x * (0.25 / (0.25 + sigma**2)).reshape(-1, 1, 1, 1)


@pytest.fixture(scope="module")
def sheet() -> Any:
    return compare_samplers(
        gaussian, (1, 4, 4), [3, 4], samplers=["euler", "heun", "euler_ancestral"],
        schedulers=["karras", "exponential"], steps=[5, 10, 40], reference_steps=200,
    )  # fmt: skip


def test_distances_fall_as_the_order_says(sheet: Any) -> None:
    by = {(c.sampler, c.scheduler, c.steps): c for c in sheet.cells}
    assert len(by) == 18
    for scheduler in ("karras", "exponential"):
        for sampler in ("euler", "heun", "euler_ancestral"):
            assert by[sampler, scheduler, 40].distance < by[sampler, scheduler, 5].distance
    ratio = by["euler", "karras", 10].distance / by["euler", "karras", 40].distance
    assert 3 < ratio < 6  # of order 1
    assert by["heun", "karras", 40].distance < by["euler", "karras", 40].distance / 3
    assert [by["heun", "karras", n].calls for n in (5, 10, 40)] == [9, 19, 79]
    assert sheet.references["euler"] is sheet.references["heun"]
    assert not torch.equal(sheet.references["euler"], sheet.references["euler_ancestral"])


def test_the_reference_itself_is_at_no_distance() -> None:
    same = compare_samplers(
        gaussian, (1, 2, 2), [0], samplers=["heun", "dpmpp_2m_sde"], schedulers=["karras"],
        steps=[30], reference_steps=30,
    )  # fmt: skip
    assert [c.distance for c in same.cells] == [0.0, 0.0]
    assert "NaN" not in curve(same)


def test_what_cannot_be_compared_is_refused_before_anything_is_drawn() -> None:
    calls = []

    def model(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return gaussian(x, sigma)

    def compare(*samplers: str, schedulers: Any = ("karras",), steps: Any = (2,)) -> None:
        compare_samplers(
            model, (1, 2, 2), [0], samplers=samplers, schedulers=schedulers, steps=steps
        )

    for name in ("euler_cfg_pp", "dpmpp_2m_cfg_pp"):
        with pytest.raises(ValueError, match=f"{name} goes by two estimates"):
            compare("euler", name)
    with pytest.raises(ValueError, match="pure noise"):  # of a variance-exploding model
        compare("euler", schedulers=("karras", "zero_terminal_snr"))
    with pytest.raises(ValueError, match="steps"):
        compare("euler", steps=(2, 0))
    assert calls == []


def test_noise_on_no_path_is_told_of() -> None:
    sheet = compare_samplers(
        gaussian, (1, 2, 2), [0], samplers=["euler", "ddpm", "restart"], schedulers=["karras"],
        steps=[8], reference_steps=9,
    )  # fmt: skip
    assert sheet.off_path == ("restart",)
    text = page(sheet, picture(sheet), {})
    assert "That of restart lies on no path" in text
    alone = dataclasses.replace(sheet, off_path=())
    assert "on no path" not in page(alone, picture(alone), {})


def test_many_lines_are_told_apart(sheet: Any) -> None:
    """A colour for each; where there are too few, one a sampler, and dashes for the schedules."""

    def looks(samplers: int, schedulers: int) -> list[tuple[str, Any]]:
        cells = [
            dataclasses.replace(
                sheet.cells[0], sampler=f"s{i}", scheduler=f"t{j}", steps=n, calls=n
            )
            for i in range(samplers)
            for j in range(schedulers)
            for n in (4, 9)
        ]
        many = dataclasses.replace(sheet, cells=tuple(cells))
        lines = [item for item in drawing(many) if getattr(item, "dots", False)]
        assert curve(many).count("stroke-dasharray") == 2 * sum(bool(x.dash) for x in lines)
        curve_picture(many)
        return [(line.colour, line.dash) for line in lines]

    for samplers, schedulers in ((1, 4), (5, 2), (4, 3), (12, 3)):
        found = looks(samplers, schedulers)
        assert len(set(found)) == samplers * schedulers
    assert len({colour for colour, _ in looks(5, 2)}) == 10
    assert [colour for colour, _ in looks(4, 3)] == [c for c in COLOURS[:4] for _ in range(3)]


def test_dashes_cover_their_share_of_a_line() -> None:
    line = Line(((0.0, 0.0), (30.0, 40.0), (30.0, 120.0)), "#000000", dash=(7, 4))
    strokes = _strokes(line)
    long = sum(math.dist(*stroke) for stroke in strokes)
    assert abs(long - (130 // 11 * 7 + min(130 % 11, 7))) < 1e-9
    assert strokes[0][0] == (0.0, 0.0)
    assert _strokes(dataclasses.replace(line, dash=None)) == [list(line.points)]


def test_samples_lie_in_a_block_for_each_method(sheet: Any) -> None:
    """A column a number of steps and the reference, a row a seed; blocks side by side."""
    one = dataclasses.replace(sheet, cells=sheet.cells[:3])
    block = picture(one)
    assert picture(sheet).shape[2] == 3 * block.shape[2] + 2 * 16
    assert abs(picture(sheet).shape[1] - (2 * block.shape[1] + 16)) < 10  # names' tails
    samples = torch.stack([*(c.samples for c in one.cells), one.references["euler"]], 1)
    pixels = to_uint8(samples).flatten(0, 1)  # seed by seed
    found = 0
    for k, pixel in enumerate(pixels):
        large = pixel.repeat_interleave(16, -2).repeat_interleave(16, -1)[0]
        row, column = divmod(k, 4)
        y = block.shape[1] - 66 * (2 - row)
        x = block.shape[2] - 66 * (4 - column)
        found += torch.equal(block[0, y : y + 64, x : x + 64], large)
    assert found == 8


class Reader(HTMLParser):
    """Takes a page apart."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [v or "" for k, v in attrs if k in ("src", "href")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_needs_no_other_file(sheet: Any) -> None:
    text = page(sheet, picture(sheet), {"seeds": "3 & 4", "of": "<script>alert(1)</script>"})
    reader = Reader()
    reader.feed(text)
    assert reader.open == []
    assert "<script" not in text
    (link,) = reader.links
    head, _, data = link.partition(",")
    assert head == "data:image/png;base64"
    shown = Image.open(io.BytesIO(base64.b64decode(data)))
    assert (shown.height, shown.width) == tuple(picture(sheet).shape[1:])
    for cell in sheet.cells:
        assert f"{cell.distance:.4f} ({cell.calls} calls)" in text
    assert text.count("<circle") == 18


def test_the_curve_lies_within_its_frame(sheet: Any) -> None:
    numbers = [p for item in drawing(sheet) if hasattr(item, "points") for p in item.points]
    assert all(0 <= x <= 840 and 0 <= y <= 320 for x, y in numbers)
    image = curve_picture(sheet)
    assert image.dtype == torch.uint8
    assert {tuple(c.tolist()) for c in image.flatten(1).T.unique(dim=0)} >= {
        (255, 255, 255), (0x1F, 0x77, 0xB4)
    }  # fmt: skip


def test_of_a_checkpoint(trained: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "sheet"
    words = ["compare", "--checkpoint", str(trained), "--samplers", "euler,dpmpp_2m"]
    words += ["--schedules", "karras", "--steps", "2,4", "-n", "2", "--out", str(out)]
    assert main(words) == 0
    figures = json.loads((out / "sheet.json").read_text())
    assert [(c["sampler"], c["steps"]) for c in figures["cells"]] == [
        ("euler", 2), ("euler", 4), ("dpmpp_2m", 2), ("dpmpp_2m", 4)
    ]  # fmt: skip
    image, text = load_png(out / "sheet.png")
    assert image.shape[0] == 3
    assert text["command"].startswith("k-diffusion compare --checkpoint")
    assert re.search(r"dpmpp_2m, karras +4 steps +4 calls +distance \d", capsys.readouterr().out)
    assert main(words) == 2
    assert "holds a sheet already; give --overwrite" in capsys.readouterr().err
    assert main([*words, "--overwrite"]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--samplers", "eulerr"], "did you mean 'euler'"),
        (
            ["--samplers", "euler,euler_cfg_pp"],
            "euler_cfg_pp goes by two estimates",
        ),
        (["--schedules", "karas"], "did you mean 'karras'"),
        (["--steps", "5,0"], "--steps holds 0; give numbers of at least 1"),
        (["--steps", "five"], "'five' is not a whole number"),
        (["--samplers", ","], "--samplers names nothing to compare"),
        (["-n", "0"], "--number is 0"),
        (["--seed", "-1"], "--seed is -1"),
        (["--class-label", "99"], "--class-label 99 does not exist"),
    ],
)
def test_wrong_input_is_one_line(
    words: list[str], message: str, trained: Path, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "sheet"
    assert main(["compare", "--checkpoint", str(trained), "--out", str(out), *words]) == 2
    said = capsys.readouterr().err.strip()
    assert message in said
    assert "\n" not in said
    assert not out.exists()
