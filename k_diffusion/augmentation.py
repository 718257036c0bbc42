"""The established module `augmentation`: the pipeline of Karras et al., one image at a time.

What happens to an image, its matrix and its nine numbers are those of `utils.warp.Warp`, which does
whole batches and is what `k-diffusion train` uses. What stays as it was here: the order in which
numbers are drawn from torch's global generator, and how pixels are interpolated.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from k_diffusion.models.augment_wrapper import KarrasAugmentWrapper
from k_diffusion.utils.augmentation import mirrored
from k_diffusion.utils.pil import from_pil_image
from k_diffusion.utils.warp import Warp, condition

__all__ = [
    "KarrasAugmentWrapper",
    "KarrasAugmentationPipeline",
    "rotate2d",
    "scale2d",
    "translate2d",
]


def translate2d(tx: float | Tensor, ty: float | Tensor) -> Tensor:
    """A translation of the plane, (3, 3), float32; the last row and column stand for 1."""
    return torch.tensor([[1.0, 0.0, tx], [0.0, 1.0, ty], [0.0, 0.0, 1.0]])


def scale2d(sx: float | Tensor, sy: float | Tensor) -> Tensor:
    """A scaling of the plane, see `translate2d`."""
    return torch.tensor([[sx, 0.0, 0.0], [0.0, sy, 0.0], [0.0, 0.0, 1.0]])


def rotate2d(theta: Tensor) -> Tensor:
    """A rotation of the plane by an angle in radians, see `translate2d`."""
    cos, sin = theta.cos(), theta.sin()
    return torch.tensor([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]])


class KarrasAugmentationPipeline:
    """Random changes of a Pillow image, and what the network is to be told of them.

    Source: Karras et al. 2022, arXiv:2206.00364, appendix F.2 and table 6.

    Args:
        a_prob: probability of each change but the mirroring left to right, which has 1/2.
        a_scale: images are enlarged by a_scale^n, n a unit Gaussian number.
        a_aniso: images are stretched by a_aniso^n along an even angle.
        a_trans: images are moved by n times this share of their sides.
        disable_all: numbers are drawn, but the image stays as it is and the nine numbers are 0.

    Raises:
        ValueError: one of them is out of its range.
    """

    def __init__(
        self,
        a_prob: float = 0.12,
        a_scale: float = 2**0.2,
        a_aniso: float = 2**0.2,
        a_trans: float = 1 / 8,
        disable_all: bool = False,
    ) -> None:
        self.a_prob, self.a_scale, self.a_aniso, self.a_trans = a_prob, a_scale, a_aniso, a_trans
        self.disable_all = disable_all
        Warp(a_prob, a_scale, a_aniso, a_trans)  # which looks at them

    def __call__(self, image: Any) -> tuple[Tensor, Tensor, Tensor]:
        """The changed image, the image as it was, and nine numbers.

        Args:
            image: a Pillow image.

        Returns:
            Both images in [-1, 1] (the changed one a little beyond, where interpolation overshoots)
            of shape (C, H, W), and the condition, shape (9,); float32.
        """
        original = from_pil_image(image).float()
        drawn = self._draw()
        if self.disable_all:
            return original.clone(), original, torch.zeros(9)
        told = condition(drawn)[0].float()
        if not drawn[0, 2:].any():  # at most mirrored, for which nothing is interpolated
            axes = [axis for axis, chosen in ((2, drawn[0, 0]), (1, drawn[0, 1])) if chosen]
            return original.flip(axes), original, told
        warp = Warp(self.a_prob, self.a_scale, self.a_aniso, self.a_trans)
        # Height and width change places: with the established pipeline, an image moves sideways by
        # shares of its height, and downwards by shares of its width.
        height, width = original.shape[1:]
        back = warp.matrices(drawn, width, height)[0]
        return _interpolated(original, back), original, told

    def _draw(self) -> Tensor:
        """As `Warp.draw` gives it, for one image, from the global generator, number by number."""

        def happens() -> bool:
            return float(torch.rand([])) < self.a_prob

        def angle() -> float:
            return float(torch.rand([]) * 2 * math.pi - math.pi)

        def normal() -> float:
            return float(torch.randn([]))

        def half() -> int:
            return int(torch.randint(2, []))

        # Each is drawn whether or not it happens. Python goes through a list from left to right.
        sideways = [float(half())]
        upright = [happens(), half()]
        enlarged = [happens(), normal()]
        turned = [happens(), angle()]
        stretched = [happens(), angle(), normal()]
        moved = [happens(), normal(), normal()]
        changes = (upright, enlarged, turned, stretched, moved)
        chosen = [do * number for do, *numbers in changes for number in numbers]
        return torch.tensor([sideways + chosen], dtype=torch.float64)


def _interpolated(image: Tensor, back: Tensor) -> Tensor:
    """An image by cubic interpolation with Catmull-Rom's kernel (Keys 1981, a = -1/2), continued
    beyond its edges by reflection about the outermost pixels.

    `utils.warp` has grid_sample's kernel, a = -3/4, and mirrors at the edges of these pixels.

    Args:
        image: shape (C, H, W).
        back: where pixels of the result come from, in pixels from the centre, (2, 3), float64.
    """
    height, width = image.shape[1:]
    # By numpy, whose small operations cost less than torch's.
    m = back.numpy()
    x = np.arange(width) - (width - 1) / 2
    y = (np.arange(height) - (height - 1) / 2)[:, None]
    columns, across = _taps(m[0, 0] * x + m[0, 1] * y + (m[0, 2] + (width - 1) / 2), width)
    rows, down = _taps(m[1, 0] * x + m[1, 1] * y + (m[1, 2] + (height - 1) / 2), height)
    result = np.zeros((len(image), height * width), np.float32)
    for row, weight in zip(rows * width, down, strict=True):
        four = row + columns
        for channel, pixels in zip(result, image.flatten(1).numpy(), strict=True):
            channel += weight * np.einsum("kn,kn->n", pixels[four], across)
    return torch.from_numpy(result).reshape(image.shape)


def _taps(place: Any, length: int) -> tuple[Any, Any]:
    """The four pixels about each place on a line, and their weights, float32: (4, N) each."""
    first = np.floor(place).astype(np.int64).ravel()
    t = (place.ravel() - first).astype(np.float32)
    weights = np.stack(
        [
            ((2 - t) * t - 1) * t / 2,
            (t * t * (3 * t - 5) + 2) / 2,
            ((4 - 3 * t) * t + 1) * t / 2,
            (t - 1) * t * t / 2,
        ]
    )
    # By a table, since remainders of whole numbers are slow.
    low = int(first.min()) - 1
    table = mirrored(torch.arange(low, int(first.max()) + 3), length).numpy()
    return table[first - low + np.arange(-1, 3)[:, None]], weights
