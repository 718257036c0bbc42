"""Images that the command line names, brought to the size and channels of a model."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .problems import UsageError, one_line

if TYPE_CHECKING:
    import torch


def read_picture(option: str, path: str, shape: Sequence[int]) -> tuple[torch.Tensor, str]:
    """One image, scaled until it covers the model's size, then cropped, as a folder's in training.

    Args:
        option: that named it, for the message.
        path: the file.
        shape: (channels, height, width).

    Returns:
        Floats in [-1, 1], shape (1, channels, height, width), and the file's sha256.

    Raises:
        UsageError: it cannot be read.
    """
    import torch

    from k_diffusion.training.pictures import read_image
    from k_diffusion.utils.images import to_float

    channels, height, width = shape
    if channels == 2:
        raise UsageError(f"--{option} {path}: a model of grey with alpha begins from no image")
    try:
        pixels = torch.from_numpy(read_image(Path(path), (height, width), channels).copy())
        digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except Exception as error:  # a decoder may raise anything on a broken file
        said = f"--{option} {path} is no image that can be read ({one_line(error)})"
        raise UsageError(said) from None
    return to_float(pixels.permute(2, 0, 1)[None]), digest


def read_mask(option: str, path: str, shape: Sequence[int]) -> tuple[torch.Tensor, str]:
    """A mask: 1 where the picture is white, 0 where it is black; shape (1, 1, height, width)."""
    picture, digest = read_picture(option, path, (1, *shape[1:]))
    return (picture + 1) / 2, digest


def open_picture(option: str, path: str) -> tuple[Any, str]:
    """An image as it is, a PIL image, and the file's sha256.

    Raises:
        UsageError: it cannot be read.
    """
    from PIL import Image

    try:
        data = Path(path).read_bytes()
        picture = Image.open(io.BytesIO(data))
        picture.load()
    except Exception as error:  # a decoder may raise anything on a broken file
        said = f"--{option} {path} is no image that can be read ({one_line(error)})"
        raise UsageError(said) from None
    return picture, hashlib.sha256(data).hexdigest()
