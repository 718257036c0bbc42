"""Random changes of colour, for a whole batch at once: one affine map of the colours an image.

Grey is the axis on which all channels are equal; an image of one channel lies on it.
Source: Karras et al. 2020, arXiv:2006.06676, appendix B (colour changes as matrices that are
multiplied), with the luma of ITU-R BT.601 as the grey value of a colour.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from k_diffusion.utils.augmentation import Randomness, uniforms
from k_diffusion.utils.maths import is_number

LUMA = (0.299, 0.587, 0.114)
"""What red, green and blue count in a grey value (ITU-R BT.601)."""


@dataclass(frozen=True)
class ColourChange:
    """Random brightness, contrast, saturation and hue, and grey images.

    Each number is drawn evenly from its range, anew for each image; what follows is done in this
    order, and the result cut to [-1, 1].

    Args:
        hue: colours are turned about the grey axis by up to this many turns, either way; to 0.5.
        saturation: a colour's distance from its grey value is multiplied by 1 - this to 1 + this.
        greyscale: share of images that lose their colours, in [0, 1].
        contrast: values are multiplied by 1 - this to 1 + this; mid-grey, 0, stays.
        brightness: a value between -this and this is added, in data units.

    Raises:
        ValueError: an argument out of its range.
    """

    hue: float = 0.0
    saturation: float = 0.0
    greyscale: float = 0.0
    contrast: float = 0.0
    brightness: float = 0.0

    def __post_init__(self) -> None:
        most = {"hue": 0.5, "saturation": 1, "greyscale": 1, "contrast": 1, "brightness": math.inf}
        for name, limit in most.items():
            value = getattr(self, name)
            if not (is_number(value) and 0 <= value <= limit and value < math.inf):
                raise ValueError(f"{name} must lie in [0, {limit}], got {value!r}")

    @property
    def of_colours(self) -> bool:
        """Whether it changes what only an image of several channels has."""
        return any((self.hue, self.saturation, self.greyscale))

    def __call__(self, x: Tensor, randomness: Randomness) -> Tensor:
        """Changed images, of x's shape, dtype and device.

        Args:
            x: floating-point in [-1, 1], shape (B, C, H, W): grey, RGB, or either with alpha, which
                stays.
            randomness: a CPU generator, or B seeds.

        Raises:
            TypeError, ValueError: x is no batch of floating-point images of 1 to 4 channels.
        """
        if not x.is_floating_point():
            raise TypeError(f"images to colour must be floating-point, got {x.dtype}")
        if x.ndim != 4 or not 1 <= x.shape[1] <= 4:
            raise ValueError(
                f"images to colour must have shape (B, C, H, W) with 1 to 4 channels, got "
                f"{tuple(x.shape)}"
            )
        return apply(x, self.draw(randomness, x.shape[0]))

    def draw(self, randomness: Randomness, batch: int) -> Tensor:
        """What happens to each image, float64 on the CPU, shape (B, 5).

        In this order: turns of the hue, factor of the saturation, grey (0 or 1), factor of the
        contrast, what is added.
        """
        u = uniforms(randomness, batch, 5)
        even = 2 * u - 1
        return torch.stack(
            [
                self.hue * even[:, 0],
                1 + self.saturation * even[:, 1],
                (u[:, 2] < self.greyscale).double(),
                1 + self.contrast * even[:, 3],
                self.brightness * even[:, 4],
            ],
            dim=1,
        )


def matrices(drawn: Tensor) -> Tensor:
    """RGB to RGB of what was drawn: a linear map and what is added, (B, 3, 4), from (B, 5)."""
    turned = _about_grey(2 * math.pi * drawn[:, 0])
    grey = torch.tensor(LUMA, dtype=torch.float64).expand(3, 3)
    colourful = (drawn[:, 1] * (1 - drawn[:, 2])).reshape(-1, 1, 1)
    linear = (grey + colourful * (torch.eye(3, dtype=torch.float64) - grey)) @ turned
    linear = drawn[:, 3].reshape(-1, 1, 1) * linear
    return torch.cat([linear, drawn[:, 4].reshape(-1, 1, 1).expand(-1, 3, 1)], dim=2)


def apply(x: Tensor, drawn: Tensor) -> Tensor:
    """Images with their colours changed, shape (B, C, H, W); drawn: from `ColourChange.draw`."""
    own = x.float()
    if x.shape[1] < 3:  # grey, and where there is a second channel, alpha
        factor, added = (
            drawn[:, i].to(x.device, torch.float32).reshape(-1, 1, 1, 1) for i in (3, 4)
        )
        grey = (factor * own[:, :1] + added).clamp(-1, 1)
        return torch.cat([grey, own[:, 1:]], dim=1).to(x.dtype)
    m = matrices(drawn).to(x.device, torch.float32)[..., None, None]
    red, green, blue = own[:, 0:1], own[:, 1:2], own[:, 2:3]
    # Not by a matrix product, which sums in an order that depends on the batch's size.
    rgb = m[:, :, 0] * red + m[:, :, 1] * green + m[:, :, 2] * blue + m[:, :, 3]
    return torch.cat([rgb.clamp(-1, 1), own[:, 3:]], dim=1).to(x.dtype)


def _about_grey(angle: Tensor) -> Tensor:
    """Turns of RGB space about its grey axis, (B, 3, 3), from angles, (B,), by Rodrigues' formula:
    for the axis (1, 1, 1) / sqrt 3 every element is one of three numbers."""
    third = (1 - angle.cos()) / 3
    sideways = angle.sin() / math.sqrt(3)
    same, after, before = angle.cos() + third, third - sideways, third + sideways
    rows = [(same, after, before), (before, same, after), (after, before, same)]
    return torch.stack([torch.stack(row, dim=1) for row in rows], dim=1)
