"""A second pass over a finished sample: enlarged, noised to a level of choice, denoised again."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from k_diffusion.sampling.noise import ENHANCED, unit_noise
from k_diffusion.sampling.start import Start
from k_diffusion.utils.maths import fold_seed, is_number


@dataclass(frozen=True)
class Enhance:
    """How a sample is made larger and finer by the model itself, if it takes other sizes.

    A network draws large images badly at once, for it has learnt small ones; it can, though, add
    detail to a large one that has its layout already.

    Attributes:
        scale: factor of height and width; 1 only draws the details anew.
        strength: share of the steps that the second pass walks; see `KSampler.sample`.
        steps: of which that is the share; None: as many as the first pass is laid with.
        multiple: sizes are rounded to multiples of it.
        condition: what the model is told in the second pass; None: the same as in the first.
    """

    scale: float = 2.0
    strength: float = 0.5
    steps: int | None = None
    multiple: int = 1
    condition: Any = None

    def __post_init__(self) -> None:
        if not is_number(self.scale) or not 1 <= self.scale <= 64:
            raise ValueError(f"enhance's scale must lie in [1, 64], got {self.scale!r}")
        if not is_number(self.strength) or not 0 <= self.strength <= 1:
            raise ValueError(f"enhance's strength must lie in [0, 1], got {self.strength!r}")
        for name, value in (("steps", self.steps), ("multiple", self.multiple)):
            if value is None and name == "steps":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(
                    f"enhance's {name} must be a whole number of at least 1, got {value!r}"
                )

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Of the second pass."""
        large = [
            max(1, round(side * self.scale / self.multiple)) * self.multiple
            for side in (height, width)
        ]
        return large[0], large[1]

    def start(self, start: Start, x: Tensor) -> Start:
        """The start of the second pass, from the result of the first, shape (B, C, H, W).

        Its noise, and that of its solver, are other than the first pass's of the same seeds.

        Raises:
            ValueError: no images.
        """
        if x.ndim != 4:
            raise ValueError(f"enhance takes images, (B, C, H, W), not samples of {tuple(x.shape)}")
        size = self.size(*x.shape[2:])
        large = x if size == x.shape[2:] else F.interpolate(x, size, mode="bicubic")
        mask = start.mask
        if mask is not None:
            mask = mask.expand(*mask.shape[:2], *x.shape[2:])
            mask = F.interpolate(mask, size, mode="nearest-exact")
        noise = unit_noise(large.shape[1:], start.seeds, x.device, stream=ENHANCED)
        return replace(
            start,
            noise=noise.to(start.noise.dtype),
            seeds=[fold_seed(seed, ENHANCED) for seed in start.seeds],
            init=large,
            mask=mask,
            strength=float(self.strength),
        )


def make_enhance(enhance: Any) -> Enhance:
    """An Enhance; True is the usual one, a number its scale.

    Raises:
        TypeError: none of these.
    """
    if isinstance(enhance, Enhance):
        return enhance
    if enhance is True:
        return Enhance()
    if is_number(enhance):
        return Enhance(scale=float(enhance))
    raise TypeError(
        f"enhance must be an Enhance, or the factor of height and width, got "
        f"{type(enhance).__name__}"
    )
