"""Pictures of 16 bits a channel: none of them is lost, in any format, mode, size or turn."""

from __future__ import annotations

import importlib.util
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from k_diffusion.training import Folder
from k_diffusion.training.decoding import open_picture, upright_size

spec = importlib.util.spec_from_file_location(
    "unusual_pictures", Path(__file__).with_name("unusual_pictures.py")
)
assert spec is not None
assert spec.loader is not None
made = importlib.util.module_from_spec(spec)
spec.loader.exec_module(made)
SIDE, chunk, deep, png, tiff16 = made.SIDE, made.chunk, made.deep, made.png, made.tiff16


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
def test_16_bits_of_tiff(tmp_path: Path, order: str, compressed: bool) -> None:
    values = deep(3)
    (tmp_path / "x.tif").write_bytes(tiff16(values, order, compressed))
    image = Folder(tmp_path, SIDE, bits=16)[0][0]
    wanted = torch.from_numpy(values.astype(np.float32) / 32767.5 - 1).permute(2, 0, 1)
    assert (image - wanted).abs().max() < 1e-6


@pytest.mark.parametrize("stored", [1, 2, 3, 4])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_16_bits_of_png(tmp_path: Path, stored: int, channels: int) -> None:
    values = deep(stored)
    (tmp_path / "x.png").write_bytes(png(values))
    image = Folder(tmp_path, SIDE, channels=channels, bits=16)[0][0]
    assert image.dtype == torch.float32
    colour = values[..., : 1 if stored < 3 else 3].astype(float) / 65535
    alpha = values[..., -1:] / 65535 if stored in (2, 4) else np.ones_like(colour[..., :1])
    if channels != 4:
        colour = colour * alpha + 1 - alpha
    if channels == 1 and stored > 2:
        colour = (colour * (0.299, 0.587, 0.114)).sum(-1, keepdims=True)
    elif channels > 1 and stored < 3:
        colour = np.concatenate([colour] * 3, -1)
    wanted = np.concatenate([colour, alpha], -1) if channels == 4 else colour
    assert np.abs(image.permute(1, 2, 0).numpy() - (2 * wanted - 1)).max() < 1.6e-5  # half a level


def test_16_bits_with_a_transparent_colour(tmp_path: Path) -> None:
    for channels in (1, 3):
        values = deep(channels)
        if channels == 3:
            values[0, 0, 0] = values[2, 5, 0]  # of the colour one channel alone
        key = struct.pack(f">{channels}H", *values[2, 5].tolist())
        (tmp_path / f"{channels}.png").write_bytes(png(values, extra=chunk(b"tRNS", key)))
    source = Folder(tmp_path, SIDE, bits=16, channels=4)
    for i, channels in enumerate((1, 3)):
        alpha = source[i][0][3]
        assert alpha[2, 5] == -1
        assert int((alpha == 1).sum()) == SIDE * SIDE - 1, channels


def test_8_bit_files_are_spread_over_16(tmp_path: Path) -> None:
    for name, make in made.READ.items():
        (tmp_path / name).write_bytes(make()[0])
    shallow, wide = Folder(tmp_path, SIDE), Folder(tmp_path, SIDE, bits=16)
    assert wide.moments[0] == pytest.approx(shallow.moments[0], abs=0.01)
    for name in ("mode-RGB.png", "mode-1.png", "exif-6.png", "palette.png", "mode-L.bmp"):
        index = [Path(f).name for f in shallow.files].index(name)
        exact = shallow[index][0].float() / 127.5 - 1
        assert (wide[index][0] - exact).abs().max() < 1e-6, name


def test_16_bits_are_turned_and_scaled_like_8(tmp_path: Path) -> None:
    y, x = np.mgrid[:40, :60]
    smooth = np.stack([y * 1500, x * 1000, (x + y) * 600], -1).astype(np.uint16)
    exif = Image.Exif()
    for orientation in range(1, 9):
        exif[0x0112] = orientation
        block = chunk(b"eXIf", exif.tobytes()[6:])
        (tmp_path / f"{orientation}.png").write_bytes(png(smooth, extra=block))
    options: dict[str, Any] = {"crop": "random", "flip": True}
    shallow = Folder(tmp_path, (9, 12), **options)
    wide = Folder(tmp_path, (9, 12), bits=16, **options)
    indices, seeds = torch.arange(8).repeat(3), list(range(24))
    eight = shallow.batch(indices, seeds).images.float() / 127.5 - 1
    sixteen = wide.batch(indices, seeds).images
    assert (eight - sixteen).abs().max() < 0.03
    assert sixteen.unique().numel() > 256 > eight.unique().numel()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_sizes_are_told_upright_before_pixels_are_read(tmp_path: Path, kind: str) -> None:
    exif = Image.Exif()
    for orientation in range(1, 9):
        exif[0x0112] = orientation
        path = tmp_path / f"{orientation}"
        Image.new("RGB", (40, 24)).save(path, kind, exif=exif)
        with open_picture(path, 10**6) as picture:
            told = upright_size(picture)
        assert told == ((24, 40) if orientation < 5 else (40, 24)), orientation


@pytest.mark.parametrize("value", [-1, 65_536])
@pytest.mark.parametrize("bits", [8, 16])
def test_grey_beyond_16_bits_is_skipped(tmp_path: Path, bits: int, value: int) -> None:
    grey = np.full((SIDE, SIDE), 5, np.int32)
    Image.fromarray(grey).save(tmp_path / "a.tif")
    grey[1, 2] = value
    Image.fromarray(grey).save(tmp_path / "b.tif")
    source = Folder(tmp_path, SIDE, bits=bits)
    batch = source.batch(torch.tensor([1]))
    assert batch.indices.tolist() == [0]
    assert batch.bad[0][1].startswith(f"grey values from {min(5, value)} to {max(5, value)} have")


def test_sharp_edges_do_not_wrap_around(tmp_path: Path) -> None:
    """Bicubic scaling goes beyond black and white on both sides of one."""
    edge = np.zeros((40, 40, 1), np.uint16)
    edge[:, 20:] = 65535
    (tmp_path / "x.png").write_bytes(png(edge))
    for size in (15, 90):
        eight = Folder(tmp_path, size, channels=1)[0][0].float() / 127.5 - 1
        assert (Folder(tmp_path, size, channels=1, bits=16)[0][0] - eight).abs().max() < 0.02
