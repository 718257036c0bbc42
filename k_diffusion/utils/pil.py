"""Pillow's images to tensors in [-1, 1] and back, under their established names.

Needs Pillow and numpy alone; they are imported when a function is called. Elsewhere the library
rounds to pixels (`utils.images.to_uint8`); here they are cut off, as they always were.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def from_pil_image(x: Any) -> Tensor:
    """An image as a tensor, shape (C, H, W), with 0 to 255 brought to [-1, 1].

    Pixels of more than 8 bits (modes I, I;16 and F) have no agreed range: v becomes 2 v - 1.

    Args:
        x: a Pillow image, or an array of shape (H, W) or (H, W, C).

    Raises:
        ValueError: an array of another number of dimensions.
    """
    import numpy as np

    mode = getattr(x, "mode", "")
    pixels = np.array(x)  # a copy: what Pillow lends cannot be written to
    if pixels.ndim not in (2, 3):
        raise ValueError(
            f"an image has shape (H, W) or (H, W, C), but this array has {pixels.shape}"
        )
    if mode == "1":
        pixels = pixels.astype(np.uint8) * 255
    elif mode.startswith("I"):
        pixels = pixels.astype(np.int32)
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    image = torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
    if image.dtype == torch.uint8:
        image = image.to(torch.get_default_dtype()) / 255
    return image * 2 - 1


def to_pil_image(x: Tensor) -> Any:
    """A tensor as a Pillow image of mode L, LA, RGB or RGBA; what lies outside [-1, 1] is clipped.

    Args:
        x: values in [-1, 1], shape (C, H, W), (1, C, H, W) or (H, W), C from 1 to 4.

    Raises:
        ValueError: another shape, a batch of more than one, or a value that is not a number.
    """
    from PIL import Image

    if x.ndim == 4:
        if x.shape[0] != 1:
            raise ValueError(f"to_pil_image makes one image, but x holds {x.shape[0]}: give x[i]")
        x = x[0]
    if x.ndim == 3 and x.shape[0] == 1:
        x = x[0]
    if x.ndim not in (2, 3) or (x.ndim == 3 and not 1 <= x.shape[0] <= 4):
        raise ValueError(
            f"x has shape {tuple(x.shape)}; an image has (C, H, W), with C from 1 to 4, or (H, W)"
        )
    x = x.cpu()
    if x.dtype in (torch.float16, torch.bfloat16):
        x = x.float()  # their steps near 1 are wider than a pixel's
    if bool(x.isnan().any()):
        raise ValueError(
            "x holds values that are not a number: look at the model or the sampler that made them"
        )
    pixels = ((x.clamp(-1, 1) + 1) / 2).mul(255).to(torch.uint8)
    if pixels.ndim == 3:
        pixels = pixels.permute(1, 2, 0)
    return Image.fromarray(pixels.contiguous().numpy())


def hf_datasets_augs_helper(
    examples: Mapping[str, Any],
    transform: Callable[[Any], Any],
    image_key: str,
    mode: str = "RGB",
) -> dict[str, list[Any]]:
    """A transform for `datasets.Dataset.set_transform`, once all but `examples` are bound.

    Args:
        examples: columns of a batch.
        transform: applied to each image.
        image_key: the column of Pillow images, the only one in the result.
        mode: Pillow's mode, to which each is converted first.
    """

    def prepared(image: Any) -> Any:
        return transform(image.convert(mode))

    return {image_key: list(map(prepared, examples[image_key]))}
