"""Pillow's images and tensors: every pixel value there and back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from k_diffusion import utils

ALL = np.arange(256, dtype=np.uint8)


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA"])
def test_there_and_back(mode: str) -> None:
    channels = len(mode)
    pixels = np.stack([np.roll(ALL, 7 * c) for c in range(channels)], -1).reshape(8, 32, channels)
    picture = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
    assert picture.mode == mode
    tensor = utils.from_pil_image(picture)
    assert tensor.shape == (channels, 8, 32)
    assert tensor.dtype == torch.float32
    expected = torch.from_numpy(pixels).permute(2, 0, 1).double() / 127.5 - 1
    assert (tensor - expected).abs().max() < 2e-7
    # Values are cut off, so a hair more than what was read gives the same pixel.
    back = utils.to_pil_image(tensor + 1e-4)
    assert back.mode == mode
    assert np.array_equal(np.asarray(back), np.asarray(picture))


def test_pixels_are_cut_off_not_rounded() -> None:
    x = torch.tensor([-3.0, -1.0, -0.9999, 0.0, 0.999, 1.0, 2.0, torch.inf, -torch.inf])
    got = np.asarray(utils.to_pil_image(x.reshape(1, 1, -1)))
    assert got.tolist() == [[0, 0, 0, 127, 254, 255, 255, 255, 0]]


def test_shapes() -> None:
    x = torch.rand(3, 4, 5) * 2 - 1
    expected = np.asarray(utils.to_pil_image(x))
    assert expected.shape == (4, 5, 3)
    assert np.array_equal(np.asarray(utils.to_pil_image(x[None])), expected)
    assert np.array_equal(np.asarray(utils.to_pil_image(x[0])), expected[..., 0])
    assert np.array_equal(np.asarray(utils.to_pil_image(x[:1])), expected[..., 0])
    assert utils.to_pil_image(x[0, :1]).size == (5, 1)
    for bad in (torch.zeros(5), torch.zeros(5, 4, 4), torch.zeros(0, 4, 4)):
        with pytest.raises(ValueError, match=r"an image has \(C, H, W\)"):
            utils.to_pil_image(bad)
    with pytest.raises(ValueError, match=r"makes one image, but x holds 2: give x\[i\]"):
        utils.to_pil_image(torch.zeros(2, 3, 4, 4))


def test_low_precision_and_gradients() -> None:
    x = torch.linspace(-1, 1, 64).reshape(1, 8, 8).bfloat16()
    expected = np.asarray(utils.to_pil_image(x.float()))
    assert np.array_equal(np.asarray(utils.to_pil_image(x)), expected)
    assert np.array_equal(np.asarray(utils.to_pil_image(x.float().requires_grad_())), expected)


def test_no_pixel_for_what_is_not_a_number() -> None:
    with pytest.raises(ValueError, match="not a number"):
        utils.to_pil_image(torch.tensor([[[0.0, torch.nan]]]))


def test_other_modes_and_arrays() -> None:
    black_white = Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1")
    assert utils.from_pil_image(black_white).tolist() == [[[-1.0, 1.0]]]
    deep = Image.fromarray(np.array([[3, 40000]], np.uint16))
    assert utils.from_pil_image(deep).tolist() == [[[5, 79999]]]
    real = Image.fromarray(np.array([[0.25, 2.0]], np.float32))
    assert utils.from_pil_image(real).tolist() == [[[-0.5, 3.0]]]
    array = np.array([[[0, 255, 51]]], np.uint8)
    got = utils.from_pil_image(array)
    assert got.shape == (3, 1, 1)
    assert (got.flatten() - torch.tensor([-1.0, 1.0, -0.6])).abs().max() < 1e-6
    assert utils.from_pil_image(array[0]).shape == (1, 1, 3)
    with pytest.raises(ValueError, match=r"this array has \(3,\)"):
        utils.from_pil_image(array[0, 0])


def test_hugging_face_helper() -> None:
    grey = Image.fromarray(np.array([[7]], np.uint8))
    examples = {"image": [grey, grey], "label": [0, 1]}
    got = utils.hf_datasets_augs_helper(examples, lambda image: image.mode, "image")
    assert got == {"image": ["RGB", "RGB"]}
    assert utils.hf_datasets_augs_helper(examples, lambda i: i.mode, "image", mode="L") == {
        "image": ["L", "L"]
    }
